//! The history of one entity or relation: every version of it that the module or its exports still have.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::config::Config;
use crate::database::cell::{self, Cell};
use crate::database::link::{Link, LinkError};
use crate::database::schema::Table;
use crate::database::shape::Field;
use crate::export::archive::{Archive, ArchiveError};
use crate::export::{ExportError, ndjson};
use crate::ids::Identity;
use crate::repository::Repository;

const TABLE: &str = "state_version";

/// Whose history.
#[derive(Debug, Clone)]
pub struct Subject {
    /// `Entity` or `Relation`, as the module's column `subject` has it.
    pub kind: &'static str,
    pub id: String,
}

/// Versions in order, oldest first.
#[derive(Debug, Serialize)]
pub struct History {
    pub subject: &'static str,
    pub subject_id: String,
    pub versions: Vec<Version>,
}

/// One version, and who has it.
#[derive(Debug, Serialize)]
pub struct Version {
    pub in_module: bool,
    pub in_exports: bool,
    /// The columns of `state_version`, written as NDJSON exports write them.
    #[serde(flatten)]
    pub row: Map<String, Value>,
}

impl Version {
    /// A column as text.
    pub fn text(&self, column: &str) -> String {
        match self.row.get(column) {
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
            None => String::new(),
        }
    }
}

/// Reads the history of `subject` from the database that the configuration names, and from the exports in `repository`:
/// of the database `from`, or of this one, or of the only one that has any. Either alone will do.
///
/// # Errors
/// When what is there cannot be read, or neither module nor exports are to be had.
pub async fn history(
    repository: Option<&Repository>,
    from: Option<Identity>,
    config: &Config,
    subject: Subject,
) -> Result<History, ExportError> {
    let mut versions = BTreeMap::new();
    let live = in_module(config, &subject, &mut versions).await;
    let archive = match repository {
        Some(repository) => open(repository, from, live.as_ref().ok().copied()).await?,
        None => None,
    };
    match (&archive, live) {
        (Some(archive), Ok(_)) => in_exports(archive, &subject, &mut versions).await?,
        (Some(archive), Err(error)) => {
            tracing::warn!(%error, "the module is not asked; what was exported is told alone");
            in_exports(archive, &subject, &mut versions).await?;
        }
        (None, Ok(_)) => {}
        (None, Err(error)) => return Err(error),
    }
    Ok(History { subject: subject.kind, subject_id: subject.id, versions: versions.into_values().collect() })
}

async fn open(
    repository: &Repository,
    from: Option<Identity>,
    live: Option<Identity>,
) -> Result<Option<Archive>, ArchiveError> {
    match (Archive::open(repository, from, None).await, live) {
        (Ok(archive), _) => Ok(Some(archive)),
        (Err(ArchiveError::Several(exported)), Some(live)) if exported.contains(&live) => {
            Archive::open(repository, Some(live), None).await.map(Some)
        }
        // Somebody who names a database wants to know that it is not there.
        (Err(ArchiveError::Nothing(None)), _) => Ok(None),
        (Err(error), _) => Err(error),
    }
}

/// Takes the module's versions; returns its identity.
async fn in_module(
    config: &Config,
    subject: &Subject,
    versions: &mut BTreeMap<u64, Version>,
) -> Result<Identity, ExportError> {
    let name = config.spacetimedb_config.database.as_deref().unwrap_or_default();
    let mut link = Link::new(&config.spacetimedb_config, &config.server_config, name)?;
    let identity = link.database().identity().await?;
    let schema = link.schema().await?;
    let table: Table = match schema.table(TABLE) {
        Some(Ok(table)) => table.clone(),
        Some(Err(reason)) => return Err(ExportError::NotExportable { table: TABLE.into(), reason: reason.into() }),
        None => {
            let known = schema.table_names().collect::<Vec<_>>().join(", ");
            return Err(ExportError::NoTable { table: TABLE.into(), known });
        }
    };
    let id = subject.id.replace('\'', "''");
    let rows = link.query(&format!("SELECT * FROM {TABLE} WHERE subject_id = '{id}'")).await;
    link.close().await;
    let rows = rows.map_err(|error| match error {
        LinkError::TooLarge => ExportError::TooLarge { table: TABLE.into() },
        error => error.into(),
    })?;
    for row in rows {
        let row = cell::decode_row(&table.columns, &row)
            .map_err(|error| ExportError::Row { table: TABLE.into(), reason: error.to_string() })?;
        if let Some((number, row)) = of_subject(&table.columns, &row, subject) {
            versions.insert(number, Version { in_module: true, in_exports: false, row });
        }
    }
    Ok(identity)
}

async fn in_exports(
    archive: &Archive,
    subject: &Subject,
    versions: &mut BTreeMap<u64, Version>,
) -> Result<(), ExportError> {
    for part in archive.parts(TABLE).await? {
        let mut pieces = archive.read(&part).await?;
        while let Some(piece) = pieces.next().await? {
            for row in piece {
                let Some((number, row)) = of_subject(&pieces.columns, &row, subject) else { continue };
                let kept =
                    versions.entry(number).or_insert_with(|| Version { in_module: false, in_exports: false, row });
                kept.in_exports = true;
            }
        }
    }
    Ok(())
}

/// The row's number and columns, if it is a version of `subject`.
fn of_subject(columns: &[Field], row: &[Cell], subject: &Subject) -> Option<(u64, Map<String, Value>)> {
    let cell = |name: &str| {
        let index = columns.iter().position(|column| column.name == name)?;
        Some((&columns[index].shape, row.get(index)?))
    };
    let text = |name: &str| cell(name).and_then(|(shape, cell)| ndjson::text(shape, cell));
    if text("subject_id")? != subject.id || text("subject")? != subject.kind {
        return None;
    }
    let number = cell("version_id")?.1.as_u64()?;
    let mut line = Vec::new();
    ndjson::write_row(columns, row, &mut line);
    Some((number, serde_json::from_slice(&line).ok()?))
}
