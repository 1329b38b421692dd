//! Trimming: exported events leave the database, so that an event log does not grow for ever.
//!
//! Invariant: nothing is removed that a manifest does not name and whose files were not read back a moment before.

use jiff::tz::TimeZone;

use crate::export::archive::Archive;
use crate::export::manifest::Series;
use crate::export::{ExportError, Exporter, files, rows};
use crate::repository::paths;

impl Exporter<'_> {
    /// Removes exported events that are older than `age` from the database, once their files were read back. Returns the
    /// last number that is gone.
    pub(super) async fn trim(&mut self, age: std::time::Duration) -> Result<Option<u64>, ExportError> {
        let archive = Archive::open(self.repository, Some(self.database), None).await?;
        let schema = self.link.schema().await?;
        let table = self.find(&schema, "event_log")?.clone();
        let Some(first) = rows::first_from(&self.link, &table, 0).await? else { return Ok(None) };
        let mut covered = first;
        let age_of = jiff::SignedDuration::try_from(age).unwrap_or(jiff::SignedDuration::MAX);
        let oldest = self.clock.now().checked_sub(age_of).unwrap_or(jiff::Timestamp::MIN);
        for part in archive.parts("event_log").await? {
            if paths::parse_export_manifest(&part.key).is_none_or(|(_, last)| last.min(part.through) < first) {
                continue;
            }
            let series = Series { database: self.database, table: "event_log", number: part.series };
            let manifest = series.read(self.repository, &part.key).await?;
            let (begin, last) = manifest.content.numbers();
            let last = last.min(part.through);
            let young = manifest
                .files
                .iter()
                .all(|file| file.date.to_zoned(TimeZone::UTC).is_ok_and(|midnight| midnight.timestamp() > oldest));
            if young || begin > covered {
                break;
            }
            for file in &manifest.files {
                files::read_back(self.repository, file).await?;
            }
            for step in trim_steps(covered, last) {
                self.call_trim(step, age).await?;
            }
            covered = last.saturating_add(1);
        }
        let left = rows::first_from(&self.link, &table, 0).await?;
        Ok(left.map_or(Some(covered), Some).and_then(|left| left.checked_sub(1)).filter(|last| *last >= first))
    }

    async fn call_trim(&mut self, through: u64, age: std::time::Duration) -> Result<(), ExportError> {
        let mut arguments = through.to_le_bytes().to_vec();
        arguments.extend(age.as_secs().to_le_bytes());
        self.link.call("trim_event_log", arguments).await?;
        self.link.confirm().await?.map_err(ExportError::Trim)
    }
}

/// Numbers up to which to trim, one after the other: one call must not hold the database for long.
fn trim_steps(first: u64, through: u64) -> impl Iterator<Item = u64> {
    const STEP: u64 = 5_000;
    (0..)
        .map(move |step: u64| first.saturating_add((step + 1) * STEP - 1))
        .take_while(move |at| *at < through)
        .chain([through])
}
