//! Gapless counters and event ids.

use spacetimedb::{ReducerContext, Table};

use crate::tables::{SequenceCounter, sequence_counter};

/// The counters' names, one per numbered table.
pub const EVENTS: &str = "event_log";
pub const VERSIONS: &str = "state_version";
pub const METRICS: &str = "metric";
/// The last event that was trimmed, so that trimming need not search for the first.
pub const TRIMMED: &str = "event_log_trimmed";

/// Takes the next number of `name`; the first is 1.
pub fn next(ctx: &ReducerContext, name: &str) -> u64 {
    advance_to(ctx, name, last(ctx, name) + 1)
}

/// The last number given out, 0 when none was.
pub fn last(ctx: &ReducerContext, name: &str) -> u64 {
    ctx.db.sequence_counter().name().find(name.to_owned()).map_or(0, |row| row.last)
}

/// Lifts the counter to at least `to`, so that imported rows and new ones never share a number.
pub fn advance_to(ctx: &ReducerContext, name: &str, to: u64) -> u64 {
    match ctx.db.sequence_counter().name().find(name.to_owned()) {
        Some(row) if row.last >= to => {}
        Some(row) => {
            ctx.db.sequence_counter().name().update(SequenceCounter { last: to, ..row });
        }
        None => {
            ctx.db.sequence_counter().insert(SequenceCounter { name: name.to_owned(), last: to });
        }
    }
    to
}

/// Lowers the counter to at most `to`: rows from before it came back.
pub fn fall_back_to(ctx: &ReducerContext, name: &str, to: u64) {
    if let Some(row) = ctx.db.sequence_counter().name().find(name.to_owned())
        && row.last > to
    {
        ctx.db.sequence_counter().name().update(SequenceCounter { last: to, ..row });
    }
}

/// Begins to count anew.
pub fn forget(ctx: &ReducerContext, name: &str) {
    ctx.db.sequence_counter().name().delete(name.to_owned());
}

/// A UUID (version 8) made of database, time and sequence: unique within a database because the sequence is, and
/// across databases because the identity is mixed in. The host's random generator is seeded by time alone, so two
/// databases could draw the same value from it.
pub fn event_id(ctx: &ReducerContext, sequence: u64) -> String {
    let database = ctx.identity().to_byte_array();
    let time = ctx.timestamp.to_micros_since_unix_epoch() as u64;
    let mut state = [0x9e37_79b9_7f4a_7c15u64 ^ time, 0xd1b5_4a32_d192_ed03u64 ^ sequence];
    for chunk in database.chunks_exact(8) {
        let word = chunk.iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        state[0] = mix(state[0] ^ word);
        state[1] = mix(state[1].wrapping_add(word) ^ state[0].rotate_left(17));
    }
    let high = (mix(state[0] ^ sequence) & 0xffff_ffff_ffff_0fff) | 0x8000;
    // The low half is a bijection of the sequence for a fixed database and time, less the two variant bits.
    let low = (mix(state[1] ^ time) & 0x3fff_ffff_ffff_ffff) | 0x8000_0000_0000_0000;
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        (high >> 16) & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

/// The finaliser of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
