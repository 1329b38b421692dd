//! Every table of the module, public ones first.

use spacetimedb::{ConnectionId, Identity, Timestamp, table};

use crate::types::{ConnectionStatus, EventData, Field, Operation, SubjectKind, SystemState};

/// Settings by key; what the deployer's configuration asks of the module arrives here.
#[table(name = config, public)]
#[derive(Clone)]
pub struct Config {
    #[primary_key]
    pub key: String,
    pub value: String,
    pub description: Option<String>,
    pub updated_at: Timestamp,
    pub updated_by: Identity,
}

/// What happened, in order. `sequence` starts at 1 and has no holes until the log is trimmed from its start.
#[table(name = event_log, public)]
#[derive(Clone)]
pub struct EventLog {
    #[primary_key]
    pub sequence: u64,
    #[unique]
    pub event_id: String,
    pub event_type: String,
    pub source: Option<String>,
    pub timestamp: Timestamp,
    /// Ties the events of one operation together; all events of one reducer call share it unless the caller gave one.
    pub correlation_id: String,
    pub data: EventData,
    #[cfg(feature = "next")]
    pub severity: Option<String>,
}

#[table(name = entity, public)]
#[derive(Clone)]
pub struct Entity {
    #[primary_key]
    pub entity_id: String,
    #[index(btree)]
    pub entity_type: String,
    /// The entity's content; JSON by convention, opaque to the module.
    pub data: String,
    /// 1 at creation, plus one with every change.
    pub version: u64,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub updated_by: Identity,
}

#[table(name = relation, public)]
#[derive(Clone)]
pub struct Relation {
    #[primary_key]
    pub relation_id: String,
    #[index(btree)]
    pub from_entity: String,
    #[index(btree)]
    pub to_entity: String,
    pub relation_type: String,
    pub data: String,
    pub version: u64,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub updated_by: Identity,
}

/// Every version of every entity and relation. `version_id` starts at 1 and has no holes.
#[table(name = state_version, public)]
#[derive(Clone)]
pub struct StateVersion {
    #[primary_key]
    pub version_id: u64,
    pub subject: SubjectKind,
    #[index(btree)]
    pub subject_id: String,
    /// `entity_type` or `relation_type` at that version.
    pub subject_type: String,
    /// Set for relations only.
    pub from_entity: Option<String>,
    /// Set for relations only.
    pub to_entity: Option<String>,
    pub version: u64,
    pub operation: Operation,
    pub data: String,
    pub timestamp: Timestamp,
    pub changed_by: Identity,
}

/// Live connections; a row leaves when its client does.
#[table(name = client_connection, public)]
#[derive(Clone)]
pub struct ClientConnection {
    #[primary_key]
    pub connection_id: ConnectionId,
    pub identity: Identity,
    pub status: ConnectionStatus,
    pub connected_at: Timestamp,
}

#[table(name = admin, public)]
#[derive(Clone)]
pub struct Admin {
    #[primary_key]
    pub identity: Identity,
    pub granted_at: Timestamp,
    pub granted_by: Identity,
}

/// Measurements recorded by clients. `metric_id` starts at 1 and has no holes.
#[table(name = metric, public)]
#[derive(Clone)]
pub struct Metric {
    #[primary_key]
    pub metric_id: u64,
    #[index(btree)]
    pub name: String,
    pub value: f64,
    pub unit: String,
    pub labels: Vec<Field>,
    pub timestamp: Timestamp,
}

/// One row, id 0, written by `get_system_status`.
#[table(name = system_status, public)]
#[derive(Clone)]
pub struct SystemStatus {
    #[primary_key]
    pub id: u8,
    pub status: SystemState,
    pub version: String,
    pub uptime_seconds: u64,
    pub entity_count: u64,
    pub relation_count: u64,
    pub event_count: u64,
    pub connected_clients: u32,
    pub updated_at: Timestamp,
}

/// Identities that may connect while `auth_required` is on, besides the admins.
#[table(name = member)]
#[derive(Clone)]
pub struct Member {
    #[primary_key]
    pub identity: Identity,
    pub label: String,
    pub added_at: Timestamp,
    pub added_by: Identity,
}

/// Counters behind the gapless sequences. An auto-increment column skips numbers after a restart, so it cannot serve.
#[table(name = sequence_counter)]
#[derive(Clone)]
pub struct SequenceCounter {
    #[primary_key]
    pub name: String,
    pub last: u64,
}

/// Exports that were replayed here; the first clears what the module wrote at its own start.
#[table(name = import_run, public)]
#[derive(Clone)]
pub struct ImportRun {
    /// The identity of the database that was exported.
    #[primary_key]
    pub source: String,
    pub begun_at: Timestamp,
    pub begun_by: Identity,
}

/// What a later release may have; tests deploy it over this one.
#[cfg(feature = "more")]
#[table(name = annotation, public)]
#[derive(Clone)]
pub struct Annotation {
    #[primary_key]
    pub annotation_id: u64,
    pub text: String,
}
