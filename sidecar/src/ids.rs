//! Newtypes for what must not be mixed up: transaction offsets, timelines, identities, restore points, content hashes.
//!
//! Each has one text form, used in object names, JSON and messages alike.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What a text could not be read as.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct ParseIdError {
    pub text: String,
    pub expected: &'static str,
}

fn refuse<T>(text: &str, expected: &'static str) -> Result<T, ParseIdError> {
    Err(ParseIdError { text: text.to_owned(), expected })
}

/// A transaction offset: the number of a transaction in its database's log, starting at 0. "Up to N" includes N.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Offset(pub u64);

impl Offset {
    /// The twenty digits used in file and object names, so that names sort by offset.
    pub fn padded(self) -> String {
        format!("{:020}", self.0)
    }

    /// # Errors
    /// When the text is not exactly twenty digits of a 64-bit number.
    pub fn from_padded(text: &str) -> Result<Self, ParseIdError> {
        if text.len() == 20
            && text.bytes().all(|byte| byte.is_ascii_digit())
            && let Ok(value) = text.parse()
        {
            return Ok(Self(value));
        }
        refuse(text, "an offset of twenty digits")
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One unbroken history of a database. Histories fork when a log no longer continues what is archived; the first is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct TimelineId(pub u32);

impl TimelineId {
    pub const FIRST: Self = Self(1);
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08}", self.0)
    }
}

impl FromStr for TimelineId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        match text.parse() {
            Ok(value) if value > 0 => Ok(Self(value)),
            _ => refuse(text, "a timeline: a number from 1"),
        }
    }
}

/// Thirty-two bytes with a hexadecimal text form.
macro_rules! hex32 {
    ($(#[$doc:meta])* $name:ident, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                match parse_hex(text) {
                    Some(bytes) => Ok(Self(bytes)),
                    None => refuse(text, $expected),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({"type": "string", "pattern": "^[0-9a-f]{64}$"})
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

hex32! {
    /// A database's or a user's identity, most significant byte first, as the server prints it.
    Identity, "an identity of 64 hexadecimal digits"
}

impl Identity {
    /// From the little-endian form that the server keeps on disk.
    pub fn from_le(mut bytes: [u8; 32]) -> Self {
        bytes.reverse();
        Self(bytes)
    }

    /// The little-endian form.
    pub fn to_le(self) -> [u8; 32] {
        let mut bytes = self.0;
        bytes.reverse();
        bytes
    }
}

hex32! {
    /// A 32-byte content hash: BLAKE3 for pages, blobs and our objects, Keccak-256 for the server's programs.
    ContentHash, "a hash of 64 hexadecimal digits"
}

impl ContentHash {
    pub const ZERO: Self = Self([0; 32]);

    /// BLAKE3 of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = u8::try_from(high << 4 | low).ok()?;
    }
    Some(bytes)
}

/// A restore point's id: a ULID, so that names sort by creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RestorePointId(pub ulid::Ulid);

impl fmt::Display for RestorePointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl RestorePointId {
    /// A new one that sorts after `newest`, also when the clock was set back since.
    pub fn after(newest: Option<Self>, now: jiff::Timestamp) -> Self {
        let millis = u64::try_from(now.as_millisecond()).unwrap_or(0);
        let millis = newest.map_or(millis, |newest| millis.max(newest.0.timestamp_ms().saturating_add(1)));
        Self(ulid::Ulid::from_parts(millis, ulid::Ulid::new().random()))
    }
}

impl FromStr for RestorePointId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        text.parse().map(Self).or_else(|_| refuse(text, "a restore point id of 26 characters"))
    }
}

impl Serialize for RestorePointId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl JsonSchema for RestorePointId {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "RestorePointId".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "pattern": "^[0-7][0-9A-HJKMNP-TV-Z]{25}$"})
    }
}

impl<'de> Deserialize<'de> for RestorePointId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_its_text_form() {
        let identity = Identity::from_le(std::array::from_fn(|i| u8::try_from(i).unwrap()));
        let text = identity.to_string();
        assert!(text.starts_with("1f1e"));
        assert_eq!(text.parse::<Identity>().unwrap(), identity);
    }

    #[test]
    fn texts_of_the_wrong_length_or_alphabet_are_refused() {
        assert!("12".parse::<Identity>().is_err());
        assert!("g".repeat(64).parse::<ContentHash>().is_err());
        assert!("é".repeat(32).parse::<ContentHash>().is_err());
        assert!(Offset::from_padded("5").is_err());
        assert!(Offset::from_padded("99999999999999999999").is_err());
        assert_eq!(Offset::from_padded(&Offset(7).padded()).unwrap(), Offset(7));
        assert!("0".parse::<TimelineId>().is_err());
    }
}
