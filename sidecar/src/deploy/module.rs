//! The module that is deployed: built if asked for, read, known by its hash, and described by the server's own binary.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::config::ModuleConfig;
use crate::database::control::HostType;
use crate::database::description::Description;
use crate::deploy::DeployError;
use crate::ids::ContentHash;
use crate::standalone::command::Binary;

const TARGET: &str = "wasm32-unknown-unknown";
/// What is quoted of a build that failed.
const QUOTED_LINES: usize = 15;

/// A compiled module.
#[derive(Debug, Clone)]
pub struct Module {
    pub path: PathBuf,
    pub bytes: Vec<u8>,
    /// As the server computes it.
    pub hash: ContentHash,
}

/// The hash that the server knows a program by.
pub fn program_hash(bytes: &[u8]) -> ContentHash {
    ContentHash(spacetimedb_sats::hash::hash_bytes(bytes).data)
}

impl Module {
    /// Builds the module if the configuration says so, and reads it.
    ///
    /// # Errors
    /// When it does not compile, or is not there, or is neither WebAssembly nor JavaScript.
    pub fn prepare(config: &ModuleConfig) -> Result<Self, DeployError> {
        let built = match config.build_module {
            true => Some(build(config)?),
            false => None,
        };
        match config.module_path.clone().or(built) {
            Some(path) => Self::read(&path),
            None => Err(DeployError::NoModule),
        }
    }

    /// # Errors
    /// When it is not there, or is neither WebAssembly nor JavaScript.
    pub fn read(path: &Path) -> Result<Self, DeployError> {
        let refuse = |reason: String| DeployError::Module { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
        let is_script =
            path.extension().is_some_and(|extension| ["js", "mjs", "cjs"].iter().any(|js| extension == *js));
        if HostType::of(&bytes) == HostType::Js && !(is_script && std::str::from_utf8(&bytes).is_ok()) {
            let reason = "it is neither WebAssembly nor a bundle of JavaScript; give the .wasm file that cargo has built, or \
                          the bundle.js of `spacetime build`";
            return Err(refuse(reason.into()));
        }
        Ok(Self { path: path.to_owned(), hash: program_hash(&bytes), bytes })
    }

    pub fn host_type(&self) -> HostType {
        HostType::of(&self.bytes)
    }

    /// What the module declares, as the server's binary reads it.
    ///
    /// # Errors
    /// When the binary does not read it: it would not run it either.
    pub fn describe(&self, binary: &Binary) -> Result<Description, DeployError> {
        let refuse = |reason: String| DeployError::Module { path: self.path.clone(), reason };
        // Its ending is how the binary knows what it is.
        let file = tempfile::Builder::new()
            .suffix(self.host_type().suffix())
            .tempfile()
            .map_err(|error| refuse(error.to_string()))?;
        std::fs::write(file.path(), &self.bytes).map_err(|error| refuse(error.to_string()))?;
        let mut command = Command::new(&binary.path);
        let output = command.arg("extract-schema").arg(file.path()).stdin(Stdio::null()).output();
        let output = output.map_err(|error| refuse(format!("{}: {error}", binary.path.display())))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(refuse(format!("the server does not read it: {}", last_lines(&said, 3))));
        }
        Description::parse(&output.stdout).map_err(refuse)
    }
}

/// One line of `cargo build --message-format=json`.
#[derive(Deserialize)]
struct Message {
    reason: String,
    #[serde(default)]
    filenames: Vec<PathBuf>,
}

/// Compiles; returns where the module is.
fn build(config: &ModuleConfig) -> Result<PathBuf, DeployError> {
    let dir = config.module_dir.as_deref().ok_or(DeployError::NoModuleDir)?;
    let failed = |reason: String| DeployError::Build { dir: dir.to_owned(), reason };
    if !dir.join("Cargo.toml").is_file() {
        let reason = "it has no Cargo.toml, and only Rust modules are built here; run `spacetime build` there, and give the \
                      file that it makes with --module-path and --no-build";
        return Err(failed(reason.into()));
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--release", "--target", TARGET, "--message-format=json-render-diagnostics"]);
    let output = command.current_dir(dir).stdin(Stdio::null()).output().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = last_lines(&String::from_utf8_lossy(&output.stderr), QUOTED_LINES);
        let hint = if said.contains("can't find crate for `core`") || said.contains("target may not be installed") {
            "; run `rustup target add wasm32-unknown-unknown`"
        } else {
            ""
        };
        return Err(failed(format!("{said}{hint}")));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok());
    let artifacts = messages.filter(|message| message.reason == "compiler-artifact");
    let is_wasm = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "wasm");
    // The package itself comes last, behind what it depends on.
    let found = artifacts.flat_map(|message| message.filenames).rfind(is_wasm);
    found.ok_or_else(|| failed("it made no .wasm file; is `crate-type = [\"cdylib\"]` set?".into()))
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
