//! Exports: rows of a live table as files that query engines read as they are, every row once.
//!
//! A table that only grows is exported in steps, each of the rows that came since the step before; any other is captured
//! whole when it changed. Each format has its own position: rows that a step left out of a format are copied into it. What a step writes is planned first and counts once its manifest is written: a step that was
//! broken off is done again under the same names, and rows are never in two files. FORMAT.md describes the objects.
//!
//! Invariants: a manifest names only what is durable; files of one series read as one table; when histories part (a
//! restore) or a column changes its type, a new series begins and the old one stays.

pub mod archive;
mod capture;
pub mod columnar;
mod copies;
pub mod files;
#[cfg(test)]
mod fixture;
pub mod history;
pub mod manifest;
pub mod names;
pub mod ndjson;
pub(crate) mod rows;
pub mod spool;
mod trim;

use std::path::Path;
use std::sync::Arc;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use crate::clock::{Clock, Stopwatch};
use crate::config::{Config, Format};
use crate::database::cell::Cell;
use crate::database::link::{LARGEST_ANSWER, Link, LinkError};
use crate::database::schema::{Schema, Table};
use crate::database::shape::{self, Field, Shape};
use crate::export::archive::ArchiveError;
use crate::export::files::{file, upload};
use crate::export::manifest::{Content, ExportFile, ExportManifest, ExportPlan, Parent, Series};
use crate::export::names::{Folders, check_names};
use crate::export::rows::Rows;
use crate::export::spool::{FILE_BYTES, Finished, Layout, Spool, SpoolError, line_of};
use crate::export::trim::Trimmed;
use crate::ids::{ContentHash, Identity};
use crate::observe::server::SourceError;
use crate::repository::{Repository, RepositoryError};

/// A step ends when its rows as text are longer.
const STEP_BYTES: u64 = 64 << 20;
/// The column by whose date rows are filed, where a table has it.
const TIME: &str = "timestamp";

/// What can go wrong with an export.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Spool(#[from] SpoolError),
    #[error("the database has no table `{table}`; it has {known}")]
    NoTable { table: String, known: String },
    #[error("`{table}` is private and only the database's owner may read it; give the owner's token with --token-file")]
    Private { table: String },
    #[error("`{table}` is an event table: no table holds its rows, they are in the log and its archive alone")]
    EventTable { table: String },
    #[error("`{table}` is a view, which the module computes from tables; export those")]
    View { table: String },
    #[error("`{table}` cannot be exported: {reason}")]
    NotExportable { table: String, reason: String },
    #[error(
        "`{table}` has no unique column of type u64 and is no table that only grows; leave it out of export.append_only"
    )]
    NoSequence { table: String },
    #[error(
        "the columns of `{table}` changed in a way that its files cannot be read as one table ({reason}); give \
         --new-series to begin anew beside what was exported"
    )]
    SchemaChanged { table: String, reason: String },
    #[error("the columns of `{table}` changed while it was exported, by a publish most likely; export it again")]
    ChangedMeanwhile { table: String },
    #[error(
        "`{table}` has more in one piece than an answer of the server may have, {most}: give it a unique column of type u64 or a \
         primary key of text, by which it is read in ranges", most = crate::config::value::ByteSize(LARGEST_ANSWER as u64)
    )]
    TooLarge { table: String },
    #[error("a row of `{table}` is not understood: {reason}; was the module published a moment ago? Export it again")]
    Row { table: String, reason: String },
    #[error("`{table}` was exported up to {exported} already; --since is for a first export")]
    NotFirst { table: String, exported: u64 },
    #[error("{object} is not what was written ({reason}); nothing was trimmed; run the export again")]
    ReadBack { object: String, reason: String },
    #[error(
        "rows {first} to {last} of `{table}` were exported without {format}, the repository is encrypted, and the database no longer \
         has these rows as they were; name the repository's key in repository.identity_files for one export, or leave {format} out",
        format = .format.name()
    )]
    NotToBeCopied { table: String, first: u64, last: u64, format: Format },
    #[error("trim the event log: {0}")]
    Trim(String),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("a worker failed: {0}")]
    Worker(String),
}

impl ExportError {
    /// Would another try be in vain?
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Link(error) => error.is_permanent(),
            Self::Repository(error) => error.is_permanent(),
            Self::ChangedMeanwhile { .. } | Self::Row { .. } => false,
            _ => true,
        }
    }
}

/// What to export, and how.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExportOptions {
    /// Tables by name; every table that may be read when there are none.
    pub tables: Vec<String>,
    /// Configuration files too.
    pub configuration: bool,
    pub formats: Vec<Format>,
    /// Begin a new series where columns changed.
    pub new_series: bool,
    /// Leave out rows up to this number, in a first export.
    pub since: Option<u64>,
}

/// Where files of the server and of the daemon are, as far as that is known.
#[derive(Debug, Clone, Copy, Default)]
pub struct Places<'a> {
    /// The server's data directory.
    pub data_dir: Option<&'a Path>,
    /// The daemon's own directory, which says how far events were streamed.
    pub state_dir: Option<&'a Path>,
}

/// What was exported.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExportReport {
    pub database: Identity,
    pub tables: Vec<TableReport>,
    /// Event tables, which are not exported: no table holds their rows, they are in the log and its archive alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub event_tables: Vec<String>,
    /// Private tables that the token's identity may not read, where all were asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_readable: Vec<String>,
    /// The last event that was removed from the database, when any was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trimmed_through: Option<u64>,
    /// Why events that are old enough to be removed were kept, when any were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_trimmed: Option<String>,
    pub duration_ms: u64,
}

/// What was exported of one table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TableReport {
    pub table: String,
    /// The folder that its files are in.
    pub series: String,
    pub rows: u64,
    pub objects: u64,
    pub bytes: u64,
    /// The last number of all that was exported so far, of a table that only grows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub through: Option<u64>,
}

impl TableReport {
    /// Counts files of the same rows; a row counts once, whatever the number of formats.
    fn add(&mut self, files: &[ExportFile]) {
        let Some(format) = files.first().map(|file| file.format) else { return };
        self.rows += files.iter().filter(|file| file.format == format).map(|file| file.rows).sum::<u64>();
        self.objects += files.len() as u64;
        self.bytes += files.iter().map(|file| file.bytes).sum::<u64>();
    }
}

/// An export that is going on.
pub struct Exporter<'a> {
    repository: &'a Repository,
    config: &'a Config,
    options: ExportOptions,
    clock: Arc<dyn Clock>,
    link: Link,
    database: Identity,
}

/// Exports from the database that the configuration names. The repository must be open to write, under its lease.
///
/// # Errors
/// When a table cannot be exported; those before it are.
pub async fn export(
    repository: &Repository,
    config: &Config,
    options: ExportOptions,
    places: Places<'_>,
    clock: Arc<dyn Clock>,
) -> Result<ExportReport, ExportError> {
    let took = Stopwatch::start();
    let name = config.spacetimedb_config.database.as_deref().unwrap_or_default();
    let link = Link::new(&config.spacetimedb_config, &config.server_config, name)?;
    let database = link.database().identity().await.map_err(LinkError::from)?;
    let mut exporter = Exporter { repository, config, options, clock, link, database };
    let result = exporter.run(places).await;
    exporter.link.close().await;
    let Exported { tables, event_tables, not_readable, trimmed } = result?;
    let Trimmed { through: trimmed_through, kept: not_trimmed } = trimmed;
    let duration_ms = (took.elapsed_seconds() * 1000.0) as u64;
    Ok(ExportReport { database, tables, event_tables, not_readable, trimmed_through, not_trimmed, duration_ms })
}

/// What an export did.
struct Exported {
    tables: Vec<TableReport>,
    event_tables: Vec<String>,
    not_readable: Vec<String>,
    trimmed: Trimmed,
}

impl Exporter<'_> {
    async fn run(&mut self, places: Places<'_>) -> Result<Exported, ExportError> {
        let schema = self.link.schema().await?;
        let (mut reports, mut not_readable) = (Vec::new(), Vec::new());
        let (chosen, event_tables) = self.chosen(&schema);
        for name in chosen {
            let table = self.find(&schema, &name)?.clone();
            let append_only = self.config.export.append_only.contains(&name);
            let exported = if append_only { self.append(&table).await } else { self.capture(&table).await };
            let exported = match exported {
                Ok(report) if append_only => self.complete(&table, report).await,
                exported => exported,
            };
            match exported {
                Err(ExportError::Link(LinkError::Query { .. })) if table.private => {
                    // By name it was asked for; of all, those that may be read.
                    if self.options.tables.contains(&name) {
                        return Err(ExportError::Private { table: name });
                    }
                    not_readable.push(name);
                }
                exported => reports.push(exported?),
            }
        }
        if self.options.configuration {
            reports.push(self.configuration(places.data_dir).await?);
        }
        let trimmed = match self.config.export.trim_after {
            Some(age) if reports.iter().any(|report| report.table == "event_log") => {
                self.trim(age.0, places.state_dir).await?
            }
            _ => Trimmed::default(),
        };
        Ok(Exported { tables: reports, event_tables, not_readable, trimmed })
    }

    /// The tables asked for, or all that outlive a connection; of these, event tables apart.
    fn chosen(&self, schema: &Schema) -> (Vec<String>, Vec<String>) {
        if !self.options.tables.is_empty() || self.options.configuration {
            return (self.options.tables.clone(), Vec::new());
        }
        let is_bundled = schema.is_bundled();
        let lasting =
            |name: &&str| !is_bundled || !matches!(*name, "client_connection" | "import_run" | "sequence_counter");
        let is_stored = |name: &String| !matches!(schema.table(name), Some(Ok(table)) if table.is_event);
        schema.table_names().filter(lasting).map(str::to_owned).partition(is_stored)
    }

    fn find<'s>(&self, schema: &'s Schema, name: &str) -> Result<&'s Table, ExportError> {
        match schema.table(name) {
            Some(Ok(table)) if table.is_event => Err(ExportError::EventTable { table: name.into() }),
            Some(Ok(table)) => Ok(table),
            None if schema.is_view(name) => Err(ExportError::View { table: name.into() }),
            Some(Err(reason)) => Err(ExportError::NotExportable { table: name.into(), reason: reason.into() }),
            None => {
                let known = schema.table_names().collect::<Vec<_>>().join(", ");
                Err(ExportError::NoTable { table: name.into(), known })
            }
        }
    }

    /// Exports the rows that came since the last export, step by step.
    async fn append(&mut self, table: &Table) -> Result<TableReport, ExportError> {
        let name = table.name.clone();
        let Some(key) = table.sequence_column() else { return Err(ExportError::NoSequence { table: name }) };
        let key = key.to_owned();
        let newest = Series::newest(self.repository, self.database, &name).await?;
        let (series, mut cursor) = self.place(newest, table).await?;
        let mut report =
            TableReport { table: name.clone(), series: series.name(), rows: 0, objects: 0, bytes: 0, through: None };
        let mut plan = series.plan(self.repository).await?;
        let mut rows = cursor.rows(plan.as_ref().map_or(u64::MAX, |plan| plan.last));
        loop {
            let step = self.step(table, &mut rows).await?;
            // A publish in the middle would mix rows of two forms.
            if self.link.schema().await?.table(&name) != Some(Ok(table)) {
                return Err(ExportError::ChangedMeanwhile { table: name });
            }
            let done = step.rows == 0;
            if !done || plan.is_some() {
                let content =
                    Content::Range { key: key.clone(), first: step.first, last: step.last, last_row: step.hash };
                let redone = plan.is_some();
                let files = self.commit(&series, table, &cursor, content, step, plan.take()).await?;
                if let Some(files) = files {
                    report.add(&files);
                    cursor.last = files.iter().map(|file| file.last).max().or(cursor.last);
                    cursor.parent = None;
                }
                if redone {
                    rows = cursor.rows(u64::MAX);
                    continue;
                }
            }
            if done {
                break;
            }
        }
        report.through = cursor.last;
        Ok(report)
    }

    /// Where a table's export goes on: in the newest series behind its last row, or in a new one.
    async fn place<'t>(&mut self, newest: Series<'t>, table: &Table) -> Result<(Series<'t>, Cursor), ExportError> {
        let keys = newest.manifests(self.repository).await?;
        let Some(last_key) = keys.last() else {
            check_names(table)?;
            return Ok((newest, Cursor::first(table, self.options.since, None)));
        };
        let last = newest.read(self.repository, last_key).await?;
        let (_, exported) = last.content.numbers();
        let Content::Range { last_row, .. } = &last.content else {
            let reason = "it was captured whole before and is in export.append_only now".to_owned();
            return self.begin_series(newest, table, reason, None).await;
        };
        if self.options.since.is_some() {
            return Err(ExportError::NotFirst { table: table.name.clone(), exported });
        }
        if let Err(reason) = shape::extends(&last.columns, &table.columns) {
            // Rows of other columns are no longer known again: only where the last one still is, or was trimmed, does the new
            // series go on behind it. Otherwise it begins anew, so that nothing is missing in it.
            let known = self.known(table, &last.columns, exported, *last_row).await?;
            let through = (known != Some(false)).then_some(exported);
            return self.begin_series(newest, table, reason, through).await;
        }
        if let Some(parted) = self.parted(newest, &keys, table, &last.columns, exported, *last_row).await? {
            tracing::warn!(
                table = table.name,
                exported,
                common = ?parted,
                "the table was set back, by a restore most likely; its export goes on in a new series"
            );
            if let Some(plan) = newest.plan(self.repository).await? {
                newest.abandon(self.repository, &plan).await?;
            }
            let parent = Parent { series: newest.number, through: parted };
            return Ok((newest.next(), Cursor::first(table, parted, Some(parent))));
        }
        if let Some(reason) = self.hidden_column(&last, table) {
            return self.begin_series(newest, table, reason, Some(exported)).await;
        }
        let schema_version = last.schema_version + u32::from(last.columns != table.columns);
        Ok((newest, Cursor { last: Some(exported), schema_version, folders: last.folders, parent: None }))
    }

    /// The series after `newest`, if one was asked for; `through` is the last row that both share.
    async fn begin_series<'t>(
        &self,
        newest: Series<'t>,
        table: &Table,
        reason: String,
        through: Option<u64>,
    ) -> Result<(Series<'t>, Cursor), ExportError> {
        if !self.options.new_series {
            return Err(ExportError::SchemaChanged { table: table.name.clone(), reason });
        }
        if let Some(plan) = newest.plan(self.repository).await? {
            newest.abandon(self.repository, &plan).await?;
        }
        check_names(table)?;
        let parent = through.map(|_| Parent { series: newest.number, through });
        Ok((newest.next(), Cursor::first(table, through, parent)))
    }

    /// Did the table's history part from what was exported? If so, the last exported row that both have, if any.
    async fn parted(
        &mut self,
        series: Series<'_>,
        keys: &[object_store::path::Path],
        table: &Table,
        columns: &[Field],
        exported: u64,
        last_row: ContentHash,
    ) -> Result<Option<Option<u64>>, ExportError> {
        match self.known(table, columns, exported, last_row).await? {
            Some(true) => return Ok(None),
            Some(false) => {}
            // It is gone. Trimmed, if nothing is left before it.
            None => match rows::first_from(&self.link, table, 0).await? {
                Some(first) if first < exported => {}
                _ => return Ok(None),
            },
        }
        for key in keys.iter().rev().skip(1) {
            let manifest = series.read(self.repository, key).await?;
            if let Content::Range { last, last_row, .. } = manifest.content
                && self.known(table, &manifest.columns, last, last_row).await? == Some(true)
            {
                return Ok(Some(Some(last)));
            }
        }
        // Rows from before the first were trimmed before histories parted, and so belong to both.
        let first = rows::first_from(&self.link, table, 0).await?;
        Ok(Some(first.and_then(|first| first.checked_sub(1))))
    }

    /// Is the row with this number the one that was exported? `None` when there is none.
    async fn known(
        &mut self,
        table: &Table,
        columns: &[Field],
        number: u64,
        hash: ContentHash,
    ) -> Result<Option<bool>, ExportError> {
        let Some(row) = rows::at(&mut self.link, table, number).await? else { return Ok(None) };
        let row = crate::database::cell::convert_row(row, &table.columns, columns);
        let hashing = self.repository.hashing()?;
        Ok(Some(row.is_ok_and(|row| hashing.name_of(&line_of(columns, &row)) == hash)))
    }

    /// Reads rows into files until there are enough, or none.
    async fn step(&mut self, table: &Table, rows: &mut Rows) -> Result<Step, ExportError> {
        let mut spool = Spool::new(self.layout(&table.columns))?;
        let time = table.columns.iter().position(|column| column.name == TIME && column.shape == Shape::Timestamp);
        let today = date_of_micros(self.clock.now().as_microsecond());
        let (mut first, mut last) = (None, 0);
        let (mut hash, hashing) = (ContentHash::of(&[]), self.repository.hashing()?);
        while spool.text_bytes() < STEP_BYTES {
            let read = rows.next(&mut self.link, table).await?;
            let (Some((from, _)), Some((to, _))) = (read.first(), read.last()) else { break };
            first = first.or(Some(*from));
            last = *to;
            let columns = table.columns.clone();
            let writing = tokio::task::spawn_blocking(move || {
                for (number, row) in read {
                    let date = time.and_then(|index| date_of(row.get(index)?)).unwrap_or(today);
                    let line = line_of(&columns, &row);
                    if number == last {
                        hash = hashing.name_of(&line);
                    }
                    spool.push(date, number, row, &line)?;
                }
                Ok::<_, SpoolError>((spool, hash))
            });
            (spool, hash) = writing.await.map_err(|error| ExportError::Worker(error.to_string()))??;
        }
        Step::of(spool, first.unwrap_or(0), last, hash).await
    }

    /// Plans, writes, and writes the manifest. `None` when a plan turned out to be empty.
    async fn commit(
        &mut self,
        series: &Series<'_>,
        table: &Table,
        cursor: &Cursor,
        content: Content,
        step: Step,
        left_over: Option<ExportPlan>,
    ) -> Result<Option<Vec<ExportFile>>, ExportError> {
        let mut files = Vec::new();
        for part in &step.finished {
            for (format, _) in &part.files {
                files.push(file(self.repository, series, (&content, &cursor.folders), part, *format));
            }
        }
        let objects: Vec<String> = files.iter().map(|file| file.object.clone()).collect();
        if let Some(plan) = &left_over {
            series.abandon(self.repository, plan).await?;
        }
        if files.is_empty() && matches!(content, Content::Range { .. }) {
            return Ok(None);
        }
        let (_, last) = content.numbers();
        self.repository.put_document(&series.plan_key(), &ExportPlan { last, objects }).await?;
        let paths: Vec<_> = step.finished.iter().flat_map(|part| &part.files).map(|(_, path)| path.clone()).collect();
        for (file, path) in files.iter_mut().zip(&paths) {
            upload(self.repository, file, path).await?;
        }
        let manifest = ExportManifest {
            format: manifest::FORMAT,
            table: table.name.clone(),
            rows: step.rows,
            exported_at: self.clock.now(),
            schema_version: cursor.schema_version,
            columns: table.columns.clone(),
            files,
            folders: cursor.folders.clone(),
            parent: cursor.parent.clone(),
            content,
        };
        self.repository.put_document(&series.step_key(manifest.content.numbers()), &manifest).await?;
        self.repository.delete(&series.plan_key()).await?;
        Ok(Some(manifest.files))
    }

    fn layout(&self, columns: &[Field]) -> Layout {
        Layout {
            columns: columns.to_vec(),
            formats: self.options.formats.clone(),
            rows_per_file: self.config.export.rows_per_file,
            bytes_per_file: FILE_BYTES,
            level: self.config.repository.compression_level,
        }
    }
}

/// How far an export is.
struct Cursor {
    /// The last row that was exported.
    last: Option<u64>,
    schema_version: u32,
    folders: Folders,
    parent: Option<Parent>,
}

impl Cursor {
    /// At the start of a series.
    fn first(table: &Table, last: Option<u64>, parent: Option<Parent>) -> Self {
        Self { last, schema_version: 1, folders: Folders::beside(&table.columns), parent }
    }

    /// The rows behind it, up to `until`.
    fn rows(&self, until: u64) -> Rows {
        match self.last {
            None => Rows::between(0, until),
            Some(u64::MAX) => Rows::between(u64::MAX, 0),
            Some(last) => Rows::between(last + 1, until),
        }
    }
}

/// Files that are ready to be written.
struct Step {
    finished: Vec<Finished>,
    rows: u64,
    first: u64,
    last: u64,
    hash: ContentHash,
    /// Keeps the files.
    _spool: Spool,
}

impl Step {
    async fn of(mut spool: Spool, first: u64, last: u64, hash: ContentHash) -> Result<Self, ExportError> {
        let finishing = tokio::task::spawn_blocking(move || spool.finish().map(|finished| (finished, spool)));
        let (finished, spool) = finishing.await.map_err(|error| ExportError::Worker(error.to_string()))??;
        Ok(Self { finished, rows: spool.rows(), first, last, hash, _spool: spool })
    }
}

fn date_of(cell: &Cell) -> Option<Date> {
    match cell {
        Cell::Int(micros) => i64::try_from(*micros).ok().map(date_of_micros),
        _ => None,
    }
}

/// In UTC; what no calendar reaches is filed under its last day.
fn date_of_micros(micros: i64) -> Date {
    let time = jiff::Timestamp::from_microsecond(micros).unwrap_or(jiff::Timestamp::MAX);
    time.to_zoned(TimeZone::UTC).date()
}

impl From<SourceError> for ExportError {
    fn from(error: SourceError) -> Self {
        Self::Link(error.into())
    }
}
