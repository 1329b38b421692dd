//! Finds a SpacetimeDB server, or builds the one that the registry carries.

use std::path::PathBuf;

use crate::run::{Result, announce, cache, cargo, on_path, run};

/// The newest standalone server on crates.io that builds without further downloads.
pub const VERSION: &str = "1.2.0";

/// The server binary that everything runs against.
pub fn find_or_build() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SPACETIMEDB_STANDALONE").filter(|value| !value.is_empty()).map(PathBuf::from)
    {
        if path.is_file() {
            return Ok(path);
        }
        return Err(format!("SPACETIMEDB_STANDALONE names {}, which is no file", path.display()));
    }
    if let Some(path) = on_path("spacetimedb-standalone") {
        return Ok(path);
    }
    let installed = std::env::var_os("HOME")
        .map(|home| PathBuf::from(home).join(".local/share/spacetime/bin/current/spacetimedb-standalone"));
    if let Some(path) = installed.filter(|path| path.is_file()) {
        return Ok(path);
    }
    tool("spacetimedb-standalone", "once, 10 to 17 minutes on two cores")
}

/// The command line that generates bindings, and the server that it calls; only `bindings` needs them.
pub fn cli() -> Result<PathBuf> {
    tool("spacetimedb-standalone", "once, 10 to 17 minutes on two cores")?;
    tool("spacetimedb-cli", "once, about 10 minutes on two cores")
}

fn tool(name: &str, how_long: &str) -> Result<PathBuf> {
    // One folder for both, since the command line looks for the server beside itself.
    let root = cache()?.join(format!("tools/spacetimedb-{VERSION}"));
    let binary = root.join("bin").join(name);
    if binary.is_file() {
        return Ok(binary);
    }
    announce(&format!("building {name} {VERSION} into {}", root.display()), how_long, || {
        let mut install = cargo();
        install.current_dir(cache_dir()?);
        install.args(["install", "--locked", &format!("{name}@{VERSION}"), "--root"]).arg(&root);
        // The checkout's own settings are not for a tool.
        install.arg("--target-dir").arg(cache()?.join("build")).env_remove("CARGO_TARGET_DIR");
        run(&mut install)
    })?;
    Ok(binary)
}

fn cache_dir() -> Result<PathBuf> {
    let cache = cache()?;
    std::fs::create_dir_all(&cache).map_err(|error| format!("create {}: {error}", cache.display()))?;
    Ok(cache)
}
