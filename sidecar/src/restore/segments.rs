//! Writes commits as segments of a log with their indexes, as the server would have, and reads the files to prove it.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use crate::datadir::commit::{Commit, Frame, NEWEST_LOG_VERSION, SegmentHeader};
use crate::datadir::log::{IndexWriter, SegmentFile, segment_name};
use crate::durable::{FileError, OnPath, streamed};
use crate::ids::Offset;
use crate::restore::RestoreError;

/// As large as the server makes its segments by default.
const SEGMENT_SIZE: u64 = 1 << 30;

/// Segments that are read back at once: the one that is being written, and the one before it.
const CHECKS: usize = 2;

/// Writes commits into segments, leaving out what lies before `from` and after `until`. Each segment is brought to the disk
/// and read as it is written.
pub(crate) struct SegmentWriter {
    dir: PathBuf,
    from: Offset,
    until: Offset,
    /// Before the checks: a check that is dropped ends once its writer is gone.
    open: Option<Open>,
    checks: VecDeque<Check>,
    checked: Vec<CheckedSegment>,
    /// No commit is larger than what was written at once.
    largest: Arc<AtomicUsize>,
}

struct Open {
    file: streamed::Writer,
    log_version: u8,
    len: u64,
}

/// A segment that is being read back.
struct Check {
    segment: SegmentFile,
    worker: Option<JoinHandle<Result<Offset, RestoreError>>>,
    /// Once all of it is written.
    syncing: Option<streamed::Syncing>,
}

impl Drop for Check {
    fn drop(&mut self) {
        // Where a restore has failed: nothing may be at work on what is cleared away.
        self.worker.take().map(JoinHandle::join);
    }
}

/// A segment that is on the disk, was read, and holds whole commits in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CheckedSegment {
    pub segment: SegmentFile,
    /// One past its last transaction.
    pub next: Offset,
}

impl SegmentWriter {
    pub(crate) fn new(dir: &Path, from: Offset, until: Offset) -> Self {
        Self {
            dir: dir.to_owned(),
            from,
            until,
            open: None,
            checks: VecDeque::new(),
            checked: Vec::new(),
            largest: Arc::default(),
        }
    }

    /// Writes commits that were checked and hold the given transactions.
    pub(crate) fn write(
        &mut self,
        log_version: u8,
        offsets: RangeInclusive<Offset>,
        commits: &[u8],
    ) -> Result<(), RestoreError> {
        let all = *offsets.start() >= self.from && *offsets.end() <= self.until;
        let wanted = if all { Some((*offsets.start(), commits)) } else { self.wanted(log_version, commits) };
        let Some((first, bytes)) = wanted.filter(|(_, bytes)| !bytes.is_empty()) else { return Ok(()) };
        let fits = |open: &Open| open.log_version == log_version && open.len + bytes.len() as u64 <= SEGMENT_SIZE;
        let mut open = match self.open.take() {
            Some(open) if fits(&open) => open,
            full => {
                if let Some(full) = full {
                    self.end(full);
                }
                self.begin(first, log_version)?
            }
        };
        self.largest.fetch_max(bytes.len(), Ordering::Relaxed);
        open.file.write(bytes)?;
        open.len += bytes.len() as u64;
        self.open = Some(open);
        Ok(())
    }

    fn begin(&mut self, first: Offset, log_version: u8) -> Result<Open, RestoreError> {
        if self.checks.len() >= CHECKS {
            self.finish_check()?;
        }
        let path = self.dir.join(segment_name(first));
        let (mut file, follow) = streamed::Writer::create(&path)?;
        let segment = SegmentFile { first, path };
        let reader = streamed::Reader::follow(&segment.path, follow)?;
        let largest = Arc::clone(&self.largest);
        let mut index = IndexWriter::create(&segment.path)?;
        let path = segment.path.clone();
        let check = move || {
            let next = check_segment(first, reader, &largest, |commit, place| {
                index.commit(commit.first, place, commit.bytes.len());
            })
            .map_err(|reason| RestoreError::SelfCheck(format!("{}: {reason}", path.display())))?;
            index.finish()?;
            Ok(next)
        };
        let worker = std::thread::Builder::new().name("read back".into()).spawn(check).on("read", &segment.path)?;
        self.checks.push_back(Check { segment, worker: Some(worker), syncing: None });
        let header = SegmentHeader { log_version, checksum_algorithm: 0 }.to_bytes();
        file.write(&header)?;
        Ok(Open { file, log_version, len: header.len() as u64 })
    }

    /// All of a segment is written: its check, which is the last that was begun, comes to its end.
    fn end(&mut self, open: Open) {
        if let Some(check) = self.checks.back_mut() {
            check.syncing = Some(open.file.finish());
        }
    }

    /// The commits that are asked for, and the first one's offset.
    fn wanted<'a>(&self, log_version: u8, commits: &'a [u8]) -> Option<(Offset, &'a [u8])> {
        let (mut start, mut end, mut first) = (0, 0, None);
        while let Frame::Commit(commit) = Frame::parse(log_version, &commits[end..]) {
            if commit.last() > self.until {
                break;
            }
            end += commit.bytes.len();
            if commit.last() < self.from {
                start = end;
            } else {
                first.get_or_insert(commit.first);
            }
        }
        first.map(|first| (first, &commits[start..end]))
    }

    /// Finishes the last segment and waits until all are read back. A log without a segment would be a database without a
    /// transaction.
    pub(crate) fn finish(mut self) -> Result<Vec<CheckedSegment>, RestoreError> {
        match self.open.take() {
            Some(open) => self.end(open),
            None => {
                return Err(RestoreError::Unreachable {
                    wanted: self.until,
                    reason: "no commit lies wholly at or before it".into(),
                });
            }
        }
        while !self.checks.is_empty() {
            self.finish_check()?;
        }
        Ok(self.checked)
    }

    /// Waits until the oldest segment that is not yet read back and on the disk is.
    fn finish_check(&mut self) -> Result<(), RestoreError> {
        let Some(mut check) = self.checks.pop_front() else { return Ok(()) };
        if let Some(worker) = check.worker.take() {
            let next = worker.join().map_err(|_| RestoreError::Worker("reading back".into()))??;
            self.checked.push(CheckedSegment { segment: check.segment.clone(), next });
        }
        check.syncing.take().map_or(Ok(()), streamed::Syncing::wait)?;
        Ok(())
    }
}

/// Every commit must be whole, with a good checksum, and follow the one before; then `seen` is told of it and of the byte
/// it starts at. Returns one past the last transaction.
fn check_segment(
    first: Offset,
    mut reader: streamed::Reader,
    largest: &AtomicUsize,
    mut seen: impl FnMut(&Commit<'_>, u64),
) -> Result<Offset, String> {
    let text = |error: FileError| error.to_string();
    // Its own: a shared one has room for a whole object, which this never needs.
    let mut unread = Vec::new();
    while unread.len() < SegmentHeader::LEN && reader.read(&mut unread).map_err(text)? {}
    let header = unread.first_chunk().map(SegmentHeader::parse);
    let header = header.ok_or("it has no header")?.map_err(|malformed| malformed.to_string())?;
    if header.log_version > NEWEST_LOG_VERSION || header.checksum_algorithm != 0 {
        return Err(format!(
            "its header holds version {} and checksum {}",
            header.log_version, header.checksum_algorithm
        ));
    }
    let (mut at, mut place, mut next) = (SegmentHeader::LEN, SegmentHeader::LEN as u64, first);
    loop {
        let needs = match Frame::parse(header.log_version, &unread[at..]) {
            Frame::Commit(commit) if commit.first == next => {
                seen(&commit, place);
                next = Offset(commit.last().0 + 1);
                at += commit.bytes.len();
                place += commit.bytes.len() as u64;
                continue;
            }
            Frame::Commit(commit) => {
                return Err(format!("transaction {next} is expected, and {} follows", commit.first));
            }
            Frame::Incomplete { needs } => needs,
            Frame::Zeros => return Err(format!("it holds zeros at byte {place}")),
            Frame::Broken(reason) => return Err(format!("at byte {place}, {reason}")),
        };
        unread.drain(..at);
        at = 0;
        // A damaged length must not make us read all that is left into memory.
        if needs > largest.load(Ordering::Relaxed) {
            return Err(format!("a commit of {needs} bytes starts at byte {place}"));
        }
        if !reader.read(&mut unread).map_err(text)? {
            return match unread.is_empty() {
                true => Ok(next),
                false => Err(format!("it ends inside a commit of {needs} bytes, at byte {place}")),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::datadir::commit::encode;
    use crate::datadir::log::{self, segments};

    /// Commits `first` to `last`, each of about `len` bytes.
    fn commits(version: u8, first: u64, last: u64, len: usize) -> Vec<u8> {
        (first..=last).flat_map(|offset| encode(version, Offset(offset), 0, 1, &vec![offset as u8; len])).collect()
    }

    fn range(first: u64, last: u64) -> RangeInclusive<Offset> {
        Offset(first)..=Offset(last)
    }

    #[test]
    fn what_is_asked_for_is_written_and_a_new_version_starts_a_new_segment() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = SegmentWriter::new(dir.path(), Offset(3), Offset(25));
        writer.write(0, range(0, 1), &commits(0, 0, 1, 50)).unwrap();
        writer.write(0, range(2, 9), &commits(0, 2, 9, 50)).unwrap();
        writer.write(1, range(10, 19), &commits(1, 10, 19, 50)).unwrap();
        writer.write(1, range(20, 29), &commits(1, 20, 29, 50)).unwrap();
        let checked = writer.finish().unwrap();
        assert_eq!(
            checked.iter().map(|found| found.segment.clone()).collect::<Vec<_>>(),
            segments(dir.path()).unwrap()
        );
        assert_eq!(
            checked.iter().map(|found| (found.segment.first.0, found.next.0)).collect::<Vec<_>>(),
            [(3, 10), (10, 26)]
        );
        let empty = SegmentWriter::new(dir.path(), Offset(3), Offset(25));
        assert!(matches!(empty.finish(), Err(RestoreError::Unreachable { .. })));
    }

    #[test]
    fn an_index_leads_into_each_segment() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = SegmentWriter::new(dir.path(), Offset(0), Offset(999));
        for first in (0..1000).step_by(10) {
            let commits = commits(1, first, first + 9, 1 + 40 * (first as usize % 70));
            writer.write(1, range(first, first + 9), &commits).unwrap();
        }
        let file = writer.finish().unwrap().remove(0).segment;
        let (segment, index) = (fs::read(&file.path).unwrap(), fs::read(file.path.with_extension("ofs")).unwrap());
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
        let entries = index.chunks_exact(16).map(|entry| (number(&entry[..8]), number(&entry[8..])));
        let (mut last, mut place) = (0, SegmentHeader::LEN);
        for (first, at) in entries.take_while(|entry| entry.0 != 0) {
            let Frame::Commit(commit) = Frame::parse(1, &segment[at as usize..]) else { panic!("nothing at {at}") };
            assert_eq!(commit.first.0, first);
            assert!(first > last && at as usize >= place, "transaction {first} at byte {at} is too close");
            // The first transaction of all counts, but has no entry.
            (last, place) = (first, at as usize + 4000);
        }
        assert!(segment.len() < place + 5000, "nothing leads behind byte {place} of {}", segment.len());
        assert_eq!(log::end(dir.path()).unwrap(), Offset(1000));
    }

    #[test]
    fn every_flipped_bit_and_every_lost_byte_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = SegmentWriter::new(dir.path(), Offset(4), Offset(6));
        writer.write(1, range(4, 6), &commits(1, 4, 6, 40)).unwrap();
        let file = writer.finish().unwrap().remove(0).segment;
        let whole = std::fs::read(&file.path).unwrap();
        let largest = AtomicUsize::new(whole.len());
        let check = || check_segment(Offset(4), streamed::Reader::open(&file.path).unwrap(), &largest, |_, _| {});
        assert_eq!(check(), Ok(Offset(7)));
        // The last two bytes of the header mean nothing.
        for bit in (0..whole.len() * 8).filter(|bit| !(64..80).contains(bit)) {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&file.path, bytes).unwrap();
            assert!(check().is_err(), "bit {bit}");
        }
        let commit = (whole.len() - SegmentHeader::LEN) / 3;
        for len in 0..whole.len() {
            std::fs::write(&file.path, &whole[..len]).unwrap();
            let result = check();
            match len.checked_sub(SegmentHeader::LEN) {
                Some(held) if held % commit == 0 => assert_eq!(result, Ok(Offset(4 + (held / commit) as u64))),
                _ => assert!(result.is_err(), "{len} bytes"),
            }
        }
        std::fs::write(&file.path, [whole.as_slice(), &[0; 9000]].concat()).unwrap();
        assert!(check().unwrap_err().contains("zeros"));
    }
}
