//! Which restore points are kept: a pure function of their times, the policy and the clock.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Datelike as _, Timelike as _, Utc};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::config::RetentionConfig;
use crate::ids::RestorePointId;

/// What is kept.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    pub last: u32,
    pub hourly: u32,
    pub daily: u32,
    pub weekly: u32,
    pub monthly: u32,
    pub yearly: u32,
    /// Every moment since so long ago can be restored.
    pub window: SignedDuration,
    /// So many restore points are kept whatever their age.
    pub minimum: u32,
    /// Days, weeks and so on begin by the clocks there.
    pub zone: chrono_tz::Tz,
}

impl Policy {
    pub fn new(config: &RetentionConfig, zone: chrono_tz::Tz) -> Self {
        Self {
            last: config.keep_last,
            hourly: config.keep_hourly,
            daily: config.keep_daily,
            weekly: config.keep_weekly,
            monthly: config.keep_monthly,
            yearly: config.keep_yearly,
            window: SignedDuration::try_from(config.window.0).unwrap_or(SignedDuration::MAX),
            minimum: config.minimum,
            zone,
        }
    }

    /// Does it say anything? One that says nothing would remove nearly everything.
    pub fn is_empty(&self) -> bool {
        let counts = [self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly];
        counts.iter().all(|count| *count == 0) && self.window.is_zero()
    }

    /// Where the window begins; `None` without one.
    pub fn window_start(&self, now: Timestamp) -> Option<Timestamp> {
        (!self.window.is_zero()).then(|| now.checked_sub(self.window).unwrap_or(Timestamp::MIN))
    }
}

/// A restore point as the policy sees it.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    pub id: RestorePointId,
    pub created_at: Timestamp,
    pub pinned: bool,
}

/// What tells one hour, day and so on from another.
type Period = fn(&DateTime<chrono_tz::Tz>) -> [i64; 3];

/// Why a restore point is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    Newest,
    Last,
    Hourly,
    Daily,
    Weekly,
    Monthly,
    Yearly,
    /// It lies in the window, or is the last one before it.
    Window,
    Minimum,
    Pinned,
}

/// The restore points that are kept, and why. Of an hour, a day and so on the newest one is.
pub fn choose(candidates: &[Candidate], policy: &Policy, now: Timestamp) -> BTreeMap<RestorePointId, BTreeSet<Reason>> {
    let mut kept: BTreeMap<RestorePointId, BTreeSet<Reason>> = BTreeMap::new();
    let mut newest_first: Vec<_> = candidates.to_vec();
    // Ids grow even where a clock was set back.
    newest_first.sort_by_key(|point| std::cmp::Reverse(point.id));
    let mut keep = |point: &Candidate, reason| {
        kept.entry(point.id).or_default().insert(reason);
    };
    for (count, reason) in [(1, Reason::Newest), (policy.last, Reason::Last), (policy.minimum, Reason::Minimum)] {
        newest_first.iter().take(count as usize).for_each(|point| keep(point, reason));
    }
    newest_first.iter().filter(|point| point.pinned).for_each(|point| keep(point, Reason::Pinned));
    let calendars: [(u32, Reason, Period); 5] = [
        (policy.hourly, Reason::Hourly, |at| [i64::from(at.num_days_from_ce()), i64::from(at.hour()), shift(at)]),
        (policy.daily, Reason::Daily, |at| [i64::from(at.num_days_from_ce()), 0, 0]),
        (policy.weekly, Reason::Weekly, |at| [i64::from(at.iso_week().year()), i64::from(at.iso_week().week()), 0]),
        (policy.monthly, Reason::Monthly, |at| [i64::from(at.year()), i64::from(at.month()), 0]),
        (policy.yearly, Reason::Yearly, |at| [i64::from(at.year()), 0, 0]),
    ];
    for (count, reason, period) in calendars {
        let (mut left, mut last) = (count, None);
        for point in &newest_first {
            let Some(at) = local(point.created_at, policy.zone) else { continue };
            let period = Some(period(&at));
            if left > 0 && period != last {
                keep(point, reason);
                left -= 1;
                last = period;
            }
        }
    }
    if let Some(start) = policy.window_start(now) {
        newest_first.iter().filter(|point| point.created_at > start).for_each(|point| keep(point, Reason::Window));
        // The one before the window says what databases there were when it began.
        newest_first
            .iter()
            .find(|point| point.created_at <= start)
            .into_iter()
            .for_each(|point| keep(point, Reason::Window));
    }
    kept
}

/// An hour that comes twice when clocks go back is two.
fn shift(at: &DateTime<chrono_tz::Tz>) -> i64 {
    use chrono::Offset as _;
    i64::from(at.offset().fix().local_minus_utc())
}

fn local(at: Timestamp, zone: chrono_tz::Tz) -> Option<DateTime<chrono_tz::Tz>> {
    Some(DateTime::<Utc>::from_timestamp_millis(at.as_millisecond())?.with_timezone(&zone))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(times: &[&str]) -> Vec<Candidate> {
        let point = |(n, time): (usize, &&str)| {
            let created_at: Timestamp = time.parse().unwrap();
            let id = RestorePointId(ulid::Ulid::from_parts(created_at.as_millisecond() as u64, n as u128));
            Candidate { id, created_at, pinned: false }
        };
        times.iter().enumerate().map(point).collect()
    }

    fn kept(points: &[Candidate], policy: &Policy, now: &str) -> Vec<String> {
        let kept = choose(points, policy, now.parse().unwrap());
        points.iter().filter(|p| kept.contains_key(&p.id)).map(|p| p.created_at.to_string()).collect()
    }

    #[test]
    fn the_newest_of_a_period_is_kept_and_periods_without_one_do_not_count() {
        let points = points(&[
            "2026-01-01T08:00:00Z",
            "2026-01-01T20:00:00Z",
            "2026-01-04T01:00:00Z",
            "2026-01-04T02:00:00Z",
            "2026-01-05T03:00:00Z",
        ]);
        let daily = Policy { daily: 3, ..Policy::default() };
        assert_eq!(
            kept(&points, &daily, "2026-01-06T00:00:00Z"),
            ["2026-01-01T20:00:00Z", "2026-01-04T02:00:00Z", "2026-01-05T03:00:00Z"]
        );
        // The fourth of January is a Sunday: it ends its ISO week.
        let weekly = Policy { weekly: 2, ..Policy::default() };
        assert_eq!(kept(&points, &weekly, "2026-01-06T00:00:00Z"), ["2026-01-04T02:00:00Z", "2026-01-05T03:00:00Z"]);
        let minimum = Policy { minimum: 2, ..Policy::default() };
        assert_eq!(kept(&points, &minimum, "2027-01-01T00:00:00Z"), ["2026-01-04T02:00:00Z", "2026-01-05T03:00:00Z"]);
    }

    #[test]
    fn the_window_keeps_all_in_it_and_the_last_one_before() {
        let points =
            points(&["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z", "2026-01-04T00:00:00Z"]);
        let window = Policy { window: SignedDuration::from_hours(36), ..Policy::default() };
        assert_eq!(
            kept(&points, &window, "2026-01-04T06:00:00Z"),
            ["2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z", "2026-01-04T00:00:00Z"]
        );
    }

    #[test]
    fn the_newest_is_the_one_that_was_made_last_whatever_the_clock_said() {
        let mut points = points(&["2026-01-01T00:00:00Z", "2026-01-05T00:00:00Z", "2026-01-02T00:00:00Z"]);
        let before = points[1].id;
        points[2].id = RestorePointId::after(Some(before), points[2].created_at);
        assert!(points[2].id > before);
        let one = Policy { last: 1, ..Policy::default() };
        assert_eq!(kept(&points, &one, "2026-01-02T01:00:00Z"), ["2026-01-02T00:00:00Z"]);
        // A window that the others lie in keeps them, in whatever order they were made.
        let window = Policy { window: SignedDuration::from_hours(48), ..Policy::default() };
        assert_eq!(kept(&points, &window, "2026-01-05T12:00:00Z"), ["2026-01-05T00:00:00Z", "2026-01-02T00:00:00Z"]);
    }

    #[test]
    fn an_hour_that_comes_twice_is_two_and_days_begin_where_the_clocks_say() {
        // In Berlin, clocks went from three back to two on 25 October 2026, at one by UTC.
        let points =
            points(&["2026-10-25T00:10:00Z", "2026-10-25T00:40:00Z", "2026-10-25T01:10:00Z", "2026-10-25T23:30:00Z"]);
        let berlin = Policy { zone: chrono_tz::Europe::Berlin, ..Policy::default() };
        let hourly = Policy { hourly: 3, ..berlin.clone() };
        assert_eq!(
            kept(&points, &hourly, "2026-10-26T00:00:00Z"),
            ["2026-10-25T00:40:00Z", "2026-10-25T01:10:00Z", "2026-10-25T23:30:00Z"]
        );
        // Half past eleven by UTC is the next day there.
        let daily = Policy { daily: 9, ..berlin };
        assert_eq!(kept(&points, &daily, "2026-10-26T00:00:00Z"), ["2026-10-25T01:10:00Z", "2026-10-25T23:30:00Z"]);
    }
}
