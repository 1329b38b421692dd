//! Paths in JSON. JSON is text and a path need not be: what is not UTF-8 is replaced, so that a report is always whole.

use std::path::{Path, PathBuf};

use serde::Serializer;

/// # Errors
/// When the serializer fails.
pub fn path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// # Errors
/// When the serializer fails.
pub fn option<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    match path {
        Some(found) => serializer.serialize_some(&found.to_string_lossy()),
        None => serializer.serialize_none(),
    }
}
