//! Who may do what. Admins administer; members may connect while `auth_required` is on.

use spacetimedb::{Identity, ReducerContext, Table, reducer};

use crate::config::{self, AUTH_REQUIRED};
use crate::events;
use crate::tables::{Admin, Member, admin, member};
use crate::types::{EventData, Field, Value};

pub fn is_admin(ctx: &ReducerContext, identity: Identity) -> bool {
    // Scheduled and internal calls come from the database itself.
    identity == ctx.identity() || ctx.db.admin().identity().find(identity).is_some()
}

pub fn require_admin(ctx: &ReducerContext) -> Result<(), String> {
    if is_admin(ctx, ctx.sender) {
        return Ok(());
    }
    Err(format!(
        "unauthorized: {} is not an admin of this database; ask an admin to call grant_admin",
        ctx.sender.to_hex()
    ))
}

/// May this caller change entities and relations?
pub fn require_member(ctx: &ReducerContext) -> Result<(), String> {
    if may_enter(ctx, ctx.sender) {
        return Ok(());
    }
    Err(format!(
        "unauthorized: auth_required is on and {} is not known; ask an admin to call add_member",
        ctx.sender.to_hex()
    ))
}

pub fn may_enter(ctx: &ReducerContext, identity: Identity) -> bool {
    !config::flag(ctx, AUTH_REQUIRED)
        || is_admin(ctx, identity)
        || ctx.db.member().identity().find(identity).is_some()
}

#[reducer]
pub fn grant_admin(ctx: &ReducerContext, identity: Identity) -> Result<(), String> {
    require_admin(ctx)?;
    if ctx.db.admin().identity().find(identity).is_some() {
        return Ok(());
    }
    ctx.db.admin().insert(Admin { identity, granted_at: ctx.timestamp, granted_by: ctx.sender });
    audit(ctx, "ADMIN_GRANTED", identity);
    Ok(())
}

#[reducer]
pub fn revoke_admin(ctx: &ReducerContext, identity: Identity) -> Result<(), String> {
    require_admin(ctx)?;
    if ctx.db.admin().identity().find(identity).is_none() {
        return Err(format!("{} is not an admin", identity.to_hex()));
    }
    if ctx.db.admin().count() == 1 {
        return Err("refused: this is the last admin; grant another one first".into());
    }
    ctx.db.admin().identity().delete(identity);
    audit(ctx, "ADMIN_REVOKED", identity);
    Ok(())
}

#[reducer]
pub fn add_member(ctx: &ReducerContext, identity: Identity, label: String) -> Result<(), String> {
    require_admin(ctx)?;
    let row = Member { identity, label, added_at: ctx.timestamp, added_by: ctx.sender };
    if ctx.db.member().identity().find(identity).is_some() {
        ctx.db.member().identity().update(row);
    } else {
        ctx.db.member().insert(row);
    }
    audit(ctx, "MEMBER_ADDED", identity);
    Ok(())
}

#[reducer]
pub fn remove_member(ctx: &ReducerContext, identity: Identity) -> Result<(), String> {
    require_admin(ctx)?;
    if !ctx.db.member().identity().delete(identity) {
        return Err(format!("{} is not a member", identity.to_hex()));
    }
    audit(ctx, "MEMBER_REMOVED", identity);
    Ok(())
}

fn audit(ctx: &ReducerContext, event_type: &str, identity: Identity) {
    let field = |name: &str, value: Identity| Field { name: name.into(), value: Value::String(value.to_hex().to_string()) };
    let data = EventData::Custom(vec![field("identity", identity), field("by", ctx.sender)]);
    events::audit(ctx, event_type, None, data);
}
