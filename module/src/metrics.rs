//! Measurements that clients record.

use spacetimedb::{ReducerContext, Table, reducer};

use crate::access::{require_admin, require_member};
use crate::config::{self, ENABLE_METRICS};
use crate::sequence::{self, METRICS};
use crate::tables::{Metric, metric};
use crate::types::Field;

#[reducer]
pub fn record_metric(ctx: &ReducerContext, name: String, value: f64, unit: String, labels: Vec<Field>) -> Result<(), String> {
    require_member(ctx)?;
    if !config::flag(ctx, ENABLE_METRICS) {
        return Err("refused: enable_metrics is off; an admin can set it with set_config".into());
    }
    if name.trim().is_empty() {
        return Err("the metric's name is empty".into());
    }
    if !value.is_finite() {
        return Err(format!("{name} takes a finite number, not {value}"));
    }
    let metric_id = sequence::next(ctx, METRICS);
    ctx.db.metric().insert(Metric { metric_id, name, value, unit, labels, timestamp: ctx.timestamp });
    Ok(())
}

/// Removes measurements up to and including `through_metric_id`.
#[reducer]
pub fn trim_metrics(ctx: &ReducerContext, through_metric_id: u64) -> Result<(), String> {
    require_admin(ctx)?;
    let old: Vec<u64> = ctx.db.metric().iter().map(|row| row.metric_id).filter(|id| *id <= through_metric_id).collect();
    for metric_id in old {
        ctx.db.metric().metric_id().delete(metric_id);
    }
    Ok(())
}
