//! `inner-universe run` as a process, ended by its own process id.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use inner_universe::daemon::state::DaemonStatus;
use inner_universe::ids::Offset;

use crate::sidecar::{Sidecar, path};

pub struct Daemon {
    child: Child,
    data_dir: PathBuf,
    state_dir: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts the daemon on `data_dir`, with configuration given as variables without their prefix and, if any, a server
    /// command.
    pub fn start(sidecar: &Sidecar, data_dir: &Path, settings: &[(&str, &str)], server: &[&str]) -> Self {
        Self::start_with(sidecar, data_dir, settings, &[], server)
    }

    /// As [`Self::start`], with further flags.
    pub fn start_with(
        sidecar: &Sidecar,
        data_dir: &Path,
        settings: &[(&str, &str)],
        flags: &[&str],
        server: &[&str],
    ) -> Self {
        sidecar.has_repository(data_dir);
        let state_dir = sidecar.state_dir();
        let log = state_dir.join("daemon.log");
        let output = std::fs::File::options().create(true).append(true).open(&log).expect("the daemon's log file");
        let mut command = sidecar.command();
        command.args(["run", "--data-dir", path(data_dir)]).args(flags);
        for (name, value) in settings {
            command.env(format!("INNER_UNIVERSE__{name}"), value);
        }
        if !server.is_empty() {
            command.arg("--").args(server);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a second handle"))
            .stderr(output)
            .spawn()
            .expect("start the daemon");
        Self { child, data_dir: data_dir.into(), state_dir, log }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything the daemons of this sidecar logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// What this process last told of itself.
    pub fn status(&self) -> Option<DaemonStatus> {
        let mut config = inner_universe::config::Config::default();
        config.archive.state_dir = Some(self.state_dir.clone());
        let status = inner_universe::daemon::state::read_status(&config, &self.data_dir)?;
        (status.pid == self.pid()).then_some(status)
    }

    /// Waits until its status is as wished; panics after two minutes.
    pub fn wait(&mut self, what: &str, wished: impl Fn(&DaemonStatus) -> bool) -> DaemonStatus {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            if let Some(status) = self.status().filter(|status| wished(status)) {
                return status;
            }
            if let Some(code) = self.child.try_wait().expect("the daemon's state") {
                panic!("waiting for {what}: the daemon ended with {code}: {}", self.log());
            }
            assert!(Instant::now() < deadline, "waiting for {what}: {:?}\n{}", self.status(), self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the HTTP interface; returns its address.
    pub fn wait_http(&mut self) -> String {
        self.wait("its HTTP interface", |status| status.http.is_some()).http.unwrap_or_default()
    }

    /// Waits until the one database is archived up to `offset`.
    pub fn wait_archived(&mut self, offset: u64) -> DaemonStatus {
        self.wait(&format!("transaction {offset}"), |status| {
            status.databases.first().is_some_and(|database| database.archived_offset >= Some(Offset(offset)))
        })
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()).status();
        assert!(sent.is_ok_and(|status| status.success()), "kill -{name}");
    }

    /// Has it ended by itself?
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("the daemon's state").is_some()
    }

    /// Asks it to stop; returns its exit code.
    pub fn stop(mut self) -> i32 {
        self.signal("TERM");
        self.exit_code()
    }

    /// Waits for its end.
    pub fn exit_code(&mut self) -> i32 {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(code) = self.child.try_wait().expect("the daemon's state") {
                return code.code().unwrap_or(-1);
            }
            assert!(Instant::now() < deadline, "the daemon does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
