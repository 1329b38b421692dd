//! Captures: a table as it is, written whole when it changed; configuration files as a table of their own. A format whose
//! newest capture is of other rows gets one of its own.
//!
//! Invariant: a capture is the whole table of one schema, or it is not written.

use std::path::Path;
use std::sync::Arc;

use jiff::civil::Date;

use crate::config::Format;
use crate::database::cell::Cell;
use crate::database::schema::Table;
use crate::database::shape::{self, Field, Shape};
use crate::export::manifest::{Content, ExportManifest, Series};
use crate::export::names::check_names;
use crate::export::rows::Whole;
use crate::export::spool::{Spool, SpoolError, line_of};
use crate::export::{Cursor, ExportError, Exporter, Step, TableReport, date_of_micros};
use crate::ids::ContentHash;

/// The configuration as a table.
pub const CONFIGURATION: &str = "sidecar_configuration";

impl Exporter<'_> {
    /// Exports a table as it is, unless that is what was exported last.
    pub(super) async fn capture(&mut self, table: &Table) -> Result<TableReport, ExportError> {
        let mut captured = self.begin_capture(table).await?;
        let mut reading = Whole::of(&self.link, table).await?;
        loop {
            let rows = reading.next(&mut self.link, table).await?;
            if rows.is_empty() {
                break;
            }
            captured = captured.with(rows).await?;
        }
        if self.link.schema().await?.table(&table.name) != Some(Ok(table)) {
            return Err(ExportError::ChangedMeanwhile { table: table.name.clone() });
        }
        self.end_capture(table, captured).await
    }

    async fn begin_capture(&self, table: &Table) -> Result<Captured, ExportError> {
        let newest = Series::newest(self.repository, self.database, &table.name).await?;
        if let Some(plan) = newest.plan(self.repository).await? {
            newest.abandon(self.repository, &plan).await?;
        }
        let last = match newest.manifests(self.repository).await?.last() {
            Some(key) => Some(newest.read(self.repository, key).await?),
            None => None,
        };
        let now = u64::try_from(self.clock.now().as_microsecond()).unwrap_or_default();
        // A clock that was set back must not hide what is newest.
        let before = last.as_ref().map_or(0, |last| last.content.numbers().1);
        let captured = if last.as_ref().is_some_and(|last| matches!(last.content, Content::Capture { .. })) {
            now.max(before + 1)
        } else {
            now
        };
        Ok(Captured {
            columns: Arc::from(table.columns.as_slice()),
            date: date_of_micros(i64::try_from(captured).unwrap_or_default()),
            spool: Spool::new(self.layout(&table.columns))?,
            hasher: blake3::Hasher::new(),
            captured,
            last,
        })
    }

    async fn end_capture(&mut self, table: &Table, rows: Captured) -> Result<TableReport, ExportError> {
        let Captured { spool, hasher, captured, last, .. } = rows;
        let newest = Series::newest(self.repository, self.database, &table.name).await?;
        let hash = self.repository.hashing()?.name(ContentHash(*hasher.finalize().as_bytes()));
        let mut series = newest;
        let mut cursor = Cursor::first(table, None, None);
        let mut formats = self.options.formats.clone();
        if let Some(last) = &last {
            let grew = matches!(last.content, Content::Range { .. });
            if grew || shape::extends(&last.columns, &table.columns).is_err() {
                let differs = shape::extends(&last.columns, &table.columns).err();
                let reason = differs.unwrap_or_else(|| "it was in export.append_only before".into());
                (series, cursor) = self.begin_series(newest, table, reason, None).await?;
            } else if let Some(reason) = self.hidden_column(last, table) {
                (series, cursor) = self.begin_series(newest, table, reason, None).await?;
            } else {
                formats = self.changed(&newest, table, hash).await?;
                if formats.is_empty() {
                    let series = series.name();
                    let report =
                        TableReport { table: table.name.clone(), series, rows: 0, objects: 0, bytes: 0, through: None };
                    return Ok(report);
                }
                cursor.schema_version = last.schema_version + u32::from(last.columns != table.columns);
                cursor.folders = last.folders.clone();
            }
        } else {
            check_names(table)?;
        }
        let mut step = Step::of(spool, captured, captured, hash).await?;
        for part in &mut step.finished {
            part.files.retain(|(format, _)| formats.contains(format));
        }
        let rows = step.rows;
        let content = Content::Capture { captured, rows: hash };
        let files = self.commit(&series, table, &cursor, content, step, None).await?.unwrap_or_default();
        let bytes = files.iter().map(|file| file.bytes).sum();
        let objects = files.len() as u64;
        Ok(TableReport { table: table.name.clone(), series: series.name(), rows, objects, bytes, through: None })
    }

    /// The formats of this export whose newest capture is not these rows.
    async fn changed(&self, series: &Series<'_>, table: &Table, hash: ContentHash) -> Result<Vec<Format>, ExportError> {
        let (mut changed, mut open) = (Vec::new(), self.options.formats.clone());
        for key in series.manifests(self.repository).await?.iter().rev() {
            if open.is_empty() {
                break;
            }
            let capture = series.read(self.repository, key).await?;
            let same = matches!(&capture.content, Content::Capture { rows, .. } if *rows == hash);
            let (held, others) = open.into_iter().partition::<Vec<_>, _>(|format| capture.holds(*format));
            if !same || capture.columns != table.columns {
                changed.extend(held);
            }
            open = others;
        }
        changed.extend(open);
        Ok(changed)
    }

    /// The sidecar's own configuration, without secrets, and the server's.
    pub(super) async fn configuration(&mut self, data_dir: Option<&Path>) -> Result<TableReport, ExportError> {
        let column = |name: &str| Field { name: name.into(), shape: Shape::String };
        let text = |text: &str| Cell::Text(text.into());
        let own = serde_json::to_string_pretty(self.config).map_err(|error| ExportError::Worker(error.to_string()))?;
        let mut rows = vec![vec![text("inner-universe"), text("configuration.json"), text(&own)]];
        if let Some(path) = data_dir.map(|dir| dir.join("config.toml"))
            && let Ok(server) = tokio::fs::read_to_string(&path).await
        {
            rows.push(vec![text("spacetimedb"), text("config.toml"), text(&server)]);
        }
        let columns = ["program", "name", "content"].map(column).into();
        let table = Table {
            name: CONFIGURATION.into(),
            columns,
            sequence: None,
            primary_key: None,
            private: true,
            is_event: false,
        };
        let captured = self.begin_capture(&table).await?.with(rows).await?;
        self.end_capture(&table, captured).await
    }
}

/// A capture that is being read: its rows are on disk.
struct Captured {
    columns: Arc<[Field]>,
    date: Date,
    spool: Spool,
    /// Over all rows as text.
    hasher: blake3::Hasher,
    /// When, in microseconds.
    captured: u64,
    /// The table's newest manifest.
    last: Option<ExportManifest>,
}

impl Captured {
    /// Takes further rows.
    async fn with(mut self, rows: Vec<Vec<Cell>>) -> Result<Self, ExportError> {
        let writing = tokio::task::spawn_blocking(move || {
            for row in rows {
                let line = line_of(&self.columns, &row);
                self.hasher.update(&line);
                let number = self.spool.rows();
                self.spool.push(self.date, number, row, &line)?;
            }
            Ok::<_, SpoolError>(self)
        });
        Ok(writing.await.map_err(|error| ExportError::Worker(error.to_string()))??)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::export::fixture::{DATABASE, exporter, repository, row, rows_by_archive, table};
    use crate::export::names::Folders;
    use crate::repository::Repository;
    use crate::repository::crypto::Keyring;

    async fn captured(repository: &Repository, formats: &[Format], rows: &[u64]) -> TableReport {
        let config = Config::default();
        let mut exporter = exporter(repository, &config, formats);
        let rows = rows.iter().map(|number| row(*number, "a")).collect();
        let capture = exporter.begin_capture(&table(&[])).await.expect("a capture");
        let capture = capture.with(rows).await.expect("rows");
        exporter.end_capture(&table(&[]), capture).await.expect("a capture")
    }

    /// The folders of all captures of a table with a column `Captured`, in a repository whose first capture has `first` as
    /// its columns and is from before folders could have other names.
    async fn folders(first: &[&str], new_series: bool) -> Result<Vec<String>, ExportError> {
        let (repository, config) = (repository(Keyring::default()).await, Config::default());
        let exporting = async |names: &[&str], new_series: bool| {
            let mut exporter = exporter(&repository, &config, &[Format::Ndjson]);
            exporter.options.new_series = new_series;
            let table = table(names);
            let capture = exporter.begin_capture(&table).await?;
            let mut cells = row(1, "a");
            cells.extend(names.iter().map(|name| Cell::Text((*name).into())));
            let capture = capture.with(vec![cells]).await?;
            exporter.end_capture(&table, capture).await
        };
        if !first.is_empty() {
            exporting(first, false).await?;
            let series = Series { database: DATABASE, table: "event_log", number: 1 };
            let key = series.manifests(&repository).await?.remove(0);
            let manifest = ExportManifest { folders: Folders::default(), ..series.read(&repository, &key).await? };
            repository.delete(&key).await?;
            repository.put_document(&key, &manifest).await?;
        }
        exporting(&["Captured", "other"], new_series).await?;
        let folder = format!("databases/{DATABASE}/exports/ndjson");
        let keys = repository.list(&folder.as_str().into()).await?;
        let part = |key: &str, at: usize| {
            key.split('/').nth(at).unwrap_or_default().split('=').next().unwrap_or_default().to_owned()
        };
        let mut found: Vec<_> =
            keys.iter().map(|(key, _)| format!("{} {}", part(key.as_ref(), 4), part(key.as_ref(), 6))).collect();
        found.sort();
        Ok(found)
    }

    #[tokio::test]
    async fn a_column_is_never_hidden_by_a_new_series_folder() {
        assert_eq!(folders(&[], false).await.expect("files"), ["event_log export_captured"]);
        // A series that is there keeps its folders where it always had the column, and refuses one that comes in.
        let kept = folders(&["Captured"], false).await.expect("files");
        assert_eq!(kept, ["event_log captured", "event_log export_captured"]);
        let refused = folders(&["other"], false).await.expect_err("a refusal").to_string();
        assert!(refused.contains("`Captured`") && refused.contains("--new-series"), "{refused}");
        let begun = folders(&["other"], true).await.expect("files");
        assert_eq!(begun, ["event_log captured", "event_log.2 export_captured"]);
    }

    #[tokio::test]
    async fn columns_that_differ_by_case_are_refused() {
        let (repository, config) = (repository(Keyring::default()).await, Config::default());
        let mut exporter = exporter(&repository, &config, &[Format::Parquet]);
        let table = table(&["Event_Id"]);
        let capture = exporter.begin_capture(&table).await.expect("a capture");
        let refused = exporter.end_capture(&table, capture).await.expect_err("a refusal").to_string();
        assert!(refused.contains("`event_id`") && refused.contains("`Event_Id`"), "{refused}");
    }

    #[tokio::test]
    async fn each_format_is_captured_when_it_differs() {
        let repository = repository(Keyring::default()).await;
        let both = [Format::Ndjson, Format::Parquet];
        for (formats, rows, objects) in [
            (&both[..1], &[1, 2][..], 1),
            (&both[..1], &[1, 2], 0),
            (&both[1..], &[1, 2], 1),
            (&both, &[1, 2], 0),
            (&both[..1], &[1, 2, 3], 1),
            (&both, &[1, 2, 3], 1),
            (&both, &[1, 2, 3, 4], 2),
            (&both, &[1, 2, 3, 4], 0),
        ] {
            let report = captured(&repository, formats, rows).await;
            assert_eq!(report.objects, objects, "{formats:?} {rows:?}");
            let rows: Vec<_> = rows.iter().map(|number| row(*number, "a")).collect();
            for format in formats {
                assert_eq!(rows_by_archive(&repository, Some(*format)).await, rows, "{formats:?}");
            }
        }
    }
}
