//! What to restore to, as users write it.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;

use crate::ids::{Offset, RestorePointId};

/// A point in a database's history.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Target {
    /// Everything archived.
    #[default]
    Latest,
    /// Transactions 0 to this one.
    Offset(Offset),
    /// The last transaction whose time and all times before it are at or before this one.
    Time(Timestamp),
    /// The newest restore point with this label.
    Label(String),
    /// One restore point.
    Point(RestorePointId),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Some(offset) = text.strip_prefix("offset:") {
            let offset = offset.parse().map_err(|_| format!("`{offset}` is not an offset: a whole number from 0"))?;
            return Ok(Self::Offset(Offset(offset)));
        }
        if let Some(time) = text.strip_prefix("time:") {
            let time = time
                .parse()
                .map_err(|error| format!("`{time}` is not an RFC 3339 time such as 2026-05-01T12:30:00Z: {error}"))?;
            return Ok(Self::Time(time));
        }
        if let Some(label) = text.strip_prefix("label:") {
            return Ok(Self::Label(label.to_owned()));
        }
        text.parse().map(Self::Point).map_err(|_| {
            format!("`{text}` is no target; use latest, offset:N, time:RFC3339, label:L or a restore point's id")
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Offset(offset) => write!(f, "offset:{offset}"),
            Self::Time(time) => write!(f, "time:{time}"),
            Self::Label(label) => write!(f, "label:{label}"),
            Self::Point(id) => id.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_read_back_and_nonsense_is_named() {
        for text in ["latest", "offset:7", "time:2026-05-01T12:30:00Z", "label:before the party"] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
        for text in ["", "offset:-1", "offset:x", "time:yesterday", "lastest"] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
