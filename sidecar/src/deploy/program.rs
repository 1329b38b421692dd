//! A program as the repository keeps it: a frame of zstd, then a skippable frame with the BLAKE3 of the first.
//!
//! zstd can write the same content in many ways, so a bit that flips need not change what a frame decodes to. Only a hash
//! of the frame's own bytes sees every one. Other readers of zstd skip it.

use std::io;

use zstd::zstd_safe;

use crate::ids::ContentHash;

const LEVEL: i32 = 9;
/// No program is larger.
const MAX_LEN: usize = 256 << 20;
/// Magic number and length of the skippable frame, little-endian.
const SEAL_HEADER: [u8; 8] = [0x5e, 0x2a, 0x4d, 0x18, 32, 0, 0, 0];
const SEAL_LEN: usize = SEAL_HEADER.len() + 32;

/// # Errors
/// When zstd fails.
pub(super) fn pack(program: &[u8]) -> io::Result<Vec<u8>> {
    let mut packed = zstd::bulk::compress(program, LEVEL)?;
    let hash = ContentHash::of(&packed);
    packed.extend_from_slice(&SEAL_HEADER);
    packed.extend_from_slice(&hash.0);
    Ok(packed)
}

/// Unpacks a program. Those of before the hash was written have none; without it the program's own hash is all that tells.
///
/// # Errors
/// When a byte of it is not as it was written, as far as a hash is there, or it is no program, or larger than any.
pub(super) fn unpack(packed: &[u8]) -> io::Result<Vec<u8>> {
    let frame = match packed.split_last_chunk::<SEAL_LEN>() {
        Some((frame, seal)) if seal.starts_with(&SEAL_HEADER) => {
            if ContentHash::of(frame).0 != seal[SEAL_HEADER.len()..] {
                return Err(io::Error::other("its bytes do not match their checksum"));
            }
            frame
        }
        _ => packed,
    };
    let len = zstd_safe::find_frame_compressed_size(frame)
        .map_err(|code| io::Error::other(zstd_safe::get_error_name(code)))?;
    if len != frame.len() {
        return Err(io::Error::other(format!("its program ends after {len} of {} bytes", frame.len())));
    }
    zstd::bulk::decompress(frame, MAX_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_found_and_others_read_it_too() {
        let program: Vec<u8> = (0..4000_u32).flat_map(|n| [0, 0, 0, (n % 7) as u8, (n / 9) as u8]).collect();
        let packed = pack(&program).unwrap();
        assert_eq!(unpack(&packed).unwrap(), program);
        assert_eq!(zstd::decode_all(packed.as_slice()).unwrap(), program);
        let frame_len = packed.len() - SEAL_LEN;
        let mut unseen_without = 0;
        for bit in 0..packed.len() * 8 {
            let mut bad = packed.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(unpack(&bad).is_err(), "bit {bit}");
            let is_same = || zstd::bulk::decompress(&bad[..frame_len], MAX_LEN).is_ok_and(|found| found == program);
            unseen_without += u64::from(bit / 8 < frame_len && is_same());
        }
        assert!(unseen_without > 0, "this program does not show what the hash is for");
        for len in 0..packed.len() {
            assert_eq!(unpack(&packed[..len]).is_ok(), len == frame_len, "{len} bytes");
        }
    }

    #[test]
    fn programs_of_before_are_read() {
        let program = b"\0asm program".repeat(100);
        assert_eq!(unpack(&zstd::encode_all(program.as_slice(), LEVEL).unwrap()).unwrap(), program);
    }
}
