//! Column types that clients see.

use spacetimedb::SpacetimeType;

/// One typed value inside an event or a label.
#[derive(SpacetimeType, Clone, Debug, PartialEq)]
pub enum Value {
    Bool(bool),
    Int(i64),
    UInt(u64),
    Float(f64),
    String(String),
    Bytes(Vec<u8>),
}

/// A named value.
#[derive(SpacetimeType, Clone, Debug, PartialEq)]
pub struct Field {
    pub name: String,
    pub value: Value,
}

/// What an entity or relation looked like after a change.
#[derive(SpacetimeType, Clone, Debug, PartialEq)]
pub struct SubjectChange {
    pub subject: SubjectKind,
    pub subject_id: String,
    pub version: u64,
    pub operation: Operation,
}

/// The typed payload of an event.
#[derive(SpacetimeType, Clone, Debug, PartialEq)]
pub enum EventData {
    Empty,
    Text(String),
    Change(SubjectChange),
    Custom(Vec<Field>),
}

#[derive(SpacetimeType, Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubjectKind {
    Entity,
    Relation,
}

#[derive(SpacetimeType, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Create,
    Update,
    Delete,
    Restore,
}

#[derive(SpacetimeType, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionStatus {
    Connected,
    Disconnected,
}

#[derive(SpacetimeType, Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemState {
    Initializing,
    Running,
    Degraded,
}
