//! Debian's packages, unpacked into the cache: nothing is installed and no root is needed.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::run::{Result, run};

/// Downloads `packages` and all that they need and this machine has not, and unpacks them below `system/root`.
pub fn unpack_whole(packages: &[&str], system: &Path) -> Result<()> {
    let debs = system.join("debs");
    let _ = fs::remove_dir_all(&debs);
    fs::create_dir_all(debs.join("partial")).map_err(|error| format!("create {}: {error}", debs.display()))?;
    let download = || {
        let cache = format!("Dir::Cache::archives={}", debs.display());
        let mut command = Command::new("apt-get");
        // Nothing is installed, so the lock of those who install is not needed.
        command.args(["--yes", "--quiet", "--quiet", "--no-install-recommends", "--option", &cache]);
        command.args(["--option", "Debug::NoLocking=true", "install", "--download-only"]);
        run(command.args(packages))
    };
    if download().is_err() {
        run(Command::new("apt-get").arg("update"))?;
        download()?;
    }
    let _ = fs::remove_dir_all(debs.join("partial"));
    extract(&debs, system)
}

/// Downloads `packages` and unpacks them below `system/root`.
pub fn unpack(packages: &[&str], system: &Path) -> Result<()> {
    let debs = system.join("debs");
    let _ = fs::remove_dir_all(&debs);
    fs::create_dir_all(&debs).map_err(|error| format!("create {}: {error}", debs.display()))?;
    let download = || run(Command::new("apt-get").arg("download").args(packages).current_dir(&debs));
    if download().is_err() {
        // The package lists may be missing or old; refreshing them needs root.
        run(Command::new("apt-get").arg("update"))?;
        download()?;
    }
    extract(&debs, system)
}

fn extract(debs: &Path, system: &Path) -> Result<()> {
    for entry in fs::read_dir(debs).map_err(|error| error.to_string())? {
        let deb = entry.map_err(|error| error.to_string())?.path();
        if deb.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg").arg("-x").arg(deb).arg(system.join("root")))?;
        }
    }
    fs::remove_dir_all(debs).map_err(|error| format!("remove {}: {error}", debs.display()))
}
