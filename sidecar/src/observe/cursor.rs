//! How far a stream was sent, kept in the state directory.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::database::reader::{Reader, Sequenced};
use crate::durable::{self, FileError};
use crate::ids::ContentHash;
use crate::observe::server::SourceError;

/// Older places by which a history is known again, besides the newest.
const CHECKPOINTS: usize = 24;

/// What was sent last, and some places before it at growing distances.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cursor {
    /// Of events the sequence of the last one, of calls one past the last transaction. 0: none was sent.
    pub sequence: u64,
    /// Sequence and id, oldest first; the last is the one at `sequence`, unless that was skipped to.
    known: Vec<(u64, String)>,
    /// The server's time of the first call that was read, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<i64>,
}

impl Cursor {
    /// Everything up to `sequence`, where `id` stands, was sent.
    pub fn advance(&mut self, sequence: u64, id: &str) {
        self.sequence = sequence;
        self.known.push((sequence, id.to_owned()));
        if self.known.len() > CHECKPOINTS {
            self.thin();
        }
    }

    /// Nothing is between the cursor and `sequence`.
    pub fn skip_to(&mut self, sequence: u64) {
        self.sequence = self.sequence.max(sequence);
    }

    /// Newest first.
    pub fn checkpoints(&self) -> impl Iterator<Item = (u64, &str)> {
        self.known.iter().rev().map(|(sequence, id)| (*sequence, id.as_str()))
    }

    /// The cursor as it was at one of its checkpoints.
    pub fn back_to(&self, sequence: u64) -> Self {
        let known: Vec<_> = self.known.iter().filter(|(known, _)| *known <= sequence).cloned().collect();
        let newest = self.known.last().is_none_or(|(newest, _)| *newest <= sequence);
        Self { sequence: if newest { self.sequence } else { sequence }, known, since: self.since }
    }

    /// Drops the checkpoint whose neighbours are closest for their age, so that distances grow with age.
    fn thin(&mut self) {
        let newest = self.sequence;
        let cost = |index: usize| {
            let gap = self.known[index + 1].0 - self.known[index - 1].0;
            let age = newest.saturating_sub(self.known[index].0).max(1);
            gap as f64 / age as f64
        };
        let candidates = 1..self.known.len() - 1;
        if let Some(index) = candidates.min_by(|a, b| cost(*a).total_cmp(&cost(*b))) {
            self.known.remove(index);
        }
    }
}

/// Where to go on: the newest row of the cursor that is still part of this history. A restore may have taken some back.
///
/// # Errors
/// When the server cannot be asked.
pub async fn continue_from<R: Sequenced>(database: &Reader, known: Cursor) -> Result<Cursor, SourceError> {
    if known.sequence == 0 {
        return Ok(known);
    }
    let table = R::TABLE;
    let mut any_here = false;
    for (sequence, id) in known.checkpoints() {
        match database.at::<R>(sequence).await? {
            Some(row) if row.id() == id => {
                if sequence < known.sequence {
                    tracing::warn!(
                        table,
                        from = known.sequence,
                        to = sequence,
                        "the table was set back, by a restore most likely; the stream goes on from where histories part"
                    );
                }
                return Ok(known.back_to(sequence));
            }
            Some(_) => any_here = true,
            None => {}
        }
    }
    // Every row we know is gone. Trimmed from the start, if others follow; else the history is another one.
    if !any_here && database.first_after::<R>(known.sequence).await?.is_some() {
        return Ok(known);
    }
    tracing::warn!(table, "the table is another one than before; the stream begins at its start");
    Ok(Cursor::default())
}

/// `KIND-HASH.json`, one for each stream of each database.
pub struct CursorFile(PathBuf);

impl CursorFile {
    pub fn new(state_dir: &Path, kind: &str, database: &str) -> Self {
        let hash = ContentHash::of(database.as_bytes()).to_string();
        Self(state_dir.join(format!("{kind}-{}.json", &hash[..16])))
    }

    /// `None` when nothing was kept, or nothing that can be read: then everything is sent once more.
    pub fn read(&self) -> Option<Cursor> {
        let bytes = std::fs::read(&self.0).ok()?;
        match serde_json::from_slice(&bytes) {
            Ok(cursor) => Some(cursor),
            Err(error) => {
                tracing::warn!(%error, path = %self.0.display(), "the cursor cannot be read; everything is sent again");
                None
            }
        }
    }

    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, cursor: &Cursor) -> Result<(), FileError> {
        durable::replace(&self.0, &serde_json::to_vec(cursor).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_stay_few_and_reach_far_back_at_growing_distances() {
        let mut cursor = Cursor::default();
        for sequence in 1..=100_000u64 {
            cursor.advance(sequence, &format!("id-{sequence}"));
        }
        let known: Vec<u64> = cursor.checkpoints().map(|(sequence, _)| sequence).collect();
        assert!(known.len() <= CHECKPOINTS);
        assert_eq!((known[0], *known.last().expect("one")), (100_000, 1));
        // A history that was set back by any distance is known again without sending more than a multiple of it.
        for back in [1u64, 10, 100, 1000, 10_000] {
            let target = 100_000 - back;
            let found = known.iter().find(|sequence| **sequence <= target).expect("a checkpoint");
            assert!(100_000 - found <= back * 8 + 8, "{back}: {found}");
        }
        assert_eq!(cursor.back_to(known[3]).sequence, known[3]);
        assert_eq!(cursor.back_to(100_000), cursor);
    }
}
