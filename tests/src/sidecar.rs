//! Runs the real `inner-universe` binary.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use serde_json::Value;
use tempfile::TempDir;

use inner_universe::repository::address::Address;

use crate::tools;

/// What a run of the binary left.
#[derive(Debug)]
pub struct Run {
    pub code: i32,
    pub json: Value,
    pub stderr: String,
}

impl Run {
    /// The JSON result of a run that must succeed without a warning.
    pub fn ok(self) -> Value {
        assert_eq!(self.code, 0, "{}", self.stderr);
        assert!(!self.stderr.contains("WARN") && !self.stderr.contains("ERROR"), "{}", self.stderr);
        self.json
    }

    /// The message of a run that must fail with `code`: one line, and nothing that looks like a panic.
    pub fn fails_with(self, code: i32) -> String {
        assert_eq!(self.code, code, "{}", self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        let errors: Vec<_> = self.stderr.lines().filter(|line| line.starts_with("error")).collect();
        assert_eq!(errors.len(), 1, "{}", self.stderr);
        errors[0].to_owned()
    }
}

/// The binary with a repository.
#[derive(Clone)]
pub struct Sidecar {
    pub repository: String,
    binary: PathBuf,
    state: Arc<TempDir>,
    settings: Vec<(String, String)>,
    environment: Vec<(String, String)>,
}

impl Sidecar {
    /// With a repository in a directory.
    pub fn at(path: &Path) -> Self {
        Self::with(Address::directory(path).expect("a path").url())
    }

    /// With a repository at `url`.
    pub fn with(url: &str) -> Self {
        Self {
            repository: url.to_owned(),
            state: Arc::new(tempfile::tempdir().expect("a temporary directory")),
            binary: tools::inner_universe(),
            settings: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// As users run it, for what is promised of that alone.
    pub fn optimised(mut self) -> Self {
        self.binary = tools::optimised();
        self
    }

    /// With settings as variables without their prefix.
    pub fn configured(mut self, settings: Vec<(String, String)>) -> Self {
        self.settings = settings;
        self
    }

    /// With one more setting.
    pub fn and(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With variables as they are.
    pub fn with_environment(mut self, environment: Vec<(String, String)>) -> Self {
        self.environment = environment;
        self
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.env_remove("RUST_LOG").env("INNER_UNIVERSE__ARCHIVE__STATE_DIR", self.state_dir());
        // Many run at once: each takes a free port, and says in its status which.
        command.env("INNER_UNIVERSE__HTTP__LISTEN", "127.0.0.1:0");
        for (name, value) in &self.settings {
            command.env(format!("INNER_UNIVERSE__{name}"), value);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.arg("--json").arg("--repository").arg(&self.repository);
        command
    }

    /// Beside the repository, so that tests share nothing.
    pub fn state_dir(&self) -> PathBuf {
        self.state.path().to_owned()
    }

    pub fn run<I: IntoIterator<Item: AsRef<std::ffi::OsStr>>>(&self, arguments: I) -> Run {
        let output = self.command().args(arguments).output();
        let output = output.unwrap_or_else(|error| panic!("run {}: {error}", self.binary.display()));
        let stdout = String::from_utf8_lossy(&output.stdout);
        Run {
            code: output.status.code().unwrap_or(-1),
            json: serde_json::from_str(&stdout).unwrap_or(Value::Null),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// `repository init`, where no repository is. What is wrong with the store is for what follows to say.
    pub fn has_repository(&self, data_dir: &Path) {
        let is_there =
            self.repository.strip_prefix("file://").is_some_and(|dir| Path::new(dir).join("repository.json").exists());
        if !is_there && !data_dir.as_os_str().is_empty() {
            let data_dir = data_dir.as_os_str();
            self.run(["repository".as_ref(), "init".as_ref(), "--data-dir".as_ref(), data_dir]);
        }
    }

    /// `backup create`, which must succeed.
    pub fn backup(&self, data_dir: &Path) -> Value {
        self.run(["backup", "create", "--data-dir", path(data_dir)]).ok()
    }

    /// `restore --to TARGET`, which must succeed.
    pub fn restore(&self, data_dir: &Path, target: &str) -> Value {
        self.run(["restore", "--data-dir", path(data_dir), "--to", target]).ok()
    }
}

/// Paths of tests are text.
pub fn path(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
