//! The kinds of values that a configuration holds beyond numbers and texts. Each reads from the text a person would write.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// A length of time, written as `250ms`, `30s`, `5m`, `1h 30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Period(pub Duration);

impl Period {
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    pub const fn millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }
}

impl TryFrom<String> for Period {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let hint = || format!("`{text}` is no length of time; write it as 250ms, 30s, 5m, 1h or 7d");
        if let Some(days) = text.strip_suffix('d').and_then(|days| days.trim().parse::<u32>().ok()) {
            return Ok(Self(Duration::from_secs(u64::from(days) * 24 * 3600)));
        }
        let signed: jiff::SignedDuration = text.parse().map_err(|_| hint())?;
        Duration::try_from(signed).map(Self).map_err(|_| hint())
    }
}

impl From<Period> for String {
    fn from(period: Period) -> Self {
        period.to_string()
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::SignedDuration::try_from(self.0) {
            Ok(signed) => write!(f, "{signed:#}"),
            Err(_) => write!(f, "{}s", self.0.as_secs()),
        }
    }
}

/// A number of bytes, written as `4MiB` or `500 kB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct ByteSize(pub u64);

impl TryFrom<String> for ByteSize {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let size: bytesize::ByteSize =
            text.parse().map_err(|_| format!("`{text}` is no size; write it as 512KiB, 4MiB or 1GiB"))?;
        Ok(Self(size.as_u64()))
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

/// A size for people, `1.5 GiB`.
pub fn approximate(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Exact, so that what is shown reads back as the same.
        for (unit, name) in [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(f, "{}{name}", self.0 / unit);
            }
        }
        write!(f, "{}B", self.0)
    }
}

/// A secret: the text itself, or better `file:/path` or `env:NAME`. It never shows, not even in the error that refuses it.
#[derive(Clone, PartialEq, Eq, JsonSchema)]
#[schemars(with = "String")]
pub struct Secret {
    text: String,
    /// The file that it was read from.
    file: Option<PathBuf>,
}

/// What is shown of a secret.
pub const REDACTED: &str = "(redacted)";

impl Secret {
    /// The secret itself, for the one who needs it.
    pub fn reveal(&self) -> &str {
        &self.text
    }

    /// The file that it was read from.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// The secret as its file holds it now.
    pub(crate) fn read_again(&self) -> Result<String, String> {
        match &self.file {
            Some(path) => read_secret(path),
            None => Ok(self.text.clone()),
        }
    }
}

fn read_secret(path: &Path) -> Result<String, String> {
    let read = std::fs::read_to_string(path);
    let read = read.map_err(|error| format!("read the secret in {}: {error}", path.display()))?;
    match read.trim() {
        "" => Err("the secret is empty".into()),
        text => Ok(text.to_owned()),
    }
}

impl TryFrom<String> for Secret {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("file:") {
            let file = PathBuf::from(path);
            return Ok(Self { text: read_secret(&file)?, file: Some(file) });
        }
        let text = match text.strip_prefix("env:") {
            Some(name) => {
                std::env::var(name).map_err(|_| format!("the environment has no {name}, which the secret refers to"))?
            }
            None => text,
        };
        if text.is_empty() { Err("the secret is empty".into()) } else { Ok(Self { text, file: None }) }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(REDACTED)
    }
}

/// Reads one secret or several, in words that hold nothing of the value: serde's own quote it.
struct SecretVisitor<T> {
    expected: &'static str,
    text: fn(String) -> Result<T, String>,
    list: fn(Vec<Secret>) -> Result<T, String>,
}

impl<T> SecretVisitor<T> {
    fn refuse<E: de::Error>(&self) -> Result<T, E> {
        Err(E::custom(self.expected))
    }
}

impl<'de, T> Visitor<'de> for SecretVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.text)(text.to_owned()).map_err(E::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<T, A::Error> {
        let mut secrets = Vec::new();
        while let Some(secret) = items.next_element()? {
            secrets.push(secret);
        }
        (self.list)(secrets).map_err(de::Error::custom)
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<T, E> {
        self.refuse()
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<T, E> {
        self.refuse()
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<T, E> {
        self.refuse()
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<T, E> {
        self.refuse()
    }

    fn visit_unit<E: de::Error>(self) -> Result<T, E> {
        self.refuse()
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<T, A::Error> {
        self.refuse()
    }
}

const TEXT_EXPECTED: &str = "a text is expected, in quotes; its value is a secret and not shown";
const LIST_EXPECTED: &str = "a list of texts is expected, as [\"NAME=VALUE\"]; their values are secret and not shown";

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SecretVisitor {
            expected: TEXT_EXPECTED,
            text: Self::try_from,
            list: |_| Err(TEXT_EXPECTED.into()),
        })
    }
}

/// Reads a list of secrets.
pub(super) fn secrets<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Secret>, D::Error> {
    deserializer.deserialize_any(SecretVisitor {
        expected: LIST_EXPECTED,
        text: |_| Err(LIST_EXPECTED.into()),
        list: Ok,
    })
}

/// A URL as it may be shown: without the name and the password that may precede its host. Need not be a valid one.
pub fn without_user(url: &str) -> String {
    let start = url.find("//").map_or(0, |slashes| slashes + 2);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |len| start + len);
    // A password that was not percent-encoded may hold any of these.
    let authority = if url[start..end].contains('@') { &url[start..end] } else { &url[start..] };
    match authority.rfind('@') {
        Some(at) => format!("{}{REDACTED}{}", &url[..start], &url[start + at..]),
        None => url.to_owned(),
    }
}

/// A cron expression of six fields: second, minute, hour, day of month, month, day of week.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Cron(String);

impl Cron {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The parsed form. The text was checked when it was read.
    pub fn parse(&self) -> Result<croner::Cron, String> {
        let parser = croner::parser::CronParser::builder().seconds(croner::parser::Seconds::Required).build();
        parser.parse(&self.0).map_err(|error| {
            format!("`{}` is no cron expression of six fields (second minute hour day month weekday): {error}", self.0)
        })
    }
}

impl TryFrom<String> for Cron {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let cron = Self(text);
        let parsed = cron.parse()?;
        let now = chrono::Utc::now();
        match parsed.find_next_occurrence(&now, false) {
            Ok(_) => Ok(cron),
            Err(_) => Err(format!("`{}` never comes", cron.0)),
        }
    }
}

impl From<Cron> for String {
    fn from(cron: Cron) -> Self {
        cron.0
    }
}

/// A time zone by its IANA name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct TimeZone(pub chrono_tz::Tz);

impl TimeZone {
    pub const UTC: Self = Self(chrono_tz::UTC);
}

impl TryFrom<String> for TimeZone {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let zone = chrono_tz::Tz::from_str(&text);
        zone.map(Self).map_err(|_| format!("`{text}` is no time zone; write it as UTC or Europe/Berlin"))
    }
}

impl From<TimeZone> for String {
    fn from(zone: TimeZone) -> Self {
        zone.0.name().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_url_has_no_password() {
        for (url, shown) in [
            ("https://host:4318/v1?a=b", "https://host:4318/v1?a=b"),
            ("https://me:hush@host/x", "https://(redacted)@host/x"),
            ("s3://me:hu/sh@bucket/x", "s3://(redacted)@bucket/x"),
            ("me:hush@host", "(redacted)@host"),
            ("https://host/a@b", "https://(redacted)@b"),
        ] {
            assert_eq!(without_user(url), shown);
        }
    }
}
