//! Drills: a restore point is restored to a scratch directory, a real server is booted on it, and what it serves is compared
//! with what the restore point promised.
//!
//! Invariants: nothing of the live server is touched, not its directory, port or keys; what is found is a result and no
//! error; scratch directory and server are gone afterwards, whatever happened.

pub mod promise;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::backup::SETTLE;
use crate::clock::{Clock, Stopwatch};
use crate::config::Config;
use crate::database::link::Link;
use crate::database::reader::Reader;
use crate::datadir::key_files::KeyFiles;
use crate::datadir::{DataDir, DataDirError, log};
use crate::drill::promise::Sums;
use crate::durable::FileError;
use crate::durable::owner::make_private_dir;
use crate::ids::{Identity, Offset, RestorePointId};
use crate::observe::server::{Database, SourceError};
use crate::progress::Progress;
use crate::repository::manifest::{DatabasePoint, RestorePoint, TablePromise};
use crate::repository::{Repository, RepositoryError, paths};
use crate::restore::RestoreError;
use crate::restore::apply::{ApplyOptions, apply};
use crate::restore::plan::{RestoreRequest, plan};
use crate::restore::target::Target;
use crate::scratch::Scratch;
use crate::standalone::StandaloneError;
use crate::standalone::command::Binary;
use crate::standalone::keys;
use crate::standalone::temporary::TemporaryServer;

/// What can go wrong with a drill before anything is found.
#[derive(Debug, thiserror::Error)]
pub enum DrillError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Standalone(#[from] StandaloneError),
    #[error("make a scratch directory in {}: {source}; name another with drill.scratch_dir", path.display())]
    Scratch { path: PathBuf, source: std::io::Error },
    #[error("the repository has no restore point; take one with `inner-universe backup create`")]
    NoPoint,
}

/// Which restore point is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    #[default]
    Newest,
    /// Any of them, each as likely as another.
    Random,
    Named(RestorePointId),
}

/// How to drill.
#[derive(Debug, Clone, Default)]
pub struct DrillOptions {
    pub choice: Choice,
    /// Another server than the configuration names.
    pub server_bin: Option<PathBuf>,
    /// The live data directory, to measure how far the archive is behind it.
    pub live: Option<PathBuf>,
}

/// `drills/ID.json`, and the report. Field names are stable.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DrillResult {
    pub format: u32,
    pub id: RestorePointId,
    pub started_at: Timestamp,
    pub restore_point: RestorePointId,
    pub passed: bool,
    pub findings: Vec<DrillFinding>,
    pub databases: Vec<DrilledDatabase>,
    /// The server that was booted, as it tells itself.
    pub server_version: Option<String>,
    /// The server that wrote the data.
    pub written_by: Option<String>,
    /// From the start of the restore until the server served: the measured recovery time. `None` if it never did.
    pub rto_ms: Option<u64>,
    pub restore_ms: Option<u64>,
    pub boot_ms: Option<u64>,
    /// How far the archive is behind the live log by its transactions' times: the measured recovery point. `None` without a
    /// live log at hand.
    pub rpo_ms: Option<u64>,
    pub tool_version: String,
}

/// One database of a drill.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DrilledDatabase {
    pub identity: Identity,
    pub name: String,
    pub offset: Offset,
    /// Tables that could be read.
    pub tables: u64,
    pub rows: u64,
    /// Tables that were compared with what the restore point promised.
    pub compared: u64,
    /// Tables that the server itself changed when it started, as when it says good-bye to clients that were connected.
    pub changed_at_start: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq, schemars::JsonSchema)]
pub struct DrillFinding {
    pub kind: DrillFindingKind,
    pub message: String,
    pub fix: String,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DrillFindingKind {
    /// The restore itself failed.
    NotRestored,
    /// The server did not come up on what was restored.
    NotStarted,
    /// A database does not answer, or a table cannot be read.
    NotReadable,
    /// A table holds other rows than the restore point promised.
    RowsDiffer,
    /// The server did not take a write.
    NotWritable,
}

/// Drills once and keeps the result in the repository.
///
/// # Errors
/// When the repository cannot be reached, there is no server to boot, or no place to do it. Everything else is a finding.
pub async fn drill(
    repository: &Repository,
    config: &Config,
    options: &DrillOptions,
    clock: Arc<dyn Clock>,
    progress: Arc<dyn Progress>,
) -> Result<DrillResult, DrillError> {
    let point = choose(repository, options.choice).await?;
    let mut config = config.clone();
    if let Some(binary) = options.server_bin.as_ref().or(config.drill.server_bin.as_ref()) {
        config.spacetimedb_config.server_bin = Some(binary.clone());
    }
    let binary = Binary::find(&config)?;
    let base = config.drill.scratch_dir.clone().unwrap_or_else(std::env::temp_dir);
    if config.drill.scratch_dir.is_some() {
        // It holds what the live server holds, while a drill runs.
        make_private_dir(&base)?;
    }
    let scratch = Scratch::create_in(&base, "inner-universe-drill-");
    let scratch = scratch.map_err(|source| DrillError::Scratch { path: base, source })?;
    let started_at = clock.now();
    let kept = repository.list(&paths::drills()).await?;
    let newest = kept.last().and_then(|(key, _)| paths::parse_restore_point(key));
    let mut result = DrillResult {
        format: crate::repository::manifest::FORMAT,
        id: RestorePointId::after(newest, started_at),
        started_at,
        restore_point: point.id,
        passed: false,
        findings: Vec::new(),
        databases: Vec::new(),
        server_version: binary.version.clone(),
        written_by: point.server_version.clone(),
        rto_ms: None,
        restore_ms: None,
        boot_ms: None,
        rpo_ms: measure_rpo(options.live.as_deref(), &point),
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let run = Run { repository, config, binary, scratch: scratch.path(), clock, progress };
    run.run(&point, &mut result).await?;
    result.passed = result.findings.is_empty();
    keep(repository, &result, run.config.drill.keep_results).await?;
    Ok(result)
}

/// Every result that is kept, oldest first. Those that cannot be read are left out.
///
/// # Errors
/// When the store fails.
pub async fn results(repository: &Repository) -> Result<Vec<DrillResult>, RepositoryError> {
    let mut results = Vec::new();
    for (key, _) in repository.list(&paths::drills()).await? {
        match repository.get_document(&key).await {
            Ok(result) => results.push(result),
            Err(error) if error.is_damage() => tracing::warn!(%error, "the result of a drill cannot be read"),
            Err(error) => return Err(error),
        }
    }
    Ok(results)
}

async fn choose(repository: &Repository, choice: Choice) -> Result<RestorePoint, DrillError> {
    let ids = repository.restore_point_ids().await?;
    let id = match choice {
        Choice::Named(id) => id,
        Choice::Newest => *ids.last().ok_or(DrillError::NoPoint)?,
        Choice::Random => {
            // A fresh ULID's random part is random enough to choose by.
            let drawn = ulid::Ulid::new().random() % u128::try_from(ids.len().max(1)).unwrap_or(1);
            *usize::try_from(drawn).ok().and_then(|index| ids.get(index)).ok_or(DrillError::NoPoint)?
        }
    };
    Ok(repository.restore_point(id).await?)
}

async fn keep(repository: &Repository, result: &DrillResult, count: u32) -> Result<(), RepositoryError> {
    repository.put_document(&paths::drill(result.id), result).await?;
    let kept = repository.list(&paths::drills()).await?;
    let over = kept.len().saturating_sub(count.max(1) as usize);
    for (key, _) in kept.into_iter().take(over) {
        match repository.delete(&key).await {
            // Locked objects stay, as they should.
            Err(RepositoryError::Denied { .. }) | Ok(()) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The age of what would be lost if the machine were lost now.
fn measure_rpo(live: Option<&Path>, point: &RestorePoint) -> Option<u64> {
    let data = DataDir::open(live?).ok()?;
    let lag = |database: &DatabasePoint| {
        let archived = database.time?;
        let newest = last_time(&data.replica(database.replica).log_path(), database.offset)?;
        u64::try_from(newest.duration_since(archived).as_millis()).ok()
    };
    point.databases.iter().filter_map(lag).max()
}

/// The latest time of the transactions from `from` on.
fn last_time(dir: &Path, from: Offset) -> Option<Timestamp> {
    let read = || -> Result<Option<i64>, DataDirError> {
        let mut reader = log::LogReader::open(dir, from)?;
        let (mut buffer, mut latest) = (Vec::new(), None);
        while let Some(batch) = reader.next_batch(1 << 20, &mut buffer)? {
            latest = latest.max(batch.times.max);
        }
        Ok(latest)
    };
    read().ok().flatten().and_then(|micros| Timestamp::from_microsecond(micros).ok())
}

struct Run<'a> {
    repository: &'a Repository,
    config: Config,
    binary: Binary,
    scratch: &'a Path,
    clock: Arc<dyn Clock>,
    progress: Arc<dyn Progress>,
}

impl Run<'_> {
    async fn run(&self, point: &RestorePoint, result: &mut DrillResult) -> Result<(), DrillError> {
        let total = Stopwatch::start();
        let (data, keys) = (self.scratch.join("data"), self.scratch.join("keys"));
        let request = RestoreRequest { target: Target::Point(point.id), ..RestoreRequest::default() };
        let options = ApplyOptions { key_dir: Some(keys.clone()), ..ApplyOptions::to(data.clone()) };
        let restored = async {
            let plan = plan(self.repository, &request).await?;
            apply(self.repository, &plan, &options, Arc::clone(&self.clock), Arc::clone(&self.progress)).await
        };
        match restored.await {
            Ok(_) => {}
            Err(RestoreError::Repository(error)) if !error.is_damage() => return Err(error.into()),
            Err(error) => {
                let fix = "run `inner-universe verify`, and try an older restore point with `drill ID`";
                find(result, DrillFindingKind::NotRestored, error.to_string(), fix);
                return Ok(());
            }
        }
        result.restore_ms = Some(total.elapsed_ms());
        self.progress.phase("the server starts", None);
        let (boot, log) = (Stopwatch::start(), self.scratch.join("server.log"));
        let limit = self.config.drill.boot_timeout.0;
        let mut config = self.config.clone();
        config.spacetimedb_config.use_keys_in(&keys);
        config.spacetimedb_config.token_file = None;
        let start = TemporaryServer::start(&self.binary, &config, &data, &log, self.clock.as_ref(), limit, |_| Ok(()));
        let server = match start.await {
            Ok(server) => server,
            Err(error) => {
                let fix =
                    "compare the server's version with the one that wrote the data; an older restore point may start";
                find(result, DrillFindingKind::NotStarted, error.to_string(), fix);
                return Ok(());
            }
        };
        result.boot_ms = Some(boot.elapsed_ms());
        result.rto_ms = Some(total.elapsed_ms());
        let looked = self.look(point, &server, &data, &keys, result).await;
        server.kill().await;
        looked
    }

    async fn look(
        &self,
        point: &RestorePoint,
        server: &TemporaryServer,
        data: &Path,
        key_dir: &Path,
        result: &mut DrillResult,
    ) -> Result<(), DrillError> {
        let mut config = server.config.clone();
        // Whoever may read the live database may read the restored one, whose server has keys of its own.
        if let Some(live) = &self.config.spacetimedb_config.token_file {
            let own = self.scratch.join("token");
            match keys::sign_again(live, &KeyFiles::in_dir(key_dir).private, &own) {
                Ok(()) => config.spacetimedb_config.token_file = Some(own),
                Err(reason) => tracing::warn!(%reason, "private tables are left out"),
            }
        }
        let data = DataDir::open(data)?;
        let promised = |identity: Identity| {
            let promise = point.promises.iter().find(|promise| promise.database == identity);
            promise.map_or(&[][..], |promise| promise.tables.as_slice())
        };
        // At its first use, a database ends the connections of clients that were there, and we connect: both are to be in its log.
        let mut readers = Vec::new();
        for database in &point.databases {
            readers.push(promise::open(&config, database.identity, promised(database.identity)).await);
        }
        self.clock.sleep(SETTLE).await;
        for (database, reader) in point.databases.iter().zip(readers) {
            self.progress.phase(&format!("rows of {}", database.name), None);
            let log = data.replica(database.replica).log_path();
            let extra = log::end(&log).map_or(0, |end| end.0.saturating_sub(database.offset.0 + 1));
            let drilled = self.compare(database, reader, promised(database.identity), extra, result);
            if let Some(drilled) = drilled.await {
                result.databases.push(drilled);
                self.write_and_read(&config, database, &log, result).await;
            }
        }
        Ok(())
    }

    /// Reads every table, and compares it with the promise, if there is one.
    async fn compare(
        &self,
        database: &DatabasePoint,
        reader: Result<Reader, SourceError>,
        promised: &[TablePromise],
        extra: u64,
        result: &mut DrillResult,
    ) -> Option<DrilledDatabase> {
        let most = self.config.drill.promise_rows;
        let found = match reader {
            Ok(reader) => promise::tables(&reader, promised, most).await,
            Err(error) => Err(error),
        };
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                let message = format!("database {} cannot be read: {error}", database.name);
                find(
                    result,
                    DrillFindingKind::NotReadable,
                    message,
                    "look at the module's log; try an older restore point",
                );
                return None;
            }
        };
        let mut drilled = DrilledDatabase {
            identity: database.identity,
            name: database.name.clone(),
            offset: database.offset,
            tables: found.len() as u64,
            rows: found.iter().map(|table| table.rows).sum(),
            compared: 0,
            changed_at_start: Vec::new(),
        };
        for promised in promised {
            let name = &promised.name;
            let Some(table) = found.iter().find(|table| table.name == *name) else {
                let message = format!("table {name} of database {} cannot be read", database.name);
                find(result, DrillFindingKind::NotReadable, message, "an older restore point may hold it");
                continue;
            };
            drilled.compared += 1;
            match difference(promised, table) {
                0 => {}
                differs if differs <= extra.saturating_mul(2) => drilled.changed_at_start.push(name.clone()),
                _ => {
                    let message = format!(
                        "table {name} of database {} has {} rows where {} were promised at transaction {}, or other ones",
                        database.name, table.rows, promised.rows, database.offset
                    );
                    let fix = "do not rely on this restore point; compare it with another one, and report it";
                    find(result, DrillFindingKind::RowsDiffer, message, fix);
                }
            }
        }
        Some(drilled)
    }

    /// A client that connects is a transaction in every database: the server must write it to its log.
    async fn write_and_read(&self, config: &Config, database: &DatabasePoint, log: &Path, result: &mut DrillResult) {
        let before = log::end(log).map_or(0, |end| end.0);
        let name = database.identity.to_string();
        let wrote = async {
            let mut link = Link::new(&config.spacetimedb_config, &config.server_config, &name)
                .map_err(|error| error.to_string())?;
            link.connect().await.map_err(|error| error.to_string())?;
            for _ in 0..WRITE_LOOKS {
                if log::end(log).is_ok_and(|end| end.0 > before) {
                    return Ok(());
                }
                self.clock.sleep(WRITE_PAUSE).await;
            }
            Err("a client connected, and nothing was written to the log".to_owned())
        };
        let read = async {
            let database = Database::new(&config.spacetimedb_config, &config.server_config, &name)?;
            database.description().await
        };
        let wrote = wrote.await;
        if let (Err(reason), None) = (&wrote, &config.spacetimedb_config.token_file) {
            tracing::warn!(%reason, "nothing was written as a stranger; spacetimedb_config.token_file names an identity");
        } else if let Err(reason) = wrote {
            let message = format!("database {} takes no write: {reason}", database.name);
            find(result, DrillFindingKind::NotWritable, message, "look at the module's connect reducer and its log");
        }
        if let Err(error) = read.await {
            let message = format!("database {} does not answer after a write: {error}", database.name);
            find(result, DrillFindingKind::NotReadable, message, "look at the server's log");
        }
    }
}

/// How often, and after which pause, it is looked whether a write reached the log.
const WRITE_LOOKS: u32 = 100;
const WRITE_PAUSE: Duration = Duration::from_millis(50);

/// A bound from below on how many rows were added, taken away or changed; 0 only for the same rows.
fn difference(promised: &TablePromise, found: &TablePromise) -> u64 {
    let sums = |table: &TablePromise| table.hash.as_deref().and_then(Sums::parse);
    let by_rows = promised.rows.abs_diff(found.rows);
    match (sums(promised), sums(found)) {
        (Some(promised), Some(found)) => by_rows.max(promised.distance(&found) as u64),
        _ => by_rows,
    }
}

fn find(result: &mut DrillResult, kind: DrillFindingKind, message: String, fix: &str) {
    result.findings.push(DrillFinding { kind, message, fix: fix.to_owned() });
}
