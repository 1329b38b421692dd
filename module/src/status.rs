//! System status. Reducers return nothing, so the report is the one row of `system_status`.

use spacetimedb::{ReducerContext, Table, reducer};

use crate::access::require_member;
use crate::config::{self, START_TIME};
use crate::tables::{SystemStatus, client_connection, entity, event_log, relation, system_status};
use crate::types::SystemState;

/// Refreshes the `system_status` row; callers then read it.
#[reducer]
pub fn get_system_status(ctx: &ReducerContext) -> Result<(), String> {
    require_member(ctx)?;
    #[cfg(feature = "broken")]
    return Err("this build of the module is broken on purpose".into());
    #[cfg(not(feature = "broken"))]
    {
        write(ctx, SystemState::Running);
        Ok(())
    }
}

pub fn write(ctx: &ReducerContext, status: SystemState) {
    let now = ctx.timestamp.to_micros_since_unix_epoch();
    let started = config::get(ctx, START_TIME).and_then(|value| value.parse::<i64>().ok()).unwrap_or(now);
    let row = SystemStatus {
        id: 0,
        status,
        version: env!("CARGO_PKG_VERSION").into(),
        uptime_seconds: u64::try_from(now.saturating_sub(started)).unwrap_or(0) / 1_000_000,
        entity_count: ctx.db.entity().count(),
        relation_count: ctx.db.relation().count(),
        event_count: ctx.db.event_log().count(),
        connected_clients: u32::try_from(ctx.db.client_connection().count()).unwrap_or(u32::MAX),
        updated_at: ctx.timestamp,
    };
    if ctx.db.system_status().id().find(0).is_some() {
        ctx.db.system_status().id().update(row);
    } else {
        ctx.db.system_status().insert(row);
    }
}
