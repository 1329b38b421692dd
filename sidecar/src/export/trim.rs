//! Trimming: exported events leave the database, so that an event log does not grow without end.
//!
//! Invariants: no row is removed that exported files do not hold, by its content and not by its number alone: imports can
//! fill numbers that were trimmed. The files were read a moment before. Where events are streamed, none is removed that the
//! collector does not have.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use crate::config::Format;
use crate::database::cell::{Cell, convert_row};
use crate::database::reader::Reader;
use crate::database::schema::Table;
use crate::database::shape::Field;
use crate::export::archive::{Archive, Part, Pieces};
use crate::export::manifest::{Content, ExportManifest, Series};
use crate::export::rows::{Numbered, Rows};
use crate::export::spool::line_of;
use crate::export::{ExportError, Exporter, files, rows};
use crate::ids::ContentHash;
use crate::module_bindings::EventLog;
use crate::observe::cursor::{CursorFile, continue_from};
use crate::observe::events::export::Exporter as EventExporter;
use crate::repository::paths;

/// What was trimmed, and what ended it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trimmed {
    /// The last event that was removed, when any was.
    pub through: Option<u64>,
    /// Why events that are old enough were kept.
    pub kept: Option<String>,
}

impl Trimmed {
    fn stopped(through: Option<u64>, kept: Option<String>) -> Self {
        if let Some(reason) = &kept {
            tracing::warn!(event = "trim_stopped", reason, "events that are old enough stay in the database");
        }
        Self { through, kept }
    }
}

impl Exporter<'_> {
    /// Removes exported events that are older than `age` from the database, once they were compared with their files.
    pub(super) async fn trim(&mut self, age: Duration, state_dir: Option<&Path>) -> Result<Trimmed, ExportError> {
        let archive = Archive::open(self.repository, Some(self.database), None).await?;
        let schema = self.link.schema().await?;
        let table = self.find(&schema, "event_log")?.clone();
        let Some(first) = rows::first_from(&self.link, &table, 0).await? else { return Ok(Trimmed::default()) };
        let sent = match self.sent(state_dir).await? {
            Ok(sent) => sent,
            Err(reason) => return Ok(Trimmed::stopped(None, Some(reason))),
        };
        let mut covered = first;
        let mut kept = None;
        for part in archive.parts("event_log").await? {
            if paths::parse_export_manifest(&part.key).is_none_or(|(_, last)| last.min(part.through) < first) {
                continue;
            }
            let series = Series { database: self.database, table: "event_log", number: part.series };
            let manifest = series.read(self.repository, &part.key).await?;
            if self.is_young(&manifest, age) {
                break;
            }
            kept = self.lacks_formats(&manifest, &part);
            if kept.is_some() {
                break;
            }
            self.read_back(&series, &manifest, &part).await?;
            let last = manifest.content.numbers().1.min(part.through);
            let until = last.min(sent);
            if until >= covered {
                let differs = match self.is_sealed(&manifest) {
                    false => self.differing(&archive, &part, &table, &manifest, (covered, until)).await?,
                    true => self.differing_sealed(&table, &manifest, (covered, until)).await?,
                };
                let until = differs.map_or(Some(until), |number| number.checked_sub(1));
                for step in
                    until.filter(|until| *until >= covered).into_iter().flat_map(|until| trim_steps(covered, until))
                {
                    self.call_trim(step, age).await?;
                }
                kept = differs.map(differs_reason);
                covered = until.map_or(covered, |until| until.saturating_add(1).max(covered));
            }
            if kept.is_none() && until < last {
                kept = Some(format!("the collector has the events up to {sent} only"));
            }
            if kept.is_some() {
                break;
            }
        }
        self.note_trimmed(&table, first, covered, kept).await
    }

    /// Says what is gone, and notes it: events that appear below it later were exported by no step of then.
    async fn note_trimmed(
        &mut self,
        table: &Table,
        first: u64,
        covered: u64,
        kept: Option<String>,
    ) -> Result<Trimmed, ExportError> {
        let left = rows::first_from(&self.link, table, 0).await?;
        let through =
            left.map_or(Some(covered), Some).and_then(|left| left.checked_sub(1)).filter(|last| *last >= first);
        if let Some(through) = through {
            let series = Series::newest(self.repository, self.database, "event_log").await?;
            let mut positions = series.positions(self.repository).await?;
            positions.trimmed = Some(through);
            series.note_positions(self.repository, &positions).await?;
        }
        Ok(Trimmed::stopped(through, kept))
    }

    /// The last event that the collector has, where events are streamed; or why that is not known.
    async fn sent(&self, state_dir: Option<&Path>) -> Result<Result<u64, String>, ExportError> {
        let telemetry = &self.config.telemetry;
        if !telemetry.events || !EventExporter::is_wanted(telemetry) {
            return Ok(Ok(u64::MAX));
        }
        let Some(state_dir) = state_dir else {
            let reason = "events are streamed, and how far is in the daemon's state directory; give --data-dir";
            return Ok(Err(reason.into()));
        };
        let database = self.config.spacetimedb_config.database.as_deref().unwrap_or_default();
        let Some(cursor) = CursorFile::new(state_dir, "events", database).read() else {
            return Ok(Err("events are streamed, and the collector has none of them yet".into()));
        };
        // A restore can have put other events in the place of those that were sent.
        let reader = Reader::new(&self.config.spacetimedb_config, &self.config.server_config, database)?;
        Ok(Ok(continue_from::<EventLog>(&reader, cursor).await?.sequence))
    }

    fn is_young(&self, manifest: &ExportManifest, age: Duration) -> bool {
        let age = jiff::SignedDuration::try_from(age).unwrap_or(jiff::SignedDuration::MAX);
        let oldest = self.clock.now().checked_sub(age).unwrap_or(jiff::Timestamp::MIN);
        let younger = |file: &crate::export::ExportFile| {
            file.date.to_zoned(TimeZone::UTC).is_ok_and(|midnight| midnight.timestamp() > oldest)
        };
        manifest.files.iter().all(younger)
    }

    fn is_sealed(&self, manifest: &ExportManifest) -> bool {
        !self.repository.keys.can_open() && manifest.files.iter().any(|file| file.object.ends_with(".age"))
    }

    /// Why the formats of these rows are not enough: one that is configured must have them; and every one, where the files
    /// cannot be read to make up for it later.
    fn lacks_formats(&self, manifest: &ExportManifest, part: &Part) -> Option<String> {
        let has = |format: &&Format| manifest.holds(**format) || part.copies.contains(format);
        let configured = &self.config.export.formats;
        let enough = match self.is_sealed(manifest) {
            false => configured.iter().any(|format| has(&format)),
            true => configured.iter().all(|format| has(&format)),
        };
        let (first, _) = manifest.content.numbers();
        let lacking: Vec<_> = configured.iter().filter(|format| !has(format)).map(|format| format.name()).collect();
        let names = lacking.join(" and ");
        (!enough)
            .then(|| format!("the events from {first} on were not exported as {names}, which export.formats names"))
    }

    async fn read_back(&self, series: &Series<'_>, step: &ExportManifest, part: &Part) -> Result<(), ExportError> {
        for file in &step.files {
            files::read_back(self.repository, file).await?;
        }
        for format in &part.copies {
            let copy = series.read(self.repository, &series.copy_key(step.content.numbers(), *format)).await?;
            for file in &copy.files {
                files::read_back(self.repository, file).await?;
            }
        }
        Ok(())
    }

    /// The first of the events with these numbers that the exported files do not hold as it is.
    async fn differing(
        &mut self,
        archive: &Archive,
        part: &Part,
        table: &Table,
        manifest: &ExportManifest,
        (from, until): (u64, u64),
    ) -> Result<Option<u64>, ExportError> {
        let mut exported = Exported::new(archive.read(part).await?);
        let mut rows = Rows::between(from, until);
        loop {
            let read = rows.next(&mut self.link, table).await?;
            if read.is_empty() {
                return Ok(None);
            }
            let convert =
                |(number, row)| (number, convert_row(row, &table.columns, &manifest.columns).unwrap_or_default());
            if let Some(number) = exported.differing(read.into_iter().map(convert).collect()).await? {
                return Ok(Some(number));
            }
        }
    }

    /// The same where the files cannot be opened: the step's last row must be there, none may be too many, and none may be
    /// from below what was trimmed before.
    async fn differing_sealed(
        &mut self,
        table: &Table,
        manifest: &ExportManifest,
        (from, until): (u64, u64),
    ) -> Result<Option<u64>, ExportError> {
        let series = Series::newest(self.repository, self.database, "event_log").await?;
        let trimmed = series.positions(self.repository).await?.trimmed;
        let (first, last) = manifest.content.numbers();
        let hashing = self.repository.hashing()?;
        let Content::Range { last_row, .. } = &manifest.content else { return Ok(Some(from)) };
        if trimmed.is_some_and(|trimmed| from <= trimmed) || until < last {
            return Ok(Some(from));
        }
        let (mut rows, mut count, mut hash) = (Rows::between(from, until), 0, ContentHash::of(&[]));
        loop {
            let read = rows.next(&mut self.link, table).await?;
            let Some((_, newest)) = read.last() else { break };
            count += read.len() as u64;
            let newest = convert_row(newest.clone(), &table.columns, &manifest.columns).unwrap_or_default();
            hash = hashing.name_of(&line_of(&manifest.columns, &newest));
        }
        let all = if from <= first { count == manifest.rows } else { count <= manifest.rows };
        Ok((!all || hash != *last_row).then_some(from))
    }

    async fn call_trim(&mut self, through: u64, age: Duration) -> Result<(), ExportError> {
        let mut arguments = through.to_le_bytes().to_vec();
        arguments.extend(age.as_secs().to_le_bytes());
        self.link.call("trim_event_log", arguments).await?;
        self.link.confirm().await?.map_err(ExportError::Trim)
    }
}

fn differs_reason(number: u64) -> String {
    format!(
        "event {number} in the database is not in the exported files under its number, or cannot be compared with them; it was \
         imported after the export, most likely"
    )
}

/// The rows of a part, to be compared with those of the database.
struct Exported {
    pieces: Pieces,
    number: Option<usize>,
    /// Read and not compared.
    waiting: VecDeque<Vec<Cell>>,
}

impl Exported {
    fn new(pieces: Pieces) -> Self {
        let number = pieces.columns.iter().position(|column| Some(&column.name) == pieces.key.as_ref());
        Self { pieces, number, waiting: VecDeque::new() }
    }

    /// The number of the first of `rows` that is not here as it is. Numbers only rise, from call to call too.
    async fn differing(&mut self, rows: Numbered) -> Result<Option<u64>, ExportError> {
        let mut pairs = Vec::with_capacity(rows.len());
        for (number, row) in rows {
            let Some(exported) = self.take(number).await? else { return Ok(Some(number)) };
            pairs.push((number, row, exported));
        }
        let columns = self.pieces.columns.clone();
        let comparing = tokio::task::spawn_blocking(move || {
            pairs.into_iter().find(|(_, row, exported)| !same(&columns, row, exported)).map(|(number, ..)| number)
        });
        comparing.await.map_err(|error| ExportError::Worker(error.to_string()))
    }

    async fn take(&mut self, number: u64) -> Result<Option<Vec<Cell>>, ExportError> {
        loop {
            while let Some(row) = self.waiting.front() {
                let found = self.number.and_then(|index| row.get(index)?.as_u64());
                if found > Some(number) {
                    return Ok(None);
                }
                let row = self.waiting.pop_front();
                if found == Some(number) {
                    return Ok(row);
                }
            }
            match self.pieces.next().await? {
                Some(piece) => self.waiting.extend(piece),
                None => return Ok(None),
            }
        }
    }
}

/// Compared as text: formats keep no payload of NaN.
fn same(columns: &[Field], one: &[Cell], other: &[Cell]) -> bool {
    one.len() == columns.len() && line_of(columns, one) == line_of(columns, other)
}

/// Numbers up to which to trim, one after the other: one call must not hold the database for long.
fn trim_steps(first: u64, through: u64) -> impl Iterator<Item = u64> {
    const STEP: u64 = 5_000;
    (0..)
        .map(move |step: u64| first.saturating_add((step + 1) * STEP - 1))
        .take_while(move |at| *at < through)
        .chain([through])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::export::fixture::{DATABASE, exporter, repository, row};
    use crate::repository::crypto::Keyring;

    #[tokio::test]
    async fn rows_are_compared_by_content() {
        let (repository, config) = (repository(Keyring::default()).await, Config::default());
        let rows: Vec<_> = (1..=3_000).filter(|number| number % 7 != 0).map(|number| (number, "a")).collect();
        exporter(&repository, &config, &[Format::Parquet]).commit_rows(&rows).await;
        let archive = Archive::open(&repository, Some(DATABASE), None).await.expect("an archive");
        let part = archive.parts("event_log").await.expect("parts").remove(0);
        let number = |number: u64, text: &str| (number, row(number, text));
        for (database, expected) in [
            // The start was trimmed, and the rest is as it was exported.
            (vec![number(1_000, "a"), number(1_002, "a"), number(3_000, "a")], None),
            (vec![number(1, "a"), number(2, "b"), number(3, "b")], Some(2)),
            // A number that the export never had.
            (vec![number(6, "a"), number(7, "a")], Some(7)),
            (vec![number(3_000, "a"), number(3_001, "a")], Some(3_001)),
        ] {
            let mut exported = Exported::new(archive.read(&part).await.expect("rows"));
            let (one, two) = database.split_at(1);
            let mut found = exported.differing(one.to_vec()).await.expect("compare");
            if found.is_none() {
                found = exported.differing(two.to_vec()).await.expect("compare");
            }
            assert_eq!(found, expected);
        }
    }

    #[tokio::test]
    async fn only_rows_in_configured_formats_count() {
        let (repository, config) = (repository(Keyring::default()).await, Config::default());
        exporter(&repository, &config, &[Format::Ndjson]).commit_rows(&[(1, "a")]).await;
        let archive = Archive::open(&repository, Some(DATABASE), None).await.expect("an archive");
        let part = archive.parts("event_log").await.expect("parts").remove(0);
        let series = Series { database: DATABASE, table: "event_log", number: 1 };
        let manifest = series.read(&repository, &part.key).await.expect("a manifest");
        let lacks = |formats: &[Format]| {
            let mut config = Config::default();
            config.export.formats = formats.to_vec();
            exporter(&repository, &config, formats).lacks_formats(&manifest, &part)
        };
        let reason = lacks(&[Format::Parquet]).expect("a reason");
        assert!(reason.contains("parquet") && reason.contains("export.formats"), "{reason}");
        assert_eq!(lacks(&[Format::Ndjson]), None);
        assert_eq!(lacks(&[Format::Ndjson, Format::Parquet]), None);
    }
}
