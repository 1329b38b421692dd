//! What a time leaves open: an archive that ends before it, another timeline that reaches further, a server's clock that was
//! set back. Nothing of it stops a restore; the operator reads it before one.

use jiff::Timestamp;

use crate::datadir::commit::Frame;
use crate::ids::{Offset, TimelineId};
use crate::repository::chain::{LogChain, LogEntry};
use crate::repository::manifest::{DatabasePoint, RestorePoint, Timeline};
use crate::repository::timeline::ancestry;
use crate::repository::{Repository, RepositoryError};
use crate::restore::RestoreError;
use crate::restore::plan::at_time;
use crate::retention::needs::header_of;

/// Log objects whose headers are looked at for times that go back; of more, as many at even distances.
const LOOKS_MAX: usize = 128;
const READ_AHEAD: usize = 8;
/// Microseconds that times go back at the least where a clock was set back: calls that wait for each other go back by less.
const STEP_MIN: i64 = 1_000_000;

/// A time that was asked for, in one database, and the timeline on which it is looked for.
pub(super) struct Moment<'a> {
    pub repository: &'a Repository,
    pub database: &'a DatabasePoint,
    pub points: &'a [RestorePoint],
    pub timelines: &'a [Timeline],
    pub timeline: TimelineId,
    /// The operator named the timeline.
    pub is_chosen: bool,
    pub chain: &'a LogChain,
    pub time: Timestamp,
}

impl Moment<'_> {
    /// What the operator should know of a restore that ends at `offset`, whose latest time is `reached` (microseconds).
    pub async fn warnings(&self, offset: Offset, reached: i64) -> Result<Vec<String>, RestoreError> {
        let mut warnings = Vec::new();
        warnings.extend(self.end_of_archive(offset, reached));
        if !self.is_chosen {
            warnings.extend(self.other_timelines(offset, reached).await?);
        }
        warnings.extend(self.set_back_before(offset, reached).await?);
        warnings.extend(self.set_back_after(offset).await?);
        let name = &self.database.name;
        Ok(warnings.into_iter().map(|warning| format!("{name}: {warning}")).collect())
    }

    fn end_of_archive(&self, offset: Offset, reached: i64) -> Option<String> {
        // A restore point that was made later at the same transaction proves that nothing came between.
        let proves = |point: &&RestorePoint| {
            let is_here = |found: &DatabasePoint| {
                found.identity == self.database.identity && found.timeline == self.timeline && found.offset == offset
            };
            point.created_at >= self.time && point.databases.iter().any(is_here)
        };
        let ends = self.chain.last() == Some(offset) && reached < self.time.as_microsecond();
        (ends && !self.points.iter().any(|point| proves(&point))).then(|| {
            format!(
                "the archive of timeline {} ends at transaction {offset}, at {}, before {}; what came later is not in it",
                self.timeline,
                at(reached),
                self.time
            )
        })
    }

    /// Timelines on which more happened up to that time, and is not in the one that is restored.
    async fn other_timelines(&self, offset: Offset, reached: i64) -> Result<Vec<String>, RestoreError> {
        let mut warnings = Vec::new();
        for other in self.timelines.iter().map(|timeline| timeline.timeline).filter(|id| *id != self.timeline) {
            let chain = self.repository.log_chain(&self.database.identity, self.timelines, other).await?;
            let (last, time) = match at_time(self.repository, &chain, self.time).await {
                Ok((last, Some(time))) => (last, time),
                Ok(_) | Err(RestoreError::NothingToRestore(_)) => continue,
                Err(RestoreError::Repository(error)) if error.is_damage() => continue,
                Err(error) => return Err(error),
            };
            let shared = self.shared_with(other);
            if time > reached && shared.is_none_or(|shared| last > shared) {
                let since =
                    shared.map_or_else(|| "they share nothing".to_owned(), |at| format!("they part after {at}"));
                warnings.push(format!(
                    "timeline {other} goes up to transaction {last}, at {}, by that time, and timeline {} is restored, up to \
                     transaction {offset}, at {} ({since}); for the other one add `--timeline {}`",
                    at(time),
                    self.timeline,
                    at(reached),
                    other.0
                ));
            }
        }
        Ok(warnings)
    }

    /// The last transaction that this timeline and another have in common.
    fn shared_with(&self, other: TimelineId) -> Option<Offset> {
        let (ours, theirs) = (ancestry(self.timelines, self.timeline), ancestry(self.timelines, other));
        let both = ours.iter().flat_map(|(line, until)| {
            let same = theirs.iter().filter(|(found, _)| found.timeline == line.timeline);
            same.map(|(_, found)| until.unwrap_or(Offset(u64::MAX)).min(found.unwrap_or(Offset(u64::MAX))))
        });
        both.max()
    }

    /// Transactions that are restored and carry earlier times than one before them: they may be later than they say.
    async fn set_back_before(&self, offset: Offset, reached: i64) -> Result<Option<String>, RestoreError> {
        let mut since = None;
        for (last, time) in self.times_around(offset).await?.into_iter().filter(|(last, _)| *last <= offset) {
            match time {
                Some(time) if time >= reached => since = None,
                Some(time) if time.saturating_add(STEP_MIN) <= reached => since = since.or(Some(last)),
                _ => {}
            }
        }
        Ok(since.map(|first| {
            format!(
                "the server's clock was set back: transactions {first} to {offset} carry times before {}, which an earlier one \
                 has, and may have been made after {}; to leave them out restore `--to offset:{}`",
                at(reached),
                self.time,
                first.0.saturating_sub(1)
            )
        }))
    }

    /// Transactions that are not restored and carry times up to the one that was asked for.
    async fn set_back_after(&self, offset: Offset) -> Result<Option<String>, RestoreError> {
        let limit = self.time.as_microsecond();
        let mut found: Option<(Offset, Offset)> = None;
        let mut add = |at: Offset| found = Some(found.map_or((at, at), |(first, last)| (first.min(at), last.max(at))));
        let goes_back = |time: Option<i64>, latest: Option<i64>| {
            time.zip(latest).is_some_and(|(time, latest)| time <= limit && time.saturating_add(STEP_MIN) <= latest)
        };
        let mut latest = None;
        for (last, time) in self.times_around(Offset(offset.0.saturating_add(1))).await? {
            if last > offset && goes_back(time, latest) {
                add(last);
            }
            latest = latest.max(time);
        }
        let start = self.chain.entries.partition_point(|entry| entry.last <= offset);
        let later = self.chain.entries.get(start..).unwrap_or_default();
        let step = later.len().div_ceil(LOOKS_MAX).max(1);
        let looked_at: Vec<&LogEntry> = later.iter().step_by(step).collect();
        for some in looked_at.chunks(READ_AHEAD) {
            let requests: Vec<_> = some.iter().map(|entry| header_of(self.repository.clone(), entry.key())).collect();
            for (header, entry) in futures::future::join_all(requests).await.into_iter().zip(some) {
                let Some(header) = readable(header)? else { continue };
                if entry.first > offset && goes_back(header.times.first, header.times.max) {
                    add(entry.first);
                }
                // Of an object that a fork cuts, the last time is another history's.
                if entry.last == header.last && goes_back(header.times.last, header.times.max) {
                    add(entry.last);
                }
            }
        }
        Ok(found.map(|(first, last)| {
            format!(
                "the server's clock was set back: transactions {first} to {last}, or some of them, carry times up to {} and come \
                 after later ones; they are not restored: to have them restore `--to offset:{last}`",
                self.time
            )
        }))
    }

    /// The last offset and the time of each commit in the part that holds `offset`; empty where it cannot be read.
    async fn times_around(&self, offset: Offset) -> Result<Vec<(Offset, Option<i64>)>, RestoreError> {
        let Some(entry) = self.chain.range(offset, offset).first() else { return Ok(Vec::new()) };
        Ok(readable(self.times_in(entry, offset).await)?.unwrap_or_default())
    }

    async fn times_in(&self, entry: &LogEntry, offset: Offset) -> Result<Vec<(Offset, Option<i64>)>, RepositoryError> {
        let open = self.repository.open_log(entry).await?;
        let header = &open.header;
        let Some(index) = header.links.iter().position(|link| link.last >= offset) else { return Ok(Vec::new()) };
        let part = header.part_of_link(index);
        let stored = self.repository.log_part(&open, part).await?;
        let commits = header.decode_part(&open.key, part, &stored, &self.repository.keys)?;
        let (mut rest, mut times): (&[u8], _) = (&commits, Vec::new());
        while let Frame::Commit(commit) = Frame::parse(header.log_version, rest)
            && commit.last() <= entry.last
        {
            times.push((commit.last(), commit.inputs().map(|inputs| inputs.time_micros)));
            rest = &rest[commit.bytes.len()..];
        }
        Ok(times)
    }
}

/// What is damaged or encrypted says nothing here; the restore itself reports it.
fn readable<T>(result: Result<T, RepositoryError>) -> Result<Option<T>, RestoreError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_damage() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn at(micros: i64) -> Timestamp {
    Timestamp::from_microsecond(micros).unwrap_or_default()
}

#[cfg(test)]
mod tests;
