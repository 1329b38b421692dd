//! Connection attempts to one collector, ever more rarely while they fail, whatever the number of streams.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff};
use parking_lot::Mutex;

use crate::clock::{Stopwatch, patience};

const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(15);

/// All that is sent to one collector passes here.
#[derive(Default)]
pub struct Gate(Mutex<Option<Closed>>);

struct Closed {
    since: Stopwatch,
    wait: Duration,
    delays: ExponentialBackoff,
    /// One sender tries while the others wait.
    is_tried: bool,
    reason: String,
}

static GATES: Mutex<BTreeMap<String, Arc<Gate>>> = Mutex::new(BTreeMap::new());

impl Gate {
    /// The gate of the collector at `origin`: one for the process.
    pub fn of(origin: &str) -> Arc<Self> {
        Arc::clone(GATES.lock().entry(origin.to_owned()).or_default())
    }

    /// Returns the last failure if no attempt is to be made now; an attempt that is let through keeps others away for
    /// `longest` or until its end.
    pub fn enter(&self, longest: Duration) -> Result<(), String> {
        let mut state = self.0.lock();
        let Some(closed) = state.as_mut() else { return Ok(()) };
        if closed.since.elapsed_seconds() < closed.wait.as_secs_f64() {
            return Err(closed.reason.clone());
        }
        (closed.since, closed.wait, closed.is_tried) = (Stopwatch::start(), longest, true);
        Ok(())
    }

    #[cfg(test)]
    pub fn is_open(&self) -> bool {
        self.0.lock().is_none()
    }

    /// The collector answered.
    pub fn open(&self) {
        *self.0.lock() = None;
    }

    /// The collector was not reached, or asks to be left alone for a while.
    pub fn close(&self, reason: &str, at_least: Option<Duration>) {
        let mut state = self.0.lock();
        let mut delays = match state.take() {
            // Others that failed at the same time say nothing new.
            Some(closed) if !closed.is_tried && at_least.is_none() => return *state = Some(closed),
            Some(closed) => closed.delays,
            None => patience(FIRST_WAIT).build(),
        };
        let wait = at_least.or_else(|| delays.next()).unwrap_or(LONGEST_WAIT);
        let reason = reason.to_owned();
        *state = Some(Closed { since: Stopwatch::start(), wait, delays, is_tried: false, reason });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_attempts_keep_others_away() {
        let gate = Gate::default();
        assert_eq!(gate.enter(Duration::from_secs(9)), Ok(()));
        assert_eq!(gate.enter(Duration::from_secs(9)), Ok(()), "all are let through while all is well");
        gate.close("refused", None);
        gate.close("refused", None);
        assert_eq!(gate.enter(Duration::from_secs(9)), Err("refused".into()));
        gate.close("busy", Some(Duration::ZERO));
        assert_eq!(gate.enter(Duration::from_secs(9)), Ok(()), "one tries");
        assert_eq!(gate.enter(Duration::from_secs(9)), Err("busy".into()), "and the others wait for it");
        gate.open();
        assert_eq!(gate.enter(Duration::from_secs(9)), Ok(()));
    }
}
