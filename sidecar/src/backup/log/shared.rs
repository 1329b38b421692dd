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
