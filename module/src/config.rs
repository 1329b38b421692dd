//! The module's settings: rows of the `config` table, with a default for each key the module reads.

use spacetimedb::{ReducerContext, Table, reducer};

use crate::access::require_admin;
use crate::events;
use crate::tables::{Config, config};
use crate::types::{EventData, Field, Value};

pub const AUTH_REQUIRED: &str = "auth_required";
pub const MAX_CONNECTIONS: &str = "max_connections";
pub const ENABLE_STATE_VERSIONING: &str = "enable_state_versioning";
pub const ENABLE_AUDIT_LOG: &str = "enable_audit_log";
pub const ENABLE_METRICS: &str = "enable_metrics";
pub const ENABLE_DISTRIBUTION: &str = "enable_distribution";
/// Unix microseconds of the first publish or of the last `mark_started`; written by the module.
pub const START_TIME: &str = "start_time";

/// `(key, default, what it does)` of every setting; a value that cannot be read falls back to the default.
pub const DEFAULTS: &[(&str, &str, &str)] = &[
    ("name", "inner-universe", "Name of this deployment"),
    ("version", env!("CARGO_PKG_VERSION"), "Version of the module that initialised the database"),
    (AUTH_REQUIRED, "true", "Admit known identities only: admins and members"),
    (MAX_CONNECTIONS, "100", "Clients connected at once, admins not counted; 0 means no limit"),
    ("timeout_ms", "30000", "Milliseconds a call from the sidecar may take"),
    ("cache_size_mb", "512", "The server's page pool and the Python client's row cache, in MiB"),
    ("log_level", "info", "The server's log level"),
    (ENABLE_STATE_VERSIONING, "true", "Keep every version of every entity and relation"),
    (ENABLE_AUDIT_LOG, "true", "Write an event for every change"),
    (ENABLE_METRICS, "true", "Accept measurements through record_metric"),
    ("enable_caching", "true", "Let clients cache rows they subscribed to"),
    (ENABLE_DISTRIBUTION, "false", "Take rows of other instances into a database that is in use"),
];

/// The value in force.
pub fn get(ctx: &ReducerContext, key: &str) -> Option<String> {
    ctx.db.config().key().find(key.to_owned()).map(|row| row.value).or_else(|| default(key).map(str::to_owned))
}

pub fn flag(ctx: &ReducerContext, key: &str) -> bool {
    get(ctx, key).and_then(|value| value.parse().ok()).or_else(|| default(key)?.parse().ok()).unwrap_or(false)
}

pub fn number(ctx: &ReducerContext, key: &str) -> u64 {
    get(ctx, key).and_then(|value| value.parse().ok()).or_else(|| default(key)?.parse().ok()).unwrap_or(0)
}

/// Writes every default that has no row yet.
pub fn initialise(ctx: &ReducerContext) {
    for (key, value, description) in DEFAULTS {
        if ctx.db.config().key().find((*key).to_owned()).is_none() {
            write(ctx, key, value.to_string(), Some(description.to_string()));
        }
    }
    write(ctx, START_TIME, ctx.timestamp.to_micros_since_unix_epoch().to_string(), Some("Unix microseconds".into()));
}

pub fn write(ctx: &ReducerContext, key: &str, value: String, description: Option<String>) {
    let row = Config { key: key.into(), value, description, updated_at: ctx.timestamp, updated_by: ctx.sender };
    match ctx.db.config().key().find(key.to_owned()) {
        Some(old) => {
            let description = row.description.clone().or(old.description);
            ctx.db.config().key().update(Config { description, ..row });
        }
        None => {
            ctx.db.config().insert(row);
        }
    }
}

/// Sets one setting. Known keys are checked for type; unknown ones are the deployer's own and stay as given.
#[reducer]
pub fn set_config(ctx: &ReducerContext, key: String, value: String) -> Result<(), String> {
    require_admin(ctx)?;
    if key.trim().is_empty() {
        return Err("the key is empty; give the setting's name".into());
    }
    if let Some(expected) = default(&key) {
        let fits = match expected {
            "true" | "false" => value.parse::<bool>().is_ok(),
            number if number.parse::<u64>().is_ok() => value.parse::<u64>().is_ok(),
            _ => true,
        };
        if !fits {
            return Err(format!("{key} takes a value like `{expected}`, not `{value}`"));
        }
    }
    write(ctx, &key, value.clone(), None);
    let field = |name: &str, value: String| Field { name: name.into(), value: Value::String(value) };
    events::audit(ctx, "CONFIG_CHANGED", None, EventData::Custom(vec![field("key", key), field("value", value)]));
    Ok(())
}

/// Removes one setting; a known key goes back to its default.
#[reducer]
pub fn delete_config(ctx: &ReducerContext, key: String) -> Result<(), String> {
    require_admin(ctx)?;
    if !ctx.db.config().key().delete(key.clone()) {
        return Err(format!("there is no setting `{key}`"));
    }
    let data = EventData::Custom(vec![Field { name: "key".into(), value: Value::String(key) }]);
    events::audit(ctx, "CONFIG_DELETED", None, data);
    Ok(())
}

fn default(key: &str) -> Option<&'static str> {
    DEFAULTS.iter().find(|(name, ..)| *name == key).map(|(_, value, _)| *value)
}
