//! What users would pick instead, each as its documentation says, with the compression that it offers.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A tool that copies a data directory, and back.
pub struct Peer {
    pub name: &'static str,
    /// How it was called, for the report.
    pub version: String,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Tar,
    Copy,
    Restic(PathBuf),
    Rustic(PathBuf),
    Borg(PathBuf),
}

impl Peer {
    /// All that are here: those that `cargo xtask bench` has installed, and what every machine has.
    pub fn all() -> Vec<Self> {
        let mut peers = vec![
            Self { name: "tar \\| zstd -3 -T2", version: version("zstd", &["--version"]), kind: Kind::Tar },
            Self { name: "cp -r, server stopped", version: version("cp", &["--version"]), kind: Kind::Copy },
        ];
        if let Some(root) = std::env::var_os("INNER_UNIVERSE_PEERS").map(PathBuf::from) {
            let restic = root.join("usr/bin/restic");
            peers.push(Self {
                name: "restic",
                version: version_of(Command::new(&restic).arg("version")),
                kind: Kind::Restic(restic),
            });
            peers.push(Self {
                name: "borg, zstd,3",
                version: version_of(borg(&root).arg("--version")),
                kind: Kind::Borg(root),
            });
        }
        if let Some(rustic) = std::env::var_os("INNER_UNIVERSE_RUSTIC").map(PathBuf::from) {
            let version = version_of(Command::new(&rustic).arg("--version"));
            peers.push(Self { name: "rustic", version, kind: Kind::Rustic(rustic) });
        }
        peers
    }

    /// What the project has set itself against it.
    pub fn wanted(&self, work: &str) -> Option<f64> {
        match (&self.kind, work) {
            (Kind::Tar, _) => Some(1.0),
            (Kind::Restic(_), _) | (Kind::Borg(_), "backup") => Some(2.0),
            _ => None,
        }
    }

    pub fn is_incremental(&self) -> bool {
        matches!(self.kind, Kind::Restic(_) | Kind::Rustic(_) | Kind::Borg(_))
    }

    pub fn file_name(&self) -> String {
        self.name.split([' ', ',']).next().unwrap_or_default().to_owned()
    }

    /// Reads everything back, where it can.
    pub fn check(&self, repository: &Path) -> Option<Command> {
        match &self.kind {
            Kind::Tar | Kind::Copy => None,
            Kind::Restic(restic) => {
                let mut command = restic_on(restic, repository);
                command.args(["check", "--quiet", "--read-data"]);
                Some(command)
            }
            Kind::Rustic(rustic) => {
                let mut command = rustic_on(rustic, repository);
                command.args(["check", "--read-data"]);
                Some(command)
            }
            Kind::Borg(root) => {
                let mut command = borg(root);
                command.args(["check", "--verify-data"]).arg(repository);
                Some(command)
            }
        }
    }

    /// Makes what it writes into.
    pub fn init(&self, repository: &Path) {
        let mut command = match &self.kind {
            Kind::Tar | Kind::Copy => return,
            Kind::Restic(restic) => {
                let mut command = restic_on(restic, repository);
                command.args(["init", "--quiet", "--repository-version", "2"]);
                command
            }
            Kind::Rustic(rustic) => {
                let mut command = rustic_on(rustic, repository);
                command.arg("init");
                command
            }
            Kind::Borg(root) => {
                let mut command = borg(root);
                command.args(["init", "--encryption", "none"]).arg(repository);
                command
            }
        };
        assert!(command.status().expect("start").success(), "{command:?}");
    }

    pub fn backup(&self, data: &Path, repository: &Path, number: usize) -> Command {
        match &self.kind {
            Kind::Tar => {
                shell(&format!("tar -C '{}' -cf - . | zstd -q -3 -T2 -f -o '{}'", data.display(), repository.display()))
            }
            Kind::Copy => shell(&format!("rm -rf '{1}' && cp -r '{0}' '{1}'", data.display(), repository.display())),
            Kind::Restic(restic) => {
                let mut command = restic_on(restic, repository);
                command.args(["backup", "--quiet", "."]).current_dir(data);
                command
            }
            Kind::Rustic(rustic) => {
                let mut command = rustic_on(rustic, repository);
                command.args(["backup", "."]).current_dir(data);
                command
            }
            Kind::Borg(root) => {
                let mut command = borg(root);
                command.args(["create", "--compression", "zstd,3"]);
                command.arg(format!("{}::{number}", repository.display())).arg(".").current_dir(data);
                command
            }
        }
    }

    /// Restores backup `number` into an empty directory.
    pub fn restore(&self, repository: &Path, to: &Path, number: usize) -> Command {
        match &self.kind {
            Kind::Tar => shell(&format!("zstd -q -d -c '{}' | tar -C '{}' -xf -", repository.display(), to.display())),
            Kind::Copy => shell(&format!("cp -r '{}/.' '{}'", repository.display(), to.display())),
            Kind::Restic(restic) => {
                let mut command = restic_on(restic, repository);
                command.args(["restore", "--quiet", "latest", "--target"]).arg(to);
                command
            }
            Kind::Rustic(rustic) => {
                let mut command = rustic_on(rustic, repository);
                command.args(["restore", "latest"]).arg(to);
                command
            }
            Kind::Borg(root) => {
                let mut command = borg(root);
                command.arg("extract").arg(format!("{}::{number}", repository.display())).current_dir(to);
                command
            }
        }
    }
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

fn restic_on(restic: &Path, repository: &Path) -> Command {
    let mut command = Command::new(restic);
    // No cache of the user's: a repository on this disk needs none.
    command.arg("--repo").arg(repository).arg("--no-cache").env("RESTIC_PASSWORD", "benchmark");
    command
}

fn rustic_on(rustic: &Path, repository: &Path) -> Command {
    let mut command = Command::new(rustic);
    command.arg("--repository").arg(repository).args(["--no-cache", "--no-progress", "--log-level", "warn"]);
    command.env("RUSTIC_PASSWORD", "benchmark");
    command
}

/// Debian's, unpacked.
fn borg(root: &Path) -> Command {
    let mut command = Command::new("/usr/bin/python3");
    command.arg(root.join("usr/bin/borg")).env("PYTHONPATH", root.join("usr/lib/python3/dist-packages"));
    command.env("BORG_BASE_DIR", root.join("borg")).env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
    command.env("BORG_RELOCATED_REPO_ACCESS_IS_OK", "yes");
    command
}

fn version(program: &str, arguments: &[&str]) -> String {
    version_of(Command::new(program).args(arguments))
}

pub(super) fn version_of(command: &mut Command) -> String {
    let output =
        command.output().map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    output.lines().next().unwrap_or("not here").trim_matches(['*', ' ']).to_owned()
}
