//! Log objects: runs of commits, byte for byte as in the server's log, behind a header that proves them.
//!
//! The body is a row of parts, each one zstd frame, sealed if the repository is, so that a large object is read part by
//! part. The header holds each part's hash, so a stored object can be checked without any key; and a chain of links, each a
//! BLAKE3 hash over the link before and the commits it covers, so that a gap, a swap or a repetition shows when objects are
//! put side by side. Beside the chain, which depends on where runs were cut, each link has a history hash, which does not; see
//! [`history`]. Compaction keeps both.

mod cut;
mod header;
pub mod history;
mod merge;

use object_store::path::Path as Key;

use crate::buffers::Buffer;
use crate::datadir::bytes::Malformed;
use crate::datadir::commit::Frame;
use crate::datadir::log::{Batch, Times};
use crate::ids::{ContentHash, Identity, Offset, TimelineId};
use crate::repository::crypto::{CryptoError, Keyring};
use crate::repository::hashing::Hashing;
use crate::repository::{InObject, RepositoryError, codec, paths};

pub use cut::{PartSpan, Place};
pub use header::{HEADER_READ, Link, LogHeader, Part};
pub(crate) use merge::Merge;

/// Where a chain stands: what the next object continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainTip {
    /// The next object's first offset.
    pub next: Offset,
    pub chain: ContentHash,
    /// The latest time so far.
    pub max_time: Option<i64>,
    /// The hash of the last commit; `None` at a beginning.
    pub last_commit: Option<ContentHash>,
    /// The history hash: see [`history`].
    pub history: ContentHash,
}

impl ChainTip {
    /// The start of a database's first timeline, or of one after a gap.
    pub fn origin(database: &Identity, start: Offset) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"inner-universe log chain 1").update(&database.0);
        let chain = ContentHash(*hasher.finalize().as_bytes());
        Self { next: start, chain, max_time: None, last_commit: None, history: history::origin(database) }
    }

    /// After one more run of commits.
    pub fn extend(&self, batch: &Batch, commits: &[u8], hashing: Hashing) -> Self {
        Self {
            next: Offset(batch.last.0 + 1),
            chain: link(&self.chain, commits, hashing),
            max_time: self.max_time.max(batch.times.max),
            last_commit: Some(hashing.name_of(&commits[commits.len().saturating_sub(batch.last_len)..])),
            history: history::after(self.history, batch.log_version, commits, hashing),
        }
    }
}

/// The chain hash after `commits`.
pub fn link(previous: &ContentHash, commits: &[u8], hashing: Hashing) -> ContentHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&previous.0).update(commits);
    hashing.name(ContentHash(*hasher.finalize().as_bytes()))
}

/// What an object is made from.
pub struct LogContent<'a> {
    pub database: Identity,
    pub timeline: TimelineId,
    pub batch: Batch,
    pub before: ChainTip,
    pub after: ChainTip,
    pub archived_at: i64,
    pub commits: &'a [u8],
}

impl LogContent<'_> {
    pub fn key(&self) -> Key {
        paths::log(&self.database, self.timeline, 0, self.batch.first, self.batch.last)
    }

    /// Compresses and, if the keyring has recipients, seals; then puts the header before it.
    ///
    /// # Errors
    /// When compression or sealing fails.
    pub fn encode(&self, level: i32, keys: &Keyring) -> Result<Vec<u8>, RepositoryError> {
        seal_part(self.commits, 1, level, keys, |part, body| {
            let mut bytes = self.header(part, keys.seals()).to_bytes();
            bytes.reserve_exact(body.len());
            bytes.extend_from_slice(body);
            bytes
        })
    }

    fn header(&self, part: Part, sealed: bool) -> LogHeader {
        LogHeader {
            sealed,
            database: self.database,
            timeline: self.timeline,
            log_version: self.batch.log_version,
            level: 0,
            first: self.batch.first,
            last: self.batch.last,
            times: Times { max: self.after.max_time, ..self.batch.times },
            archived_at: self.archived_at,
            raw_len: self.commits.len() as u64,
            body_len: part.stored_len,
            previous_chain: self.before.chain,
            previous_history: Some(self.before.history),
            links: vec![Link {
                last: self.batch.last,
                raw_len: self.commits.len() as u64,
                chain: self.after.chain,
                last_commit: self.after.last_commit.unwrap_or(ContentHash::ZERO),
                max_time: self.after.max_time,
                history: Some(self.after.history),
            }],
            parts: vec![part],
            len: 0,
        }
    }
}

/// Compresses and, if the keyring has recipients, seals the commits of `links` links, and hands them to `then`.
pub(super) fn seal_part<T>(
    commits: &[u8],
    links: u32,
    level: i32,
    keys: &Keyring,
    then: impl FnOnce(Part, &[u8]) -> T,
) -> Result<T, RepositoryError> {
    let part = |stored: &[u8]| Part { stored_len: stored.len() as u64, links, hash: ContentHash::of(stored) };
    let sealed = codec::compress(commits, level, |compressed| {
        if keys.seals() {
            let sealed = keys.seal(compressed.to_vec())?;
            Ok(then(part(&sealed), &sealed))
        } else {
            Ok(then(part(compressed), compressed))
        }
    });
    sealed.map_err(|error| CryptoError::Seal(format!("compress: {error}")))?
}

impl LogHeader {
    /// Does the stored part hash to what the header says? Needs no key.
    ///
    /// # Errors
    /// When it does not.
    pub fn check_part(&self, index: usize, stored: &[u8]) -> Result<(), Malformed> {
        match self.parts.get(index) {
            Some(part) if part.stored_len == stored.len() as u64 && ContentHash::of(stored) == part.hash => Ok(()),
            _ => {
                let reason = format!("part {index} of the body does not match its hash");
                Err(Malformed { at: self.part_range(index).start, reason })
            }
        }
    }

    /// Opens part `index`: its commits, after every check there is.
    ///
    /// # Errors
    /// When a hash, the chain or a commit is wrong, or the part cannot be unsealed.
    pub fn decode_part(
        &self,
        key: &Key,
        index: usize,
        stored: &[u8],
        keys: &Keyring,
    ) -> Result<Buffer, RepositoryError> {
        self.check_part(index, stored).in_object(key)?;
        let commits = self.unpack(key, index, stored, keys)?;
        let (_, first, links) = self.span(index);
        check_frames(self.log_version, first, links, &commits).in_object(key)?;
        let before = self.place_before(first).history;
        check_history(self.log_version, before, links, &commits, keys.hashing()?).in_object(key)?;
        Ok(commits)
    }

    /// Opens part `index` for those who look at each commit themselves: the chain proves that these are, byte for byte, the
    /// bytes that were archived, and no commit is parsed.
    ///
    /// # Errors
    /// When a hash or the chain is wrong, or the part cannot be unsealed.
    pub fn unpack_part(
        &self,
        key: &Key,
        index: usize,
        stored: &[u8],
        keys: &Keyring,
    ) -> Result<Buffer, RepositoryError> {
        let unpacked = self.unpack(key, index, stored, keys);
        if unpacked.is_err() {
            // Stored bytes that are damaged are told as such, whatever came of them.
            self.check_part(index, stored).in_object(key)?;
        }
        unpacked
    }

    fn unpack(&self, key: &Key, index: usize, stored: &[u8], keys: &Keyring) -> Result<Buffer, RepositoryError> {
        let opened;
        let compressed = if self.sealed {
            opened = keys.open(stored)?;
            opened.as_slice()
        } else {
            stored
        };
        let (chain, _, links) = self.span(index);
        let raw_len = links.iter().fold(0u64, |sum, link| sum.saturating_add(link.raw_len));
        let commits = decompress(compressed, raw_len).map_err(|error| RepositoryError::damaged(key, error))?;
        check_chain(chain, links, &commits, keys.hashing()?).in_object(key)?;
        Ok(commits)
    }
}

/// Is this the header of the object that `key` names?
pub fn check_name(key: &Key, header: &LogHeader) -> Result<(), RepositoryError> {
    if paths::parse_log(key) == Some((header.first, header.last)) {
        return Ok(());
    }
    Err(RepositoryError::damaged(key, "its header holds other offsets than its name"))
}

/// Reads a whole object: its header, and its commits after every check there is.
///
/// # Errors
/// When the name, the hashes, the chain or a commit is wrong, or it cannot be unsealed.
pub fn decode(key: &Key, object: &[u8], keys: &Keyring) -> Result<(LogHeader, Vec<u8>), RepositoryError> {
    let header = LogHeader::parse(object).in_object(key)?;
    check_name(key, &header)?;
    if header.object_len() != object.len() as u64 {
        return Err(RepositoryError::damaged(key, "it is not as long as its header says"));
    }
    let mut commits = Vec::new();
    for index in 0..header.parts.len() {
        let range = header.part_range(index);
        let stored = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        let stored = stored.and_then(|(start, end)| object.get(start..end)).unwrap_or_default();
        commits.extend_from_slice(&header.decode_part(key, index, stored, keys)?);
    }
    Ok((header, commits))
}

/// No part holds more; it bounds what a crafted header can make us allocate.
const MAX_RAW_LEN: u64 = 4 << 30;

fn decompress(compressed: &[u8], raw_len: u64) -> std::io::Result<Buffer> {
    match usize::try_from(raw_len) {
        Ok(len) if raw_len <= MAX_RAW_LEN => {
            let mut commits = Buffer::take();
            codec::decompress(compressed, len, &mut commits)?;
            Ok(commits)
        }
        _ => Err(std::io::Error::other(format!("it claims {raw_len} bytes, more than any part holds"))),
    }
}

/// The runs of commits that belong to `links`, as long as these say, with the places where they start.
fn runs<'a>(links: &'a [Link], commits: &'a [u8]) -> impl Iterator<Item = (&'a Link, usize, &'a [u8])> {
    let mut end = 0usize;
    links.iter().map(move |link| {
        let at = end;
        end = at.saturating_add(usize::try_from(link.raw_len).unwrap_or(usize::MAX));
        (link, at, commits.get(at..end).unwrap_or_default())
    })
}

fn check_chain(mut chain: ContentHash, links: &[Link], commits: &[u8], hashing: Hashing) -> Result<(), Malformed> {
    let raw_len = links.iter().fold(0u64, |sum, link| sum.saturating_add(link.raw_len));
    if commits.len() as u64 != raw_len {
        return Err(Malformed { at: 0, reason: "the body is not as long as its header says".into() });
    }
    for (expected, at, run) in runs(links, commits) {
        chain = link(&chain, run, hashing);
        if chain != expected.chain {
            return Err(Malformed { at: at as u64, reason: "the commits do not match the chain".into() });
        }
    }
    Ok(())
}

/// Compares the history hashes of links with their commits.
fn check_history(
    log_version: u8,
    mut before: Option<ContentHash>,
    links: &[Link],
    commits: &[u8],
    hashing: Hashing,
) -> Result<(), Malformed> {
    for (link, at, run) in runs(links, commits) {
        if let (Some(start), Some(expected)) = (before, link.history)
            && history::after(start, log_version, run, hashing) != expected
        {
            return Err(Malformed { at: at as u64, reason: "the commits do not match the history hash".into() });
        }
        before = Some(link.history_after());
    }
    Ok(())
}

fn check_frames(log_version: u8, mut next: Offset, links: &[Link], commits: &[u8]) -> Result<(), Malformed> {
    for (expected, at, run) in runs(links, commits) {
        let mut inside = 0;
        while inside < run.len() {
            let Frame::Commit(commit) = Frame::parse(log_version, &run[inside..]) else {
                return Err(Malformed { at: (at + inside) as u64, reason: "this is not a whole commit".into() });
            };
            if commit.first != next {
                let reason = format!("transaction {next} is expected and {} found", commit.first);
                return Err(Malformed { at: (at + inside) as u64, reason });
            }
            next = Offset(commit.last().0 + 1);
            inside += commit.bytes.len();
        }
        if next.0 != expected.last.0 + 1 {
            return Err(Malformed {
                at: (at + run.len()) as u64,
                reason: format!("the link ends before transaction {}", expected.last),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datadir::commit::encode;

    fn object() -> (Key, Vec<u8>) {
        let commits: Vec<u8> =
            (5..9).flat_map(|offset| encode(1, Offset(offset), 0, 1, b"\0the same text again and again")).collect();
        let database = Identity([1; 32]);
        let before = ChainTip::origin(&database, Offset(5));
        let batch = Batch {
            log_version: 1,
            first: Offset(5),
            last: Offset(8),
            commits: 4,
            times: Times::default(),
            last_len: commits.len() / 4,
        };
        let after = before.extend(&batch, &commits, Hashing::Plain);
        let content = LogContent {
            database,
            timeline: TimelineId::FIRST,
            batch,
            before,
            after,
            archived_at: 1,
            commits: &commits,
        };
        (content.key(), content.encode(3, &Keyring::default()).unwrap())
    }

    #[test]
    fn an_object_reads_back_and_every_flipped_bit_and_cut_is_seen() {
        let (key, bytes) = object();
        let (header, commits) = decode(&key, &bytes, &Keyring::default()).unwrap();
        assert_eq!((header.first, header.last, header.tip().next), (Offset(5), Offset(8), Offset(9)));
        assert_eq!(commits.len() as u64, header.raw_len);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&key, &flipped, &Keyring::default()).is_err(), "bit {bit}");
        }
        for cut in 0..bytes.len() {
            assert!(decode(&key, &bytes[..cut], &Keyring::default()).is_err(), "cut at {cut}");
        }
        // Who unpacks alone gets the same commits, or hears of the stored bytes.
        let body = &bytes[header.len..];
        for bit in 0..body.len() * 8 {
            let mut flipped = body.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            match header.unpack_part(&key, 0, &flipped, &Keyring::default()) {
                Ok(unpacked) => assert_eq!(*unpacked, commits, "bit {bit}"),
                Err(error) => assert!(error.to_string().contains("does not match its hash"), "bit {bit}: {error}"),
            }
        }
    }

    #[test]
    fn an_object_under_another_name_is_refused() {
        let (_, bytes) = object();
        let other = paths::log(&Identity([1; 32]), TimelineId::FIRST, 0, Offset(6), Offset(9));
        assert!(decode(&other, &bytes, &Keyring::default()).is_err());
    }
}
