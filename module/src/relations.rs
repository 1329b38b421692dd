//! Relations between entities; versioned like entities.

use spacetimedb::{ReducerContext, Table, reducer};

use crate::access::require_member;
use crate::entities;
use crate::tables::{Relation, relation};
use crate::types::{Operation, SubjectKind};
use crate::versions::{self, Change};

#[reducer]
pub fn create_relation(
    ctx: &ReducerContext,
    relation_id: String,
    from_entity: String,
    to_entity: String,
    relation_type: String,
    data: String,
) -> Result<(), String> {
    require_member(ctx)?;
    if relation_id.is_empty() {
        return Err("the relation id is empty".into());
    }
    entities::find(ctx, &from_entity)?;
    entities::find(ctx, &to_entity)?;
    if ctx.db.relation().relation_id().find(relation_id.clone()).is_some() {
        return Err(format!("relation `{relation_id}` exists already; call update_relation to change it"));
    }
    let version = versions::latest(ctx, SubjectKind::Relation, &relation_id) + 1;
    let row = ctx.db.relation().insert(Relation {
        relation_id,
        from_entity,
        to_entity,
        relation_type,
        data,
        version,
        created_at: ctx.timestamp,
        updated_at: ctx.timestamp,
        updated_by: ctx.sender,
    });
    versions::keep(ctx, Change::of_relation(&row, Operation::Create));
    Ok(())
}

#[reducer]
pub fn update_relation(ctx: &ReducerContext, relation_id: String, data: String) -> Result<(), String> {
    require_member(ctx)?;
    let old = find(ctx, &relation_id)?;
    let row = Relation { data, version: old.version + 1, updated_at: ctx.timestamp, updated_by: ctx.sender, ..old };
    let row = ctx.db.relation().relation_id().update(row);
    versions::keep(ctx, Change::of_relation(&row, Operation::Update));
    Ok(())
}

#[reducer]
pub fn delete_relation(ctx: &ReducerContext, relation_id: String) -> Result<(), String> {
    require_member(ctx)?;
    let row = find(ctx, &relation_id)?;
    delete(ctx, row);
    Ok(())
}

pub fn delete(ctx: &ReducerContext, mut row: Relation) {
    ctx.db.relation().relation_id().delete(row.relation_id.clone());
    row.version += 1;
    versions::keep(ctx, Change::of_relation(&row, Operation::Delete));
}

fn find(ctx: &ReducerContext, relation_id: &str) -> Result<Relation, String> {
    ctx.db
        .relation()
        .relation_id()
        .find(relation_id.to_owned())
        .ok_or_else(|| format!("there is no relation `{relation_id}`"))
}
