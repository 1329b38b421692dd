//! Exported rows, read as one table: across steps, and across series back to where histories parted.

use bytes::Bytes;
use object_store::path::Path as Key;
use tokio::sync::mpsc;

use crate::config::Format;
use crate::database::cell::Cell;
use crate::database::shape::Field;
use crate::export::files;
use crate::export::manifest::{Content, ExportFile, Names, Series, parse_series};
use crate::ids::Identity;
use crate::repository::{Repository, RepositoryError, paths};

/// Rows that are in memory between a file and who reads them, in pieces.
const AHEAD: usize = 2;

/// What can go wrong with exported rows.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("{object} is not understood: {reason}; export the table again, or replay the other format with --format")]
    File { object: String, reason: String },
    #[error("the repository holds exports of {}; name one with --from", list(.0))]
    Several(Vec<Identity>),
    #[error("the repository holds no exports{}", .0.map(|database| format!(" of {database}")).unwrap_or_default())]
    Nothing(Option<Identity>),
}

fn list(databases: &[Identity]) -> String {
    databases.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The exports of one database.
#[derive(Clone)]
pub struct Archive {
    repository: Repository,
    pub database: Identity,
    /// The format to read where there are several; either when none is named.
    format: Option<Format>,
}

/// One manifest's part of a table.
#[derive(Debug, Clone)]
pub struct Part {
    pub(super) key: Key,
    pub(super) series: u32,
    table: String,
    /// Rows behind it belong to another history.
    pub(super) through: u64,
    /// The formats in which copies hold its rows too.
    pub(super) copies: Vec<Format>,
}

impl Part {
    /// Can the row with this number be in it?
    pub fn may_hold(&self, number: u64) -> bool {
        number <= self.through
            && paths::parse_export_manifest(&self.key).is_some_and(|(first, last)| (first..=last).contains(&number))
    }
}

/// Rows of a part, in order.
pub struct Pieces {
    pub columns: Vec<Field>,
    /// The column of the numbers, of a table that only grows.
    pub key: Option<String>,
    receiver: mpsc::Receiver<Result<Vec<Vec<Cell>>, ArchiveError>>,
}

impl Archive {
    /// The exports of `database`, or of the only one that has any.
    ///
    /// # Errors
    /// When there are none, or of several databases.
    pub async fn open(
        repository: &Repository,
        database: Option<Identity>,
        format: Option<Format>,
    ) -> Result<Self, ArchiveError> {
        let mut exported = Vec::new();
        for candidate in repository.databases().await? {
            if database.is_none_or(|database| database == candidate)
                && !repository.folders(&paths::export_manifests(&candidate)).await?.is_empty()
            {
                exported.push(candidate);
            }
        }
        match exported.as_slice() {
            [] => Err(ArchiveError::Nothing(database)),
            [one] => Ok(Self { repository: repository.clone(), database: *one, format }),
            _ => Err(ArchiveError::Several(exported)),
        }
    }

    /// Every table with exports.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn tables(&self) -> Result<Vec<String>, ArchiveError> {
        let names = self.repository.folders(&paths::export_manifests(&self.database)).await?;
        let mut tables: Vec<_> =
            names.iter().filter_map(|name| parse_series(name)).map(|(table, _)| table.to_owned()).collect();
        tables.sort();
        tables.dedup();
        Ok(tables)
    }

    /// The parts of a table, oldest first; the newest capture of one that was captured whole.
    ///
    /// # Errors
    /// When a manifest is damaged or the store fails.
    pub async fn parts(&self, table: &str) -> Result<Vec<Part>, ArchiveError> {
        let mut series = Series::newest(&self.repository, self.database, table).await?;
        let (mut parts, mut through) = (Vec::new(), u64::MAX);
        loop {
            let Names { steps: keys, copies } = series.names(&self.repository).await?;
            let (Some(first_key), Some(last_key)) = (keys.first(), keys.last()) else { break };
            let copies_of = |key: &Key| {
                let numbers = paths::parse_export_manifest(key);
                copies.iter().filter(|(of, _)| Some(*of) == numbers).map(|(_, format)| *format).collect()
            };
            let part = |key: &Key| Part {
                key: key.clone(),
                series: series.number,
                table: table.to_owned(),
                through,
                copies: copies_of(key),
            };
            let last = series.read(&self.repository, last_key).await?;
            if matches!(last.content, Content::Capture { .. }) {
                return Ok(vec![part(self.newest_capture(&series, &keys).await?.unwrap_or(last_key))]);
            }
            let begins = |key: &Key| paths::parse_export_manifest(key).map_or(0, |(first, _)| first);
            let mut of_series: Vec<_> = keys.iter().filter(|key| begins(key) <= through).map(part).collect();
            of_series.append(&mut parts);
            parts = of_series;
            let first = series.read(&self.repository, first_key).await?;
            // Numbers of series fall, so this ends.
            let Some(parent) = first.parent.filter(|parent| parent.series < series.number) else { break };
            let Some(common) = parent.through else { break };
            through = through.min(common);
            series = Series { number: parent.series, ..series };
        }
        Ok(parts)
    }

    /// The newest capture in the format that is to be read.
    async fn newest_capture<'k>(&self, series: &Series<'_>, keys: &'k [Key]) -> Result<Option<&'k Key>, ArchiveError> {
        let Some(format) = self.format else { return Ok(keys.last()) };
        for key in keys.iter().rev() {
            if series.read(&self.repository, key).await?.holds(format) {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    /// Begins to read a part.
    ///
    /// # Errors
    /// When its manifest is damaged or the store fails.
    pub async fn read(&self, part: &Part) -> Result<Pieces, ArchiveError> {
        let series = Series { database: self.database, table: &part.table, number: part.series };
        let mut manifest = series.read(&self.repository, &part.key).await?;
        for format in &part.copies {
            let copy = series.copy_key(manifest.content.numbers(), *format);
            manifest.files.extend(series.read(&self.repository, &copy).await?.files);
        }
        let key = match &manifest.content {
            Content::Range { key, .. } => Some(key.clone()),
            Content::Capture { .. } => None,
        };
        let number = key.as_ref().and_then(|key| manifest.columns.iter().position(|column| column.name == *key));
        let columns = manifest.columns.clone();
        let (sender, receiver) = mpsc::channel(AHEAD);
        let (archive, through) = (self.clone(), part.through);
        tokio::spawn(async move {
            let mut files = manifest.files;
            files.sort_by_key(|file| (file.first, file.format.name()));
            let mut rest = files.as_slice();
            while let Some(file) = rest.first() {
                let same = rest.iter().take_while(|other| other.first == file.first).count();
                let (copies, others) = rest.split_at(same);
                rest = others;
                let fetched = match archive.fetch(copies).await {
                    Ok(fetched) => fetched,
                    Err(error) => return drop(sender.send(Err(error)).await),
                };
                let (columns, object) = (manifest.columns.clone(), fetched.0.object.clone());
                let rows = sender.clone();
                let reading = tokio::task::spawn_blocking(move || give(fetched, &columns, number, through, &rows));
                match reading.await {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(error) => {
                        let reason = error.to_string();
                        return drop(sender.send(Err(ArchiveError::File { object, reason })).await);
                    }
                }
            }
        });
        Ok(Pieces { columns, key, receiver })
    }

    /// One of the copies of the same rows: another format's where the first is damaged.
    async fn fetch(&self, copies: &[ExportFile]) -> Result<(ExportFile, Bytes), ArchiveError> {
        let mut last = None;
        for file in copies.iter().filter(|file| self.format.is_none_or(|format| file.format == format)) {
            match files::fetch(&self.repository, file).await {
                Ok(bytes) => return Ok((file.clone(), bytes)),
                Err(error @ (RepositoryError::Damaged { .. } | RepositoryError::Missing { .. })) => {
                    if copies.len() > 1 && self.format.is_none() {
                        tracing::warn!(%error, "another format of the same rows is read instead");
                    }
                    last = Some(error);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(match last {
            Some(error) => error.into(),
            None => ArchiveError::File {
                object: copies.first().map(|file| file.object.clone()).unwrap_or_default(),
                reason: "it is there in another format only".into(),
            },
        })
    }
}

/// Sends the rows of a file; `false` when nobody wants more, or more would make no sense.
fn give(
    (file, bytes): (ExportFile, Bytes),
    columns: &[Field],
    number: Option<usize>,
    through: u64,
    sender: &mpsc::Sender<Result<Vec<Vec<Cell>>, ArchiveError>>,
) -> bool {
    let belongs =
        |row: &Vec<Cell>| number.and_then(|index| row.get(index)?.as_u64()).is_none_or(|number| number <= through);
    let read = files::rows(&file, columns, bytes, |mut rows| {
        rows.retain(belongs);
        sender.blocking_send(Ok(rows)).map_err(|_| String::new())
    });
    match read {
        Ok(()) => true,
        Err(reason) => {
            let _ = sender.blocking_send(Err(ArchiveError::File { object: file.object, reason }));
            false
        }
    }
}

impl Pieces {
    /// Some rows; `None` at the end.
    ///
    /// # Errors
    /// When a file is damaged or the store fails.
    pub async fn next(&mut self) -> Result<Option<Vec<Vec<Cell>>>, ArchiveError> {
        self.receiver.recv().await.transpose()
    }
}
