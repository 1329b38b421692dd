//! The server's own `config.toml`, as far as our configuration decides it: the log level.
//!
//! Invariant: written only while no server of ours runs on the directory, and everything else in the file stays as it is.

use std::path::Path;

use toml_edit::{Array, DocumentMut, Item, Table, Value, value};

use crate::config::LogLevel;
use crate::durable::{self, OnPath};
use crate::standalone::StandaloneError;

/// Sets the level in the `config.toml` of `data_dir`, which is made if it is missing.
///
/// # Errors
/// When the file is no TOML, or cannot be read or written.
pub fn set_log_level(data_dir: &Path, level: LogLevel) -> Result<(), StandaloneError> {
    let path = data_dir.join("config.toml");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).on("read", &path).map_err(Into::into),
    };
    let changed =
        with_log_level(&text, level).map_err(|reason| StandaloneError::Settings { path: path.clone(), reason })?;
    if changed == text {
        return Ok(());
    }
    std::fs::create_dir_all(data_dir).on("create", data_dir)?;
    Ok(durable::replace(&path, changed.as_bytes())?)
}

/// Directives about the server's own parts would win over the level, and the server's default file has some; others stay.
fn with_log_level(text: &str, level: LogLevel) -> Result<String, String> {
    let mut document: DocumentMut = text.parse().map_err(|error: toml_edit::TomlError| error.message().to_owned())?;
    let logs = document.entry("logs").or_insert_with(|| Item::Table(Table::new()));
    let logs = logs.as_table_mut().ok_or("`logs` is not a table")?;
    logs.insert("level", value(level.name()));
    let theirs = logs.get("directives").and_then(Item::as_array).cloned().unwrap_or_default();
    let others = |directive: &Value| {
        !directive.as_str().is_some_and(|text| text.starts_with("spacetimedb") || text.starts_with("axum::rejection"))
    };
    let kept: Array = theirs.iter().filter(|directive| others(directive)).cloned().collect();
    if kept.len() != theirs.len() || logs.get("directives").is_none() {
        logs.insert("directives", value(kept));
    }
    Ok(document.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_is_set_and_the_rest_of_the_file_stays() {
        let made = with_log_level("", LogLevel::Warn).unwrap();
        assert_eq!(made, "[logs]\nlevel = \"warn\"\ndirectives = []\n");
        let theirs = "# ours\n[commitlog]\nmax-segment-size = 1048576\n\n[logs]\n# level\ndirectives = [\n    \
                      \"spacetimedb=debug\",\n    \"hyper=info\",\n]\n";
        let changed = with_log_level(theirs, LogLevel::Error).unwrap();
        assert!(changed.starts_with("# ours\n[commitlog]\nmax-segment-size = 1048576\n"), "{changed}");
        assert!(changed.contains("level = \"error\"") && changed.contains("\"hyper=info\""), "{changed}");
        assert!(!changed.contains("spacetimedb=debug"), "{changed}");
        assert_eq!(with_log_level(&changed, LogLevel::Error).unwrap(), changed);
        assert!(with_log_level("logs = 3", LogLevel::Error).is_err());
        assert!(with_log_level("[logs", LogLevel::Error).is_err());
    }
}
