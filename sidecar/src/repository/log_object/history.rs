//! The history hash: a hash over the commits of a history, one after another, however they were cut into objects.
//!
//! A link's chain hash depends on how many commits a flush happened to take. The history hash does not: it takes each
//! commit's first offset, length and checksum. Two objects that cover a range with the same commits have the same history
//! hash at every commit they share, so either can stand for the other.
//!
//! Invariant: equal history hashes at one offset mean the same number of commits before it, each with the same offset, the
//! same length and the same CRC32C. The bytes themselves are proven by the chain hash of the object that holds them.

use crate::ids::{ContentHash, Identity, Offset};
use crate::repository::hashing::Hashing;

/// Where a commit's header has the number of its transactions.
const fn count_at(log_version: u8) -> usize {
    if log_version == 0 { 8 } else { 16 }
}

/// The history hash before the first commit of a database.
pub(super) fn origin(database: &Identity) -> ContentHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"inner-universe history 1").update(&database.0);
    ContentHash(*hasher.finalize().as_bytes())
}

/// The history hash where objects of format version 1 end, which have none: their chain hash stands for what came before.
pub(super) fn after_chain(chain: &ContentHash) -> ContentHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"inner-universe history after chain 1").update(&chain.0);
    ContentHash(*hasher.finalize().as_bytes())
}

/// A place between two commits of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boundary {
    /// The first and the last transaction of the commit.
    pub first: Offset,
    pub last: Offset,
    /// Where the commit ends in the run.
    pub end: usize,
    /// The history hash after the commit.
    pub history: ContentHash,
}

/// Walks the commits of a run. Frames are taken as they are: whether they are whole is checked elsewhere. Ends early where the
/// bytes cannot be commits.
pub fn walk(
    before: ContentHash,
    log_version: u8,
    commits: &[u8],
    hashing: Hashing,
) -> impl Iterator<Item = Boundary> + '_ {
    let (count_at, len_at) = (count_at(log_version), count_at(log_version) + 2);
    let header = len_at + 4;
    let (mut history, mut at) = (before, 0usize);
    std::iter::from_fn(move || {
        let frame = commits.get(at..)?;
        let first = frame.get(..8)?;
        let len = u32::from_le_bytes(frame.get(len_at..header)?.try_into().ok()?) as usize;
        let end = header.checked_add(len)?;
        let checksum = frame.get(end..end.checked_add(4)?)?;
        let whole = end + 4;
        let mut input = [0; 32 + 8 + 8 + 4];
        input[..32].copy_from_slice(&history.0);
        input[32..40].copy_from_slice(first);
        input[40..48].copy_from_slice(&(whole as u64).to_le_bytes());
        input[48..].copy_from_slice(checksum);
        history = hashing.name_of(&input);
        at += whole;
        let first = u64::from_le_bytes(first.try_into().ok()?);
        let count = u16::from_le_bytes(frame.get(count_at..len_at)?.try_into().ok()?);
        let last = Offset(first.saturating_add(u64::from(count).saturating_sub(1)));
        Some(Boundary { first: Offset(first), last, end: at, history })
    })
}

/// The history hash after a run of whole commits.
pub(super) fn after(before: ContentHash, log_version: u8, commits: &[u8], hashing: Hashing) -> ContentHash {
    walk(before, log_version, commits, hashing).last().map_or(before, |boundary| boundary.history)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datadir::commit::encode;

    #[test]
    fn cuts_do_not_change_the_history_hash() {
        for version in [0, 1] {
            let commits: Vec<Vec<u8>> =
                (0..9u8).map(|n| encode(version, Offset(u64::from(n)), 0, 1, &vec![n; usize::from(n) * 7])).collect();
            let start = origin(&Identity([3; 32]));
            let after = |before, commits: &[u8]| after(before, version, commits, Hashing::Plain);
            let whole = after(start, &commits.concat());
            for cut in 0..=commits.len() {
                let first = after(start, &commits[..cut].concat());
                assert_eq!(after(first, &commits[cut..].concat()), whole, "cut at {cut}");
            }
            let other = encode(version, Offset(4), 0, 1, &[9; 28]);
            let mut changed = commits.clone();
            changed[4] = other;
            assert_ne!(after(start, &changed.concat()), whole);
            assert_ne!(after(start, &commits[..8].concat()), whole);
        }
    }

    #[test]
    fn bytes_that_are_not_commits_end_the_walk() {
        let commits = encode(1, Offset(0), 0, 1, b"records");
        for cut in 0..commits.len() {
            assert_eq!(walk(ContentHash([0; 32]), 1, &commits[..cut], Hashing::Plain).count(), 0, "cut at {cut}");
        }
        assert_eq!(walk(ContentHash([0; 32]), 1, &[0xff; 64], Hashing::Plain).count(), 0);
    }
}
