//! Import for replay: admins load exported rows into a fresh module, in batches, as often as they like.
//!
//! A row that is there already is skipped, so a batch can be sent twice. Imports leave no events of their own.

use spacetimedb::{ReducerContext, SpacetimeType, Table, Timestamp, reducer};

use crate::access::require_admin;
use crate::config;
use crate::sequence::{self, EVENTS, METRICS, VERSIONS};
use crate::tables::{
    Entity, EventLog, Metric, Relation, StateVersion, entity, event_log, metric, relation, state_version,
};
use crate::types::{EventData, Field, Operation, SubjectKind};
use spacetimedb::Identity;

#[derive(SpacetimeType, Clone)]
pub struct EventImport {
    pub sequence: u64,
    pub event_id: String,
    pub event_type: String,
    pub source: Option<String>,
    pub timestamp: Timestamp,
    pub correlation_id: String,
    pub data: EventData,
}

#[derive(SpacetimeType, Clone)]
pub struct StateVersionImport {
    pub version_id: u64,
    pub subject: SubjectKind,
    pub subject_id: String,
    pub subject_type: String,
    pub from_entity: Option<String>,
    pub to_entity: Option<String>,
    pub version: u64,
    pub operation: Operation,
    pub data: String,
    pub timestamp: Timestamp,
    pub changed_by: Identity,
}

#[derive(SpacetimeType, Clone)]
pub struct EntityImport {
    pub entity_id: String,
    pub entity_type: String,
    pub data: String,
    pub version: u64,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub updated_by: Identity,
}

#[derive(SpacetimeType, Clone)]
pub struct RelationImport {
    pub relation_id: String,
    pub from_entity: String,
    pub to_entity: String,
    pub relation_type: String,
    pub data: String,
    pub version: u64,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub updated_by: Identity,
}

#[derive(SpacetimeType, Clone)]
pub struct MetricImport {
    pub metric_id: u64,
    pub name: String,
    pub value: f64,
    pub unit: String,
    pub labels: Vec<Field>,
    pub timestamp: Timestamp,
}

#[derive(SpacetimeType, Clone)]
pub struct ConfigImport {
    pub key: String,
    pub value: String,
    pub description: Option<String>,
}

/// Loads events. One whose id is there is skipped; one whose sequence is taken by another event is refused, since
/// replacing history silently is worse than stopping.
#[reducer]
pub fn import_events(ctx: &ReducerContext, events: Vec<EventImport>) -> Result<(), String> {
    require_admin(ctx)?;
    for event in events {
        if ctx.db.event_log().event_id().find(event.event_id.clone()).is_some() {
            continue;
        }
        if let Some(other) = ctx.db.event_log().sequence().find(event.sequence) {
            return Err(format!(
                "sequence {} holds event {} here and {} in the import; import into a fresh module",
                event.sequence, other.event_id, event.event_id
            ));
        }
        sequence::advance_to(ctx, EVENTS, event.sequence);
        ctx.db.event_log().insert(EventLog {
            sequence: event.sequence,
            event_id: event.event_id,
            event_type: event.event_type,
            source: event.source,
            timestamp: event.timestamp,
            correlation_id: event.correlation_id,
            data: event.data,
        });
    }
    Ok(())
}

#[reducer]
pub fn import_state_versions(ctx: &ReducerContext, versions: Vec<StateVersionImport>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in versions {
        if ctx.db.state_version().version_id().find(row.version_id).is_some() {
            continue;
        }
        sequence::advance_to(ctx, VERSIONS, row.version_id);
        ctx.db.state_version().insert(StateVersion {
            version_id: row.version_id,
            subject: row.subject,
            subject_id: row.subject_id,
            subject_type: row.subject_type,
            from_entity: row.from_entity,
            to_entity: row.to_entity,
            version: row.version,
            operation: row.operation,
            data: row.data,
            timestamp: row.timestamp,
            changed_by: row.changed_by,
        });
    }
    Ok(())
}

/// Loads entities; one that is here in the same or a newer version stays as it is.
#[reducer]
pub fn import_entities(ctx: &ReducerContext, entities: Vec<EntityImport>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in entities {
        let here = ctx.db.entity().entity_id().find(row.entity_id.clone());
        if here.as_ref().is_some_and(|here| here.version >= row.version) {
            continue;
        }
        let row = Entity {
            entity_id: row.entity_id,
            entity_type: row.entity_type,
            data: row.data,
            version: row.version,
            created_at: row.created_at,
            updated_at: row.updated_at,
            updated_by: row.updated_by,
        };
        match here {
            Some(_) => ctx.db.entity().entity_id().update(row),
            None => ctx.db.entity().insert(row),
        };
    }
    Ok(())
}

/// Loads relations; one that is here in the same or a newer version stays as it is.
#[reducer]
pub fn import_relations(ctx: &ReducerContext, relations: Vec<RelationImport>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in relations {
        let here = ctx.db.relation().relation_id().find(row.relation_id.clone());
        if here.as_ref().is_some_and(|here| here.version >= row.version) {
            continue;
        }
        let row = Relation {
            relation_id: row.relation_id,
            from_entity: row.from_entity,
            to_entity: row.to_entity,
            relation_type: row.relation_type,
            data: row.data,
            version: row.version,
            created_at: row.created_at,
            updated_at: row.updated_at,
            updated_by: row.updated_by,
        };
        match here {
            Some(_) => ctx.db.relation().relation_id().update(row),
            None => ctx.db.relation().insert(row),
        };
    }
    Ok(())
}

#[reducer]
pub fn import_metrics(ctx: &ReducerContext, metrics: Vec<MetricImport>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in metrics {
        if ctx.db.metric().metric_id().find(row.metric_id).is_some() {
            continue;
        }
        sequence::advance_to(ctx, METRICS, row.metric_id);
        ctx.db.metric().insert(Metric {
            metric_id: row.metric_id,
            name: row.name,
            value: row.value,
            unit: row.unit,
            labels: row.labels,
            timestamp: row.timestamp,
        });
    }
    Ok(())
}

/// Loads settings; the import wins over what is here.
#[reducer]
pub fn import_config(ctx: &ReducerContext, settings: Vec<ConfigImport>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in settings {
        config::write(ctx, &row.key, row.value, row.description);
    }
    Ok(())
}
