//! A cursor over untrusted bytes: every read is checked, nothing panics, nothing is allocated on a length's word.

/// Where and why bytes made no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at}: {reason}")]
pub struct Malformed {
    /// Bytes from the start of what was being read.
    pub at: u64,
    pub reason: String,
}

/// Reads little-endian values and BSATN lengths from a slice.
#[derive(Debug, Clone)]
pub struct Cursor<'a> {
    rest: &'a [u8],
    len: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, len: bytes.len() }
    }

    /// Bytes consumed so far.
    pub fn position(&self) -> usize {
        self.len - self.rest.len()
    }

    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub fn fail<T>(&self, reason: impl Into<String>) -> Result<T, Malformed> {
        Err(Malformed { at: self.position() as u64, reason: reason.into() })
    }

    /// # Errors
    /// When fewer than `n` bytes are left.
    pub fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], Malformed> {
        match self.rest.split_at_checked(n) {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(head)
            }
            None => self.fail(format!("{what} needs {n} bytes and {} are left", self.rest.len())),
        }
    }

    /// # Errors
    /// When fewer than `N` bytes are left.
    pub fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Malformed> {
        let bytes = self.take(N, what)?;
        let mut array = [0; N];
        array.copy_from_slice(bytes);
        Ok(array)
    }

    /// # Errors
    /// At the end of the bytes.
    pub fn u8(&mut self, what: &str) -> Result<u8, Malformed> {
        self.array(what).map(u8::from_le_bytes)
    }

    /// # Errors
    /// At the end of the bytes.
    pub fn u16(&mut self, what: &str) -> Result<u16, Malformed> {
        self.array(what).map(u16::from_le_bytes)
    }

    /// # Errors
    /// At the end of the bytes.
    pub fn u32(&mut self, what: &str) -> Result<u32, Malformed> {
        self.array(what).map(u32::from_le_bytes)
    }

    /// # Errors
    /// At the end of the bytes.
    pub fn u64(&mut self, what: &str) -> Result<u64, Malformed> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// # Errors
    /// At the end of the bytes.
    pub fn i64(&mut self, what: &str) -> Result<i64, Malformed> {
        self.array(what).map(i64::from_le_bytes)
    }

    /// A BSATN array length, checked against the least its elements can take.
    ///
    /// # Errors
    /// When the array could not fit into what is left.
    pub fn array_len(&mut self, element_size: usize, what: &str) -> Result<usize, Malformed> {
        let len = self.u32(what)? as usize;
        if len.checked_mul(element_size).is_none_or(|bytes| bytes > self.rest.len()) {
            return self.fail(format!("{what} claims {len} elements, more than the bytes hold"));
        }
        Ok(len)
    }

    /// A BSATN byte array of a length known beforehand; BSATN writes the length all the same.
    ///
    /// # Errors
    /// When the written length is another, or too few bytes are left.
    pub fn fixed_bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Malformed> {
        let len = self.array_len(1, what)?;
        if len != N {
            return self.fail(format!("{what} is {len} bytes long instead of {N}"));
        }
        self.array(what)
    }

    /// # Errors
    /// When bytes are left over.
    pub fn finish(&self, what: &str) -> Result<(), Malformed> {
        if self.rest.is_empty() {
            return Ok(());
        }
        self.fail(format!("{} bytes are left over after {what}", self.rest.len()))
    }
}
