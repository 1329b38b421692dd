//! The content hash of a snapshot's page, from the page's file alone.
//!
//! A page file is the BSATN of the server's page: header, then rows. Its name is BLAKE3 over rows, fixed header, the bits
//! of the rows present and the variable header, in this order; the hash that the file itself carries is left out.

use crate::datadir::bytes::{Cursor, Malformed};
use crate::ids::ContentHash;

/// Bytes of row data in a page.
const ROW_DATA_LEN: usize = 65_536 - 64;

/// Computes the name that the page in `file` must have.
///
/// # Errors
/// When the bytes are not a page.
pub fn content_hash(file: &[u8]) -> Result<ContentHash, Malformed> {
    let mut cursor = Cursor::new(file);
    // next free cell, end of the rows, number of rows
    let fixed: [u8; 6] = cursor.array("the fixed header")?;
    let words = cursor.array_len(8, "the bits of present rows")?;
    let present = cursor.take(words * 8, "the bits of present rows")?;
    // next free granule, length of its list, start of the granules, number of granules
    let variable: [u8; 8] = cursor.array("the variable header")?;
    match cursor.u8("the saved hash")? {
        0 => {
            cursor.fixed_bytes::<32>("the saved hash")?;
        }
        1 => {}
        tag => return cursor.fail(format!("the saved hash has tag {tag} instead of 0 or 1")),
    }
    let len = cursor.array_len(1, "the rows")?;
    if len != ROW_DATA_LEN {
        return cursor.fail(format!("a page holds {ROW_DATA_LEN} bytes of rows, not {len}"));
    }
    let rows = cursor.take(len, "the rows")?;
    cursor.finish("the page")?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(rows).update(&fixed).update(present).update(&variable);
    Ok(ContentHash(*hasher.finalize().as_bytes()))
}
