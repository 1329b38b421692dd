//! One commit of the log: its frame, its checksum, and the inputs of its first transaction.
//!
//! A frame is `min_tx_offset u64 | epoch u64 | n u16 | len u32 | records | crc32c u32`, little-endian, the checksum over
//! all that precedes it. Logs of format version 0 have no epoch. Rows carry no length, so only the first record of a
//! commit can be read without the database's schema; every server seen writes one transaction a commit.

use crate::datadir::bytes::{Cursor, Malformed};
use crate::ids::{Identity, Offset};

/// The newest log format version this release reads.
pub const NEWEST_LOG_VERSION: u8 = 1;
/// Bytes after the records.
pub(super) const CHECKSUM_LEN: usize = 4;

/// A segment's first ten bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    pub log_version: u8,
    pub checksum_algorithm: u8,
}

impl SegmentHeader {
    pub const LEN: usize = 10;
    const MAGIC: [u8; 6] = *b"(ds)^2";

    /// # Errors
    /// When the bytes do not start with the magic.
    pub fn parse(bytes: &[u8; Self::LEN]) -> Result<Self, Malformed> {
        let mut cursor = Cursor::new(bytes);
        if cursor.array("the magic")? != Self::MAGIC {
            return Err(Malformed { at: 0, reason: "a log segment starts with `(ds)^2`, and this does not".into() });
        }
        Ok(Self { log_version: cursor.u8("the version")?, checksum_algorithm: cursor.u8("the checksum algorithm")? })
    }

    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..6].copy_from_slice(&Self::MAGIC);
        bytes[6] = self.log_version;
        bytes[7] = self.checksum_algorithm;
        bytes
    }
}

/// What is found at a place in a log.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A whole commit with a good checksum.
    Commit(Commit<'a>),
    /// Preallocated space: the log ends here.
    Zeros,
    /// The bytes end before the commit does; it needs at least this many.
    Incomplete { needs: usize },
    /// The bytes are all there and the checksum is wrong, or the frame contradicts itself.
    Broken(&'static str),
}

/// A whole commit, byte for byte as in the segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Commit<'a> {
    pub first: Offset,
    pub epoch: u64,
    /// Transactions in it, at least 1.
    pub count: u16,
    /// The frame with header and checksum.
    pub bytes: &'a [u8],
    /// The records alone.
    pub records: &'a [u8],
}

/// Bytes before a commit's records.
pub(super) const fn header_len(log_version: u8) -> usize {
    if log_version == 0 { 14 } else { 22 }
}

impl<'a> Frame<'a> {
    /// Reads what stands at the start of `bytes`.
    pub fn parse(log_version: u8, bytes: &'a [u8]) -> Self {
        let header = header_len(log_version);
        if bytes.len() < header {
            return Self::Incomplete { needs: header };
        }
        if bytes[..header].iter().all(|byte| *byte == 0) {
            return Self::Zeros;
        }
        Self::parse_header(log_version, bytes).unwrap_or(Self::Broken("its frame is cut short"))
    }

    fn parse_header(log_version: u8, bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut cursor = Cursor::new(bytes);
        let first = cursor.u64("the offset")?;
        let epoch = if log_version == 0 { 0 } else { cursor.u64("the epoch")? };
        let count = cursor.u16("the count")?;
        let len = cursor.u32("the length")? as usize;
        if count == 0 {
            return Ok(Self::Broken("it claims to hold no transaction"));
        }
        if first.checked_add(u64::from(count)).is_none() {
            return Ok(Self::Broken("its offset is past the end of the numbers"));
        }
        let header = cursor.position();
        let needs = header + len + CHECKSUM_LEN;
        if bytes.len() < needs {
            return Ok(Self::Incomplete { needs });
        }
        let records = cursor.take(len, "the records")?;
        let checksum = cursor.u32("the checksum")?;
        if crc32c::crc32c(&bytes[..header + len]) != checksum {
            return Ok(Self::Broken("its checksum does not match"));
        }
        Ok(Self::Commit(Commit { first: Offset(first), epoch, count, bytes: &bytes[..needs], records }))
    }
}

impl Commit<'_> {
    pub fn last(&self) -> Offset {
        Offset(self.first.0 + u64::from(self.count) - 1)
    }

    /// The checksum at its end.
    pub fn checksum(&self) -> u32 {
        self.bytes.last_chunk().map_or(0, |checksum| u32::from_le_bytes(*checksum))
    }

    /// The inputs of the first transaction, `None` when it has none (a publish, SQL) or they make no sense to us.
    pub fn inputs(&self) -> Option<Inputs<'_>> {
        Inputs::parse(self.records).ok().flatten()
    }
}

/// Which reducer made a transaction, for whom and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inputs<'a> {
    pub reducer: &'a str,
    pub caller: Identity,
    pub connection_id: u128,
    /// The server's clock, microseconds since the Unix epoch.
    pub time_micros: i64,
    /// The arguments, in BSATN.
    pub arguments: &'a [u8],
}

const HAVE_INPUTS: u8 = 0x80;

impl<'a> Inputs<'a> {
    /// Reads the inputs at the start of a record.
    ///
    /// # Errors
    /// When the record claims inputs and they cannot be read.
    pub fn parse(record: &'a [u8]) -> Result<Option<Self>, Malformed> {
        let mut cursor = Cursor::new(record);
        if cursor.u8("the flags")? & HAVE_INPUTS == 0 {
            return Ok(None);
        }
        let len = cursor.u32("the inputs' length")? as usize;
        let mut inputs = Cursor::new(cursor.take(len, "the inputs")?);
        let name_len = inputs.u8("the reducer name's length")?;
        let name = inputs.take(usize::from(name_len), "the reducer name")?;
        let Ok(reducer) = std::str::from_utf8(name) else {
            return inputs.fail("the reducer name is not UTF-8");
        };
        let caller = Identity::from_le(inputs.array("the caller")?);
        let connection_id = u128::from_le_bytes(inputs.array("the connection id")?);
        let time_micros = inputs.i64("the time")?;
        let arguments = inputs.take(inputs.remaining(), "the arguments")?;
        Ok(Some(Self { reducer, caller, connection_id, time_micros, arguments }))
    }
}

/// Builds a commit frame: for tests, and for logs we write for other readers to judge.
pub fn encode(log_version: u8, first: Offset, epoch: u64, count: u16, records: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(header_len(log_version) + records.len() + CHECKSUM_LEN);
    bytes.extend_from_slice(&first.0.to_le_bytes());
    if log_version != 0 {
        bytes.extend_from_slice(&epoch.to_le_bytes());
    }
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(records.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(records);
    let checksum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_reads_back_in_both_versions() {
        for version in [0, 1] {
            let bytes = encode(version, Offset(7), 3, 2, b"records");
            let Frame::Commit(commit) = Frame::parse(version, &bytes) else { panic!("not a commit") };
            assert_eq!((commit.first, commit.last(), commit.records), (Offset(7), Offset(8), b"records".as_slice()));
            assert_eq!(commit.epoch, if version == 0 { 0 } else { 3 });
            assert_eq!(commit.bytes, bytes);
        }
    }

    #[test]
    fn every_cut_is_incomplete_and_every_flipped_bit_is_seen() {
        let bytes = encode(1, Offset(1), 0, 1, b"some records of a transaction");
        for cut in 0..bytes.len() {
            assert!(matches!(Frame::parse(1, &bytes[..cut]), Frame::Incomplete { .. }), "cut at {cut}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(!matches!(Frame::parse(1, &flipped), Frame::Commit(_)), "bit {bit}");
        }
    }

    #[test]
    fn zeros_end_the_log() {
        assert_eq!(Frame::parse(1, &[0; 64]), Frame::Zeros);
        assert_eq!(Frame::parse(0, &[0; 64]), Frame::Zeros);
    }

    #[test]
    fn inputs_name_reducer_caller_and_time() {
        let mut inputs = vec![3];
        inputs.extend_from_slice(b"add");
        inputs.extend_from_slice(&[5; 32]);
        inputs.extend_from_slice(&9u128.to_le_bytes());
        inputs.extend_from_slice(&1_700_000_000_000_000i64.to_le_bytes());
        inputs.extend_from_slice(b"args");
        let mut record = vec![0xa0];
        record.extend_from_slice(&u32::try_from(inputs.len()).unwrap().to_le_bytes());
        record.extend_from_slice(&inputs);
        record.extend_from_slice(b"mutations");
        let read = Inputs::parse(&record).unwrap().unwrap();
        assert_eq!((read.reducer, read.connection_id, read.arguments), ("add", 9, b"args".as_slice()));
        assert_eq!(read.time_micros, 1_700_000_000_000_000);
        assert_eq!(Inputs::parse(&[0x20, 1, 2]).unwrap(), None);
        for cut in 1..inputs.len() {
            assert!(Inputs::parse(&record[..cut]).is_err());
        }
    }
}
