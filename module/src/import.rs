//! Import for replay: admins load exported rows into a fresh module, in batches, as often as they like.
//!
//! A row that is there already is skipped, so a batch can be sent twice. Imports leave no events of their own.

use spacetimedb::{ReducerContext, Table, reducer};

use crate::access::require_admin;
use crate::sequence::{self, EVENTS, METRICS, VERSIONS};
use crate::tables::{
    Config, Entity, EventLog, Metric, Relation, StateVersion, config, entity, event_log, metric, relation,
    state_version,
};

/// Loads events. One whose id is there is skipped; one whose sequence is taken by another event is refused, since
/// replacing history silently is worse than stopping.
#[reducer]
pub fn import_events(ctx: &ReducerContext, events: Vec<EventLog>) -> Result<(), String> {
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
        ctx.db.event_log().insert(event);
    }
    Ok(())
}

#[reducer]
pub fn import_state_versions(ctx: &ReducerContext, versions: Vec<StateVersion>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in versions {
        if ctx.db.state_version().version_id().find(row.version_id).is_none() {
            sequence::advance_to(ctx, VERSIONS, row.version_id);
            ctx.db.state_version().insert(row);
        }
    }
    Ok(())
}

/// Loads entities; one that is here in the same or a newer version stays as it is.
#[reducer]
pub fn import_entities(ctx: &ReducerContext, entities: Vec<Entity>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in entities {
        match ctx.db.entity().entity_id().find(row.entity_id.clone()) {
            Some(here) if here.version >= row.version => {}
            Some(_) => drop(ctx.db.entity().entity_id().update(row)),
            None => drop(ctx.db.entity().insert(row)),
        }
    }
    Ok(())
}

/// Loads relations; one that is here in the same or a newer version stays as it is.
#[reducer]
pub fn import_relations(ctx: &ReducerContext, relations: Vec<Relation>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in relations {
        match ctx.db.relation().relation_id().find(row.relation_id.clone()) {
            Some(here) if here.version >= row.version => {}
            Some(_) => drop(ctx.db.relation().relation_id().update(row)),
            None => drop(ctx.db.relation().insert(row)),
        }
    }
    Ok(())
}

#[reducer]
pub fn import_metrics(ctx: &ReducerContext, metrics: Vec<Metric>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in metrics {
        if ctx.db.metric().metric_id().find(row.metric_id).is_none() {
            sequence::advance_to(ctx, METRICS, row.metric_id);
            ctx.db.metric().insert(row);
        }
    }
    Ok(())
}

/// Loads settings; the import wins over what is here.
#[reducer]
pub fn import_config(ctx: &ReducerContext, settings: Vec<Config>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in settings {
        match ctx.db.config().key().find(row.key.clone()) {
            Some(_) => drop(ctx.db.config().key().update(row)),
            None => drop(ctx.db.config().insert(row)),
        }
    }
    Ok(())
}
