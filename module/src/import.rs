//! Import for replay: admins load exported rows into a fresh module, in batches, as often as they like.
//!
//! A row that is there already is skipped, so a batch can be sent twice. Imports leave no events of their own.

use spacetimedb::{ReducerContext, Table, reducer};

use crate::access::require_admin;
use crate::config::{ENABLE_DISTRIBUTION, flag};
use crate::sequence::{self, EVENTS, METRICS, TRIMMED, VERSIONS};
use crate::tables::{
    Admin, Config, Entity, EventLog, ImportRun, Member, Metric, Relation, StateVersion, SystemStatus, admin, config, entity,
    event_log, import_run, member, metric, relation, state_version, system_status,
};

/// What a module records before it has seen any use: its own start and its administration.
const OWN_EVENTS: &[&str] = &include!("own_events.in");

/// Comes before the imports of a replay. A module that has seen no use forgets the events of its own start, whose places
/// the imported ones take; one that was used, or imported into before, keeps what it has, and takes rows of another
/// instance only while `enable_distribution` is on.
#[reducer]
pub fn begin_import(ctx: &ReducerContext, source: String) -> Result<(), String> {
    require_admin(ctx)?;
    if source.trim().is_empty() {
        return Err("the source is empty; give the identity of the exported database".into());
    }
    let fresh = ctx.db.import_run().count() == 0 && is_unused(ctx);
    let begun = ctx.db.import_run().source().find(source.clone()).is_some();
    if !fresh && !begun && source != ctx.identity().to_hex().to_string() && !flag(ctx, ENABLE_DISTRIBUTION) {
        return Err(format!(
            "refused: this database is in use and enable_distribution is off, so it takes no rows of {source}; replay into a \
             fresh module, or turn it on"
        ));
    }
    if fresh {
        let own: Vec<u64> = ctx.db.event_log().iter().map(|event| event.sequence).collect();
        for sequence in own {
            ctx.db.event_log().sequence().delete(sequence);
        }
        for counter in [EVENTS, TRIMMED] {
            sequence::forget(ctx, counter);
        }
    }
    if !begun {
        ctx.db.import_run().insert(ImportRun { source, begun_at: ctx.timestamp, begun_by: ctx.sender });
    }
    Ok(())
}

fn is_unused(ctx: &ReducerContext) -> bool {
    ctx.db.entity().count() == 0
        && ctx.db.relation().count() == 0
        && ctx.db.state_version().count() == 0
        && ctx.db.metric().count() == 0
        && ctx.db.event_log().iter().all(|event| OWN_EVENTS.contains(&event.event_type.as_str()))
}

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
        sequence::fall_back_to(ctx, TRIMMED, event.sequence.saturating_sub(1));
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

/// Loads admins. None is removed, least of all the one who imports.
#[reducer]
pub fn import_admins(ctx: &ReducerContext, admins: Vec<Admin>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in admins {
        match ctx.db.admin().identity().find(row.identity) {
            Some(_) => drop(ctx.db.admin().identity().update(row)),
            None => drop(ctx.db.admin().insert(row)),
        }
    }
    Ok(())
}

#[reducer]
pub fn import_members(ctx: &ReducerContext, members: Vec<Member>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in members {
        match ctx.db.member().identity().find(row.identity) {
            Some(_) => drop(ctx.db.member().identity().update(row)),
            None => drop(ctx.db.member().insert(row)),
        }
    }
    Ok(())
}

/// Loads the last status; the next `get_system_status` writes over it.
#[reducer]
pub fn import_status(ctx: &ReducerContext, statuses: Vec<SystemStatus>) -> Result<(), String> {
    require_admin(ctx)?;
    for row in statuses {
        match ctx.db.system_status().id().find(row.id) {
            Some(_) => drop(ctx.db.system_status().id().update(row)),
            None => drop(ctx.db.system_status().insert(row)),
        }
    }
    Ok(())
}
