//! Compression with contexts that are used again: making one costs as much as compressing what a quiet second brings.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::compress_bound;

/// Contexts kept for the next who needs one.
const KEPT: usize = 2;
/// Above it a context takes more memory than it saves time.
const HIGHEST: i32 = 9;
/// Room that is kept; a commit can be hundreds of megabytes.
const LARGEST: usize = 8 << 20;

/// A context, and room for what it makes. Not one of the shared buffers: of those every page is in memory, and of this only
/// what a compressed object takes.
struct Compression {
    context: Compressor<'static>,
    level: i32,
    output: Vec<u8>,
}

static COMPRESSORS: Mutex<Vec<Compression>> = Mutex::new(Vec::new());
static DECOMPRESSORS: Mutex<Vec<Decompressor<'static>>> = Mutex::new(Vec::new());

/// Compresses into one frame and hands it to `then`.
///
/// # Errors
/// When zstd fails.
pub(super) fn compress<T>(bytes: &[u8], level: i32, then: impl FnOnce(&[u8]) -> T) -> io::Result<T> {
    let kept = lock(&COMPRESSORS).pop();
    let mut compression = match kept {
        Some(kept) => kept,
        None => Compression { context: Compressor::new(level)?, level, output: Vec::new() },
    };
    if compression.level != level {
        compression.context.set_compression_level(level)?;
        compression.level = level;
    }
    compression.output.clear();
    compression.output.reserve(compress_bound(bytes.len()));
    compression.context.compress_to_buffer(bytes, &mut compression.output)?;
    let result = then(&compression.output);
    if level <= HIGHEST && compression.output.capacity() <= LARGEST {
        keep(&COMPRESSORS, compression);
    }
    Ok(result)
}

/// Decompresses a frame of at most `len` bytes into `output`, in place of what is there.
///
/// # Errors
/// When it is damaged, or longer.
pub(super) fn decompress(compressed: &[u8], len: usize, output: &mut Vec<u8>) -> io::Result<()> {
    let kept = lock(&DECOMPRESSORS).pop();
    let mut context = match kept {
        Some(kept) => kept,
        None => Decompressor::new()?,
    };
    output.clear();
    output.reserve(len);
    // One that failed is not used again.
    context.decompress_to_buffer(compressed, output)?;
    keep(&DECOMPRESSORS, context);
    // There may have been more room than was asked for.
    if output.len() > len {
        return Err(io::Error::other(format!("it holds {} bytes where {len} are expected", output.len())));
    }
    Ok(())
}

fn keep<T>(kept: &Mutex<Vec<T>>, context: T) {
    let mut kept = lock(kept);
    if kept.len() < KEPT {
        kept.push(context);
    }
}

fn lock<T>(kept: &Mutex<Vec<T>>) -> MutexGuard<'_, Vec<T>> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_damaged_frames_leave_no_trace_in_what_comes_after() {
        let texts: Vec<Vec<u8>> = (0..40_usize).map(|n| format!("row {n} ").repeat(n * 50).into_bytes()).collect();
        let mut output = vec![1, 2, 3];
        for (index, text) in texts.iter().enumerate() {
            let level = [1, 3, 9][index % 3];
            let frame = compress(text, level, <[u8]>::to_vec).unwrap();
            assert_eq!(frame, zstd::bulk::compress(text, level).unwrap());
            decompress(&frame, text.len(), &mut output).unwrap();
            assert_eq!(&output, text);
            if !text.is_empty() {
                assert!(decompress(&frame[..frame.len() - 1], text.len(), &mut output).is_err());
                assert!(decompress(&frame, text.len() - 1, &mut output).is_err());
            }
        }
    }
}
