//! A log of transactions as the server writes them, from a seed.

use std::fmt::Write as _;
use std::path::Path;

use crate::synthetic::{Synthetic, record};
use crate::workload::Random;

/// About what the server writes for a reducer that inserts a row of 200 bytes.
const PAYLOAD: usize = 450;
const SEGMENT: u64 = 1 << 30;

/// Writes logs, each part where the one before ended.
pub struct Writer {
    random: Random,
    next: u64,
    time: i64,
}

impl Default for Writer {
    fn default() -> Self {
        Self { random: Random::new(42), next: 0, time: 1_760_000_000_000_000 }
    }
}

impl Writer {
    /// Adds about `bytes` to the log, in segments of the server's size. Returns the bytes.
    pub fn add(&mut self, synthetic: &Synthetic, bytes: u64) -> u64 {
        let mut total = 0;
        while total < bytes {
            let (mut records, mut len) = (Vec::new(), 0);
            while len < SEGMENT.min(bytes - total) {
                self.time += self.random.below(200) as i64;
                let payload = self.payload(self.next + records.len() as u64);
                let record = record(self.time, &payload);
                len += record.len() as u64 + 26;
                records.push(record);
            }
            synthetic.indexed_segment(1, self.next, &records);
            self.next += records.len() as u64;
            total += len;
        }
        total
    }

    /// A third random, a third words, a third numbers that count: rows compress about so.
    fn payload(&mut self, n: u64) -> Vec<u8> {
        const WORDS: [&str; 8] =
            ["entity", "updated", "relation", "created", "orbit", "station", "observed", "magnitude"];
        let mut text = format!("{{\"id\":{n},\"version\":{},\"at\":{}", n % 97, n * 3);
        while text.len() < PAYLOAD * 2 / 3 {
            let (key, value) = (self.random.below(8) as usize, self.random.below(8) as usize);
            let _ = write!(text, ",\"{}\":\"{}\"", WORDS[key], WORDS[value]);
        }
        let mut bytes = text.into_bytes();
        while bytes.len() < PAYLOAD {
            bytes.extend(self.random.draw().to_le_bytes());
        }
        bytes
    }
}

/// Bytes of a file, or of all files below a directory.
pub fn size(path: &Path) -> u64 {
    let Ok(kind) = std::fs::symlink_metadata(path) else { return 0 };
    if !kind.is_dir() {
        return kind.len();
    }
    std::fs::read_dir(path).map_or(0, |entries| entries.flatten().map(|entry| size(&entry.path())).sum())
}
