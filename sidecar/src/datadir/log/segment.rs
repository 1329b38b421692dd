//! One segment's file: its commits one after another, from wherever reading begins.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::datadir::DataDirError;
use crate::datadir::commit::{CHECKSUM_LEN, Frame, NEWEST_LOG_VERSION, SegmentHeader, header_len};
use crate::datadir::log::{Batch, Place, READ_SIZE, SegmentFile, Tail, Times, TornHeader, index, segments};
use crate::durable::OnPath;
use crate::ids::Offset;

/// Bytes of a commit that the index may lead to; before larger ones the segment is read from its start.
const LARGEST_JUMP: usize = 16 << 20;
/// Bytes of a commit that are read on the word of its length. The checksum of a larger one is compared first, piece by piece:
/// a damaged length must not make us read all that is left of a segment into memory.
const LARGEST_BELIEVED: usize = 16 << 20;
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

pub(super) struct OpenSegment {
    pub(super) file: SegmentFile,
    /// Device and inode: the name can come to mean another file.
    pub(super) inode: (u64, u64),
    pub(super) source: Source,
    pub(super) log_version: u8,
    /// Decoded bytes read from the source so far.
    pub(super) read: u64,
    /// Bytes read and not yet handed out.
    pub(super) carry: Vec<u8>,
    /// A later segment was seen and this one read to its end since: nothing more will be appended.
    pub(super) sealed: bool,
    /// Where the last commit that was parsed ends.
    pub(super) last_end: u64,
    pub(super) torn: Option<TornHeader>,
    /// Where a large commit starts whose checksum was found good.
    proven_at: Option<u64>,
}

pub(super) enum Source {
    Plain(File),
    Zstd(Box<zstd::Decoder<'static, BufReader<File>>>),
}
#[derive(Default)]
pub(super) struct Filled {
    pub(super) log_version: u8,
    /// The segment that the last commit stands in.
    pub(super) last_in: Option<Offset>,
    pub(super) first: Option<Offset>,
    pub(super) last: Offset,
    pub(super) commits: u64,
    pub(super) times: Times,
    pub(super) last_len: usize,
    /// Bytes of whole commits at the start of the buffer.
    pub(super) len: usize,
    /// Leave the commit that holds this offset unread.
    pub(super) stop_at: Option<Offset>,
    pub(super) stopped: bool,
}

impl Filled {
    pub(super) fn into_batch(self) -> Option<Batch> {
        let first = self.first?;
        Some(Batch {
            log_version: self.log_version,
            first,
            last: self.last,
            commits: self.commits,
            times: self.times,
            last_len: self.last_len,
        })
    }
}

pub(super) enum Filling {
    Full,
    EndOfSegment(Tail),
}

impl OpenSegment {
    /// `None` when the file is there and its header is not written yet.
    pub(super) fn open(file: &SegmentFile) -> Result<Option<Self>, DataDirError> {
        let path = &file.path;
        let plain = File::open(path).on("open", path)?;
        let opened = plain.metadata().on("inspect", path)?;
        let inode = (opened.dev(), opened.ino());
        let mut magic = [0; 4];
        if read_at_most(&plain, &mut magic, 0).on("read", path)? < magic.len() {
            return Ok(None);
        }
        let mut source = if magic == ZSTD_MAGIC {
            Source::Zstd(Box::new(zstd::Decoder::new(plain).on("decompress", path)?))
        } else {
            Source::Plain(plain)
        };
        let mut header = [0; SegmentHeader::LEN];
        let mut read = 0;
        while read < header.len() {
            let n = source.read(&mut header[read..], read as u64).on("read", path)?;
            if n == 0 {
                return Ok(None);
            }
            read += n;
        }
        if header.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let header = SegmentHeader::parse(&header).map_err(|malformed| DataDirError::damaged(path, 0, malformed))?;
        let unknown = |what, version, known| DataDirError::UnknownVersion { path: path.clone(), what, version, known };
        if header.log_version > NEWEST_LOG_VERSION {
            return Err(unknown("log format", header.log_version, NEWEST_LOG_VERSION));
        }
        if header.checksum_algorithm != 0 {
            return Err(unknown("checksum", header.checksum_algorithm, 0));
        }
        let sealed = matches!(source, Source::Zstd(_));
        let log_version = header.log_version;
        let (file, read, carry) = (file.clone(), read as u64, Vec::new());
        Ok(Some(Self {
            file,
            inode,
            source,
            log_version,
            read,
            carry,
            sealed,
            last_end: read,
            torn: None,
            proven_at: None,
        }))
    }

    /// Goes to the commit that the server's index names as the last at or before `from`, if it really stands there.
    pub(super) fn jump(&mut self, from: Offset) -> Option<Offset> {
        let Source::Plain(file) = &self.source else { return None };
        let (first, at) = index::find(&self.file.path, from)?;
        let len = file.metadata().ok()?.len();
        if first <= self.file.first || at < SegmentHeader::LEN as u64 {
            return None;
        }
        let mut frame = Vec::new();
        loop {
            match Frame::parse(self.log_version, &frame) {
                Frame::Commit(commit) if commit.first == first => {
                    self.read = at;
                    return Some(first);
                }
                // A stale entry leads into the middle of a record: what is no length there could be any number.
                Frame::Incomplete { needs }
                    if at.checked_add(needs as u64).is_some_and(|end| end <= len)
                        && needs <= LARGEST_JUMP
                        && (frame.is_empty() || frame.starts_with(&first.0.to_le_bytes())) =>
                {
                    frame.resize(needs, 0);
                    if read_at_most(file, &mut frame, at).ok()? < needs {
                        return None;
                    }
                }
                _ => return None,
            }
        }
    }

    /// Parses commits at the end of `buffer[..filled.len]`, reading more as needed.
    pub(super) fn fill(
        &mut self,
        max_bytes: usize,
        buffer: &mut Vec<u8>,
        filled: &mut Filled,
        place: &mut Place,
        dir: &Path,
    ) -> Result<Filling, DataDirError> {
        loop {
            let (wanted, tail) = match Frame::parse(self.log_version, &buffer[filled.len..]) {
                Frame::Commit(commit) => {
                    if place.is_repeated_by(&commit) {
                        let end = filled.len + commit.bytes.len();
                        buffer.drain(filled.len..end);
                        continue;
                    }
                    if filled.stop_at.is_some_and(|stop| commit.last() >= stop) {
                        filled.stopped = true;
                    }
                    let (path, expected, found) = (dir.to_owned(), place.next, commit.first);
                    if found > expected {
                        return Err(DataDirError::Gap { path, expected, found });
                    }
                    if found < expected {
                        return Err(DataDirError::Overlap { path, expected, found });
                    }
                    if filled.stopped || (filled.commits > 0 && filled.len + commit.bytes.len() > max_bytes) {
                        return Ok(Filling::Full);
                    }
                    if let Some(inputs) = commit.inputs() {
                        filled.times.add(inputs.time_micros);
                    }
                    filled.first.get_or_insert(commit.first);
                    filled.last = commit.last();
                    filled.last_in = Some(self.file.first);
                    filled.commits += 1;
                    filled.last_len = commit.bytes.len();
                    filled.len += commit.bytes.len();
                    place.pass(&commit);
                    self.last_end = self.read - (buffer.len() - filled.len) as u64;
                    continue;
                }
                Frame::Incomplete { needs } => (needs, "a commit is cut off, or its length is damaged"),
                // A reader may see the start of a write before its end, so only the segment's end tells.
                Frame::Zeros => (0, "zeros"),
                Frame::Broken(reason) => (0, reason),
            };
            let unread = buffer.len() - filled.len;
            if wanted > unread {
                if filled.commits > 0 && filled.len >= max_bytes {
                    return Ok(Filling::Full);
                }
                let missing = (wanted - unread) as u64;
                // The length may be made of a torn header's bytes and others.
                if missing > READ_SIZE as u64 && self.skip_torn_header(buffer, filled.len, place.next, dir)? {
                    continue;
                }
                let before = buffer.len();
                if (missing <= READ_SIZE as u64 || self.may_hold(&buffer[filled.len..], wanted)?)
                    && self.read_more(buffer, (wanted - unread).clamp(READ_SIZE.min(max_bytes), READ_SIZE))? > 0
                {
                    continue;
                }
                buffer.truncate(before);
            }
            if tail == "zeros" || unread == 0 {
                return self.end(buffer, filled, Tail::Clean);
            }
            if self.skip_torn_header(buffer, filled.len, place.next, dir)? {
                continue;
            }
            let unread = buffer.len() - filled.len;
            let at = self.read - unread as u64;
            return self.end(buffer, filled, Tail::Unfinished { at, reason: tail });
        }
    }

    /// Where `buffer[from..]` is no commit: does the one that is expected follow a torn header? Then that is taken out.
    fn skip_torn_header(
        &mut self,
        buffer: &mut Vec<u8>,
        from: usize,
        next: Offset,
        dir: &Path,
    ) -> Result<bool, DataDirError> {
        // Only what the server still appends to.
        let Source::Plain(_) = self.source else { return Ok(false) };
        let header = header_len(self.log_version);
        if buffer.len() - from < 2 * header {
            self.read_more(buffer, READ_SIZE)?;
        }
        for torn in 1..header {
            while let Some(rest) = buffer.get(from + torn..)
                && rest.starts_with(&next.0.to_le_bytes())
            {
                match Frame::parse(self.log_version, rest) {
                    Frame::Commit(_) => {
                        // A server that was started since goes on in a segment of its own: what follows here is dropped.
                        let is_dropped = |file: &SegmentFile| file.first == next && file.first != self.file.first;
                        if segments(dir)?.iter().any(is_dropped) {
                            return Ok(false);
                        }
                        let at = self.read - (buffer.len() - from) as u64;
                        self.torn = Some(TornHeader { at, len: torn, next });
                        buffer.drain(from..from + torn);
                        return Ok(true);
                    }
                    Frame::Incomplete { needs } if needs > rest.len() => {
                        if !self.may_hold(rest, needs)? || self.read_more(buffer, READ_SIZE)? == 0 {
                            break;
                        }
                    }
                    _ => break,
                }
            }
        }
        Ok(false)
    }

    /// Can a commit of `len` bytes begin with `start`, the last bytes that were read?
    fn may_hold(&mut self, start: &[u8], len: usize) -> Result<bool, DataDirError> {
        let (path, at) = (&self.file.path, self.read - start.len() as u64);
        if let Source::Plain(file) = &self.source {
            let end = file.metadata().on("inspect", path)?.len();
            if at.checked_add(len as u64).is_none_or(|wanted| wanted > end) {
                return Ok(false);
            }
        }
        if len <= LARGEST_BELIEVED || self.proven_at == Some(at) {
            return Ok(true);
        }
        let fits = match self.has_checksum(at, len) {
            // Damage, and reported as such where the segment ends.
            Err(_) if matches!(self.source, Source::Zstd(_)) => false,
            result => result.on("read", path)?,
        };
        self.proven_at = fits.then_some(at);
        Ok(fits)
    }

    /// Do `len` bytes from `at` on end in their own checksum? They are never in memory together.
    fn has_checksum(&self, at: u64, len: usize) -> io::Result<bool> {
        let mut reader: Box<dyn Read> = match &self.source {
            Source::Plain(file) => {
                let mut file = file.try_clone()?;
                file.seek(SeekFrom::Start(at))?;
                Box::new(file)
            }
            Source::Zstd(_) => {
                let mut decoder = zstd::Decoder::new(File::open(&self.file.path)?)?;
                io::copy(&mut decoder.by_ref().take(at), &mut io::sink())?;
                Box::new(decoder)
            }
        };
        let mut piece = vec![0; READ_SIZE];
        let (mut left, mut checksum) = (len.saturating_sub(CHECKSUM_LEN), 0);
        while left > 0 {
            let wanted = left.min(piece.len());
            let read = reader.read(&mut piece[..wanted])?;
            if read == 0 {
                return Ok(false);
            }
            checksum = crc32c::crc32c_append(checksum, &piece[..read]);
            left -= read;
        }
        let mut stored = [0; CHECKSUM_LEN];
        match reader.read_exact(&mut stored) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            result => result.map(|()| u32::from_le_bytes(stored) == checksum),
        }
    }

    /// Bytes that are no commit yet are read again later, since they may be a write under way.
    fn end(&mut self, buffer: &mut Vec<u8>, filled: &Filled, tail: Tail) -> Result<Filling, DataDirError> {
        if let Source::Plain(_) = self.source {
            self.read -= (buffer.len() - filled.len) as u64;
            buffer.truncate(filled.len);
        }
        Ok(Filling::EndOfSegment(tail))
    }

    fn read_more(&mut self, buffer: &mut Vec<u8>, size: usize) -> Result<usize, DataDirError> {
        let start = buffer.len();
        buffer.resize(start + size, 0);
        let mut read = 0;
        while read < size {
            match self.source.read(&mut buffer[start + read..], self.read) {
                Ok(0) => break,
                Ok(n) => {
                    read += n;
                    self.read += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => match self.source {
                    Source::Plain(_) => return Err(error).on("read", &self.file.path).map_err(Into::into),
                    Source::Zstd(_) => {
                        return Err(DataDirError::Damaged {
                            path: self.file.path.clone(),
                            at: self.read,
                            reason: format!("its compressed form does not decompress: {error}"),
                        });
                    }
                },
            }
        }
        buffer.truncate(start + read);
        Ok(read)
    }
}

impl Source {
    fn read(&mut self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.read_at(buffer, position),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

pub(super) fn read_at_most(file: &File, buffer: &mut [u8], position: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read_at(&mut buffer[read..], position + read as u64) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}
