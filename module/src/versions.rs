//! State versions: what every entity and relation looked like after each change, and the way back.

use spacetimedb::{ReducerContext, Table, reducer};

use crate::access::require_admin;
use crate::config::{self, ENABLE_STATE_VERSIONING};
use crate::entities;
use crate::events;
use crate::sequence::{self, VERSIONS};
use crate::tables::{Entity, Relation, StateVersion, entity, relation, state_version};
use crate::types::{EventData, Operation, SubjectChange, SubjectKind};

/// One change, as it is kept.
pub struct Change<'row> {
    subject: SubjectKind,
    subject_id: &'row str,
    subject_type: &'row str,
    ends: Option<(&'row str, &'row str)>,
    version: u64,
    operation: Operation,
    data: &'row str,
}

impl<'row> Change<'row> {
    pub fn of_entity(row: &'row Entity, operation: Operation) -> Self {
        Self {
            subject: SubjectKind::Entity,
            subject_id: &row.entity_id,
            subject_type: &row.entity_type,
            ends: None,
            version: row.version,
            operation,
            data: &row.data,
        }
    }

    pub fn of_relation(row: &'row Relation, operation: Operation) -> Self {
        Self {
            subject: SubjectKind::Relation,
            subject_id: &row.relation_id,
            subject_type: &row.relation_type,
            ends: Some((&row.from_entity, &row.to_entity)),
            version: row.version,
            operation,
            data: &row.data,
        }
    }
}

/// Keeps the version and leaves the event, each as its flag says.
pub fn keep(ctx: &ReducerContext, change: Change<'_>) {
    if config::flag(ctx, ENABLE_STATE_VERSIONING) {
        ctx.db.state_version().insert(StateVersion {
            version_id: sequence::next(ctx, VERSIONS),
            subject: change.subject,
            subject_id: change.subject_id.to_owned(),
            subject_type: change.subject_type.to_owned(),
            from_entity: change.ends.map(|(from, _)| from.to_owned()),
            to_entity: change.ends.map(|(_, to)| to.to_owned()),
            version: change.version,
            operation: change.operation,
            data: change.data.to_owned(),
            timestamp: ctx.timestamp,
            changed_by: ctx.sender,
        });
    }
    let event_type = match (change.subject, change.operation) {
        (SubjectKind::Entity, Operation::Create) => "ENTITY_CREATED",
        (SubjectKind::Entity, Operation::Update) => "ENTITY_UPDATED",
        (SubjectKind::Entity, Operation::Delete) => "ENTITY_DELETED",
        (SubjectKind::Entity, Operation::Restore) => "ENTITY_RESTORED",
        (SubjectKind::Relation, Operation::Create) => "RELATION_CREATED",
        (SubjectKind::Relation, Operation::Update) => "RELATION_UPDATED",
        (SubjectKind::Relation, Operation::Delete) => "RELATION_DELETED",
        (SubjectKind::Relation, Operation::Restore) => "RELATION_RESTORED",
    };
    let data = EventData::Change(SubjectChange {
        subject: change.subject,
        subject_id: change.subject_id.to_owned(),
        version: change.version,
        operation: change.operation,
    });
    events::audit(ctx, event_type, Some(change.subject_id.to_owned()), data);
}

/// The newest kept version of a subject, 0 when none is kept.
pub fn latest(ctx: &ReducerContext, subject: SubjectKind, subject_id: &str) -> u64 {
    let kept = ctx.db.state_version().subject_id().filter(subject_id);
    kept.filter(|row| row.subject == subject).map(|row| row.version).max().unwrap_or(0)
}

/// Brings an entity or relation back to what it was after the change `version_id`; this is itself a new version.
#[reducer]
pub fn restore_state_version(ctx: &ReducerContext, version_id: u64) -> Result<(), String> {
    require_admin(ctx)?;
    let kept = ctx
        .db
        .state_version()
        .version_id()
        .find(version_id)
        .ok_or_else(|| format!("state version {version_id} is not kept; it may have been trimmed: restore it from the archive"))?;
    if kept.operation == Operation::Delete {
        return Err(format!("state version {version_id} is a deletion; name the version before it"));
    }
    let version = latest(ctx, kept.subject, &kept.subject_id) + 1;
    match kept.subject {
        SubjectKind::Entity => restore_entity(ctx, kept, version),
        SubjectKind::Relation => restore_relation(ctx, kept, version)?,
    }
    Ok(())
}

fn restore_entity(ctx: &ReducerContext, kept: StateVersion, version: u64) {
    let old = ctx.db.entity().entity_id().find(kept.subject_id.clone());
    let row = Entity {
        entity_id: kept.subject_id,
        entity_type: kept.subject_type,
        data: kept.data,
        version: version.max(old.as_ref().map_or(0, |old| old.version + 1)),
        created_at: old.as_ref().map_or(ctx.timestamp, |old| old.created_at),
        updated_at: ctx.timestamp,
        updated_by: ctx.sender,
    };
    let row = match old {
        Some(_) => ctx.db.entity().entity_id().update(row),
        None => ctx.db.entity().insert(row),
    };
    keep(ctx, Change::of_entity(&row, Operation::Restore));
}

fn restore_relation(ctx: &ReducerContext, kept: StateVersion, version: u64) -> Result<(), String> {
    let (Some(from_entity), Some(to_entity)) = (kept.from_entity, kept.to_entity) else {
        return Err(format!("state version {} names no ends; it cannot be restored", kept.version_id));
    };
    entities::find(ctx, &from_entity)?;
    entities::find(ctx, &to_entity)?;
    let old = ctx.db.relation().relation_id().find(kept.subject_id.clone());
    let row = Relation {
        relation_id: kept.subject_id,
        from_entity,
        to_entity,
        relation_type: kept.subject_type,
        data: kept.data,
        version: version.max(old.as_ref().map_or(0, |old| old.version + 1)),
        created_at: old.as_ref().map_or(ctx.timestamp, |old| old.created_at),
        updated_at: ctx.timestamp,
        updated_by: ctx.sender,
    };
    let row = match old {
        Some(_) => ctx.db.relation().relation_id().update(row),
        None => ctx.db.relation().insert(row),
    };
    keep(ctx, Change::of_relation(&row, Operation::Restore));
    Ok(())
}
