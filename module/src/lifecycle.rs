//! First publish, and clients coming and going.

use spacetimedb::{ReducerContext, Table, reducer};

use crate::access::{is_admin, may_enter};
use crate::config::{self, MAX_CONNECTIONS};
use crate::events;
use crate::status;
use crate::tables::{Admin, ClientConnection, admin, client_connection};
use crate::types::{ConnectionStatus, EventData, Field, SystemState, Value};

/// Runs once, when the module is first published: the schema stands already; then the first admin, the default
/// configuration, the `SYSTEM_INITIALIZED` event and the readiness mark.
#[reducer(init)]
pub fn init(ctx: &ReducerContext) {
    ctx.db.admin().insert(Admin { identity: ctx.sender, granted_at: ctx.timestamp, granted_by: ctx.sender });
    config::initialise(ctx);
    let field = |name: &str, value: String| Field { name: name.into(), value: Value::String(value) };
    events::record(
        ctx,
        "SYSTEM_INITIALIZED",
        None,
        None,
        EventData::Custom(vec![
            field("version", env!("CARGO_PKG_VERSION").into()),
            field("initialized_by", ctx.sender.to_hex().to_string()),
        ]),
    );
    status::write(ctx, SystemState::Running);
    log::info!("Inner Universe {} initialised by {}", env!("CARGO_PKG_VERSION"), ctx.sender.to_hex());
}

/// Refuses unknown identities while `auth_required` is on, and clients beyond `max_connections`.
#[reducer(client_connected)]
pub fn client_connected(ctx: &ReducerContext) -> Result<(), String> {
    let Some(connection_id) = ctx.connection_id else {
        return Err("a client without a connection id cannot be counted".into());
    };
    if !may_enter(ctx, ctx.sender) {
        return Err(format!(
            "unauthorized: auth_required is on and {} is not known; ask an admin to call add_member",
            ctx.sender.to_hex()
        ));
    }
    let limit = config::number(ctx, MAX_CONNECTIONS);
    if limit > 0 && !is_admin(ctx, ctx.sender) && ctx.db.client_connection().count() >= limit {
        return Err(format!("refused: {limit} clients are connected, which is max_connections; try again later"));
    }
    let row = ClientConnection {
        connection_id,
        identity: ctx.sender,
        status: ConnectionStatus::Connected,
        connected_at: ctx.timestamp,
    };
    if ctx.db.client_connection().connection_id().find(connection_id).is_some() {
        ctx.db.client_connection().connection_id().update(row);
    } else {
        ctx.db.client_connection().insert(row);
    }
    Ok(())
}

#[reducer(client_disconnected)]
pub fn client_disconnected(ctx: &ReducerContext) {
    if let Some(connection_id) = ctx.connection_id {
        ctx.db.client_connection().connection_id().delete(connection_id);
    }
}
