//! The archive lag of the last hours and the timelines, kept in memory for the status page.

use std::collections::{BTreeMap, VecDeque};

use jiff::Timestamp;
use serde::Serialize;

use crate::daemon::state::DaemonStatus;
use crate::ids::{Identity, Offset, TimelineId};
use crate::repository::manifest::TimelineReason;

/// Seconds between points.
const STEP: i64 = 20;
/// Six hours of them.
const KEPT: usize = 1080;
/// No more databases than this are kept, so that memory is bounded.
const DATABASES: usize = 64;

/// The lags of all databases.
#[derive(Debug, Clone, Default)]
pub struct History {
    by_database: BTreeMap<String, VecDeque<LagPoint>>,
}

/// The largest lag in one step of time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, schemars::JsonSchema)]
pub struct LagPoint {
    /// Unix seconds.
    pub at: i64,
    /// Seconds.
    pub lag: f64,
}

/// The answer of `/v1/history`.
#[derive(Debug, Clone, Serialize, schemars::JsonSchema)]
pub struct HistoryReport {
    pub at: Timestamp,
    /// The archive lag by database, oldest first.
    pub lag: BTreeMap<String, Vec<LagPoint>>,
    /// The restorable window: every timeline of every database in the repository, as last surveyed.
    pub timelines: Vec<TimelineView>,
    /// Seconds that a restore to `latest` would take until the server serves again, estimated.
    pub restore_estimate_seconds: Option<f64>,
}

/// One timeline and what of it can be restored.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct TimelineView {
    pub database: Identity,
    pub name: String,
    pub timeline: TimelineId,
    pub reason: TimelineReason,
    pub parent: Option<TimelineId>,
    pub fork_offset: Option<Offset>,
    /// The first and the last transaction that are archived on this timeline itself.
    pub first_offset: Offset,
    pub last_offset: Offset,
    pub first_time: Option<Timestamp>,
    pub last_time: Option<Timestamp>,
    pub created_at: Timestamp,
}

impl History {
    /// Takes what is known now.
    pub fn note(&mut self, status: &DaemonStatus, now: Timestamp) {
        let at = now.as_second() / STEP * STEP;
        for database in &status.databases {
            if !self.by_database.contains_key(&database.name) && self.by_database.len() >= DATABASES {
                continue;
            }
            let points = self.by_database.entry(database.name.clone()).or_default();
            match points.back_mut().filter(|last| last.at == at) {
                Some(last) => last.lag = last.lag.max(database.behind_seconds),
                None => points.push_back(LagPoint { at, lag: database.behind_seconds }),
            }
            while points.len() > KEPT {
                points.pop_front();
            }
        }
        self.by_database.retain(|_, points| points.back().is_some_and(|last| at - last.at <= STEP * KEPT as i64));
    }

    /// Points by database, oldest first.
    pub fn points(&self) -> BTreeMap<String, Vec<LagPoint>> {
        self.by_database.iter().map(|(name, points)| (name.clone(), points.iter().copied().collect())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::state::FollowedStatus;
    use crate::ids::Identity;

    fn status(names: &[&str], lag: f64) -> DaemonStatus {
        let (clock, alert) =
            (std::sync::Arc::new(crate::clock::SystemClock), crate::config::value::Period::seconds(60));
        let mut status = crate::daemon::state::State::new(clock, std::path::Path::new("/"), alert).status();
        let database = |name: &&str| FollowedStatus {
            identity: Identity([0; 32]),
            name: (*name).to_owned(),
            timeline: None,
            archived_offset: None,
            log_offset: None,
            behind_seconds: lag,
            objects_written: 0,
            bytes_written: 0,
            error: None,
            damage: None,
            events: Vec::new(),
        };
        status.databases = names.iter().map(database).collect();
        status
    }

    #[test]
    fn the_largest_lag_of_each_step_is_kept_for_six_hours_and_then_forgotten() {
        let at = |second: i64| Timestamp::from_second(second).expect("a time");
        let mut history = History::default();
        history.note(&status(&["a"], 0.5), at(100));
        history.note(&status(&["a"], 3.0), at(119));
        history.note(&status(&["a"], 0.1), at(120));
        assert_eq!(history.points()["a"], [LagPoint { at: 100, lag: 3.0 }, LagPoint { at: 120, lag: 0.1 }]);
        for step in 0..5000 {
            history.note(&status(&["b"], 1.0), at(200 + step * STEP));
        }
        assert_eq!(history.points().keys().collect::<Vec<_>>(), ["b"]);
        assert_eq!(history.points()["b"].len(), KEPT);
    }
}
