//! Runs every fuzz target; needs the nightly compiler, and installs cargo-fuzz into the cache.

use std::process::Command;

use crate::run::{Result, announce, cache, cargo, root, run};

pub fn fuzz(arguments: &[String]) -> Result<()> {
    let seconds = match arguments.first() {
        Some(text) => text.parse::<u32>().map_err(|_| format!("`{text}` is no number of seconds"))?,
        None => 600,
    };
    let tools = cache()?.join("tools/cargo-fuzz");
    let binary = tools.join("bin/cargo-fuzz");
    if !binary.is_file() {
        announce("installing cargo-fuzz", "once, two minutes", || {
            run(cargo().args(["install", "--locked", "cargo-fuzz", "--root"]).arg(&tools))
        })?;
    }
    for target in targets()? {
        announce(&format!("fuzzing {target}"), &format!("{seconds} s"), || {
            let mut command = Command::new(&binary);
            command.current_dir(root().join("tests/fuzz")).env("RUSTUP_TOOLCHAIN", "nightly").args(["fuzz", "run"]);
            command.args(["--fuzz-dir", ".", "--target-dir"]).arg(cache()?.join("fuzz-target"));
            run(command.arg(&target).args(["--", "-rss_limit_mb=4096", &format!("-max_total_time={seconds}")]))
        })?;
    }
    Ok(())
}

fn targets() -> Result<Vec<String>> {
    let dir = root().join("tests/fuzz/fuzz_targets");
    let entries = std::fs::read_dir(&dir).map_err(|error| format!("list {}: {error}", dir.display()))?;
    let name = |entry: std::fs::DirEntry| Some(entry.path().file_stem()?.to_str()?.to_owned());
    let mut targets: Vec<String> = entries.flatten().filter_map(name).collect();
    targets.sort();
    Ok(targets)
}
