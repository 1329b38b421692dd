//! One container: a process in mount and process namespaces of its own, on a root of its own.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Mounts what a container sees and runs its command as the first child of its first process.
const SCRIPT: &str = include_str!("container.sh");

pub struct Mount {
    pub source: PathBuf,
    pub target: String,
    pub read_only: bool,
}

/// How a container is started.
pub struct Launch {
    pub command: Vec<String>,
    pub environment: Vec<(String, String)>,
    pub user: String,
    pub capabilities: Vec<String>,
    pub read_only: bool,
    pub mounts: Vec<Mount>,
    pub secrets: Vec<(PathBuf, String)>,
    pub tmpfs: Vec<String>,
    pub programs: Vec<(PathBuf, String)>,
    /// Before the usual PATH.
    pub path: Option<String>,
    /// Names that lead to this machine.
    pub hosts: Vec<String>,
}

/// What is kept of a container between commands.
pub struct Container {
    dir: PathBuf,
}

impl Container {
    pub fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    fn pid(&self) -> Option<u32> {
        fs::read_to_string(self.dir.join("pid")).ok()?.trim().parse().ok()
    }

    pub fn was_started(&self) -> bool {
        self.dir.join("log").exists()
    }

    pub fn is_running(&self) -> bool {
        self.was_started() && !self.dir.join("code").exists()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Starts it in the background.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn start(&self, launch: &Launch) -> Result<(), String> {
        self.prepare(launch);
        let log = fs::File::options().create(true).append(true).open(self.dir.join("log")).expect("a log");
        let mut command = self.command();
        command.process_group(0).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a second handle")).stderr(log);
        drop(command.spawn().map_err(|error| format!("start: {error}"))?);
        let end = Instant::now() + Duration::from_secs(20);
        while self.pid().is_none() && self.is_running() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Runs it to its end with this process's streams; returns its exit code.
    pub fn run(&self, launch: &Launch) -> i32 {
        self.prepare(launch);
        let code = self.command().status().expect("run").code().unwrap_or(-1);
        let _ = fs::remove_dir_all(&self.dir);
        code
    }

    fn command(&self) -> Command {
        let mut command = Command::new("bash");
        // Whoever started it may be gone when it ends: its code is left in a file.
        let keep = "unshare --mount --pid --fork --propagation private bash \"$0/launch\" \"$0\"; code=$?; \
                    echo $code >\"$0/code.new\"; mv \"$0/code.new\" \"$0/code\"; exit $code";
        command.args(["-c", keep]).arg(&self.dir);
        command
    }

    fn prepare(&self, launch: &Launch) {
        fs::create_dir_all(self.root()).expect("a directory for the container");
        for old in ["pid", "code"] {
            let _ = fs::remove_file(self.dir.join(old));
        }
        let hosts: String = launch.hosts.iter().map(|name| format!("127.0.0.1 {name}\n")).collect();
        fs::write(self.dir.join("hosts"), format!("127.0.0.1 localhost\n{hosts}")).expect("hosts");
        let mut script = String::from("set -eu\n");
        for (source, target) in &launch.programs {
            script += &format!("programs+=({} {})\n", quote(&source.display()), quote(target));
        }
        for mount in &launch.mounts {
            let options = if mount.read_only { "bind,ro" } else { "bind" };
            script += &format!("mounts+=({} {} {options})\n", quote(&mount.source.display()), quote(&mount.target));
        }
        for (file, target) in &launch.secrets {
            script += &format!("secrets+=({} {})\n", quote(&file.display()), quote(target));
        }
        for tmpfs in &launch.tmpfs {
            let (target, options) = tmpfs.split_once(':').unwrap_or((tmpfs, "mode=1777"));
            script += &format!("tmpfs+=({} {})\n", quote(target), quote(options));
        }
        script += &format!("read_only={}\n", u8::from(launch.read_only));
        let inside: String = self.inside(launch).iter().map(|word| quote(word) + " ").collect();
        script += &format!("inside=({inside})\n");
        script += &format!("words=({})\n", launch.command.iter().map(|word| quote(word) + " ").collect::<String>());
        fs::write(self.dir.join("inside"), &script).expect("the container's settings");
        fs::write(self.dir.join("launch"), SCRIPT).expect("the container's script");
    }

    /// What goes before a command so that it runs inside, as the service's user, with nothing of this process's environment.
    fn inside(&self, launch: &Launch) -> Vec<String> {
        let (user, group) = launch.user.split_once(':').unwrap_or((&launch.user, "0"));
        let capabilities: String =
            launch.capabilities.iter().map(|name| format!(",+{}", name.to_lowercase())).collect();
        let mut words: Vec<String> =
            ["chroot", &self.root().display().to_string(), "/usr/bin/setpriv"].map(Into::into).into();
        words.extend(["--reuid", user, "--regid", group, "--clear-groups", "--no-new-privs"].map(Into::into));
        words.extend(["--inh-caps=-all".into(), format!("--bounding-set=-all{capabilities}"), "/usr/bin/env".into()]);
        let path = launch.path.iter().map(|added| format!("{added}:")).collect::<String>();
        words.extend(["-i".into(), format!("PATH={path}/usr/local/bin:/usr/bin:/bin"), "HOME=/tmp".into()]);
        words.extend(launch.environment.iter().map(|(name, value)| format!("{name}={value}")));
        words
    }

    fn enter(&self, command: &[String]) -> Command {
        let mut entering = Command::new("nsenter");
        let pid = self.pid().unwrap_or(0).to_string();
        let run = "source \"$0/inside\"; exec \"${inside[@]}\" \"$@\"";
        entering.args(["--target", &pid, "--mount", "--pid", "bash", "-c", run]).arg(&self.dir).args(command);
        entering
    }

    /// Runs a command in it with this process's streams.
    pub fn exec(&self, command: &[String]) -> i32 {
        self.enter(command).status().expect("nsenter").code().unwrap_or(-1)
    }

    /// Runs a command in it; its code, and what it printed.
    pub fn output(&self, command: &[String]) -> (i32, String) {
        let output = self.enter(command).stdin(Stdio::null()).output().expect("nsenter");
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
    }

    /// What a command in it prints.
    pub fn read(&self, command: &[String]) -> (i32, Vec<u8>) {
        let output = self.enter(command).stdin(Stdio::null()).output().expect("nsenter");
        (output.status.code().unwrap_or(-1), if output.status.success() { output.stdout } else { output.stderr })
    }

    pub fn signal(&self, signal: &str) {
        if let Some(pid) = self.pid().filter(|_| self.is_running()) {
            let _ = Command::new("kill").args(["-s", signal, &pid.to_string()]).status();
        }
    }

    pub fn stop(&self, signal: &str, grace: Duration) {
        self.signal(signal);
        let end = Instant::now() + grace;
        while self.is_running() {
            if Instant::now() > end {
                self.signal("KILL");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for its end; returns its exit code.
    pub fn wait(&self) -> i32 {
        while self.is_running() {
            std::thread::sleep(Duration::from_millis(10));
        }
        fs::read_to_string(self.dir.join("code")).ok().and_then(|code| code.trim().parse().ok()).unwrap_or(-1)
    }
}

fn quote(text: &(impl ToString + ?Sized)) -> String {
    format!("'{}'", text.to_string().replace('\'', "'\\''"))
}
