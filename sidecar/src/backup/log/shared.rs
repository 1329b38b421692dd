//! How far the log on the disk and the archive are of one history: decided by content, never by names or times.

use std::path::Path;

use crate::backup::{BackupError, READ_SIZE, blocking};
use crate::datadir::DataDirError;
use crate::datadir::log::{LogReader, segments};
use crate::ids::{Offset, TimelineId};
use crate::repository::Repository;
use crate::repository::chain::LogEntry;
use crate::repository::hashing::Hashing;
use crate::repository::log_object::{ChainTip, LogHeader, link};

/// The youngest object and link that the log at `dir` still agrees with. Objects before it agree too, since each link's
/// hash covers the one before; so the search halves. Objects that lie wholly before the log's start prove nothing.
pub(super) async fn find_fork(
    repository: &Repository,
    dir: &Path,
    entries: &[LogEntry],
    log_start: Offset,
) -> Result<Option<(TimelineId, ChainTip)>, BackupError> {
    let hashing = repository.hashing()?;
    let reached = entries.partition_point(|entry| entry.last < log_start);
    let mut left: Vec<&LogEntry> = entries.iter().skip(reached).collect();
    let mut best = None;
    while !left.is_empty() {
        let middle = left.len() / 2;
        let entry = left[middle];
        let header = match repository.log_header(&entry.key()).await {
            Ok(header) => header,
            // It tells nothing: the fork is looked for among the others.
            Err(error) if error.is_damage() => {
                left.remove(middle);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        // An object that an earlier fork leaves in its middle holds another history behind that fork.
        let counts = header.links.partition_point(|link| link.last <= entry.last);
        if counts == 0 {
            // So does one that is left inside its first link.
            left.remove(middle);
            continue;
        }
        let shared = shared_links(dir, &header, hashing).await?.unwrap_or(0).min(counts);
        if let Some(tip) = shared.checked_sub(1).and_then(|last| header.tip_at(last))
            && best.is_none_or(|(_, before): (_, ChainTip)| before.next < tip.next)
        {
            best = Some((entry.timeline, tip));
        }
        if shared == counts {
            left.drain(..=middle);
        } else {
            left.truncate(middle);
        }
    }
    Ok(best)
}

/// How many of an object's links the log at `dir` agrees with, from the first on; `None` when the log starts after it.
pub(crate) async fn shared_links(
    dir: &Path,
    header: &LogHeader,
    hashing: Hashing,
) -> Result<Option<usize>, BackupError> {
    let (dir, header) = (dir.to_owned(), header.clone());
    Ok(blocking(move || match segments(&dir)?.first() {
        Some(segment) if segment.first > header.last => Ok(None),
        Some(segment) if segment.first > header.first => {
            count_links_from_inside(&dir, &header, segment.first, hashing).map(Some)
        }
        Some(_) => count_links_by_chain(&dir, &header, 0, hashing).map(Some),
        None => Ok(Some(0)),
    })
    .await?
    .map_err(|error: DataDirError| error)?)
}

/// Does the log at `dir` hold link `index` of an object? `false` also when the log does not reach that far, in either direction.
pub(crate) async fn holds_link(
    dir: &Path,
    header: &LogHeader,
    index: usize,
    hashing: Hashing,
) -> Result<bool, BackupError> {
    let Some(expected) = header.links.get(index) else { return Ok(false) };
    let before = index.checked_sub(1).and_then(|before| header.tip_at(before));
    let single = LogHeader {
        first: before.map_or(header.first, |tip| tip.next),
        last: expected.last,
        previous_chain: before.map_or(header.previous_chain, |tip| tip.chain),
        links: vec![*expected],
        parts: Vec::new(),
        ..header.clone()
    };
    Ok(shared_links(dir, &single, hashing).await? == Some(1))
}

/// The log reaches back to the start of link `from`: every byte from there on is compared.
fn count_links_by_chain(dir: &Path, header: &LogHeader, from: usize, hashing: Hashing) -> Result<usize, DataDirError> {
    let before = from.checked_sub(1).and_then(|before| header.tip_at(before));
    let (first, mut chain) = before.map_or((header.first, header.previous_chain), |tip| (tip.next, tip.chain));
    let mut reader = LogReader::open(dir, first)?;
    if reader.position() != first {
        return Ok(from);
    }
    let (mut pending, mut batch_bytes) = (Vec::new(), Vec::new());
    for (agreed, expected) in header.links.iter().enumerate().skip(from) {
        let wanted = usize::try_from(expected.raw_len).unwrap_or(usize::MAX);
        while pending.len() < wanted {
            match reader.next_batch(READ_SIZE.min(wanted - pending.len()), &mut batch_bytes)? {
                Some(_) => pending.extend_from_slice(&batch_bytes),
                None => return Ok(agreed),
            }
        }
        chain = link(&chain, &pending[..wanted], hashing);
        if chain != expected.chain {
            return Ok(agreed);
        }
        pending.drain(..wanted);
    }
    Ok(header.links.len())
}

/// The log was pruned and starts inside the object. Of the link that it starts in only the last commit can be compared, which
/// carries offset, time and caller; of those after it every byte. Links before prove nothing by themselves.
fn count_links_from_inside(
    dir: &Path,
    header: &LogHeader,
    log_start: Offset,
    hashing: Hashing,
) -> Result<usize, DataDirError> {
    let started = header.links.partition_point(|link| link.last < log_start);
    let Some(cut) = header.links.get(started) else { return Ok(0) };
    let before = started.checked_sub(1).and_then(|before| header.tip_at(before));
    let is_whole = before.map_or(header.first, |tip| tip.next) == log_start;
    if !is_whole {
        let mut reader = LogReader::open(dir, cut.last)?;
        let mut commit = Vec::new();
        let is_same = reader
            .next_batch(1, &mut commit)?
            .is_some_and(|batch| batch.last == cut.last && hashing.name_of(&commit) == cut.last_commit);
        if !is_same {
            return Ok(0);
        }
    }
    let from = if is_whole { started } else { started + 1 };
    let agreed = count_links_by_chain(dir, header, from, hashing)?;
    // Where not even the first one agrees, nothing was compared that does.
    Ok(if is_whole && agreed == started { 0 } else { agreed })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datadir::commit::{SegmentHeader, encode};
    use crate::datadir::log::{Times, segment_name};
    use crate::ids::{ContentHash, Identity};
    use crate::repository::log_object::Link;

    const START: ContentHash = ContentHash([7; 32]);

    /// A commit that tells nothing but its offset and one byte, as those of SQL statements do.
    fn commit(offset: u64, byte: u8) -> Vec<u8> {
        encode(1, Offset(offset), 0, 1, &[byte; 40])
    }

    /// An object of transactions 0 to 99 whose links end at each ten.
    fn header(byte: impl Fn(u64) -> u8) -> LogHeader {
        let mut chain = START;
        let mut links = Vec::new();
        for first in (0..100).step_by(10) {
            let commits: Vec<u8> = (first..first + 10).flat_map(|offset| commit(offset, byte(offset))).collect();
            chain = link(&chain, &commits, Hashing::Plain);
            links.push(Link {
                last: Offset(first + 9),
                raw_len: commits.len() as u64,
                chain,
                last_commit: Hashing::Plain.name_of(&commit(first + 9, byte(first + 9))),
                max_time: None,
                history: None,
            });
        }
        LogHeader {
            sealed: false,
            database: Identity([1; 32]),
            timeline: TimelineId::FIRST,
            log_version: 1,
            level: 1,
            first: Offset(0),
            last: Offset(99),
            times: Times::default(),
            archived_at: 0,
            raw_len: links.iter().map(|link| link.raw_len).sum(),
            body_len: 0,
            previous_chain: START,
            previous_history: None,
            links,
            parts: Vec::new(),
            len: 0,
        }
    }

    async fn shared(from: u64, byte: impl Fn(u64) -> u8) -> Option<usize> {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes().to_vec();
        bytes.extend((from..100).flat_map(|offset| commit(offset, byte(offset))));
        std::fs::write(dir.path().join(segment_name(Offset(from))), bytes).unwrap();
        shared_links(dir.path(), &header(|_| 0), Hashing::Plain).await.unwrap()
    }

    #[tokio::test]
    async fn what_follows_a_log_that_starts_inside_an_object_is_compared_byte_for_byte() {
        let other = |changed: u64| move |offset| u8::from(offset == changed);
        for from in [0, 60, 64] {
            assert_eq!(shared(from, other(1000)).await, Some(10), "the same from {from} on");
            // Every commit after it is the same, the last one too.
            assert_eq!(shared(from, other(85)).await, Some(8), "another one at 85, from {from} on");
        }
        assert_eq!(shared(60, other(60)).await, Some(0), "nothing that was compared agrees");
        assert_eq!(shared(64, other(69)).await, Some(0));
        assert_eq!(shared(0, other(3)).await, Some(0));
    }
}
