//! What is kept beside exported rows: manifests, by which files count, plans, by which a broken export is mended, and how
//! far each format reaches.
//!
//! Invariant: the manifests of steps hold every row of a series once, in one format at least; a copy holds the rows of one
//! step in a format that the step lacks.

use std::collections::BTreeMap;

use jiff::Timestamp;
use jiff::civil::Date;
use object_store::path::Path as Key;
use serde::{Deserialize, Serialize};

use crate::config::Format;
use crate::database::shape::Field;
use crate::export::names::Folders;
use crate::ids::{ContentHash, Identity};
use crate::repository::{Repository, RepositoryError, paths};

/// The newest form of manifests that is known here.
pub const FORMAT: u32 = 1;

/// Files that were exported together. They count once this is written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExportManifest {
    pub format: u32,
    pub table: String,
    pub content: Content,
    pub rows: u64,
    pub exported_at: Timestamp,
    /// Raised by one when columns came in.
    pub schema_version: u32,
    pub columns: Vec<Field>,
    pub files: Vec<ExportFile>,
    #[serde(default, skip_serializing_if = "Folders::are_usual")]
    pub folders: Folders,
    /// The series that this one goes on from, in the first manifest of a series only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
}

impl ExportManifest {
    /// Returns true if its rows are in files of `format`.
    pub fn holds(&self, format: Format) -> bool {
        self.rows == 0 || self.files.iter().any(|file| file.format == format)
    }
}

/// Which rows a manifest stands for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// Every row of a table that only grows, by the numbers in the column `key`, both ends included.
    Range { key: String, first: u64, last: u64, last_row: ContentHash },
    /// The whole table as it was, by which it is known again when nothing changed.
    Capture { captured: u64, rows: ContentHash },
}

/// One file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExportFile {
    /// Its name in the repository.
    pub object: String,
    pub format: Format,
    pub date: Date,
    /// The numbers of its first and last row; of a capture, the rows' places.
    pub first: u64,
    pub last: u64,
    pub rows: u64,
    pub bytes: u64,
    /// Of the object's bytes.
    pub hash: ContentHash,
}

/// Where a series comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    pub series: u32,
    /// The last row of the parent that belongs to this history too.
    pub through: Option<u64>,
}

/// What an export is about to write. Whatever of it is there without a manifest is finished or taken away by the next.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExportPlan {
    /// The number of the last row, or the time of the capture.
    pub last: u64,
    pub objects: Vec<String>,
}

/// How far each format of a series reaches, so that not every manifest is read again; and what was trimmed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Positions {
    /// By a format's name, the last number up to which its files hold all that was exported.
    pub through: BTreeMap<String, u64>,
    /// The last number that was trimmed from the database.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trimmed: Option<u64>,
}

impl Positions {
    /// Is every row up to `last` noted as held in `format`?
    pub fn reach(&self, format: Format, last: u64) -> bool {
        self.through.get(format.name()).is_some_and(|through| *through >= last)
    }
}

/// The manifests of a series by name.
#[derive(Debug, Default)]
pub struct Names {
    /// In the order of their rows.
    pub steps: Vec<Key>,
    /// The numbers of the step whose rows a copy holds, and the copy's format.
    pub copies: Vec<((u64, u64), Format)>,
}

/// The files of one table that can be read as one; another series begins when histories part or columns change their
/// type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Series<'a> {
    pub database: Identity,
    pub table: &'a str,
    pub number: u32,
}

impl<'a> Series<'a> {
    /// The newest series of a table; the first when there is none.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn newest(repository: &Repository, database: Identity, table: &'a str) -> Result<Self, RepositoryError> {
        let names = repository.folders(&paths::export_manifests(&database)).await?;
        let numbers = names.iter().filter_map(|name| parse_series(name)).filter(|(of, _)| *of == table);
        Ok(Self { database, table, number: numbers.map(|(_, number)| number).max().unwrap_or(1) })
    }

    pub fn next(&self) -> Self {
        Self { number: self.number + 1, ..*self }
    }

    /// The folder's name: the table's, with the series' number after the first.
    pub fn name(&self) -> String {
        if self.number == 1 { self.table.to_owned() } else { format!("{}.{}", self.table, self.number) }
    }

    pub fn step_key(&self, (first, last): (u64, u64)) -> Key {
        paths::export_manifest(&self.database, &self.name(), first, last)
    }

    pub fn plan_key(&self) -> Key {
        paths::export_plan(&self.database, &self.name())
    }

    /// Every step's manifest by name, in the order of their rows.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn manifests(&self, repository: &Repository) -> Result<Vec<Key>, RepositoryError> {
        Ok(self.names(repository).await?.steps)
    }

    /// Every manifest by name.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn names(&self, repository: &Repository) -> Result<Names, RepositoryError> {
        let mut names = Names::default();
        for (key, _) in repository.list(&paths::export_series(&self.database, &self.name())).await? {
            if paths::parse_export_manifest(&key).is_some() {
                names.steps.push(key);
            } else if let Some((numbers, format)) = paths::parse_export_copy(&key)
                && let Some(format) = Format::named(format)
            {
                names.copies.push((numbers, format));
            }
        }
        Ok(names)
    }

    pub fn copy_key(&self, numbers: (u64, u64), format: Format) -> Key {
        paths::export_copy(&self.database, &self.name(), numbers, format.name())
    }

    /// How far each format reaches, as far as that was noted.
    ///
    /// # Errors
    /// When the note is damaged, or the store fails.
    pub async fn positions(&self, repository: &Repository) -> Result<Positions, RepositoryError> {
        match repository.get_document(&paths::export_positions(&self.database, &self.name())).await {
            Err(RepositoryError::Missing { .. }) => Ok(Positions::default()),
            found => found,
        }
    }

    /// Puts a new note in place of the old one.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn note_positions(&self, repository: &Repository, positions: &Positions) -> Result<(), RepositoryError> {
        let key = paths::export_positions(&self.database, &self.name());
        repository.delete(&key).await?;
        repository.put_document(&key, positions).await.map(drop)
    }

    /// # Errors
    /// When it is damaged or of a newer form, or the store fails.
    pub async fn read(&self, repository: &Repository, key: &Key) -> Result<ExportManifest, RepositoryError> {
        let manifest: ExportManifest = repository.get_document(key).await?;
        if manifest.format > FORMAT {
            return Err(RepositoryError::UnknownFormat { found: manifest.format, known: FORMAT });
        }
        Ok(manifest)
    }

    /// What an export that did not end was about to write. A plan whose manifest is there is done with, and taken away.
    ///
    /// # Errors
    /// When it is damaged, or the store fails.
    pub async fn plan(&self, repository: &Repository) -> Result<Option<ExportPlan>, RepositoryError> {
        let plan: ExportPlan = match repository.get_document(&self.plan_key()).await {
            Ok(plan) => plan,
            Err(RepositoryError::Missing { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let keys = self.manifests(repository).await?;
        let counted = keys.last().and_then(paths::parse_export_manifest).is_some_and(|(_, last)| plan.last <= last);
        if counted {
            repository.delete(&self.plan_key()).await?;
            return Ok(None);
        }
        Ok(Some(plan))
    }

    /// Takes away what an export that did not end has left, its files before its plan.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn abandon(&self, repository: &Repository, plan: &ExportPlan) -> Result<(), RepositoryError> {
        for object in &plan.objects {
            repository.delete(&object.as_str().into()).await?;
        }
        repository.delete(&self.plan_key()).await
    }
}

/// The table and the number that a series' folder tells.
pub fn parse_series(name: &str) -> Option<(&str, u32)> {
    // A submodule's table has a dot in its own name, and no table's name is a number.
    match name.rsplit_once('.').map(|(table, number)| (table, number.parse())) {
        Some((table, Ok(number))) => Some((table, number)),
        _ => Some((name, 1)),
    }
}

impl Content {
    pub fn numbers(&self) -> (u64, u64) {
        match self {
            Self::Range { first, last, .. } => (*first, *last),
            Self::Capture { captured, .. } => (*captured, *captured),
        }
    }
}
