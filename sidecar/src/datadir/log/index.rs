//! The server's index beside a segment: at which byte which transaction starts. A hint and no more: it is preallocated,
//! written without fsync and stale after a crash, so what it names counts only where that very commit stands there whole.

use std::fs::File;
use std::path::Path;

use crate::datadir::log::segment::read_at_most;
use crate::ids::Offset;

/// A transaction's offset and the byte its commit starts at, both little-endian.
const ENTRY: u64 = 16;

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
