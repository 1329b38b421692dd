//! What users would pick to bring a data directory to an S3 server, each with its own means.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bench::peers::version_of;
use crate::s3::{ACCESS_KEY, BUCKET, S3, SECRET_KEY};

/// A tool that speaks S3.
pub struct Remote {
    pub name: &'static str,
    pub version: String,
    kind: Kind,
}

enum Kind {
    Rclone(PathBuf),
    S5cmd(PathBuf),
    Restic(PathBuf),
}

impl Remote {
    /// Those that `cargo xtask bench` has installed.
    pub fn all() -> Vec<Self> {
        let mut remotes = Vec::new();
        if let Some(bin) = std::env::var_os("INNER_UNIVERSE_TRANSFER").map(PathBuf::from) {
            let (rclone, s5cmd) = (bin.join("rclone"), bin.join("s5cmd"));
            let version = version_of(Command::new(&rclone).arg("version"));
            remotes.push(Self { name: "rclone, raw", version, kind: Kind::Rclone(rclone) });
            let version = version_of(Command::new(&s5cmd).arg("version"));
            remotes.push(Self { name: "s5cmd, raw", version, kind: Kind::S5cmd(s5cmd) });
        }
        if let Some(root) = std::env::var_os("INNER_UNIVERSE_PEERS").map(PathBuf::from) {
            let restic = root.join("usr/bin/restic");
            let version = version_of(Command::new(&restic).arg("version"));
            remotes.push(Self { name: "restic to S3", version, kind: Kind::Restic(restic) });
        }
        remotes
    }

    pub fn init(&self, server: &S3) {
        if let Kind::Restic(restic) = &self.kind {
            let mut command = restic_on(restic, server);
            command.args(["init", "--quiet", "--repository-version", "2"]);
            assert!(command.status().expect("start").success(), "{command:?}");
        }
    }

    pub fn backup(&self, data: &Path, server: &S3) -> Command {
        match &self.kind {
            Kind::Rclone(rclone) => {
                let mut command = rclone_on(rclone, server);
                command.args(["copy", "--quiet"]).arg(data).arg(format!("store:{BUCKET}/rclone"));
                command
            }
            Kind::S5cmd(s5cmd) => {
                let mut command = s5cmd_on(s5cmd, server);
                command.arg("cp").arg(format!("{}/*", data.display())).arg(format!("s3://{BUCKET}/s5cmd/"));
                command
            }
            Kind::Restic(restic) => {
                let mut command = restic_on(restic, server);
                command.args(["backup", "--quiet", "."]).current_dir(data);
                command
            }
        }
    }

    pub fn restore(&self, server: &S3, to: &Path) -> Command {
        match &self.kind {
            Kind::Rclone(rclone) => {
                let mut command = rclone_on(rclone, server);
                command.args(["copy", "--quiet"]).arg(format!("store:{BUCKET}/rclone")).arg(to);
                command
            }
            Kind::S5cmd(s5cmd) => {
                let mut command = s5cmd_on(s5cmd, server);
                command.arg("cp").arg(format!("s3://{BUCKET}/s5cmd/*")).arg(format!("{}/", to.display()));
                command
            }
            Kind::Restic(restic) => {
                let mut command = restic_on(restic, server);
                command.args(["restore", "--quiet", "latest", "--target"]).arg(to);
                command
            }
        }
    }
}

fn rclone_on(rclone: &Path, server: &S3) -> Command {
    let mut command = Command::new(rclone);
    command.arg("--config").arg("/dev/null");
    for (name, value) in [
        ("TYPE", "s3"),
        ("PROVIDER", "Other"),
        ("ACCESS_KEY_ID", ACCESS_KEY),
        ("SECRET_ACCESS_KEY", SECRET_KEY),
        ("REGION", "us-east-1"),
        ("ENDPOINT", &server.endpoint),
    ] {
        command.env(format!("RCLONE_CONFIG_STORE_{name}"), value);
    }
    command
}

fn with_keys(command: &mut Command) {
    command.env("AWS_ACCESS_KEY_ID", ACCESS_KEY).env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
    command.env("AWS_REGION", "us-east-1").env("AWS_EC2_METADATA_DISABLED", "true");
}

fn s5cmd_on(s5cmd: &Path, server: &S3) -> Command {
    let mut command = Command::new(s5cmd);
    command.args(["--endpoint-url", &server.endpoint, "--log", "error"]);
    with_keys(&mut command);
    command
}

fn restic_on(restic: &Path, server: &S3) -> Command {
    let mut command = Command::new(restic);
    command.arg("--repo").arg(format!("s3:{}/{BUCKET}/restic", server.endpoint)).arg("--no-cache");
    command.env("RESTIC_PASSWORD", "benchmark");
    with_keys(&mut command);
    command
}
