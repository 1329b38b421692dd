//! Debian's packages, unpacked into the cache: nothing is installed and no root is needed.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::run::{Result, run};

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
    for entry in fs::read_dir(&debs).map_err(|error| error.to_string())? {
        let deb = entry.map_err(|error| error.to_string())?.path();
        run(Command::new("dpkg").arg("-x").arg(deb).arg(system.join("root")))?;
    }
    fs::remove_dir_all(&debs).map_err(|error| format!("remove {}: {error}", debs.display()))
}
