//! The header of a log object: what it holds, in which parts, and the chain that proves it. See FORMAT.md.

use crate::datadir::bytes::{Cursor, Malformed};
use crate::datadir::log::Times;
use crate::ids::{ContentHash, Identity, Offset, TimelineId};
use crate::repository::log_object::{ChainTip, history};

const MAGIC: [u8; 8] = *b"IULOG\r\n\x1a";
/// What is written. Objects of version 1 have no history hashes.
const VERSION: u16 = 2;
const FLAG_SEALED: u16 = 1;
const FIXED_LEN: usize = 192;
const LINK_LEN: usize = 120;
/// Bytes before the links, and of a link, in version 1.
const LENS_OF_1: (usize, usize) = (160, 88);
const PART_LEN: usize = 48;
const HASH_LEN: usize = 32;
/// Stands for a history hash that is not known.
const NO_HISTORY: ContentHash = ContentHash([0; 32]);
/// Enough for the header of most objects in one read, and for all of a small one.
pub const HEADER_READ: u64 = 16 << 10;
const NO_TIME: i64 = i64::MIN;

/// The lengths of the fixed part and of a link.
fn lens_of(version: u16, cursor: &Cursor<'_>) -> Result<(usize, usize), Malformed> {
    match version {
        1 => Ok(LENS_OF_1),
        VERSION => Ok((FIXED_LEN, LINK_LEN)),
        _ => cursor.fail(format!("log object version {version} is unknown to this release; upgrade inner-universe")),
    }
}

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
    /// The history hash before the first commit; `None` in an object of format version 1.
    pub previous_history: Option<ContentHash>,
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
    /// The history hash after it; `None` where an object of format version 1 brought it.
    pub history: Option<ContentHash>,
}

impl Link {
    /// The history hash after it, as what is archived next continues it.
    pub fn history_after(&self) -> ContentHash {
        self.history.unwrap_or_else(|| history::after_chain(&self.chain))
    }
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

impl LogHeader {
    /// The chain after this object.
    pub fn tip(&self) -> ChainTip {
        let chain = self.links.last().map_or(self.previous_chain, |link| link.chain);
        let last_commit = self.links.last().map(|link| link.last_commit);
        let history = self.links.last().map_or_else(|| self.history_before(), Link::history_after);
        ChainTip { next: Offset(self.last.0.saturating_add(1)), chain, max_time: self.times.max, last_commit, history }
    }

    /// Returns true if both hold the same commits of the same history, and have links that end at the same transactions.
    pub fn holds_same_commits(&self, other: &Self) -> bool {
        (self.database, self.timeline, self.first) == (other.database, other.timeline, other.first)
            && self.place_before(self.first).is(&other.place_before(other.first))
            && self.links.len() == other.links.len()
            && self.has_places_of(other)
    }

    /// Returns true if every link of `other` ends where one of these does, at the same place of the history.
    pub fn has_places_of(&self, other: &Self) -> bool {
        other.links.iter().all(|link| self.place_after(link.last).is(&other.place_after(link.last)))
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
        bytes.extend_from_slice(&self.previous_history.unwrap_or(NO_HISTORY).0);
        debug_assert_eq!(bytes.len(), FIXED_LEN);
        for link in &self.links {
            bytes.extend_from_slice(&link.last.0.to_le_bytes());
            bytes.extend_from_slice(&link.raw_len.to_le_bytes());
            bytes.extend_from_slice(&link.chain.0);
            bytes.extend_from_slice(&link.last_commit.0);
            bytes.extend_from_slice(&link.max_time.unwrap_or(NO_TIME).to_le_bytes());
            bytes.extend_from_slice(&link.history.unwrap_or(NO_HISTORY).0);
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

    /// How many bytes the header takes, from the object's first 160. A damaged length does not decide how much is read: it
    /// must agree with the numbers of links and parts.
    ///
    /// # Errors
    /// When the bytes are not the start of a log object, or contradict each other.
    pub fn len_of(start: &[u8]) -> Result<usize, Malformed> {
        let mut cursor = Cursor::new(start);
        if cursor.array("the magic")? != MAGIC {
            return Err(Malformed { at: 0, reason: "it does not start as a log object does".into() });
        }
        let version = cursor.u16("the version")?;
        let (fixed, link_len) = lens_of(version, &cursor)?;
        cursor.take(2, "the flags")?;
        let len = cursor.u32("the header's length")? as usize;
        cursor.take(LENS_OF_1.0 - 8 - cursor.position(), "the fixed part")?;
        let (links, parts) = (cursor.u32("the number of links")? as usize, cursor.u32("the number of parts")? as usize);
        let needed = links.checked_mul(link_len).zip(parts.checked_mul(PART_LEN));
        let needed =
            needed.and_then(|(links, parts)| fixed.checked_add(links)?.checked_add(parts)?.checked_add(HASH_LEN));
        if needed == Some(len) { Ok(len) } else { cursor.fail("the header contradicts itself") }
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
        let (fixed_len, link_len) = lens_of(version, &cursor)?;
        let flags = cursor.u16("the flags")?;
        let len = cursor.u32("the header's length")? as usize;
        let hashed_len = len.checked_sub(HASH_LEN).filter(|hashed| *hashed >= fixed_len);
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
        let (count, part_count) =
            (cursor.u32("the number of links")? as usize, cursor.u32("the number of parts")? as usize);
        let known = |history: ContentHash| Some(history).filter(|history| *history != NO_HISTORY);
        let has_history = version >= 2;
        let history = |cursor: &mut Cursor<'_>| match has_history {
            true => cursor.array("a history hash").map(|hash| known(ContentHash(hash))),
            false => Ok(None),
        };
        let previous_history = history(&mut cursor)?;
        if count > cursor.remaining() / link_len {
            return cursor.fail("the links are cut short");
        }
        let mut links = Vec::with_capacity(count);
        for _ in 0..count {
            links.push(Link {
                last: Offset(cursor.u64("a link's last offset")?),
                raw_len: cursor.u64("a link's length")?,
                chain: ContentHash(cursor.array("a link's chain hash")?),
                last_commit: ContentHash(cursor.array("a link's last commit's hash")?),
                max_time: Some(cursor.i64("a link's time")?).filter(|time| *time != NO_TIME),
                history: history(&mut cursor)?,
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
            previous_history,
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

    /// What part `index` continues, and the links in it.
    pub(super) fn span(&self, index: usize) -> (ContentHash, Offset, &[Link]) {
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
        Some(ChainTip {
            next: Offset(link.last.0.saturating_add(1)),
            chain: link.chain,
            max_time: link.max_time,
            last_commit: Some(link.last_commit),
            history: link.history_after(),
        })
    }

    /// The history hash before the first commit, as the object before it was continued.
    pub fn history_before(&self) -> ContentHash {
        self.previous_history.unwrap_or_else(|| history::after_chain(&self.previous_chain))
    }

    /// The end of the history after `last`, where a timeline that forked off inside this object leaves it.
    pub fn tip_until(&self, last: Offset) -> ChainTip {
        let within = self.links.partition_point(|link| link.last <= last);
        within.checked_sub(1).and_then(|index| self.tip_at(index)).unwrap_or(ChainTip {
            next: self.first,
            chain: self.previous_chain,
            max_time: None,
            last_commit: None,
            history: self.history_before(),
        })
    }

    /// The latest time of the history up to `last`, or up to the end of the link that holds `last`.
    pub fn max_time_until(&self, last: Offset) -> Option<i64> {
        let at = self.links.partition_point(|link| link.last < last).min(self.links.len().saturating_sub(1));
        self.links.get(at).and_then(|link| link.max_time)
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
}
