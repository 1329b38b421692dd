//! Writes commits as segments of a log, as the server would have.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::datadir::commit::{Frame, SegmentHeader};
use crate::datadir::log::segment_name;
use crate::durable::{FileError, OnPath};
use crate::ids::Offset;
use crate::restore::RestoreError;

/// As large as the server makes its segments by default.
const SEGMENT_SIZE: u64 = 1 << 30;

/// Writes commits into segments, leaving out what lies before `from` and after `until`.
pub(crate) struct SegmentWriter {
    dir: PathBuf,
    from: Offset,
    until: Offset,
    open: Option<(File, PathBuf, u8, u64)>,
    unsynced: u64,
    /// The disk writes while we decode on, instead of all at the end.
    syncing: Option<std::thread::JoinHandle<std::io::Result<()>>>,
}

/// Bytes written between two calls for the disk to start.
const SYNC_STEP: u64 = 64 << 20;

impl SegmentWriter {
    pub(crate) fn new(dir: &Path, from: Offset, until: Offset) -> Self {
        Self { dir: dir.to_owned(), from, until, open: None, unsynced: 0, syncing: None }
    }

    pub(crate) fn write(&mut self, log_version: u8, commits: &[u8]) -> Result<(), FileError> {
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
        let Some(first) = first else { return Ok(()) };
        let bytes = &commits[start..end];
        let fits = |(_, _, version, len): &(File, PathBuf, u8, u64)| {
            *version == log_version && len + bytes.len() as u64 <= SEGMENT_SIZE
        };
        if !self.open.as_ref().is_some_and(fits) {
            let path = self.dir.join(segment_name(first));
            let header = SegmentHeader { log_version, checksum_algorithm: 0 }.to_bytes();
            let mut file = File::create_new(&path).on("create", &path)?;
            file.write_all(&header).on("write", &path)?;
            self.open = Some((file, path, log_version, header.len() as u64));
        }
        if let Some((file, path, _, len)) = &mut self.open {
            file.write_all(bytes).on("write", path)?;
            *len += bytes.len() as u64;
            self.unsynced += bytes.len() as u64;
            if self.unsynced >= SYNC_STEP {
                self.unsynced = 0;
                let again = file.try_clone().on("reopen", path)?;
                let path = path.clone();
                self.finish_sync(&path)?;
                self.syncing = Some(std::thread::spawn(move || again.sync_data()));
            }
        }
        Ok(())
    }

    fn finish_sync(&mut self, path: &Path) -> Result<(), FileError> {
        match self.syncing.take().map(std::thread::JoinHandle::join) {
            Some(Ok(result)) => result.on("sync", path),
            // The sync of the whole file system comes anyway.
            Some(Err(_)) | None => Ok(()),
        }
    }

    /// A log without a segment would be a database without a transaction.
    pub(crate) fn finish(mut self) -> Result<(), RestoreError> {
        let dir = self.dir.clone();
        self.finish_sync(&dir)?;
        match self.open {
            Some(_) => Ok(()),
            None => Err(RestoreError::Unreachable {
                wanted: self.until,
                reason: "no commit lies wholly at or before it".into(),
            }),
        }
    }
}
