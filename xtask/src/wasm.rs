//! Builds the modules for wasm32: with rustup's target where that can be had, else with Debian's packages of the same
//! standard library, unpacked into the cache without touching the system.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian;
use crate::run::{Result, announce, cache, cargo, root, run, target, try_output};

const TARGET: &str = "wasm32-unknown-unknown";
/// What Debian splits the compiler, its standard library's source and the linker into.
const PACKAGES: [&str; 7] =
    ["rustc-web", "libstd-rust-web-1.96", "libstd-rust-web-dev", "rust-web-src", "lld-19", "libllvm19", "libllvm22"];

enum Toolchain {
    Rustup,
    Debian(PathBuf),
}

impl Toolchain {
    /// What a build for wasm32 needs in its environment.
    fn environment(&self) -> Vec<(String, String)> {
        let Self::Debian(system) = self else { return Vec::new() };
        let at = |path: &str| system.join(path).display().to_string();
        let linker = format!("CARGO_TARGET_{}_LINKER", TARGET.to_uppercase().replace('-', "_"));
        vec![
            ("CARGO_UNSTABLE_BUILD_STD".into(), "std,panic_abort".into()),
            ("RUSTC".into(), at("usr/bin/rustc")),
            // The stable compiler may use unstable options then; only to build the standard library from Debian's source.
            ("RUSTC_BOOTSTRAP".into(), "1".into()),
            ("LD_LIBRARY_PATH".into(), at("usr/lib/x86_64-linux-gnu")),
            (linker, at("usr/lib/llvm-19/bin/wasm-ld")),
        ]
    }
}

/// What a build for wasm32 needs in its environment, a line each, for tests that build a module.
pub fn environment() -> Result<String> {
    let lines: Vec<_> = toolchain()?.environment().iter().map(|(name, value)| format!("{name}={value}")).collect();
    Ok(lines.join("\n"))
}

/// Builds every module; returns the directory that holds them.
pub fn build_all() -> Result<PathBuf> {
    let out = target().join("wasm");
    fs::create_dir_all(&out).map_err(|error| format!("create {}: {error}", out.display()))?;
    let toolchain = toolchain()?;
    let modules = [
        ("module", "inner_universe_module"),
        ("tests/next-module", "inner_universe_module_next"),
        ("tests/more-module", "inner_universe_module_more"),
        ("tests/broken-module", "inner_universe_module_broken"),
        ("tests/workload-module", "workload_module"),
        ("tests/workload-module/v2", "workload_module_v2"),
    ];
    announce("building the modules for wasm32", "a minute the first time", || {
        for (dir, name) in modules {
            let built = build(&toolchain, &root().join(dir), name)?;
            let to = out.join(format!("{name}.wasm"));
            fs::copy(&built, &to).map_err(|error| format!("copy {}: {error}", built.display()))?;
        }
        Ok(())
    })?;
    Ok(out)
}

fn build(toolchain: &Toolchain, dir: &Path, name: &str) -> Result<PathBuf> {
    let target_dir = cache()?.join("wasm-target");
    let mut command = cargo();
    command.current_dir(dir).args(["build", "--quiet", "--locked", "--release", "--target", TARGET]);
    command.env("CARGO_TARGET_DIR", &target_dir);
    command.envs(toolchain.environment());
    run(&mut command)?;
    Ok(target_dir.join(TARGET).join("release").join(format!("{name}.wasm")))
}

fn toolchain() -> Result<Toolchain> {
    let installed = |output: String| output.lines().any(|line| line == TARGET);
    if try_output(Command::new("rustup").args(["target", "list", "--installed"]).current_dir(root()))
        .is_some_and(installed)
    {
        return Ok(Toolchain::Rustup);
    }
    let system = cache()?.join("debian-wasm");
    let ready = system.join("ready");
    if ready.is_file() {
        return Ok(Toolchain::Debian(system.join("root")));
    }
    let added = announce("adding the wasm32 target with rustup", "seconds", || {
        run(Command::new("rustup").args(["target", "add", TARGET]).current_dir(root()))
    });
    if added.is_ok() {
        return Ok(Toolchain::Rustup);
    }
    announce("rustup has no wasm32 target here; unpacking Debian's packages of it", "once, a minute, 170 MB", || {
        debian::unpack(&PACKAGES, &system)?;
        fs::write(&ready, "").map_err(|error| format!("write {}: {error}", ready.display()))
    })?;
    Ok(Toolchain::Debian(system.join("root")))
}
