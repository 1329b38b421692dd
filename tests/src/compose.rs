//! compose.yaml without a Docker engine: the same services, commands, volumes, secrets, health checks and order, as processes in
//! namespaces of their own. What an image holds is replaced by programs of this machine ([`images`]).

pub mod container;
pub mod document;
pub mod images;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use container::{Container, Launch};
use document::Document;

/// A project: its file, and where the state of its containers is kept.
pub struct Project {
    pub document: Document,
    dir: PathBuf,
    state: PathBuf,
}

type Result<T> = std::result::Result<T, String>;

impl Project {
    /// # Errors
    /// When the file cannot be read, or, if `strict`, a variable that it asks for is not set.
    pub fn open(dir: &Path, profiles: &[String], strict: bool) -> Result<Self> {
        let document = Document::load(dir, profiles, strict)?;
        Ok(Self { document, dir: dir.to_owned(), state: dir.join(".containers") })
    }

    fn container(&self, service: &str) -> Container {
        Container::at(&self.state.join(service))
    }

    /// The services that are meant: those named, or all of the active profiles.
    fn meant(&self, services: &[String]) -> Result<Vec<String>> {
        match services {
            [] => Ok(self.document.active()),
            named => named.iter().map(|name| self.document.service(name).map(|_| name.clone())).collect(),
        }
    }

    /// Starts services, and before them what they depend on.
    pub fn up(&self, services: &[String], wait: bool, leave_out: &[String]) -> Result<()> {
        let meant: Vec<_> = self.meant(services)?.into_iter().filter(|name| !leave_out.contains(name)).collect();
        for service in &meant {
            self.start(service, leave_out)?;
        }
        for service in meant.iter().filter(|_| wait) {
            self.wait_healthy(service)?;
        }
        Ok(())
    }

    fn start(&self, service: &str, leave_out: &[String]) -> Result<()> {
        let none = self.document.service(service)?["scale"].as_str() == Some("0");
        if none || leave_out.iter().any(|left| left == service) || self.container(service).is_running() {
            return Ok(());
        }
        self.start_dependencies(service, leave_out)?;
        let launch = self.launch(service, &Overrides::default())?;
        self.container(service).start(&launch)
    }

    fn start_dependencies(&self, service: &str, leave_out: &[String]) -> Result<()> {
        let definition = self.document.service(service)?;
        for (name, dependency) in definition["depends_on"].as_object().into_iter().flatten() {
            if !self.document.active().contains(name) && dependency["required"] == false {
                continue;
            }
            self.start(name, leave_out)?;
            match dependency["condition"].as_str() {
                _ if leave_out.contains(name) => {}
                Some("service_healthy") => self.wait_healthy(name)?,
                Some("service_completed_successfully") => match self.container(name).wait() {
                    0 => {}
                    code => return Err(format!("service {name} ended with {code}: {}", self.container(name).log())),
                },
                _ => {}
            }
        }
        Ok(())
    }

    fn wait_healthy(&self, service: &str) -> Result<()> {
        if self.document.service(service)?["scale"].as_str() == Some("0") {
            return Ok(());
        }
        let check = &self.document.service(service)?["healthcheck"];
        let Some(test) = check["test"].as_array() else { return Ok(()) };
        let test: Vec<_> = test.iter().skip(1).filter_map(Value::as_str).map(str::to_owned).collect();
        let test = images::health(service, test);
        let container = self.container(service);
        let end = Instant::now() + Duration::from_secs(90);
        loop {
            if !container.is_running() {
                return Err(format!("service {service} has ended: {}", container.log()));
            }
            let (code, output) = container.output(&test);
            if code == 0 {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(format!("service {service} does not become healthy: {output}\n{}", container.log()));
            }
            std::thread::sleep(Duration::from_millis(250));
        }
    }

    /// Asks services to end, those that depend on others first, and kills what does not end in its time.
    pub fn stop(&self, services: &[String]) -> Result<()> {
        let mut meant = self.meant(services)?;
        meant.reverse();
        for service in meant {
            let grace = self.document.service(&service)?["stop_grace_period"].as_str().unwrap_or("10s");
            let seconds = grace.trim_end_matches('s').parse().unwrap_or(10);
            let signal = self.document.service(&service)?["stop_signal"].as_str().unwrap_or("SIGTERM");
            self.container(&service).stop(signal.trim_start_matches("SIG"), Duration::from_secs(seconds));
        }
        Ok(())
    }

    pub fn kill(&self, services: &[String], signal: &str) -> Result<()> {
        for service in self.meant(services)? {
            self.container(&service).signal(signal);
            while signal == "KILL" && self.container(&service).is_running() {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// Runs a command in a running container, with this process's streams; returns its exit code.
    pub fn exec(&self, service: &str, command: &[String]) -> Result<i32> {
        let container = self.container(service);
        match container.is_running() {
            true => Ok(container.exec(command)),
            false => Err(format!("service \"{service}\" is not running")),
        }
    }

    /// Runs a service once; returns its exit code.
    pub fn run(&self, service: &str, overrides: &Overrides) -> Result<i32> {
        if !overrides.no_deps {
            self.start_dependencies(service, &[])?;
        }
        let launch = self.launch(service, overrides)?;
        let one_off = self.state.join(format!("{service}-run-{}", std::process::id()));
        Ok(Container::at(&one_off).run(&launch))
    }

    /// Copies `SERVICE:PATH` to a file here.
    pub fn copy(&self, from: &str, to: &str) -> Result<()> {
        let (service, path) = from.split_once(':').ok_or("only out of a service")?;
        let command = ["cat".to_owned(), path.to_owned()];
        let (code, bytes) = self.container(service).read(&command);
        match code {
            0 => std::fs::write(self.dir.join(to), bytes).map_err(|error| format!("{to}: {error}")),
            _ => Err(String::from_utf8_lossy(&bytes).into_owned()),
        }
    }

    pub fn down(&self, volumes: bool) -> Result<()> {
        for service in self.document.names() {
            self.container(&service).stop("TERM", Duration::from_secs(10));
        }
        let _ = std::fs::remove_dir_all(&self.state);
        if volumes {
            let _ = std::fs::remove_dir_all(self.dir.join(".volumes"));
        }
        Ok(())
    }

    pub fn log(&self, service: &str) -> String {
        self.container(service).log()
    }

    /// A line for each service that has been started: name, state, health.
    pub fn list(&self) -> Vec<(String, bool)> {
        let names = self.document.names().into_iter();
        names
            .filter(|name| self.container(name).was_started())
            .map(|name| (name.clone(), self.container(&name).is_running()))
            .collect()
    }

    fn launch(&self, service: &str, overrides: &Overrides) -> Result<Launch> {
        let (full, bare) = (self.document.service(service)?, Value::Null);
        let definition = if overrides.bare { &bare } else { full };
        let words = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let image = full["image"].as_str().unwrap_or_default();
        let substitute = images::substitute(image)?;
        let mut command = match (&overrides.entrypoint, &definition["entrypoint"]) {
            (Some(entrypoint), _) => vec![entrypoint.clone()],
            (None, Value::Array(_)) => words(&definition["entrypoint"]),
            (None, _) => substitute.entrypoint.clone(),
        };
        match (&overrides.command, &overrides.entrypoint) {
            (Some(given), _) => command.extend(given.iter().cloned()),
            (None, Some(_)) => {}
            (None, None) => command.extend(words(&definition["command"])),
        }
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let environment = definition["environment"].as_object().into_iter().flatten();
        let mut mounts = Vec::new();
        for volume in words(&definition["volumes"]).iter().chain(&overrides.volumes) {
            mounts.push(self.mount(volume)?);
        }
        let mut secrets = Vec::new();
        for secret in words(&definition["secrets"]) {
            let file = self.document.secret(&secret)?;
            secrets.push((self.dir.join(file), format!("/run/secrets/{secret}")));
        }
        Ok(Launch {
            command,
            environment: environment.map(|(name, value)| (name.clone(), text(value))).collect(),
            user: overrides.user.clone().unwrap_or_else(|| definition["user"].as_str().unwrap_or("0:0").to_owned()),
            capabilities: words(&definition["cap_add"]),
            read_only: definition["read_only"] == true,
            mounts,
            secrets,
            tmpfs: words(&definition["tmpfs"]),
            programs: substitute.programs,
            path: substitute.path,
            hosts: self.document.names(),
        })
    }

    /// `volume:/path[:ro]` or `./path:/path[:ro]`.
    fn mount(&self, volume: &str) -> Result<container::Mount> {
        let mut parts = volume.split(':');
        let (Some(from), Some(to)) = (parts.next(), parts.next()) else { return Err(format!("volume {volume}")) };
        let source = match from.starts_with(['.', '/']) {
            true => self.dir.join(from),
            false => {
                let volume = self.dir.join(".volumes").join(from);
                std::fs::create_dir_all(&volume).map_err(|error| error.to_string())?;
                volume
            }
        };
        Ok(container::Mount { source, target: to.to_owned(), read_only: parts.next() == Some("ro") })
    }
}

/// What `run` says of a service.
#[derive(Debug, Default)]
pub struct Overrides {
    pub entrypoint: Option<String>,
    pub command: Option<Vec<String>>,
    pub volumes: Vec<String>,
    pub user: Option<String>,
    pub no_deps: bool,
    /// The image alone, with nothing of what the service adds to it.
    pub bare: bool,
}
