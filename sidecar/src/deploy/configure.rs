//! What the configuration asks of the bundled module: rows of its `config` table, its admins and members.
//!
//! Invariant: only what differs is written, so that a second deployment of the same leaves no transaction.

use serde::Serialize;
use serde_json::{Value, json};

use crate::config::Config;
use crate::database::schema::Schema;
use crate::observe::server::{Database, SourceError};

/// One setting that is not as the configuration has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    pub key: String,
    pub from: Option<String>,
    pub to: String,
}

/// What is to be changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Changes {
    pub settings: Vec<Change>,
    pub admins: Vec<String>,
    pub members: Vec<String>,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.settings.is_empty() && self.admins.is_empty() && self.members.is_empty()
    }

    pub fn describe(&self) -> String {
        let settings = self.settings.iter().map(|change| match &change.from {
            Some(from) => format!("{} {from} -> {}", change.key, change.to),
            None => format!("{} = {}", change.key, change.to),
        });
        let admins = self.admins.iter().map(|identity| format!("admin {identity}"));
        let members = self.members.iter().map(|identity| format!("member {identity}"));
        let all: Vec<_> = settings.chain(admins).chain(members).collect();
        if all.is_empty() { "nothing to change".into() } else { all.join(", ") }
    }
}

/// The settings as the configuration has them, by the names of their rows.
pub fn wanted(config: &Config) -> Vec<(&'static str, String)> {
    let (server, flags) = (&config.server_config, &config.feature_flags);
    vec![
        ("auth_required", server.auth_required.to_string()),
        ("max_connections", server.max_connections.to_string()),
        ("timeout_ms", server.timeout_ms.to_string()),
        ("cache_size_mb", server.cache_size_mb.to_string()),
        ("log_level", config.spacetimedb_config.log_level.name().to_owned()),
        ("enable_state_versioning", flags.enable_state_versioning.to_string()),
        ("enable_audit_log", flags.enable_audit_log.to_string()),
        ("enable_metrics", flags.enable_metrics.to_string()),
        ("enable_caching", flags.enable_caching.to_string()),
        ("enable_distribution", flags.enable_distribution.to_string()),
    ]
}

/// Compares the bundled module with the configuration. What another module calls by the same names is its own.
///
/// # Errors
/// When the server cannot be asked.
pub async fn changes(database: &Database, schema: &Schema, config: &Config) -> Result<Changes, SourceError> {
    let mut changes = Changes::default();
    if !schema.is_bundled() {
        return Ok(changes);
    }
    let rows: Vec<(String, String)> = database.rows("SELECT key, value FROM config".into()).await?;
    for (key, to) in wanted(config) {
        let from = rows.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
        if from.as_ref() != Some(&to) {
            changes.settings.push(Change { key: key.to_owned(), from, to });
        }
    }
    for (table, wanted, missing) in [
        ("admin", &config.deploy.admins, &mut changes.admins),
        ("member", &config.deploy.members, &mut changes.members),
    ] {
        if !wanted.is_empty() {
            let rows: Vec<Value> = database.rows(format!("SELECT identity FROM {table}")).await?;
            let known = Value::from(rows).to_string();
            missing.extend(wanted.iter().filter(|identity| !known.contains(&identity.to_lowercase())).cloned());
        }
    }
    Ok(changes)
}

/// Makes the changes.
///
/// # Errors
/// When the module refuses one, or the server cannot be asked.
pub async fn apply(database: &Database, changes: &Changes) -> Result<(), SourceError> {
    for change in &changes.settings {
        set(database, &change.key, &change.to).await?;
    }
    let identity = |text: &str| json!({"__identity__": format!("0x{}", text.to_lowercase())});
    for admin in &changes.admins {
        database.call_with("grant_admin", &json!([identity(admin)])).await?;
    }
    for member in &changes.members {
        database.call_with("add_member", &json!([identity(member), "deploy.members"])).await?;
    }
    Ok(())
}

/// Puts settings back to what they were.
///
/// # Errors
/// When the module refuses, or the server cannot be asked.
pub async fn restore(
    database: &Database,
    before: &[(String, Option<String>)],
    admins: &[String],
    members: &[String],
) -> Result<(), SourceError> {
    for (table, reducer, added) in [("admin", "revoke_admin", admins), ("member", "remove_member", members)] {
        if added.is_empty() {
            continue;
        }
        let rows: Vec<Value> = database.rows(format!("SELECT identity FROM {table}")).await?;
        let known = Value::from(rows).to_string();
        for identity in added.iter().map(|identity| identity.to_lowercase()).filter(|text| known.contains(text)) {
            database.call_with(reducer, &json!([{"__identity__": format!("0x{identity}")}])).await?;
        }
    }
    if before.is_empty() {
        return Ok(());
    }
    let rows: Vec<(String, String)> = database.rows("SELECT key, value FROM config".into()).await?;
    for (key, value) in before {
        let now = rows.iter().find(|(name, _)| name == key).map(|(_, value)| value);
        match value {
            Some(value) if now != Some(value) => set(database, key, value).await?,
            None if now.is_some() => database.call_with("delete_config", &json!([key])).await?,
            _ => {}
        }
    }
    Ok(())
}

async fn set(database: &Database, key: &str, value: &str) -> Result<(), SourceError> {
    database.call_with("set_config", &json!([key, value])).await
}
