//! Large buffers that are used again. Fresh memory costs a page fault for every 4 KiB, and work on a log takes megabytes at a
//! time, over and over.

use std::mem;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// Buffers kept for the next who needs one: as many as a pipeline on two cores has under way.
const KEPT: usize = 3;
/// Larger ones are rare, and given back to the system.
const LARGEST: usize = 8 << 20;

static IDLE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// A vector that others use again once it is dropped.
#[derive(Debug, Default)]
pub struct Buffer(Vec<u8>);

impl Buffer {
    /// An empty one.
    pub fn take() -> Self {
        Self(idle().pop().unwrap_or_default())
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl Deref for Buffer {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut bytes = mem::take(&mut self.0);
        bytes.clear();
        let mut idle = idle();
        if bytes.capacity() > 0 && bytes.capacity() <= LARGEST && idle.len() < KEPT {
            idle.push(bytes);
        }
    }
}

fn idle() -> std::sync::MutexGuard<'static, Vec<Vec<u8>>> {
    IDLE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_is_taken_is_empty_whatever_was_in_it() {
        for round in 0..20_usize {
            let mut held: Vec<_> = (0..6).map(|_| Buffer::take()).collect();
            assert!(held.iter().all(|buffer| buffer.is_empty()));
            held.iter_mut().for_each(|buffer| buffer.extend_from_slice(&vec![7; round << 12]));
        }
        assert!(idle().len() <= KEPT);
    }
}
