//! Log objects: runs of commits, byte for byte as in the server's log, behind a header that proves them.
//!
//! The body is a row of parts, each one zstd frame, sealed if the repository is, so that a large object is read part by
//! part. The header holds each part's hash, so a stored object can be checked without any key; and a chain of links, each a
//! BLAKE3 hash over the link before and the commits it covers, so that a gap, a swap or a repetition shows when objects are
//! put side by side. Compaction keeps the links.

mod merge;

use object_store::path::Path as Key;

use crate::buffers::Buffer;
use crate::datadir::bytes::{Cursor, Malformed};
use crate::datadir::commit::Frame;
use crate::datadir::log::{Batch, Times};
use crate::ids::{ContentHash, Identity, Offset, TimelineId};
use crate::repository::crypto::{CryptoError, Keyring};
use crate::repository::{InObject, RepositoryError, codec, paths};

pub(crate) use merge::Merge;

const MAGIC: [u8; 8] = *b"IULOG\r\n\x1a";
const VERSION: u16 = 1;
const FLAG_SEALED: u16 = 1;
const FIXED_LEN: usize = 160;
const LINK_LEN: usize = 88;
const PART_LEN: usize = 48;
const HASH_LEN: usize = 32;
/// Where the header's length stands.
const LEN_AT: usize = 12;
/// Enough for the header of most objects in one read, and for all of a small one.
pub const HEADER_READ: u64 = 16 << 10;
const NO_TIME: i64 = i64::MIN;

/// What an object's header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogHeader {
    pub sealed: bool,
    pub database: Identity,
    pub timeline: TimelineId,
    pub log_version: u8,
    pub level: u8,
    pub first: Offset,
    pub last: Offset,
    /// Times of these commits; `max` is over all of the timeline up to `last`.
    pub times: Times,
    /// Microseconds since the Unix epoch.
    pub archived_at: i64,
    pub raw_len: u64,
    pub body_len: u64,
    pub previous_chain: ContentHash,
    pub links: Vec<Link>,
    pub parts: Vec<Part>,
    /// Bytes of the header itself.
    pub len: usize,
}

/// A run of commits inside an object and the chain hash after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    pub last: Offset,
    pub raw_len: u64,
    pub chain: ContentHash,
    /// The hash of the last commit alone: what a log that starts inside the run can still be compared with.
    pub last_commit: ContentHash,
    /// The latest time of the history up to `last`, microseconds.
    pub max_time: Option<i64>,
}

/// A piece of a body that is read on its own: whole links in one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Bytes as stored.
    pub stored_len: u64,
    /// How many links it holds.
    pub links: u32,
    /// The hash of the bytes as stored.
    pub hash: ContentHash,
}

/// The commits of a part, or the first of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartSpan {
    pub first: Offset,
    /// One past the last transaction.
    pub next: Offset,
    /// The chain hash before it, and after it.
    pub before: ContentHash,
    pub after: ContentHash,
    /// Bytes of the commits.
    pub len: u64,
}

impl PartSpan {
    /// The last transaction; before the first where there is none.
    pub fn last(&self) -> Offset {
        Offset(self.next.0.saturating_sub(1))
    }
}

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
}

impl ChainTip {
    /// The start of a database's first timeline, or of one after a gap.
    pub fn origin(database: &Identity, start: Offset) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"inner-universe log chain 1").update(&database.0);
        Self { next: start, chain: ContentHash(*hasher.finalize().as_bytes()), max_time: None, last_commit: None }
    }

    /// After one more run of commits.
    pub fn extend(&self, batch: &Batch, commits: &[u8]) -> Self {
        Self {
            next: Offset(batch.last.0 + 1),
            chain: link(&self.chain, commits),
            max_time: self.max_time.max(batch.times.max),
            last_commit: Some(ContentHash::of(&commits[commits.len().saturating_sub(batch.last_len)..])),
        }
    }
}

/// The chain hash after `commits`.
pub fn link(previous: &ContentHash, commits: &[u8]) -> ContentHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&previous.0).update(commits);
    ContentHash(*hasher.finalize().as_bytes())
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
            links: vec![Link {
                last: self.batch.last,
                raw_len: self.commits.len() as u64,
                chain: self.after.chain,
                last_commit: ContentHash::of(&self.commits[self.commits.len().saturating_sub(self.batch.last_len)..]),
                max_time: self.after.max_time,
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
    /// The chain after this object.
    pub fn tip(&self) -> ChainTip {
        let chain = self.links.last().map_or(self.previous_chain, |link| link.chain);
        let last_commit = self.links.last().map(|link| link.last_commit);
        ChainTip { next: Offset(self.last.0.saturating_add(1)), chain, max_time: self.times.max, last_commit }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let len = FIXED_LEN + self.links.len() * LINK_LEN + self.parts.len() * PART_LEN + HASH_LEN;
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&if self.sealed { FLAG_SEALED } else { 0 }.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&self.database.0);
        bytes.extend_from_slice(&self.timeline.0.to_le_bytes());
        bytes.extend_from_slice(&[self.log_version, self.level, 0, 0]);
        bytes.extend_from_slice(&self.first.0.to_le_bytes());
        bytes.extend_from_slice(&self.last.0.to_le_bytes());
        for time in [self.times.first, self.times.last, self.times.max] {
            bytes.extend_from_slice(&time.unwrap_or(NO_TIME).to_le_bytes());
        }
        bytes.extend_from_slice(&self.archived_at.to_le_bytes());
        bytes.extend_from_slice(&self.raw_len.to_le_bytes());
        bytes.extend_from_slice(&self.body_len.to_le_bytes());
        bytes.extend_from_slice(&self.previous_chain.0);
        bytes.extend_from_slice(&u32::try_from(self.links.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(self.parts.len()).unwrap_or(u32::MAX).to_le_bytes());
        debug_assert_eq!(bytes.len(), FIXED_LEN);
        for link in &self.links {
            bytes.extend_from_slice(&link.last.0.to_le_bytes());
            bytes.extend_from_slice(&link.raw_len.to_le_bytes());
            bytes.extend_from_slice(&link.chain.0);
            bytes.extend_from_slice(&link.last_commit.0);
            bytes.extend_from_slice(&link.max_time.unwrap_or(NO_TIME).to_le_bytes());
        }
        for part in &self.parts {
            bytes.extend_from_slice(&part.stored_len.to_le_bytes());
            bytes.extend_from_slice(&part.links.to_le_bytes());
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&part.hash.0);
        }
        let hash = ContentHash::of(&bytes);
        bytes.extend_from_slice(&hash.0);
        bytes
    }

    /// How many bytes the header takes, from the object's first sixteen.
    pub fn len_of(start: &[u8]) -> Option<usize> {
        let len = start.get(LEN_AT..LEN_AT + 4)?;
        Some(u32::from_le_bytes(len.try_into().ok()?) as usize)
    }

    /// Reads the header at the start of an object.
    ///
    /// # Errors
    /// When it is cut short, damaged, or of a newer format.
    pub fn parse(object: &[u8]) -> Result<Self, Malformed> {
        let mut cursor = Cursor::new(object);
        if cursor.array("the magic")? != MAGIC {
            return Err(Malformed { at: 0, reason: "it does not start as a log object does".into() });
        }
        let version = cursor.u16("the version")?;
        if version != VERSION {
            return cursor.fail(format!("log object version {version} is unknown to this release"));
        }
        let flags = cursor.u16("the flags")?;
        let len = cursor.u32("the header's length")? as usize;
        let hashed_len = len.checked_sub(HASH_LEN).filter(|hashed| *hashed >= FIXED_LEN);
        let Some((hashed, hash)) = hashed_len.and_then(|at| object.get(..len)?.split_at_checked(at)) else {
            return cursor.fail("the header is cut short");
        };
        if ContentHash::of(hashed).0 != hash {
            return cursor.fail("the header does not match its hash");
        }
        if flags & !FLAG_SEALED != 0 {
            return cursor.fail(format!("flags {flags:#06x} are unknown to this release"));
        }
        let database = Identity(cursor.array("the identity")?);
        let timeline = TimelineId(cursor.u32("the timeline")?);
        let [log_version, level, _, _] = cursor.array("the versions")?;
        let first = Offset(cursor.u64("the first offset")?);
        let last = Offset(cursor.u64("the last offset")?);
        let mut time = || cursor.i64("a time").map(|time| (time != NO_TIME).then_some(time));
        let times = Times { first: time()?, last: time()?, max: time()? };
        let archived_at = cursor.i64("the archive time")?;
        let raw_len = cursor.u64("the raw length")?;
        let body_len = cursor.u64("the body's length")?;
        let previous_chain = ContentHash(cursor.array("the previous chain hash")?);
        let count = cursor.array_len(LINK_LEN, "the links")?;
        let part_count = cursor.u32("the number of parts")? as usize;
        let mut links = Vec::with_capacity(count);
        for _ in 0..count {
            links.push(Link {
                last: Offset(cursor.u64("a link's last offset")?),
                raw_len: cursor.u64("a link's length")?,
                chain: ContentHash(cursor.array("a link's chain hash")?),
                last_commit: ContentHash(cursor.array("a link's last commit's hash")?),
                max_time: Some(cursor.i64("a link's time")?).filter(|time| *time != NO_TIME),
            });
        }
        // As many as the hashed header has room for.
        let mut parts = Vec::with_capacity(part_count.min(hashed.len() / PART_LEN));
        for _ in 0..part_count {
            let (stored_len, links) = (cursor.u64("a part's length")?, cursor.u32("a part's links")?);
            cursor.take(4, "the reserved bytes")?;
            parts.push(Part { stored_len, links, hash: ContentHash(cursor.array("a part's hash")?) });
        }
        let stored = parts.iter().try_fold(0u64, |sum, part| sum.checked_add(part.stored_len));
        let covered: u64 = parts.iter().map(|part| u64::from(part.links)).sum();
        let whole =
            stored == Some(body_len) && covered == links.len() as u64 && parts.iter().all(|part| part.links > 0);
        let ordered = whole
            && first <= last
            && last.0 < u64::MAX
            && links.windows(2).all(|pair| pair[0].last < pair[1].last)
            && links.first().is_some_and(|link| link.last >= first)
            && links.last().is_some_and(|link| link.last == last);
        let total = links.iter().try_fold(0u64, |sum, link| sum.checked_add(link.raw_len));
        if !ordered || total != Some(raw_len) || cursor.position() != hashed.len() {
            return cursor.fail("the header contradicts itself");
        }
        Ok(Self {
            sealed: flags & FLAG_SEALED != 0,
            database,
            timeline,
            log_version,
            level,
            first,
            last,
            times,
            archived_at,
            raw_len,
            body_len,
            previous_chain,
            links,
            parts,
            len,
        })
    }

    /// Where part `index` stands in the object.
    pub fn part_range(&self, index: usize) -> std::ops::Range<u64> {
        let before: u64 = self.parts.iter().take(index).map(|part| part.stored_len).sum();
        let start = self.len as u64 + before;
        start..start + self.parts.get(index).map_or(0, |part| part.stored_len)
    }

    /// Bytes of the object that this is the header of.
    pub fn object_len(&self) -> u64 {
        (self.len as u64).saturating_add(self.body_len)
    }

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

    /// What part `index` continues, and the links in it.
    fn span(&self, index: usize) -> (ContentHash, Offset, &[Link]) {
        let count = |parts: &[Part]| parts.iter().map(|part| part.links as usize).sum::<usize>();
        let start = count(self.parts.get(..index).unwrap_or_default());
        let end = start + count(self.parts.get(index..=index).unwrap_or_default());
        let before = start.checked_sub(1).and_then(|before| self.links.get(before));
        let chain = before.map_or(self.previous_chain, |link| link.chain);
        let first = before.map_or(self.first, |link| Offset(link.last.0.saturating_add(1)));
        (chain, first, self.links.get(start..end).unwrap_or_default())
    }

    /// The part that holds link `index`.
    pub fn part_of_link(&self, index: usize) -> usize {
        let mut end = 0;
        let holds = |part: &Part| {
            end += part.links as usize;
            index < end
        };
        self.parts.iter().position(holds).unwrap_or(0)
    }

    /// The end of the history after link `index`.
    pub fn tip_at(&self, index: usize) -> Option<ChainTip> {
        let link = self.links.get(index)?;
        let next = Offset(link.last.0.saturating_add(1));
        Some(ChainTip { next, chain: link.chain, max_time: link.max_time, last_commit: Some(link.last_commit) })
    }

    /// The end of the history after `last`, where a timeline that forked off inside this object leaves it.
    pub fn tip_until(&self, last: Offset) -> ChainTip {
        let within = self.links.partition_point(|link| link.last <= last);
        within.checked_sub(1).and_then(|index| self.tip_at(index)).unwrap_or(ChainTip {
            next: self.first,
            chain: self.previous_chain,
            max_time: None,
            last_commit: None,
        })
    }

    /// What part `index` holds in its links up to `last`.
    pub fn part_until(&self, index: usize, last: Offset) -> PartSpan {
        let (before, first, links) = self.span(index);
        let mut span = PartSpan { first, next: first, before, after: before, len: 0 };
        for link in links.iter().take_while(|link| link.last <= last) {
            span.next = Offset(link.last.0.saturating_add(1));
            span.after = link.chain;
            span.len += link.raw_len;
        }
        span
    }

    /// The parts that hold any transaction from `first` to `last`, both included.
    pub fn parts_within(&self, first: Offset, last: Offset) -> std::ops::Range<usize> {
        let mut wanted = 0..0;
        for index in 0..self.parts.len() {
            let (_, starts, links) = self.span(index);
            let ends = links.last().map_or(starts, |link| link.last);
            if ends >= first && starts <= last {
                wanted = if wanted.is_empty() { index..index + 1 } else { wanted.start..index + 1 };
            }
        }
        wanted
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
        let opened;
        let compressed = if self.sealed {
            opened = keys.open(stored)?;
            opened.as_slice()
        } else {
            stored
        };
        let (chain, first, links) = self.span(index);
        let raw_len = links.iter().fold(0u64, |sum, link| sum.saturating_add(link.raw_len));
        let commits = decompress(compressed, raw_len).map_err(|error| RepositoryError::damaged(key, error))?;
        check_commits(self.log_version, chain, first, links, &commits).in_object(key)?;
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

fn check_commits(
    log_version: u8,
    mut chain: ContentHash,
    mut next: Offset,
    links: &[Link],
    commits: &[u8],
) -> Result<(), Malformed> {
    let raw_len = links.iter().fold(0u64, |sum, link| sum.saturating_add(link.raw_len));
    if commits.len() as u64 != raw_len {
        return Err(Malformed { at: 0, reason: "the body is not as long as its header says".into() });
    }
    let mut at = 0;
    for expected in links {
        let end = at + usize::try_from(expected.raw_len).unwrap_or(usize::MAX);
        let run = commits.get(at..end).unwrap_or_default();
        chain = link(&chain, run);
        if chain != expected.chain {
            return Err(Malformed { at: at as u64, reason: "the commits do not match the chain".into() });
        }
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
                at: end as u64,
                reason: format!("the link ends before transaction {}", expected.last),
            });
        }
        at = end;
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
        let after = before.extend(&batch, &commits);
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
    }

    #[test]
    fn an_object_under_another_name_is_refused() {
        let (_, bytes) = object();
        let other = paths::log(&Identity([1; 32]), TimelineId::FIRST, 0, Offset(6), Offset(9));
        assert!(decode(&other, &bytes, &Keyring::default()).is_err());
    }
}
