//! The commit log of one replica: a row of segments, read as one stream of whole commits from any offset.
//!
//! Invariants:
//! - only commits with a good checksum and the expected offset are handed out, byte for byte as they stand;
//! - a segment that the server has rewritten as zstd reads the same as before;
//! - an unfinished end (a crash, a write under way, preallocated zeros) ends the stream, and reading on later is allowed;
//! - what the server wrote on behind a torn commit header is read, and told of, for as long as it is the server's history;
//! - a commit that was written twice is read once, as the server does; any other hole or repetition in the middle is an error
//!   that names both offsets;
//! - memory is bounded by the batch size, or by the largest single commit if that is larger.

mod index;
mod segment;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use crate::datadir::DataDirError;
use crate::datadir::commit::Commit;
pub(crate) use crate::datadir::log::index::IndexWriter;
use crate::datadir::log::segment::{Filled, Filling, OpenSegment, Source, read_at_most};
use crate::durable::{FileError, OnPath};
use crate::ids::{ContentHash, Offset};

const READ_SIZE: usize = 1 << 20;
const SEGMENT_SUFFIX: &str = ".stdb.log";

/// What a batch of commits holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    pub log_version: u8,
    pub first: Offset,
    pub last: Offset,
    pub commits: u64,
    pub times: Times,
    /// Bytes of the last commit.
    pub last_len: usize,
}

impl Batch {
    /// This batch and the one read after it, of the same format version.
    pub fn merge(&mut self, later: &Self) {
        self.last = later.last;
        self.commits += later.commits;
        self.times.merge(later.times);
        self.last_len = later.last_len;
    }
}

/// The server's times inside a run of commits, microseconds since the Unix epoch; `None` where no commit had inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Times {
    pub first: Option<i64>,
    pub last: Option<i64>,
    /// The latest; clocks step back, so it need not be `last`.
    pub max: Option<i64>,
}

impl Times {
    pub fn add(&mut self, micros: i64) {
        self.first.get_or_insert(micros);
        self.last = Some(micros);
        self.max = self.max.max(Some(micros));
    }

    pub fn merge(&mut self, later: Self) {
        self.first = self.first.or(later.first);
        self.last = later.last.or(self.last);
        self.max = self.max.max(later.max);
    }
}

/// How a log ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tail {
    /// After a whole commit.
    Clean,
    /// In bytes that are no whole commit: a write under way or cut off by a crash. The server drops them at its next
    /// start.
    Unfinished { at: u64, reason: &'static str },
}

/// Bytes of a commit's header that a crash left and the server wrote on behind. A server of 1.2.0 takes them for the end of
/// its log and appends; at its next start it takes them for damage, and drops all that it has appended or refuses to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TornHeader {
    /// Where in the segment they stand.
    pub at: u64,
    pub len: usize,
    /// The transaction that follows them.
    pub next: Offset,
}

impl fmt::Display for TornHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the server has written on behind {} bytes of a commit header that a crash left at byte {} of its log; from \
             transaction {} on this is archived, but when it starts the next time the server drops it, or does not start: \
             stop the server, restore the newest state, and only then start it again",
            self.len, self.at, self.next
        )
    }
}

/// A segment's file, named for its first transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentFile {
    pub first: Offset,
    pub path: PathBuf,
}

/// Every segment in a log directory, in order. A missing directory is an empty log.
///
/// # Errors
/// When the directory cannot be listed.
pub fn segments(dir: &Path) -> Result<Vec<SegmentFile>, FileError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).on("list", dir),
    };
    let mut segments = Vec::new();
    for entry in entries {
        let entry = entry.on("list", dir)?;
        let name = entry.file_name();
        let first = name.to_str().and_then(|name| name.strip_suffix(SEGMENT_SUFFIX)).map(Offset::from_padded);
        if let Some(Ok(first)) = first {
            segments.push(SegmentFile { first, path: entry.path() });
        }
    }
    segments.sort_by_key(|segment| segment.first);
    Ok(segments)
}

/// One past the last transaction in the log at `dir`.
///
/// # Errors
/// When it cannot be read.
pub fn end(dir: &Path) -> Result<Offset, DataDirError> {
    Ok(LogReader::open(dir, Offset(u64::MAX))?.position())
}

/// The file name of the segment that starts at `first`.
pub fn segment_name(first: Offset) -> String {
    format!("{}{SEGMENT_SUFFIX}", first.padded())
}

/// Reads a log as a stream of batches.
pub struct LogReader {
    dir: PathBuf,
    place: Place,
    open: Option<OpenSegment>,
    tail: Tail,
    at_end: bool,
    last_read: Option<LastRead>,
    torn: Option<TornHeader>,
}

/// How far a log was read.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// The offset that the next commit must have.
    next: Offset,
    /// Offset and checksum of the commit before it; `None` before the first.
    last: Option<(Offset, u32)>,
}

impl Place {
    /// Returns true for the commit that was read last, once more: a server whose write failed has written it again, at the
    /// start of a new segment or in the same one, and ignores the repetition when it reads.
    fn is_repeated_by(&self, commit: &Commit<'_>) -> bool {
        commit.first < self.next && self.last == Some((commit.first, commit.checksum()))
    }

    fn pass(&mut self, commit: &Commit<'_>) {
        self.next = Offset(commit.last().0 + 1);
        self.last = Some((commit.first, commit.checksum()));
    }
}

/// The last commit handed out, where it can be looked at again.
struct LastRead {
    segment: Offset,
    at: u64,
    len: usize,
    hash: ContentHash,
}

impl LogReader {
    /// Opens the log at the commit that holds `from`, or at the log's end if that is earlier: see [`Self::position`].
    /// Where the server's index tells the way, what lies before is not read.
    ///
    /// # Errors
    /// [`DataDirError::Gone`] when the log starts after `from`; damage on the way to `from`.
    pub fn open(dir: &Path, from: Offset) -> Result<Self, DataDirError> {
        let files = segments(dir)?;
        let Some(earliest) = files.first() else { return Ok(Self::at(dir, Offset(0))) };
        let Some(index) = files.iter().rposition(|file| file.first <= from) else {
            return Err(DataDirError::Gone { path: dir.to_owned(), wanted: from, first: earliest.first });
        };
        let file = &files[index];
        let reader = Self::open_in(dir, file, from)?;
        // After a failed write a segment begins with the commit that also ends the one before. Until it is written again, only
        // the one before has it.
        if let Some(before) = index.checked_sub(1).and_then(|before| files.get(before))
            && reader.place.next == file.first
            && (from > file.first || Self::open_in(dir, file, from)?.next_batch(1, &mut Vec::new())?.is_none())
            && let Ok(earlier) = Self::open_in(dir, before, from)
        {
            return Ok(earlier);
        }
        Ok(reader)
    }

    /// Opens the log in `file`, at the commit that holds `from`.
    fn open_in(dir: &Path, file: &SegmentFile, from: Offset) -> Result<Self, DataDirError> {
        let mut reader = Self::at(dir, file.first);
        reader.open = OpenSegment::open(file)?;
        if let Some(near) = reader.open.as_mut().and_then(|segment| segment.jump(from)) {
            reader.place.next = near;
        }
        reader.skip_to(from)?;
        Ok(reader)
    }

    fn at(dir: &Path, next: Offset) -> Self {
        Self {
            dir: dir.to_owned(),
            place: Place { next, last: None },
            open: None,
            tail: Tail::Clean,
            at_end: false,
            last_read: None,
            torn: None,
        }
    }

    /// Opens the log at its first segment.
    ///
    /// # Errors
    /// When the directory or the segment cannot be read.
    pub fn open_first(dir: &Path) -> Result<Self, DataDirError> {
        let first = segments(dir)?.first().map_or(Offset(0), |file| file.first);
        Self::open(dir, first)
    }

    /// The first offset of the next batch; at the end of the log, one past its last transaction.
    pub fn position(&self) -> Offset {
        self.place.next
    }

    /// Did the last batch reach what was the log's end at that moment?
    pub fn at_end(&self) -> bool {
        self.at_end
    }

    /// How the log ended, once [`Self::next_batch`] has returned `None`.
    pub fn tail(&self) -> &Tail {
        &self.tail
    }

    /// The last torn header that was passed over.
    pub fn torn(&self) -> Option<TornHeader> {
        self.torn
    }

    /// Fills `buffer` with whole commits of one format version, up to `max_bytes` but at least one commit.
    /// `None` at the end of the log; calling again later picks up what was written since.
    ///
    /// # Errors
    /// A gap, an overlap, damage that is not at the end, an unknown version, or a failed read.
    pub fn next_batch(&mut self, max_bytes: usize, buffer: &mut Vec<u8>) -> Result<Option<Batch>, DataDirError> {
        buffer.clear();
        self.at_end = false;
        let mut filled = Filled::default();
        loop {
            if self.open.is_none() && !self.open_next()? {
                self.at_end = true;
                break;
            }
            let Some(segment) = &mut self.open else { break };
            if filled.commits > 0 && filled.log_version != segment.log_version {
                break;
            }
            filled.log_version = segment.log_version;
            buffer.append(&mut segment.carry);
            let filling = segment.fill(max_bytes, buffer, &mut filled, &mut self.place, &self.dir)?;
            self.torn = segment.torn.or(self.torn);
            match filling {
                Filling::Full => break,
                Filling::EndOfSegment(tail) => {
                    segment.carry.extend_from_slice(&buffer[filled.len..]);
                    buffer.truncate(filled.len);
                    self.tail = tail;
                    if !self.leave_segment()? {
                        self.at_end = true;
                        break;
                    }
                }
            }
        }
        if let Some(segment) = &mut self.open
            && buffer.len() > filled.len
        {
            segment.carry.extend_from_slice(&buffer[filled.len..]);
            buffer.truncate(filled.len);
        }
        if filled.commits > 0 {
            self.remember_last(buffer, &filled);
        }
        Ok(filled.into_batch())
    }

    fn remember_last(&mut self, buffer: &[u8], filled: &Filled) {
        self.last_read = None;
        if let Some(segment) = &self.open
            && filled.last_in == Some(segment.file.first)
            && matches!(segment.source, Source::Plain(_))
        {
            let (end, len) = (segment.last_end, filled.last_len);
            let hash = ContentHash::of(&buffer[filled.len - len..filled.len]);
            self.last_read = Some(LastRead { segment: segment.file.first, at: end - len as u64, len, hash });
        }
    }

    /// Does the log still hold what was read of it last? After a restore or a power cut other commits can stand in the
    /// place of those that were read. `false` also when the server has rewritten the segment: then open the log again.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn is_unchanged(&self) -> Result<bool, DataDirError> {
        let Some(segment) = &self.open else { return Ok(true) };
        let path = &segment.file.path;
        let now = match fs::metadata(path) {
            Ok(now) => now,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error).on("inspect", path).map_err(Into::into),
        };
        if segment.inode != (now.dev(), now.ino()) {
            return Ok(false);
        }
        let Source::Plain(file) = &segment.source else { return Ok(true) };
        if now.len() < segment.read - segment.carry.len() as u64 {
            return Ok(false);
        }
        let Some(last) = self.last_read.as_ref().filter(|last| last.segment == segment.file.first) else {
            return Ok(true);
        };
        let mut commit = vec![0; last.len];
        let read = read_at_most(file, &mut commit, last.at).on("read", path)?;
        Ok(read == last.len && ContentHash::of(&commit) == last.hash)
    }

    /// Opens the segment that continues the log, if it is there with its header written.
    fn open_next(&mut self) -> Result<bool, DataDirError> {
        let Some(file) = segments(&self.dir)?.into_iter().find(|file| file.first >= self.place.next) else {
            return Ok(false);
        };
        if file.first > self.place.next {
            return Err(self.gap(file.first));
        }
        self.open = OpenSegment::open(&file)?;
        Ok(self.open.is_some())
    }

    /// At the end of a segment: `true` to read on (here or in the next one), `false` at the end of the log.
    fn leave_segment(&mut self) -> Result<bool, DataDirError> {
        let Some(segment) = &mut self.open else { return Ok(false) };
        let current = segment.file.first;
        let Some(following) = segments(&self.dir)?.into_iter().find(|file| file.first > current) else {
            return Ok(false);
        };
        if !segment.sealed {
            // More may have been appended between our last read and the moment the server went on to the next file.
            segment.sealed = true;
            return Ok(true);
        }
        if following.first > self.place.next {
            return Err(match self.tail {
                Tail::Unfinished { at, reason } => DataDirError::Damaged {
                    path: segment.file.path.clone(),
                    at,
                    reason: format!("{reason}, and the next segment starts at transaction {}", following.first),
                },
                Tail::Clean => self.gap(following.first),
            });
        }
        // One that begins with what was read last may repeat it: its first commit is compared.
        let may_repeat = self.place.last.is_some_and(|(last, _)| last == following.first);
        if following.first < self.place.next && !may_repeat {
            return Err(DataDirError::Overlap {
                path: following.path,
                expected: self.place.next,
                found: following.first,
            });
        }
        let opened = OpenSegment::open(&following)?;
        if opened.is_none() {
            return Ok(false);
        }
        self.open = opened;
        self.tail = Tail::Clean;
        Ok(true)
    }

    fn skip_to(&mut self, from: Offset) -> Result<(), DataDirError> {
        let mut buffer = Vec::new();
        while self.place.next < from {
            // One commit more than wanted must stay unread, so batches shrink to single commits near the target.
            let Some(segment) = &mut self.open else { return Ok(()) };
            buffer.clear();
            buffer.append(&mut segment.carry);
            let mut filled = Filled { log_version: segment.log_version, stop_at: Some(from), ..Filled::default() };
            let filling = segment.fill(READ_SIZE, &mut buffer, &mut filled, &mut self.place, &self.dir)?;
            self.torn = segment.torn.or(self.torn);
            segment.carry.extend_from_slice(&buffer[filled.len..]);
            match filling {
                Filling::Full if filled.stopped => return Ok(()),
                Filling::Full => {}
                Filling::EndOfSegment(tail) => {
                    self.tail = tail;
                    if !self.leave_segment()? {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    fn gap(&self, found: Offset) -> DataDirError {
        DataDirError::Gap { path: self.dir.clone(), expected: self.place.next, found }
    }
}

#[cfg(test)]
mod tests;
