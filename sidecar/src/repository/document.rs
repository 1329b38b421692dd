//! JSON documents that carry their own checksum and stay plain JSON to every other reader.
//!
//! A document is an object whose last member is `"checksum"`: BLAKE3 over the document's bytes with that member left out.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ids::ContentHash;

const BEFORE: &[u8] = b",\"checksum\":\"";
const AFTER: &[u8] = b"\"}\n";
const TAIL_LEN: usize = BEFORE.len() + 64 + AFTER.len();

/// Why bytes are not a document.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    #[error("it does not end in its checksum")]
    NoChecksum,
    #[error("its checksum does not match")]
    WrongChecksum,
    #[error("{0}")]
    Json(#[from] serde_json::Error),
}

/// Writes `value`, which must serialise to a JSON object with at least one member.
pub fn write<T: Serialize>(value: &T) -> Vec<u8> {
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    debug_assert!(bytes.len() > 2 && bytes.ends_with(b"}"), "documents are objects with members");
    sign(bytes)
}

/// Puts the checksum into the text of a JSON object.
pub fn sign(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum = ContentHash::of(&bytes).to_string();
    bytes.pop();
    bytes.extend_from_slice(BEFORE);
    bytes.extend_from_slice(checksum.as_bytes());
    bytes.extend_from_slice(AFTER);
    bytes
}

/// Reads and checks a document.
///
/// # Errors
/// When the checksum is missing or wrong, or the JSON is not a `T`.
pub fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DocumentError> {
    let body_len = bytes.len().checked_sub(TAIL_LEN).ok_or(DocumentError::NoChecksum)?;
    let (body, tail) = bytes.split_at(body_len);
    let checksum = tail.strip_prefix(BEFORE).and_then(|tail| tail.strip_suffix(AFTER));
    let checksum = checksum.ok_or(DocumentError::NoChecksum)?;
    let mut original = body.to_vec();
    original.push(b'}');
    if ContentHash::of(&original).to_string().as_bytes() != checksum {
        return Err(DocumentError::WrongChecksum);
    }
    Ok(serde_json::from_slice(&original)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_json_and_every_flipped_bit_is_seen() {
        let bytes = write(&serde_json::json!({"name": "inner", "n": 7}));
        let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(value["n"], 7);
        assert_eq!(read::<serde_json::Value>(&bytes).unwrap()["name"], "inner");
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(read::<serde_json::Value>(&flipped).is_err(), "bit {bit}");
        }
        for cut in 0..bytes.len() {
            assert!(read::<serde_json::Value>(&bytes[..cut]).is_err());
        }
    }
}
