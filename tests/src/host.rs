//! A machine of its own for a deployment: network, processes and mounts apart from everything else on this one. Runs what the runbooks
//! say, with the stand-in as `docker`. With `INNER_UNIVERSE_DOCKER=1` it is this machine and its Docker engine, one deployment at a time.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// The first process of the machine; what ends is taken away by it.
const INIT: &str = "ip link set lo up; echo up; while :; do sleep 0.2; done";

/// A Docker engine has one project of the name that compose.yaml gives, and its ports.
static ENGINE: Mutex<()> = Mutex::new(());

enum Kind {
    Apart { init: Child, pid: u32 },
    Docker { _alone: MutexGuard<'static, ()> },
}

pub struct Host {
    kind: Kind,
    /// The checkout as an operator has it: compose.yaml and what it mounts.
    pub dir: PathBuf,
    scratch: tempfile::TempDir,
}

impl Host {
    /// A machine with a checkout. `None` where this one may not make namespaces.
    ///
    /// # Panics
    /// Under CI, where it must be able to.
    pub fn new(docker: &Path) -> Option<Self> {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let dir = scratch.path().join("inner-universe");
        if Self::is_docker() {
            return Some(Self::docker(scratch, dir));
        }
        copy_checkout(&dir);
        let programs = scratch.path().join("bin");
        std::fs::create_dir(&programs).expect("a directory for programs");
        std::os::unix::fs::symlink(docker, programs.join("docker")).expect("the stand-in");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", INIT]);
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut init = spawned.expect("unshare of util-linux");
        let mut line = String::new();
        let stdout = init.stdout.as_mut().expect("its output");
        let _ = std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line);
        if line.trim() != "up" {
            let mut why = String::new();
            let _ = std::io::Read::read_to_string(init.stderr.as_mut().expect("its errors"), &mut why);
            let _ = init.wait();
            assert!(std::env::var_os("CI").is_none(), "no namespaces: {why}");
            eprintln!("skipped: the processes of compose.yaml need namespaces, which root may make: {why}");
            return None;
        }
        let pid = child_of(init.id()).expect("the first process");
        Some(Self { kind: Kind::Apart { init, pid }, dir, scratch })
    }

    /// Whether it is this machine's Docker engine.
    pub fn is_docker() -> bool {
        std::env::var_os("INNER_UNIVERSE_DOCKER").is_some()
    }

    /// This machine, with a whole checkout, since images are built from it, and the engine's volumes where tests look for them.
    fn docker(scratch: tempfile::TempDir, dir: PathBuf) -> Self {
        let alone = ENGINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let cloned = Command::new("git").args(["clone", "--quiet"]).arg(root).arg(&dir).status();
        assert!(cloned.is_ok_and(|status| status.success()), "clone the checkout");
        std::fs::create_dir(dir.join(".volumes")).expect("a directory");
        for volume in ["server", "state", "scratch", "bucket"] {
            let place = format!("/var/lib/docker/volumes/inner-universe_{volume}/_data");
            std::os::unix::fs::symlink(place, dir.join(".volumes").join(volume)).expect("a link");
        }
        Self { kind: Kind::Docker { _alone: alone }, dir, scratch }
    }

    /// Runs a shell script in the checkout, up to its first command that fails.
    pub fn shell(&self, script: &str) -> Output {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = match &self.kind {
            Kind::Apart { pid, .. } => {
                let mut command = Command::new("nsenter");
                command.args(["--target", &pid.to_string(), "--mount", "--net", "--pid", "--wd=.", "bash"]);
                command.env("PATH", format!("{}:{path}", self.scratch.path().join("bin").display()));
                command
            }
            Kind::Docker { .. } => Command::new("bash"),
        };
        command.args(["-euo", "pipefail", "-c", script]);
        command.current_dir(&self.dir).stdin(Stdio::null());
        // What observes has no stand-in.
        command.env("COMPOSE_PROFILES", "core").env("OTLP_ENDPOINT", "");
        // What the operator's shell would not have.
        for name in ["RUST_BACKTRACE", "RUST_LOG", "CARGO", "CARGO_MANIFEST_DIR"] {
            command.env_remove(name);
        }
        command.output().expect("nsenter of util-linux")
    }

    /// Runs a script that must succeed; returns what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub fn ok(&self, script: &str) -> String {
        let output = self.shell(script);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{script}\n{out}\n{err}");
        out.into_owned()
    }

    /// Tries a script until it succeeds.
    ///
    /// # Panics
    /// When it has not for a minute.
    pub fn until(&self, script: &str) -> String {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let output = self.shell(script);
            if output.status.success() {
                return String::from_utf8_lossy(&output.stdout).into_owned();
            }
            assert!(Instant::now() < end, "{script}: {}", String::from_utf8_lossy(&output.stderr));
            std::thread::sleep(Duration::from_millis(300));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        match &mut self.kind {
            // With its first process the machine's others end too.
            Kind::Apart { init, .. } => {
                let _ = init.kill();
                let _ = init.wait();
            }
            Kind::Docker { .. } => {
                let down = ["compose", "down", "--volumes", "--timeout", "1"];
                let _ = Command::new("docker").args(down).current_dir(&self.dir).env("AGE_RECIPIENT", "-").status();
            }
        }
        if std::thread::panicking() {
            for service in ["sidecar", "spacetimedb", "s3"] {
                let log = std::fs::read_to_string(self.dir.join(".containers").join(service).join("log"));
                let log = log.unwrap_or_default();
                let last: Vec<_> = log.lines().rev().take(25).collect();
                eprintln!("--- {service}\n{}", last.into_iter().rev().collect::<Vec<_>>().join("\n"));
            }
        }
    }
}

fn child_of(parent: u32) -> Option<u32> {
    let stat = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
    let pids = std::fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_child = |pid: &u32| {
        // After the name, which may hold anything: state and parent.
        let after = stat(*pid).and_then(|stat| Some(stat.rsplit_once(')')?.1.to_owned()));
        after.and_then(|rest| rest.split_whitespace().nth(1)?.parse::<u32>().ok()) == Some(parent)
    };
    pids.into_iter().find(is_child)
}

/// What an operator checks out, as far as the deployment reads it.
fn copy_checkout(dir: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for file in ["compose.yaml", ".env.example", "Dockerfile"] {
        std::fs::create_dir_all(dir).expect("the checkout");
        std::fs::copy(root.join(file), dir.join(file)).unwrap_or_else(|error| panic!("copy {file}: {error}"));
    }
    let copied = Command::new("cp").arg("-r").arg(root.join("dashboards")).arg(dir.join("dashboards")).status();
    assert!(copied.is_ok_and(|status| status.success()), "copy the dashboards");
}
