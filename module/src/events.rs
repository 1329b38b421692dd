//! The event log: one room writes it.

use std::time::Duration;

use spacetimedb::{ReducerContext, Table, reducer};

use crate::access::{require_admin, require_member};
use crate::config::{self, ENABLE_AUDIT_LOG};
use crate::sequence::{self, EVENTS, TRIMMED};
use crate::tables::{EventLog, event_log};
use crate::types::EventData;

/// Writes an event whatever the flags say: for what must never go unrecorded.
pub fn record(ctx: &ReducerContext, event_type: &str, source: Option<String>, correlation_id: Option<String>, data: EventData) {
    let sequence = sequence::next(ctx, EVENTS);
    let event_id = sequence::event_id(ctx, sequence);
    ctx.db.event_log().insert(EventLog {
        sequence,
        correlation_id: correlation_id.unwrap_or_else(|| correlation_of_call(ctx)),
        event_id,
        event_type: event_type.to_owned(),
        source,
        timestamp: ctx.timestamp,
        data,
        #[cfg(feature = "next")]
        severity: None,
    });
}

/// Writes an event unless `enable_audit_log` is off.
pub fn audit(ctx: &ReducerContext, event_type: &str, source: Option<String>, data: EventData) {
    if config::flag(ctx, ENABLE_AUDIT_LOG) {
        record(ctx, event_type, source, None, data);
    }
}

/// An event of the client's own.
#[reducer]
pub fn record_event(
    ctx: &ReducerContext,
    event_type: String,
    source: Option<String>,
    correlation_id: Option<String>,
    data: EventData,
) -> Result<(), String> {
    require_member(ctx)?;
    if event_type.trim().is_empty() {
        return Err("the event type is empty; give it a name such as ORDER_PLACED".into());
    }
    record(ctx, &event_type, source, correlation_id, data);
    Ok(())
}

/// Removes events up to and including `through_sequence` that are older than `min_age_seconds`.
///
/// Only from the start of the log: it stops at the first event that is too young, so that no hole appears.
#[reducer]
pub fn trim_event_log(ctx: &ReducerContext, through_sequence: u64, min_age_seconds: u64) -> Result<(), String> {
    require_admin(ctx)?;
    let age = Duration::from_secs(min_age_seconds);
    let from = sequence::last(ctx, TRIMMED) + 1;
    let mut trimmed = from - 1;
    for sequence in from..=through_sequence.min(sequence::last(ctx, EVENTS)) {
        // Numbers are missing where an import begins late.
        if let Some(event) = ctx.db.event_log().sequence().find(sequence) {
            if ctx.timestamp.duration_since(event.timestamp).unwrap_or_default() < age {
                break;
            }
            ctx.db.event_log().sequence().delete(sequence);
        }
        trimmed = sequence;
    }
    sequence::advance_to(ctx, TRIMMED, trimmed);
    Ok(())
}

/// All events of one reducer call share an id: the call's time and its first sequence are unique together.
fn correlation_of_call(ctx: &ReducerContext) -> String {
    let caller = ctx.sender.to_byte_array();
    let time = ctx.timestamp.to_micros_since_unix_epoch() as u64;
    let tail = caller.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("{time:016x}{tail:016x}")
}
