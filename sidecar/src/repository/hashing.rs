//! How content is hashed where the hash stands in clear: in an encrypted repository with a key, so that nobody who reads the
//! repository can test guesses of the content.
//!
//! The key belongs to the repository and lies in `repository.json`, encrypted to its recipients. Whoever writes without an
//! identity remembers it on its own machine. Hashes of what is stored, encrypted as it is, need no key.

use std::fmt;

use crate::ids::ContentHash;
use crate::repository::crypto::{CryptoError, Keyring};

const CONTEXT: &str = "inner-universe 2026-11 key for hashes that stand in clear";

/// The key of a repository's hashes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HashKey([u8; 32]);

impl HashKey {
    /// A new one, which nobody can guess.
    pub(super) fn generate() -> Self {
        use age::secrecy::ExposeSecret as _;
        let secret = age::x25519::Identity::generate().to_string();
        Self(blake3::derive_key(CONTEXT, secret.expose_secret().as_bytes()))
    }

    /// As text, to be kept on this machine alone.
    pub(super) fn to_text(self) -> String {
        ContentHash(self.0).to_string()
    }

    pub(super) fn from_text(text: &str) -> Option<Self> {
        text.parse::<ContentHash>().ok().map(|bytes| Self(bytes.0))
    }

    pub(super) fn seal(self, keys: &Keyring) -> Result<String, CryptoError> {
        use base64::Engine as _;
        Ok(base64::engine::general_purpose::STANDARD.encode(keys.seal(self.0.to_vec())?))
    }

    pub(super) fn open(sealed: &str, keys: &Keyring) -> Result<Self, CryptoError> {
        use base64::Engine as _;
        let damaged = || CryptoError::Damaged("the repository's hash key is damaged".into());
        let sealed = base64::engine::general_purpose::STANDARD.decode(sealed).map_err(|_| damaged())?;
        keys.open(&sealed)?.try_into().map(Self).map_err(|_| damaged())
    }
}

/// It shows in no message.
impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey")
    }
}

/// How a repository names content in clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Hashing {
    /// By its hash: the repository is not encrypted, or was made by a release before there were keys.
    #[default]
    Plain,
    Keyed(HashKey),
}

impl Hashing {
    /// What stands for content with this hash.
    pub fn name(self, hash: ContentHash) -> ContentHash {
        match self {
            Self::Plain => hash,
            Self::Keyed(key) => ContentHash(*blake3::keyed_hash(&key.0, &hash.0).as_bytes()),
        }
    }

    /// What stands for `content`.
    pub fn name_of(self, content: &[u8]) -> ContentHash {
        self.name(ContentHash::of(content))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_has_the_key_can_test_a_guess() {
        let (one, other) = (HashKey::generate(), HashKey::generate());
        assert_ne!(one, other);
        let names = [Hashing::Plain, Hashing::Keyed(one), Hashing::Keyed(other)].map(|hashing| hashing.name_of(b"row"));
        assert_eq!(names[0], ContentHash::of(b"row"));
        assert!(names[1] != names[0] && names[2] != names[0] && names[1] != names[2]);
        assert_eq!(HashKey::from_text(&one.to_text()), Some(one));
        assert!(!format!("{:?}", Hashing::Keyed(one)).contains(&one.to_text()));
    }
}
