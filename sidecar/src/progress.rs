//! Progress as the concern rooms report it; how it is shown is the command line's business.

use std::sync::atomic::{AtomicU64, Ordering};

/// Told how far a piece of work is. Calls are cheap and may come from any thread.
pub trait Progress: Send + Sync {
    /// A new phase begins; `total` bytes if known.
    fn phase(&self, name: &str, total: Option<u64>);
    /// `bytes` more are done.
    fn advance(&self, bytes: u64);
}

/// Shows nothing.
pub struct Silent;

impl Progress for Silent {
    fn phase(&self, _name: &str, _total: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
}

/// Bytes and objects counted while they pass, for the report at the end.
#[derive(Default)]
pub struct Tally {
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    objects_written: AtomicU64,
}

impl Tally {
    pub fn read(&self, bytes: usize) {
        self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn wrote(&self, bytes: usize) {
        self.bytes_written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn wrote_object(&self, bytes: usize) {
        self.wrote(bytes);
        self.objects_written.fetch_add(1, Ordering::Relaxed);
    }

    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    pub fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
    }

    pub fn objects_written(&self) -> u64 {
        self.objects_written.load(Ordering::Relaxed)
    }
}
