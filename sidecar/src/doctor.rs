//! The deployment checklist: what must hold before a deployment, and what operators forget. Each check passes, warns or
//! fails, and says what to do. Nothing is changed: scratch objects in the repository are deleted again.

mod disk;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::clock::Clock;
use crate::config::Config;
use crate::daemon::state::{self, StateDir};
use crate::datadir::DataDir;
use crate::datadir::lock::{self, ServerLock};
use crate::deploy::module::Module;
use crate::repository::crypto::Keyring;
use crate::repository::remembered::Remembered;
use crate::repository::{Repository, RepositoryError, lease};
use crate::standalone::command::{Binary, listen_address};
use crate::standalone::ready;

/// A drill older than this says little.
const OLD_DRILL: jiff::SignedDuration = jiff::SignedDuration::from_hours(31 * 24);
/// Releases that this one was run with.
const KNOWN_RELEASES: &str = "1.2.0 to 2.14.0";
/// A newest restore point that is older is no strategy.
const OLD: SignedDuration = SignedDuration::from_hours(26);

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Pass,
    Warn,
    Fail,
}

/// One line of the checklist. Field names are stable.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// A short name that stays the same.
    pub check: &'static str,
    pub verdict: Verdict,
    pub message: String,
    /// What to do; empty where nothing is to be done.
    pub fix: String,
}

/// The whole checklist.
#[derive(Debug, Serialize)]
pub struct Checklist {
    pub ok: bool,
    pub checks: Vec<Check>,
}

struct Doctor<'a> {
    config: &'a Config,
    data_dir: Option<&'a Path>,
    clock: &'a Arc<dyn Clock>,
    checks: Vec<Check>,
}

/// Goes through the checklist.
pub async fn examine(config: &Config, data_dir: Option<&Path>, clock: &Arc<dyn Clock>) -> Checklist {
    let mut doctor = Doctor { config, data_dir, clock, checks: Vec::new() };
    let binary = doctor.server();
    doctor.module(binary.as_ref());
    doctor.data_dir(binary.as_ref());
    doctor.port().await;
    doctor.tokens();
    doctor.store().await;
    doctor.monitoring();
    doctor.schedules();
    doctor.pass("configuration", "it is valid");
    disk::examine(&mut doctor);
    doctor.clocks().await;
    let ok = doctor.checks.iter().all(|check| check.verdict != Verdict::Fail);
    Checklist { ok, checks: doctor.checks }
}

impl Doctor<'_> {
    fn add(&mut self, check: &'static str, verdict: Verdict, message: impl Into<String>, fix: impl Into<String>) {
        self.checks.push(Check { check, verdict, message: message.into(), fix: fix.into() });
    }

    fn pass(&mut self, check: &'static str, message: impl Into<String>) {
        self.add(check, Verdict::Pass, message, "");
    }

    fn server(&mut self) -> Option<Binary> {
        match Binary::find(self.config) {
            Ok(binary) => {
                let place = binary.path.display();
                match &binary.version {
                    Some(version) => self.pass("server", format!("SpacetimeDB {version} at {place}")),
                    None => self.add(
                        "server",
                        Verdict::Warn,
                        format!("{place} does not tell its version"),
                        format!("this release was tested with {KNOWN_RELEASES}"),
                    ),
                }
                if !binary.release().bounds_page_pool() {
                    let fix = "take a newer server where memory is short; server_config.cache_size_mb has no effect on this one's pages";
                    self.add("page pool", Verdict::Warn, "this server does not let its page pool be bounded", fix);
                }
                Some(binary)
            }
            Err(error) if self.config.spacetimedb_config.url.is_some() => {
                self.add(
                    "server",
                    Verdict::Warn,
                    "no server binary is here; modules are not compared before a publish",
                    error.to_string(),
                );
                None
            }
            Err(error) => {
                self.add("server", Verdict::Fail, "SpacetimeDB is not installed here", error.to_string());
                None
            }
        }
    }

    fn module(&mut self, binary: Option<&Binary>) {
        let config = &self.config.module_config;
        if config.build_module {
            let manifest = config.module_dir.as_ref().map(|dir| dir.join("Cargo.toml"));
            match manifest {
                Some(manifest) if manifest.is_file() => {
                    self.pass("module", format!("it is built from {} at each deployment", manifest.display()));
                }
                _ => {
                    let fix = "set module_config.module_dir to the module's source";
                    self.add("module", Verdict::Fail, "build_module is on and there is no source to build", fix);
                }
            }
            return;
        }
        let Some(path) = &config.module_path else {
            let fix = "set module_config.module_path, or build_module with module_dir";
            return self.add("module", Verdict::Warn, "no module is named", fix);
        };
        let read = Module::read(path).and_then(|module| match binary {
            Some(binary) => module.describe(binary).map(|_| "the server's binary reads it"),
            None => Ok("it is WebAssembly"),
        });
        match read {
            Ok(how) => self.pass("module", format!("{}: {how}", path.display())),
            Err(error) => self.add("module", Verdict::Fail, error.to_string(), "build it for wasm32-unknown-unknown"),
        }
    }

    fn data_dir(&mut self, binary: Option<&Binary>) {
        let Some(dir) = self.data_dir else {
            let fix = "set spacetimedb_config.db_path, or give --db-path";
            return self.add("data directory", Verdict::Fail, "none is named", fix);
        };
        let place = if dir.exists() { dir.to_owned() } else { crate::durable::parent(dir) };
        let writable = tempfile::Builder::new().prefix(".inner-universe-").tempfile_in(&place);
        if let Err(error) = writable {
            let fix = format!("make {} and let this user write there", place.display());
            return self.add("data directory", Verdict::Fail, format!("{}: {error}", place.display()), fix);
        }
        match DataDir::open(dir).ok().map(|data| data.metadata()) {
            Some(Ok(Some(metadata))) if binary.is_some_and(|binary| binary.check(dir).is_err()) => self.add(
                "data directory",
                Verdict::Fail,
                format!("{} was written by {}, which the server here does not open", dir.display(), metadata.version),
                "name that release or a newer one in spacetimedb_config.server_bin",
            ),
            Some(Ok(Some(metadata))) => {
                self.pass("data directory", format!("{}, written by {}", dir.display(), metadata.version));
            }
            Some(Err(error)) => {
                self.add("data directory", Verdict::Fail, error.to_string(), "restore it, or name another directory");
            }
            _ => self.pass("data directory", format!("{} is writable and new", dir.display())),
        }
    }

    async fn port(&mut self) {
        let address = listen_address(self.config);
        let ours = self.data_dir.map(|dir| lock::probe_file(&dir.join("spacetime.pid")));
        let runs = matches!(ours, Some(Ok(ServerLock::Held { .. })));
        if runs {
            return match ready::health(self.config).await {
                Ok(health) => {
                    let version = health.version.unwrap_or_else(|| "of an unknown version".into());
                    self.pass(
                        "port",
                        format!("the server {version} answers at {}", self.config.spacetimedb_config.server_url()),
                    );
                }
                Err(error) => self.add(
                    "port",
                    Verdict::Fail,
                    format!("a server runs on the data directory and does not answer: {error}"),
                    "correct spacetimedb_config.address, port or url",
                ),
            };
        }
        match std::net::TcpListener::bind(&address) {
            Ok(_) => self.pass("port", format!("{address} is free")),
            Err(error) => self.add(
                "port",
                Verdict::Fail,
                format!("{address}: {error}"),
                "stop what listens there, or change spacetimedb_config.port",
            ),
        }
        if !self.config.spacetimedb_config.address.starts_with("127.")
            && self.config.spacetimedb_config.address != "localhost"
        {
            let fix = "put TLS in front of the server, and name https:// in spacetimedb_config.url";
            self.add("tls", Verdict::Warn, "the server listens beyond this machine, and speaks no TLS itself", fix);
        }
    }

    fn tokens(&mut self) {
        if self.config.server_config.auth_required {
            self.pass("authentication", "auth_required is on: known identities only");
        } else {
            let fix = "set server_config.auth_required, and deploy";
            self.add("authentication", Verdict::Warn, "auth_required is off: everybody may use the module", fix);
        }
        let mut secrets: Vec<(&'static str, PathBuf)> = Vec::new();
        if let Some(path) = &self.config.spacetimedb_config.token_file {
            secrets.push(("token", path.clone()));
        }
        if let Some(dir) = self.data_dir {
            secrets.push(("token key", self.config.spacetimedb_config.keys_of(dir).private));
        }
        secrets.extend(self.config.repository.identity_files.iter().map(|path| ("backup key", path.clone())));
        for (what, path) in secrets {
            match std::fs::metadata(&path) {
                Ok(data) if data.permissions().mode() & 0o077 != 0 => self.add(
                    what,
                    Verdict::Warn,
                    format!("{} may be read by others (mode {:o})", path.display(), data.permissions().mode() & 0o777),
                    format!("chmod 600 {}", path.display()),
                ),
                Ok(_) => self.pass(what, format!("{} is its owner's alone", path.display())),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && what == "token key" => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && what == "token" => {
                    let fix = "`inner-universe deploy` takes an identity of its own and leaves its token there";
                    self.add(what, Verdict::Warn, format!("{} is not there yet", path.display()), fix);
                }
                Err(error) => {
                    self.add(what, Verdict::Fail, format!("{}: {error}", path.display()), "name a file that is there");
                }
            }
        }
    }

    async fn store(&mut self) {
        let config = &self.config.repository;
        let Some(url) = &config.url else {
            let fix = "set repository.url to a place on another machine";
            return self.add("backup", Verdict::Fail, "no repository is named: there are no backups", fix);
        };
        let keys = Keyring::new(&config.recipients, &config.identity_files);
        let keys = match keys {
            Ok(keys) => keys,
            Err(error) => return self.add("backup", Verdict::Fail, error.to_string(), "correct repository.recipients"),
        };
        let opened = Repository::open_to_write(url, config, keys).await;
        let remembered = self.config.spacetimedb_config.db_path.as_ref();
        let remembered = remembered.map(|dir| Remembered::in_dir(&StateDir::locate(self.config, dir)));
        let checked = match remembered {
            Some(remembered) => remembered.check(url, opened),
            None => opened,
        };
        let repository = match checked {
            Ok(repository) => repository,
            Err(RepositoryError::NoRepository { .. }) => {
                let fix = "make it: `inner-universe repository init`";
                return self.add("backup", Verdict::Warn, format!("{url} holds no repository yet"), fix);
            }
            Err(error) => {
                return self.add(
                    "backup",
                    Verdict::Fail,
                    error.to_string(),
                    "check repository.url and its credentials",
                );
            }
        };
        self.pass("repository", format!("{url} is reached"));
        self.conditions(&repository).await;
        if !repository.keys.seals() && !url.starts_with("file:") {
            let fix = "make a new repository with repository.recipients; see `inner-universe key generate`";
            let message = "backups are not encrypted before they leave this machine; they hold what tables and logs hold, \
                           and since 1.4 and 2.14 the claims of clients' tokens and the module's environment";
            self.add("encryption", Verdict::Warn, message, fix);
        }
        self.lease(&repository).await;
        match repository.restore_points().await {
            Ok(list) => match list.restore_points.last() {
                Some(newest) => {
                    let age = self.clock.now().duration_since(newest.created_at);
                    let message = format!("the newest restore point is {} old", rounded(age));
                    if age > OLD {
                        let fix = "set schedule.restore_point, or look why it fails: `inner-universe status`";
                        self.add("backup", Verdict::Warn, message, fix);
                    } else {
                        self.pass("backup", message);
                    }
                }
                None => {
                    self.add("backup", Verdict::Warn, "there is no restore point yet", "`inner-universe backup create`")
                }
            },
            Err(error) => self.add("backup", Verdict::Fail, error.to_string(), "`inner-universe verify`"),
        }
        match repository.last_drill().await {
            Ok(Some(drill)) => {
                let age = self.clock.now().duration_since(drill.started_at);
                let message = format!("restore point {} at {}", drill.restore_point, drill.started_at);
                match drill.passed {
                    false => {
                        self.add("restore drill", Verdict::Fail, format!("{message} failed"), "`inner-universe drill`")
                    }
                    true if age > OLD_DRILL => {
                        let fix = "`inner-universe drill`, and set schedule.drill";
                        self.add("restore drill", Verdict::Warn, format!("the last one is old: {message}"), fix);
                    }
                    true => self.pass("restore drill", message),
                }
            }
            Ok(None) => {
                let fix = "`inner-universe drill`, and set schedule.drill";
                self.add("restore drill", Verdict::Warn, "no restore drill is on record", fix);
            }
            Err(error) => self.add("restore drill", Verdict::Fail, error.to_string(), "`inner-universe verify`"),
        }
    }

    /// Whether conditions of writes hold, asked once and in a race.
    async fn conditions(&mut self, repository: &Repository) {
        let name = "conditional writes";
        let fix = "run one sidecar only, or use a store that honours If-None-Match and If-Match";
        let conditional = repository.conditional();
        if !conditional.create || !conditional.update {
            return self.add(name, Verdict::Warn, "the store ignores or refuses them", fix);
        }
        match repository.race().await {
            Ok(race) if race.is_decided() => {
                self.pass(name, format!("the store honours them, also in a race of {}", race.writers));
            }
            Ok(race) => {
                let most = race.created.max(race.updated);
                let message = match most {
                    0 | 1 => format!("in a race of {} the store kept another content than the winner's", race.writers),
                    most => {
                        format!("the store honours them one at a time, and lets {most} of {} win a race", race.writers)
                    }
                };
                self.add(name, Verdict::Warn, message, fix);
            }
            Err(error) => self.add(name, Verdict::Fail, error.to_string(), "check the store"),
        }
    }

    async fn lease(&mut self, repository: &Repository) {
        let now = self.clock.now();
        match lease::holder(repository).await.map(|held| held.filter(|held| held.expires_at > now)) {
            Ok(Some(held)) => {
                let holder = held.writer;
                let ours = self
                    .data_dir
                    .filter(|dir| !state::has_ended(self.config, dir))
                    .and_then(|dir| state::read_status(self.config, dir));
                let ours =
                    ours.filter(|status| status.running && !status.is_stale(now) && status.lease_token.is_some());
                let message = format!("{holder} writes to the repository");
                match ours {
                    Some(status) => self
                        .pass("lease", format!("the sidecar here (process {}) writes to the repository", status.pid)),
                    None => self.add(
                        "lease",
                        Verdict::Warn,
                        message,
                        "only one sidecar may write; is this the one you mean?",
                    ),
                }
            }
            Ok(None) => {
                let fix = "start the sidecar: `inner-universe run`";
                self.add("lease", Verdict::Warn, "nobody archives continuously", fix);
            }
            Err(error) => self.add("lease", Verdict::Fail, error.to_string(), "check the store"),
        }
    }

    fn monitoring(&mut self) {
        let (http, telemetry) = (&self.config.http, &self.config.telemetry);
        let collector = telemetry.otlp_endpoint.is_some() || std::env::var_os("OTEL_EXPORTER_OTLP_ENDPOINT").is_some();
        let mut means = Vec::new();
        if http.enabled {
            means.push(format!("metrics and health at {}", http.listen));
        }
        if collector {
            means.push("a collector".into());
        }
        if telemetry.heartbeat_url.is_some() {
            means.push("a heartbeat".into());
        }
        match (means.is_empty(), telemetry.heartbeat_url.is_some()) {
            (true, _) => {
                let fix = "set http.enabled and scrape /metrics, or telemetry.otlp_endpoint";
                self.add("monitoring", Verdict::Fail, "nothing tells how the sidecar fares", fix);
            }
            (false, false) => {
                let fix = "set telemetry.heartbeat_url, where silence raises an alarm";
                self.add(
                    "monitoring",
                    Verdict::Warn,
                    format!("{}; nobody notices when all of it is gone", means.join(", ")),
                    fix,
                );
            }
            (false, true) => self.pass("monitoring", means.join(", ")),
        }
    }

    fn schedules(&mut self) {
        let schedule = &self.config.schedule;
        for (name, cron, why) in [
            (
                "restore_point",
                &schedule.restore_point,
                "log is archived, but names, programs and settings only with a restore point",
            ),
            ("verify", &schedule.verify, "damage is found when a restore needs what is damaged"),
        ] {
            match cron {
                None => {
                    let fix = format!("set schedule.{name}");
                    self.add("schedule", Verdict::Warn, format!("{name} is not scheduled: {why}"), fix);
                }
                Some(cron) => {
                    self.pass("schedule", format!("{name} at `{}` ({})", cron.as_str(), schedule.time_zone.0.name()))
                }
            }
        }
    }

    async fn clocks(&mut self) {
        let server = self.config.spacetimedb_config.server_url();
        let mut others = vec![("the server", format!("{server}/v1/ping"))];
        if let Some(endpoint) = &self.config.repository.endpoint {
            others.push(("the store", endpoint.clone()));
        }
        for (whose, url) in others {
            let Some(theirs) = date_of(&url).await else { continue };
            let skew = self.clock.now().duration_since(theirs).abs();
            let message = format!("this machine and {whose} differ by {}", rounded(skew));
            let fix = "run a time service (chrony, systemd-timesyncd) on both";
            match skew.as_secs() {
                // The header has whole seconds.
                0..=2 => self.pass("clock", format!("this machine and {whose} agree")),
                3..=60 => self.add("clock", Verdict::Warn, message, fix),
                _ => self.add("clock", Verdict::Fail, message, fix),
            }
        }
    }
}

/// What time another machine has, by its answer's header.
async fn date_of(url: &str) -> Option<Timestamp> {
    let client = crate::observe::otlp::client(std::time::Duration::from_secs(5), None).ok()?;
    let answer = client.get(url).send().await.ok()?;
    let text = answer.headers().get(http::header::DATE)?.to_str().ok()?.to_owned();
    let time = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(&text).ok()?;
    Some(time)
}

fn rounded(duration: SignedDuration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}
