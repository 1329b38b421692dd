//! Entities: every change raises the version, keeps the old state and leaves an event.

use spacetimedb::{ReducerContext, Table, reducer};

use crate::access::require_member;
use crate::tables::{Entity, Relation, entity, relation};
use crate::types::{Operation, SubjectKind};
use crate::versions::{self, Change};

#[reducer]
pub fn create_entity(ctx: &ReducerContext, entity_id: String, entity_type: String, data: String) -> Result<(), String> {
    require_member(ctx)?;
    if entity_id.is_empty() {
        return Err("the entity id is empty".into());
    }
    if ctx.db.entity().entity_id().find(entity_id.clone()).is_some() {
        return Err(format!("entity `{entity_id}` exists already; call update_entity to change it"));
    }
    // An entity that is created again goes on counting where its last life ended.
    let version = versions::latest(ctx, SubjectKind::Entity, &entity_id) + 1;
    let row = ctx.db.entity().insert(Entity {
        entity_id,
        entity_type,
        data,
        version,
        created_at: ctx.timestamp,
        updated_at: ctx.timestamp,
        updated_by: ctx.sender,
    });
    versions::keep(ctx, Change::of_entity(&row, Operation::Create));
    Ok(())
}

#[reducer]
pub fn update_entity(ctx: &ReducerContext, entity_id: String, data: String) -> Result<(), String> {
    require_member(ctx)?;
    let old = find(ctx, &entity_id)?;
    let row = Entity { data, version: old.version + 1, updated_at: ctx.timestamp, updated_by: ctx.sender, ..old };
    let row = ctx.db.entity().entity_id().update(row);
    versions::keep(ctx, Change::of_entity(&row, Operation::Update));
    Ok(())
}

/// Deletes an entity and, since they would point nowhere, its relations.
#[reducer]
pub fn delete_entity(ctx: &ReducerContext, entity_id: String) -> Result<(), String> {
    require_member(ctx)?;
    let mut row = find(ctx, &entity_id)?;
    let mut relations: Vec<Relation> = ctx.db.relation().from_entity().filter(entity_id.as_str()).collect();
    relations.extend(ctx.db.relation().to_entity().filter(entity_id.as_str()).filter(|r| r.from_entity != entity_id));
    for relation in relations {
        crate::relations::delete(ctx, relation);
    }
    ctx.db.entity().entity_id().delete(entity_id);
    row.version += 1;
    versions::keep(ctx, Change::of_entity(&row, Operation::Delete));
    Ok(())
}

pub fn find(ctx: &ReducerContext, entity_id: &str) -> Result<Entity, String> {
    ctx.db.entity().entity_id().find(entity_id.to_owned()).ok_or_else(|| format!("there is no entity `{entity_id}`"))
}
