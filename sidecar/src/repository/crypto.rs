//! Client-side encryption with age. Writing needs recipients only; reading needs an identity file.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::str::FromStr;

use crate::durable::{FileError, OnPath};
use crate::repository::hashing::{HashKey, Hashing};

/// What can be wrong with keys or sealed bytes.
#[derive(Debug, thiserror::Error)]
pub enum CryptoError {
    #[error("`{text}` is not an age recipient: {reason}; it starts with `age1`")]
    BadRecipient { text: String, reason: String },
    #[error("{path} holds no age identity: {reason}; it needs a line that starts with `AGE-SECRET-KEY-1`")]
    BadIdentity { path: String, reason: String },
    #[error(
        "the repository seals to {sealed:?} and you gave {given:?}; leave the recipients out to use the repository's, \
         or make a new repository"
    )]
    OtherRecipients { sealed: Vec<String>, given: Vec<String> },
    #[error("the repository is encrypted and no identity was given; name the identity file with --identity")]
    NoIdentity,
    #[error("none of the identities given opens this object; name the right identity file with --identity")]
    WrongIdentity,
    #[error("the sealed bytes are damaged: {0}")]
    Damaged(String),
    #[error(
        "the key of this repository's hashes is not on this machine; `inner-universe repository init --identity FILE` reads it \
         from the repository once, and remembers it beside the data directory's other notes"
    )]
    NoHashKey,
    #[error("sealing failed: {0}")]
    Seal(String),
    #[error(transparent)]
    File(#[from] FileError),
}

/// The recipients to seal to and the identities to open with.
#[derive(Clone, Default)]
pub struct Keyring {
    recipients: Vec<age::x25519::Recipient>,
    identities: Vec<age::x25519::Identity>,
    hashing: KnownHashing,
}

/// What is known of a repository's hashes.
#[derive(Debug, Clone, Copy, Default)]
enum KnownHashing {
    #[default]
    Plain,
    Keyed(HashKey),
    /// They have a key that is not here.
    Unknown,
}

impl Keyring {
    /// From recipients' texts and identity files' paths.
    ///
    /// # Errors
    /// When a text is no recipient or a file holds no identity.
    pub fn new(recipients: &[String], identity_files: &[PathBuf]) -> Result<Self, CryptoError> {
        let mut keys =
            Self { recipients: parse_recipients(recipients)?, identities: Vec::new(), hashing: KnownHashing::Plain };
        for path in identity_files {
            let text = std::fs::read_to_string(path).on("read", path)?;
            let refuse =
                |reason: &str| CryptoError::BadIdentity { path: path.display().to_string(), reason: reason.into() };
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            let before = keys.identities.len();
            for line in lines {
                keys.identities.push(age::x25519::Identity::from_str(line).map_err(refuse)?);
            }
            if keys.identities.len() == before {
                return Err(refuse("it has no key line"));
            }
        }
        Ok(keys)
    }

    /// Seals to what the repository says; other recipients than those are refused.
    pub(super) fn with_recipients(mut self, sealed: &[String]) -> Result<Self, CryptoError> {
        let given = self.recipient_names();
        if !given.is_empty() && given != sealed {
            return Err(CryptoError::OtherRecipients { sealed: sealed.to_vec(), given });
        }
        self.recipients = parse_recipients(sealed)?;
        Ok(self)
    }

    pub fn recipient_names(&self) -> Vec<String> {
        self.recipients.iter().map(ToString::to_string).collect()
    }

    /// Takes the key of a repository's hashes out of what the repository holds of it, if an identity opens that.
    pub(super) fn with_hash_key(mut self, sealed: Option<&str>) -> Result<Self, CryptoError> {
        self.hashing = match sealed {
            None => KnownHashing::Plain,
            Some(sealed) if self.can_open() => match HashKey::open(sealed, &self) {
                Ok(key) => KnownHashing::Keyed(key),
                // Whoever needs it is told then.
                Err(CryptoError::WrongIdentity) => KnownHashing::Unknown,
                Err(error) => return Err(error),
            },
            Some(_) => KnownHashing::Unknown,
        };
        Ok(self)
    }

    /// Takes a key that this machine remembers, if one is missing.
    pub(super) fn remember(&mut self, key: HashKey) {
        if matches!(self.hashing, KnownHashing::Unknown) {
            self.hashing = KnownHashing::Keyed(key);
        }
    }

    /// The key of the repository's hashes, where there is one and it is here.
    pub(super) fn hash_key(&self) -> Option<HashKey> {
        match self.hashing {
            KnownHashing::Keyed(key) => Some(key),
            KnownHashing::Plain | KnownHashing::Unknown => None,
        }
    }

    /// How content is named where names stand in clear.
    ///
    /// # Errors
    /// When that takes a key that is not here.
    pub fn hashing(&self) -> Result<Hashing, CryptoError> {
        match self.hashing {
            KnownHashing::Plain => Ok(Hashing::Plain),
            KnownHashing::Keyed(key) => Ok(Hashing::Keyed(key)),
            KnownHashing::Unknown => Err(CryptoError::NoHashKey),
        }
    }

    /// Is there any identity to open with?
    pub fn can_open(&self) -> bool {
        !self.identities.is_empty()
    }

    /// Are bodies sealed?
    pub fn seals(&self) -> bool {
        !self.recipients.is_empty()
    }

    /// Seals `plain` if there are recipients, else returns it as it is.
    ///
    /// # Errors
    /// When age refuses.
    pub fn seal(&self, plain: Vec<u8>) -> Result<Vec<u8>, CryptoError> {
        if !self.seals() {
            return Ok(plain);
        }
        let failed = |error: &dyn std::fmt::Display| CryptoError::Seal(error.to_string());
        let recipients = self.recipients.iter().map(|recipient| recipient as &dyn age::Recipient);
        let encryptor = age::Encryptor::with_recipients(recipients).map_err(|error| failed(&error))?;
        let mut sealed = Vec::with_capacity(plain.len() + plain.len() / 1024 + 512);
        let mut writer = encryptor.wrap_output(&mut sealed).map_err(|error| failed(&error))?;
        writer.write_all(&plain).map_err(|error| failed(&error))?;
        writer.finish().map_err(|error| failed(&error))?;
        Ok(sealed)
    }

    /// Opens what [`Self::seal`] sealed.
    ///
    /// # Errors
    /// Without a fitting identity, or when the bytes are damaged.
    pub fn open(&self, sealed: &[u8]) -> Result<Vec<u8>, CryptoError> {
        if self.identities.is_empty() {
            return Err(CryptoError::NoIdentity);
        }
        let decryptor = age::Decryptor::new(sealed).map_err(|error| CryptoError::Damaged(error.to_string()))?;
        let identities = self.identities.iter().map(|identity| identity as &dyn age::Identity);
        let mut reader = decryptor.decrypt(identities).map_err(|error| match error {
            age::DecryptError::NoMatchingKeys => CryptoError::WrongIdentity,
            error => CryptoError::Damaged(error.to_string()),
        })?;
        let mut plain = Vec::with_capacity(sealed.len());
        reader.read_to_end(&mut plain).map_err(|error| CryptoError::Damaged(error.to_string()))?;
        Ok(plain)
    }
}

fn parse_recipients(texts: &[String]) -> Result<Vec<age::x25519::Recipient>, CryptoError> {
    let parse = |text: &String| {
        age::x25519::Recipient::from_str(text.trim())
            .map_err(|reason| CryptoError::BadRecipient { text: text.clone(), reason: reason.to_string() })
    };
    texts.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_bytes_open_only_with_the_right_identity() {
        let right = age::x25519::Identity::generate();
        let keys = Keyring { recipients: vec![right.to_public()], identities: vec![right], ..Keyring::default() };
        let sealed = keys.seal(b"secret".to_vec()).unwrap();
        assert!(!sealed.windows(6).any(|window| window == b"secret"));
        assert_eq!(keys.open(&sealed).unwrap(), b"secret");
        let wrong = Keyring { identities: vec![age::x25519::Identity::generate()], ..Keyring::default() };
        assert!(matches!(wrong.open(&sealed), Err(CryptoError::WrongIdentity)));
        assert!(matches!(Keyring::default().open(&sealed), Err(CryptoError::NoIdentity)));
        let mut cut = sealed;
        cut.pop();
        assert!(matches!(keys.open(&cut), Err(CryptoError::Damaged(_))));
    }
}
