//! Packs: pages and blobs of snapshots, many in one object, each known by its hash.
//!
//! A pack is a 16-byte start, the BLAKE3 of start and body, and the body, sealed if the repository is. Inside the body stand
//! zstd frames of about a mebibyte, then the index, then the index's length. A pack is named for that hash.

use object_store::path::Path as Key;

use crate::buffers::Buffer;
use crate::datadir::bytes::{Cursor, Malformed};
use crate::datadir::snapshot::{ObjectKind, object_hash};
use crate::ids::ContentHash;
use crate::repository::crypto::{CryptoError, Keyring};
use crate::repository::{InObject, RepositoryError, codec};

const MAGIC: [u8; 8] = *b"IUPACK\r\x1a";
const VERSION: u16 = 1;
const FLAG_SEALED: u16 = 1;
const START_LEN: usize = 16 + 32;
const FRAME_LEN: usize = 1 << 20;
const ENTRY_LEN: usize = 37;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EntryKind {
    Object(ObjectKind),
    /// A snapshot's native manifest, by the BLAKE3 of its bytes.
    Manifest,
}

impl EntryKind {
    fn code(self) -> u8 {
        match self {
            Self::Object(ObjectKind::Page) => 0,
            Self::Object(ObjectKind::Blob) => 1,
            Self::Manifest => 2,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Object(ObjectKind::Page)),
            1 => Some(Self::Object(ObjectKind::Blob)),
            2 => Some(Self::Manifest),
            _ => None,
        }
    }
}

/// Gathers entries until they are worth an object.
pub struct PackBuilder {
    entries: Vec<(ContentHash, EntryKind, u32)>,
    raw: Buffer,
}

impl Default for PackBuilder {
    fn default() -> Self {
        Self { entries: Vec::new(), raw: Buffer::take() }
    }
}

impl PackBuilder {
    pub fn add(&mut self, hash: ContentHash, kind: EntryKind, bytes: &[u8]) {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.entries.push((hash, kind, len));
        self.raw.extend_from_slice(bytes);
    }

    /// Bytes gathered, before compression.
    pub fn raw_len(&self) -> usize {
        self.raw.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn hashes(&self) -> Vec<ContentHash> {
        self.entries.iter().map(|(hash, ..)| *hash).collect()
    }

    /// The pack's name and bytes.
    ///
    /// # Errors
    /// When compression or sealing fails.
    pub fn finish(&self, level: i32, keys: &Keyring) -> Result<(ContentHash, Vec<u8>), RepositoryError> {
        let (mut payload, mut index, mut frames) = (Vec::new(), Vec::new(), 0u32);
        let (mut at, mut entry) = (0, 0);
        while entry < self.entries.len() {
            let first = entry;
            let mut len = 0;
            while entry < self.entries.len() && (entry == first || len + self.entries[entry].2 as usize <= FRAME_LEN) {
                len += self.entries[entry].2 as usize;
                entry += 1;
            }
            let frame_len = codec::compress(&self.raw[at..at + len], level, |frame| {
                payload.extend_from_slice(frame);
                frame.len()
            })
            .map_err(|error| CryptoError::Seal(format!("compress: {error}")))?;
            at += len;
            frames += 1;
            index.extend_from_slice(&u64::try_from(frame_len).unwrap_or(u64::MAX).to_le_bytes());
            index.extend_from_slice(&u32::try_from(entry - first).unwrap_or(u32::MAX).to_le_bytes());
            for (hash, kind, len) in &self.entries[first..entry] {
                index.extend_from_slice(&hash.0);
                index.push(kind.code());
                index.extend_from_slice(&len.to_le_bytes());
            }
        }
        payload.extend_from_slice(&frames.to_le_bytes());
        payload.extend_from_slice(&index);
        payload.extend_from_slice(&u32::try_from(index.len() + 4).unwrap_or(u32::MAX).to_le_bytes());
        let body = keys.seal(payload)?;
        let (bytes, id) = wrap(body, keys.seals());
        Ok((id, bytes))
    }
}

/// Puts the start before a body; returns the pack and its name.
pub fn wrap(body: Vec<u8>, sealed: bool) -> (Vec<u8>, ContentHash) {
    let mut bytes = Vec::with_capacity(START_LEN + body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&if sealed { FLAG_SEALED } else { 0 }.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    let id = name(&bytes, &body);
    bytes.extend_from_slice(&id.0);
    bytes.extend_from_slice(&body);
    (bytes, id)
}

/// Checks a stored pack against its name. Needs no key.
///
/// # Errors
/// When it is damaged.
pub fn check(id: &ContentHash, bytes: &[u8]) -> Result<(), Malformed> {
    start(id, bytes).map(|_| ())
}

fn name(start: &[u8], body: &[u8]) -> ContentHash {
    ContentHash(*blake3::Hasher::new().update(start).update(body).finalize().as_bytes())
}

/// The body and whether it is sealed.
fn start<'a>(id: &ContentHash, bytes: &'a [u8]) -> Result<(&'a [u8], bool), Malformed> {
    let mut cursor = Cursor::new(bytes);
    if cursor.array("the magic")? != MAGIC {
        return Err(Malformed { at: 0, reason: "it does not start as a pack does".into() });
    }
    let version = cursor.u16("the version")?;
    let flags = cursor.u16("the flags")?;
    if version != VERSION || flags & !FLAG_SEALED != 0 {
        return cursor.fail(format!("pack version {version} with flags {flags:#06x} is unknown to this release"));
    }
    cursor.take(4, "the reserved bytes")?;
    let named = cursor.position();
    let hash = ContentHash(cursor.array("the hash")?);
    let body = cursor.take(cursor.remaining(), "the body")?;
    if hash != *id || name(&bytes[..named], body) != *id {
        return cursor.fail("the body does not match the pack's name");
    }
    Ok((body, flags & FLAG_SEALED != 0))
}

/// Reads a pack and hands every wanted entry, checked against its hash, to `each`.
///
/// # Errors
/// When the pack or an entry is damaged, it cannot be unsealed, or `each` fails.
pub fn read<E: From<RepositoryError>>(
    key: &Key,
    id: &ContentHash,
    bytes: &[u8],
    keys: &Keyring,
    wanted: impl Fn(&ContentHash) -> bool,
    mut each: impl FnMut(ContentHash, EntryKind, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let (body, sealed) = start(id, bytes).in_object(key)?;
    let opened;
    let payload = if sealed {
        opened = keys.open(body).map_err(RepositoryError::from)?;
        opened.as_slice()
    } else {
        body
    };
    let mut frames_at = 0usize;
    // Its own: a shared one has room for a whole object, and a frame is a quarter of that.
    let mut raw = Vec::new();
    for frame in index(payload).in_object(key)? {
        let compressed = payload.get(frames_at..).and_then(|rest| rest.get(..frame.compressed_len));
        let compressed = compressed.ok_or_else(|| RepositoryError::damaged(key, "a frame is cut short"))?;
        frames_at += frame.compressed_len;
        if !frame.entries.iter().any(|(hash, ..)| wanted(hash)) {
            continue;
        }
        decompress(compressed, frame.raw_len(), &mut raw).map_err(|error| RepositoryError::damaged(key, error))?;
        let mut at = 0;
        for (hash, kind, len) in frame.entries {
            let entry = raw.get(at..).and_then(|rest| rest.get(..len));
            let entry = entry.ok_or_else(|| RepositoryError::damaged(key, "an entry is cut short"))?;
            at += len;
            if !wanted(&hash) {
                continue;
            }
            let computed = match kind {
                EntryKind::Object(kind) => object_hash(entry, kind).in_object(key)?,
                EntryKind::Manifest => ContentHash::of(entry),
            };
            if computed != hash {
                return Err(RepositoryError::damaged(key, format!("entry {hash} does not hash to its name")).into());
            }
            each(hash, kind, entry)?;
        }
    }
    Ok(())
}

struct Frame {
    compressed_len: usize,
    entries: Vec<(ContentHash, EntryKind, usize)>,
}

impl Frame {
    fn raw_len(&self) -> usize {
        self.entries.iter().map(|(.., len)| len).sum()
    }
}

fn index(payload: &[u8]) -> Result<Vec<Frame>, Malformed> {
    let cut = || Malformed { at: 0, reason: "the index is cut short".into() };
    let (rest, len) = payload.split_last_chunk::<4>().ok_or_else(cut)?;
    let start = rest.len().checked_sub(u32::from_le_bytes(*len) as usize).ok_or_else(cut)?;
    let mut cursor = Cursor::new(&rest[start..]);
    let count = cursor.array_len(12, "the frames")?;
    let mut frames = Vec::with_capacity(count);
    for _ in 0..count {
        let compressed_len = usize::try_from(cursor.u64("a frame's length")?).map_err(|_| cut())?;
        let count = cursor.array_len(ENTRY_LEN, "a frame's entries")?;
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            let hash = ContentHash(cursor.array("an entry's hash")?);
            let code = cursor.u8("an entry's kind")?;
            let Some(kind) = EntryKind::from_code(code) else {
                return cursor.fail(format!("entry kind {code} is unknown to this release"));
            };
            entries.push((hash, kind, cursor.u32("an entry's length")? as usize));
        }
        frames.push(Frame { compressed_len, entries });
    }
    cursor.finish("the index")?;
    Ok(frames)
}

/// Above it, what a frame claims to hold is only believed as it comes.
const BELIEVED: usize = 8 * FRAME_LEN;

fn decompress(compressed: &[u8], raw_len: usize, raw: &mut Vec<u8>) -> std::io::Result<()> {
    use std::io::Read;
    if raw_len <= BELIEVED {
        codec::decompress(compressed, raw_len, raw)?;
    } else {
        raw.clear();
        zstd::Decoder::new(compressed)?.take(raw_len as u64 + 1).read_to_end(raw)?;
    }
    if raw.len() != raw_len {
        return Err(std::io::Error::other("a frame is not as long as the index says"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_gives_back_what_is_wanted_and_every_flipped_bit_is_seen() {
        let mut builder = PackBuilder::default();
        let blobs: Vec<Vec<u8>> = (0..5u8).map(|n| vec![n; 300 * usize::from(n) + 1]).collect();
        for blob in &blobs {
            builder.add(ContentHash::of(blob), EntryKind::Object(ObjectKind::Blob), blob);
        }
        let keys = Keyring::default();
        let (id, bytes) = builder.finish(3, &keys).unwrap();
        let key = Key::from("packs/x");
        let wanted = ContentHash::of(&blobs[3]);
        let mut seen = Vec::new();
        read(
            &key,
            &id,
            &bytes,
            &keys,
            |hash| *hash == wanted,
            |_, _, bytes| {
                seen.push(bytes.to_vec());
                Ok::<_, RepositoryError>(())
            },
        )
        .unwrap();
        assert_eq!(seen, [blobs[3].clone()]);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(check(&id, &flipped).is_err(), "bit {bit}");
        }
    }
}
