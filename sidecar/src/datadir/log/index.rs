//! The server's index beside a segment: at which byte which transaction starts. A hint and no more: it is preallocated,
//! written without fsync and stale after a crash, so what it names counts only where that very commit stands there whole.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::datadir::log::segment::read_at_most;
use crate::durable::{FileError, OnPath};
use crate::ids::Offset;

/// A transaction's offset and the byte its commit starts at, both little-endian.
const ENTRY: u64 = 16;

/// The server makes an entry once so many bytes of commits have come since the last one.
const INTERVAL: u64 = 4096;

/// The length that the server gives an index before it writes the first entry: for a segment of its default size.
const LEN: u64 = (1 << 30) / INTERVAL * ENTRY;

/// Writes the index of a new segment as the server would have. Without one, the server reads its last segment from its
/// start, twice, before it serves.
pub(crate) struct IndexWriter {
    file: BufWriter<File>,
    path: PathBuf,
    /// The first commit since the last entry.
    candidate: Option<(Offset, u64)>,
    since: u64,
    len: u64,
    /// What went wrong; nothing is written after it.
    result: io::Result<()>,
}

impl IndexWriter {
    /// # Errors
    /// When the index exists or cannot be created.
    pub(crate) fn create(segment: &Path) -> Result<Self, FileError> {
        let path = segment.with_extension("ofs");
        let file = File::create_new(&path).on("create", &path)?;
        Ok(Self { file: BufWriter::new(file), path, candidate: None, since: 0, len: 0, result: Ok(()) })
    }

    /// Takes note of a commit of `len` bytes, which starts at byte `at` of the segment. What goes wrong [`Self::finish`] tells.
    pub(crate) fn commit(&mut self, first: Offset, at: u64, len: usize) {
        self.since += len as u64;
        // Zeros mean that there is no entry.
        if self.candidate.is_none() && first.0 != 0 {
            self.candidate = Some((first, at));
        }
        if self.since < INTERVAL || self.len >= LEN || self.result.is_err() {
            return;
        }
        if let Some((first, at)) = self.candidate.take() {
            let entry = [first.0.to_le_bytes(), at.to_le_bytes()];
            self.result = self.file.write_all(entry.as_flattened());
            (self.since, self.len) = (0, self.len + ENTRY);
        }
    }

    /// # Errors
    /// When the disk fails or is full.
    pub(crate) fn finish(mut self) -> Result<(), FileError> {
        self.result
            .and_then(|()| self.file.flush())
            .and_then(|()| self.file.get_ref().set_len(LEN))
            .on("write", &self.path)
    }
}

/// The last entry at or before `offset`; `None` also when there is no index, or none that can be read.
pub(super) fn find(segment: &Path, offset: Offset) -> Option<(Offset, u64)> {
    let file = File::open(segment.with_extension("ofs")).ok()?;
    let (mut low, mut high) = (0, file.metadata().ok()?.len() / ENTRY);
    let mut found = None;
    // Entries ascend; after the last one there are zeros.
    while low < high {
        let middle = low + (high - low) / 2;
        let (first, at) = entry(&file, middle)?;
        if first.0 != 0 && first <= offset {
            found = Some((first, at));
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    found
}

fn entry(file: &File, index: u64) -> Option<(Offset, u64)> {
    let mut bytes = [0; ENTRY as usize];
    if read_at_most(file, &mut bytes, index * ENTRY).ok()? < bytes.len() {
        return None;
    }
    let (key, at) = bytes.split_first_chunk::<8>()?;
    Some((Offset(u64::from_le_bytes(*key)), u64::from_le_bytes(at.try_into().ok()?)))
}
