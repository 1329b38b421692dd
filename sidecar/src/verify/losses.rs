//! Which transactions can no longer be restored, given what is missing or damaged.

use std::collections::{BTreeSet, HashSet};

use object_store::path::Path as Key;

use crate::ids::{Offset, TimelineId};
use crate::repository::chain::LogChain;
use crate::repository::manifest::Timeline;
use crate::repository::ranges::{merged, without};

/// What cannot be used.
#[derive(Debug, Default)]
pub(super) struct Bad {
    pub logs: BTreeSet<Key>,
    pub snapshots: HashSet<(TimelineId, Offset)>,
}

/// Transactions from the first to the last, both included.
type Range = (u64, u64);

/// The transactions of `timeline` itself, up to `end`, that no snapshot and log lead to although nobody removed them.
/// `chain` and `snapshots` are those of the whole line that leads to it.
pub(super) fn losses(
    timeline: &Timeline,
    chain: &LogChain,
    snapshots: &[(TimelineId, Offset)],
    bad: &Bad,
    end: Option<Offset>,
) -> Vec<(Offset, Offset)> {
    let Some(end) = end.filter(|end| *end >= timeline.start) else { return Vec::new() };
    let named = pieces(chain, |_| true);
    let good = pieces(chain, |key| !bad.logs.contains(key));
    let mut covered = Vec::new();
    for (first, last) in good {
        let mut usable = snapshots.iter().filter(|found| !bad.snapshots.contains(found)).map(|(_, offset)| offset.0);
        let base = if first == 0 { Some(0) } else { usable.by_ref().filter(|at| first <= *at && *at <= last).min() };
        covered.extend(base.map(|base| (base, last)));
    }
    // What retention removed, and what was never archived, is missed by nobody; nor is the log from there to the first
    // snapshot after it.
    covered.extend(chain.holes.iter().filter(|hole| hole.removed).map(|hole| (hole.missing.0, hole.last().0)));
    for (first, last) in named {
        let begins = match chain.holes.iter().find(|hole| hole.found.0 == first) {
            Some(hole) => hole.removed,
            None => first > 0,
        };
        let base = snapshots.iter().map(|(_, offset)| offset.0).filter(|at| first <= *at && *at <= last).min();
        if let (true, Some(base)) = (begins, base.and_then(|base| base.checked_sub(1))) {
            covered.push((first, base));
        }
    }
    let lost = without((timeline.start.0, end.0), &merged(covered));
    lost.into_iter().map(|(first, last)| (Offset(first), Offset(last))).collect()
}

/// The unbroken pieces of a row, of the objects that count.
fn pieces(chain: &LogChain, counts: impl Fn(&Key) -> bool) -> Vec<Range> {
    let mut pieces: Vec<Range> = Vec::new();
    for entry in chain.entries.iter().filter(|entry| counts(&entry.key())) {
        match pieces.last_mut() {
            Some((_, last)) if *last + 1 == entry.first.0 => *last = entry.last.0,
            _ => pieces.push((entry.first.0, entry.last.0)),
        }
    }
    pieces
}
