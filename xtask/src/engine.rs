//! The engine of a newer SpacetimeDB, which judges what was restored.

use std::path::PathBuf;

use crate::run::{Result, announce, cargo, root, run, target};

/// Builds `tests/engine-oracle`, a workspace of its own.
pub fn build() -> Result<PathBuf> {
    let dir = target().join("engine-oracle");
    let mut command = cargo();
    command.current_dir(root().join("tests/engine-oracle"));
    // Its crates ask for a newer Rust than they need.
    command.args(["build", "--quiet", "--locked", "--ignore-rust-version", "--target-dir"]).arg(&dir);
    announce("building the engine of SpacetimeDB 2.14", "the first time some three minutes", || run(&mut command))?;
    Ok(dir.join("debug/engine-oracle"))
}
