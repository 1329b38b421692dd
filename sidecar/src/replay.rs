//! Replay: exported rows back into a module, through its import reducers.
//!
//! Each row is compared with what the module holds and is applied, skipped or refused; nothing that is there is replaced
//! by something older. So a replay can be repeated, and one that was broken off is completed by another.
//!
//! Invariants: rows that only grow are applied in order; a refused row is told with its reason and never half applied.

mod decide;
mod send;
mod states;

use jiff::Timestamp;
use serde::Serialize;

use crate::clock::Stopwatch;
use crate::config::Config;
use crate::database::cell::{self, Cell};
use crate::database::link::{Link, LinkError};
use crate::database::schema::{Schema, Table};
use crate::database::shape::Field;
use crate::export::ExportError;
use crate::export::archive::{Archive, ArchiveError};
use crate::ids::Identity;
use crate::replay::decide::{Decider, Decision, Policy};
use crate::replay::send::Sender;
use crate::replay::states::States;

/// Rows that are decided on at once.
const CHUNK: usize = 5_000;
/// Refusals that are told; all are counted.
const TOLD: usize = 100;

/// What can go wrong with a replay.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Target(#[from] ExportError),
    #[error("nothing of `{table}` was exported; there are exports of {known}")]
    NotExported { table: String, known: String },
    #[error(
        "the module has no reducer `{reducer}` that takes rows of `{table}`; publish a module that has, or leave the table out"
    )]
    NoReducer { table: String, reducer: String },
    #[error("`{table}` of the module does not take what was exported: {reason}")]
    Columns { table: String, reason: String },
    #[error("the module refused to begin: {0}")]
    Begin(String),
    #[error("state version {0} is neither in the module nor among what was exported")]
    NoVersion(u64),
    #[error("the module refused to bring state version {version} back: {said}")]
    NotRestored { version: u64, said: String },
}

/// The bundled module's tables in the order of their replay, and how.
const TABLES: &[(&str, &str, Policy)] = &[
    ("config", "import_config", Policy::Overwrite),
    ("admin", "import_admins", Policy::Overwrite),
    ("member", "import_members", Policy::Overwrite),
    ("entity", "import_entities", Policy::Newer),
    ("relation", "import_relations", Policy::Newer),
    ("state_version", "import_state_versions", Policy::Keep),
    ("metric", "import_metrics", Policy::Keep),
    ("event_log", "import_events", Policy::Keep),
    ("system_status", "import_status", Policy::Overwrite),
];

/// How far state is replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// The state version of this id and all before.
    Version(u64),
    /// State versions up to this time.
    Time(Timestamp),
}

/// What to replay.
#[derive(Debug, Clone, Default)]
pub struct ReplayOptions {
    /// All that were exported and have a reducer when there are none.
    pub tables: Vec<String>,
    /// Entities, relations and their versions only, as they were.
    pub until: Option<Until>,
    /// Decide, and apply nothing.
    pub dry_run: bool,
}

/// What was replayed.
#[derive(Debug, Serialize)]
pub struct ReplayReport {
    pub source: Identity,
    pub target: Identity,
    pub dry_run: bool,
    pub tables: Vec<TableReplay>,
    pub duration_ms: u64,
}

/// What was replayed of one table.
#[derive(Debug, Default, Serialize)]
pub struct TableReplay {
    pub table: String,
    pub read: u64,
    pub applied: u64,
    /// Already there, or there in a newer form.
    pub skipped: u64,
    pub refused: u64,
    /// The first refused rows.
    pub refusals: Vec<Refusal>,
}

/// Why a row was not applied.
#[derive(Debug, Serialize)]
pub struct Refusal {
    pub row: String,
    pub reason: String,
}

impl TableReplay {
    fn refuse(&mut self, row: String, reason: String) {
        self.refused += 1;
        if self.refusals.len() < TOLD {
            self.refusals.push(Refusal { row, reason });
        }
    }
}

/// Replays an archive into the database that the configuration names.
///
/// # Errors
/// When the archive cannot be read or the module cannot be asked; what was applied stays, and another replay goes on.
pub async fn replay(archive: &Archive, config: &Config, options: &ReplayOptions) -> Result<ReplayReport, ReplayError> {
    let took = Stopwatch::start();
    let mut replayer = Replayer::connect(archive, config, options).await?;
    let result = replayer.run().await;
    let target = replayer.target;
    replayer.link.close().await;
    let duration_ms = (took.elapsed_seconds() * 1000.0) as u64;
    Ok(ReplayReport { source: archive.database, target, dry_run: options.dry_run, tables: result?, duration_ms })
}

struct Replayer<'a> {
    archive: &'a Archive,
    options: &'a ReplayOptions,
    link: Link,
    schema: Schema,
    target: Identity,
    /// The module's own first events make room: as if there were none.
    clears: bool,
}

/// A table, and how its rows get into the module.
struct Way {
    table: Table,
    reducer: String,
    policy: Policy,
}

impl<'a> Replayer<'a> {
    async fn connect(archive: &'a Archive, config: &Config, options: &'a ReplayOptions) -> Result<Self, ReplayError> {
        let name = config.spacetimedb_config.database.as_deref().unwrap_or_default();
        let link = Link::new(&config.spacetimedb_config, &config.server_config, name)?;
        let target = link.database().identity().await.map_err(LinkError::from)?;
        let schema = link.schema().await?;
        Ok(Self { archive, options, link, schema, target, clears: false })
    }

    async fn run(&mut self) -> Result<Vec<TableReplay>, ReplayError> {
        let ways = self.ways().await?;
        // What is imported must not have the place of the module's own first events; nothing else is a reason to clear them.
        if ways.iter().any(|way| way.table.name == "event_log") {
            self.begin().await?;
        }
        if let Some(until) = self.options.until {
            return self.states(until, ways).await;
        }
        let mut reports = Vec::new();
        for way in ways {
            reports.push(self.table(&way).await?);
        }
        Ok(reports)
    }

    /// What is replayed, in order.
    async fn ways(&self) -> Result<Vec<Way>, ReplayError> {
        let exported = self.archive.tables().await?;
        let chosen: Vec<String> = match (self.options.until, self.options.tables.as_slice()) {
            (Some(_), _) => ["state_version", "entity", "relation"].map(str::to_owned).into(),
            (None, []) => exported.clone(),
            (None, named) => named.to_vec(),
        };
        let mut ways = Vec::new();
        for name in chosen {
            // Entities and relations of a past state come from its versions.
            let made = self.options.until.is_some() && name != "state_version";
            if !made && !exported.contains(&name) {
                return Err(ReplayError::NotExported { table: name, known: exported.join(", ") });
            }
            let known = TABLES.iter().position(|(table, ..)| *table == name);
            let (reducer, policy) = match known {
                Some(index) => (TABLES[index].1.to_owned(), TABLES[index].2),
                None => (format!("import_{name}"), Policy::Keep),
            };
            let (table, parameters) = (self.schema.table(&name), self.schema.reducer(&reducer));
            let (Some(Ok(table)), Some(Ok(parameters))) = (table, parameters) else {
                if self.options.tables.is_empty() && known.is_none() {
                    continue;
                }
                return Err(ReplayError::NoReducer { table: name, reducer });
            };
            let takes = crate::database::shape::Shape::List(Box::new(crate::database::shape::Shape::Struct(
                table.columns.clone(),
            )));
            if parameters.len() != 1 || parameters[0].shape != takes {
                return Err(ReplayError::NoReducer { table: name, reducer });
            }
            ways.push((known.unwrap_or(TABLES.len()), Way { table: table.clone(), reducer, policy }));
        }
        ways.sort_by_key(|(place, _)| *place);
        Ok(ways.into_iter().map(|(_, way)| way).collect())
    }

    async fn begin(&mut self) -> Result<(), ReplayError> {
        if self.schema.reducer("begin_import").is_none() {
            return Ok(());
        }
        if self.options.dry_run {
            self.clears = decide::would_clear(&mut self.link, &self.schema).await?;
            return Ok(());
        }
        let source = self.archive.database.to_string();
        let mut arguments = u32::try_from(source.len()).unwrap_or_default().to_le_bytes().to_vec();
        arguments.extend(source.as_bytes());
        self.link.call("begin_import", arguments).await?;
        self.link.confirm().await?.map_err(ReplayError::Begin)
    }

    async fn table(&mut self, way: &Way) -> Result<TableReplay, ReplayError> {
        let mut report = TableReplay { table: way.table.name.clone(), ..TableReplay::default() };
        let mut import = self.import(way).await?;
        for part in self.archive.parts(&way.table.name).await? {
            let mut pieces = self.archive.read(&part).await?;
            let mut chunk = Vec::new();
            loop {
                let piece = pieces.next().await?;
                let done = piece.is_none();
                chunk.extend(piece.unwrap_or_default());
                if chunk.len() >= CHUNK || done {
                    import.rows(&mut self.link, std::mem::take(&mut chunk), &pieces.columns, &mut report).await?;
                }
                if done {
                    break;
                }
            }
        }
        import.finish(&mut self.link, &mut report).await?;
        Ok(report)
    }

    async fn import<'w>(&mut self, way: &'w Way) -> Result<Import<'w>, ReplayError> {
        let clears = self.clears && way.table.name == "event_log";
        let decider = Decider::new(&mut self.link, &way.table, way.policy, clears).await?;
        Ok(Import { way, decider, sender: Sender::new(&way.reducer), dry_run: self.options.dry_run })
    }

    /// Versions up to a point, and the entities and relations that they leave.
    async fn states(&mut self, until: Until, ways: Vec<Way>) -> Result<Vec<TableReplay>, ReplayError> {
        let way = |name: &str| ways.iter().find(|way| way.table.name == name);
        let (Some(versions), Some(entities), Some(relations)) = (way("state_version"), way("entity"), way("relation"))
        else {
            return Ok(Vec::new());
        };
        let mut states = States::default();
        let mut report = TableReplay { table: "state_version".into(), ..TableReplay::default() };
        let mut import = self.import(versions).await?;
        for part in self.archive.parts("state_version").await? {
            let mut pieces = self.archive.read(&part).await?;
            while let Some(mut piece) = pieces.next().await? {
                states
                    .take(&mut piece, &pieces.columns, until)
                    .map_err(|reason| ReplayError::Columns { table: "state_version".into(), reason })?;
                import.rows(&mut self.link, piece, &pieces.columns, &mut report).await?;
            }
        }
        import.finish(&mut self.link, &mut report).await?;
        let mut reports = vec![report];
        for (way, (columns, rows)) in [(entities, states.entities()), (relations, states.relations())] {
            let mut report = TableReplay { table: way.table.name.clone(), ..TableReplay::default() };
            let mut import = self.import(way).await?;
            for chunk in rows.chunks(CHUNK) {
                import.rows(&mut self.link, chunk.to_vec(), &columns, &mut report).await?;
            }
            import.finish(&mut self.link, &mut report).await?;
            reports.push(report);
        }
        Ok(reports)
    }
}

/// Rows on their way into one table.
struct Import<'w> {
    way: &'w Way,
    decider: Decider,
    sender: Sender,
    dry_run: bool,
}

impl Import<'_> {
    async fn rows(
        &mut self,
        link: &mut Link,
        rows: Vec<Vec<Cell>>,
        columns: &[Field],
        report: &mut TableReplay,
    ) -> Result<(), ReplayError> {
        let table = &self.way.table;
        report.read += rows.len() as u64;
        let mut converted = Vec::with_capacity(rows.len());
        for row in rows {
            let name = decide::name_of(columns, &row);
            match cell::convert_row(row, columns, &table.columns) {
                Ok(row) => converted.push((name, row)),
                Err(reason) => report.refuse(name, reason),
            }
        }
        if self.decider.asks() {
            // A connection that is opened anew between calls and their answers would lose these.
            self.sender.finish(link, report).await?;
        }
        self.decider.look_up(link, table, converted.iter().map(|(_, row)| row.as_slice())).await?;
        for (name, row) in converted {
            match self.decider.decide(table, columns, &row) {
                Decision::Skip => report.skipped += 1,
                Decision::Refuse(reason) => report.refuse(name, reason),
                Decision::Apply => {
                    let mut bytes = Vec::new();
                    match cell::encode_row(&table.columns, &row, &mut bytes) {
                        Ok(()) if self.dry_run => report.applied += 1,
                        Ok(()) => self.sender.push(link, name, bytes, report).await?,
                        Err(reason) => report.refuse(name, reason),
                    }
                }
            }
        }
        Ok(())
    }

    async fn finish(&mut self, link: &mut Link, report: &mut TableReplay) -> Result<(), ReplayError> {
        self.sender.finish(link, report).await
    }
}

/// What [`restore_version`] did.
#[derive(Debug, Serialize)]
pub struct Restored {
    pub version_id: u64,
    /// The version came from the archive.
    pub imported: bool,
}

/// Brings one entity or relation back to what it was after a state version, which comes from the archive if the module
/// does not have it any more.
///
/// # Errors
/// When neither has it, or the module refuses.
pub async fn restore_version(
    archive: Result<Archive, ArchiveError>,
    config: &Config,
    version: u64,
) -> Result<Restored, ReplayError> {
    let name = config.spacetimedb_config.database.as_deref().unwrap_or_default();
    let mut link = Link::new(&config.spacetimedb_config, &config.server_config, name)?;
    let schema = link.schema().await?;
    let Some(Ok(table)) = schema.table("state_version") else {
        return Err(ReplayError::NoReducer { table: "state_version".into(), reducer: "restore_state_version".into() });
    };
    let imported = crate::export::rows::at(&mut link, table, version).await?.is_none();
    let refused = |said: String| ReplayError::NotRestored { version, said };
    if imported {
        let archive = archive.map_err(|error| match error {
            ArchiveError::Nothing(_) => ReplayError::NoVersion(version),
            error => error.into(),
        })?;
        let row = find_version(&archive, table, version).await?.ok_or(ReplayError::NoVersion(version))?;
        let mut arguments = 1u32.to_le_bytes().to_vec();
        cell::encode_row(&table.columns, &row, &mut arguments).map_err(refused)?;
        link.call("import_state_versions", arguments).await?;
        link.confirm().await?.map_err(refused)?;
    }
    link.call("restore_state_version", version.to_le_bytes().to_vec()).await?;
    let said = link.confirm().await?;
    link.close().await;
    said.map_err(refused)?;
    Ok(Restored { version_id: version, imported })
}

async fn find_version(archive: &Archive, table: &Table, version: u64) -> Result<Option<Vec<Cell>>, ReplayError> {
    for part in archive.parts("state_version").await?.into_iter().filter(|part| part.may_hold(version)) {
        let mut pieces = archive.read(&part).await?;
        let key = pieces.key.clone().unwrap_or_default();
        let index = pieces.columns.iter().position(|column| column.name == key).unwrap_or_default();
        while let Some(piece) = pieces.next().await? {
            if let Some(row) = piece.into_iter().find(|row| row.get(index).and_then(Cell::as_u64) == Some(version)) {
                let row = cell::convert_row(row, &pieces.columns, &table.columns);
                return row.map(Some).map_err(|reason| ReplayError::Columns { table: table.name.clone(), reason });
            }
        }
    }
    Ok(None)
}
