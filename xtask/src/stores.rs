//! The S3 servers that tests run against, installed once into the cache.

use std::path::PathBuf;
use std::process::Command;

use crate::debian;
use crate::run::{Result, announce, cache, cargo, on_path, run};

const MOTO: &str = "5.2.5";
const S3S: &str = "0.14.1";
const GARAGE: &str = "2.5.0";
const RUSTIC: &str = "0.11.4";

/// Honours conditional writes. Needs Python; `None` where there is none.
pub fn moto() -> Result<Option<PathBuf>> {
    from_pypi("moto", "moto[server]", MOTO, "moto_server")
}

/// The program `binary` of a Python package, in an environment of its own.
pub fn from_pypi(name: &str, package: &str, version: &str, binary: &str) -> Result<Option<PathBuf>> {
    environment(name, version, &[&format!("{package}=={version}")], binary)
}

/// The program `binary` of some Python packages, in an environment of their own.
pub fn environment(name: &str, version: &str, packages: &[&str], binary: &str) -> Result<Option<PathBuf>> {
    let venv = cache()?.join(format!("tools/{name}-{version}"));
    let found = venv.join("bin").join(binary);
    if found.is_file() && venv.join("ready").is_file() {
        return Ok(Some(found));
    }
    let has_python = Command::new("python3").args(["-c", "import venv, ensurepip"]).output();
    if !has_python.is_ok_and(|output| output.status.success()) {
        eprintln!("xtask: no python3 with venv here; what needs {name} is skipped");
        return Ok(None);
    }
    announce(&format!("installing {name} {version}"), "once, half a minute", || {
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
        let mut pip = Command::new(venv.join("bin/pip"));
        run(pip.args(["install", "--quiet", "--disable-pip-version-check"]).args(packages))?;
        std::fs::write(venv.join("ready"), "").map_err(|error| error.to_string())
    })?;
    Ok(Some(found))
}

/// Checks signatures and checksums.
pub fn s3s() -> Result<PathBuf> {
    let install = ["s3s-fs", "--version", S3S, "--features", "binary"];
    installed("s3s-fs", S3S, &install, "once, three minutes")
}

/// Ignores conditional writes without a word.
pub fn garage() -> Result<PathBuf> {
    let features = "sqlite,bundled-libs,lmdb";
    let install = ["garage", "--version", GARAGE, "--no-default-features", "--features", features];
    installed("garage", GARAGE, &install, "once, eight minutes")
}

/// A peer of the benchmark, built as its users have it.
pub fn rustic() -> Result<PathBuf> {
    let install = ["rustic-rs", "--version", RUSTIC, "--no-default-features"];
    built("rustic", RUSTIC, &install, "once, ten minutes", |_| {})
}

/// A tool from crates.io for tests, built into the cache.
pub fn installed(name: &str, version: &str, install: &[&str], how_long: &str) -> Result<PathBuf> {
    built(name, version, install, how_long, |command| {
        // Tests need it built soon, not fast.
        command.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1").env("CARGO_PROFILE_RELEASE_LTO", "off");
    })
}

fn built(
    name: &str,
    version: &str,
    install: &[&str],
    how_long: &str,
    profile: impl FnOnce(&mut Command),
) -> Result<PathBuf> {
    let root = cache()?.join(format!("tools/{name}-{version}"));
    let binary = root.join("bin").join(name);
    if !binary.is_file() {
        announce(&format!("building {name} {version}"), how_long, || {
            let target = cache()?.join(format!("build/{name}"));
            let mut command = cargo();
            profile(&mut command);
            command.args(["install", "--locked", "--quiet"]).args(install).arg("--root").arg(&root);
            run(command.arg("--target-dir").arg(&target))?;
            // Gigabytes that nobody needs again.
            let _ = std::fs::remove_dir_all(target);
            Ok(())
        })?;
    }
    Ok(binary)
}

/// What users would pick instead: restic and borg, Debian's, unpacked. `None` where this is no Debian.
pub fn peers() -> Result<Option<PathBuf>> {
    let system = cache()?.join("tools/peers");
    let root = system.join("root");
    if !root.join("usr/bin/borg").is_file() || !root.join("usr/bin/restic").is_file() {
        if on_path("apt-get").is_none() || on_path("dpkg").is_none() {
            eprintln!("xtask: no Debian here; restic and borg are left out");
            return Ok(None);
        }
        announce("unpacking Debian's restic and borg", "once, seconds", || {
            debian::unpack(&["restic", "borgbackup", "python3-msgpack", "python3-packaging"], &system)
        })?;
    }
    Ok(Some(root))
}
