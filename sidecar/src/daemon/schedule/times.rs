//! When a schedule is due: from the clock and the rules of its time zone as they are now, at each look.
//!
//! Invariants:
//! - what passed since the last look is made up for once, however much it was;
//! - a clock that steps back makes nothing due by itself, and nothing waits for the time that it showed before;
//! - a time of day that the zone skips is due at the next moment that exists, and one that comes twice is due the
//!   first time. What repeats within a day follows real time: it neither pauses nor doubles.

use chrono::{DateTime, FixedOffset, Offset as _, TimeZone as _, Utc};
use chrono_tz::Tz;
use croner::Cron;
use jiff::Timestamp;

const DAY: i64 = 24 * 3600;

/// The times of one schedule.
pub(super) struct Times {
    cron: Cron,
    zone: Tz,
    looked_at: Timestamp,
    /// The first time after `looked_at`.
    next: Option<Timestamp>,
    /// The time that was due last; `None` when it made up for several.
    last: Option<Timestamp>,
}

impl Times {
    /// A run that came due after `last_run` while nobody looked is due at the first look.
    pub fn new(cron: Cron, zone: Tz, now: Timestamp, last_run: Option<Timestamp>) -> Self {
        // One from a clock that was ahead proves nothing.
        let looked_at = last_run.filter(|last| *last < now).unwrap_or(now);
        let mut times = Self { cron, zone, looked_at, next: None, last: None };
        times.next = times.after(looked_at);
        times
    }

    /// Whether a run is due now.
    pub fn is_due(&mut self, now: Timestamp) -> bool {
        let before = std::mem::replace(&mut self.looked_at, now);
        if now < before {
            self.next = self.after(now);
            return false;
        }
        let Some(due) = self.next.filter(|due| *due <= now) else { return false };
        self.last = Some(due);
        if self.after(due).is_some_and(|second| second <= now) {
            self.last = None;
        }
        self.next = self.after(now);
        true
    }

    /// The next time, as of the last look.
    pub fn next(&self) -> Option<Timestamp> {
        self.next
    }

    /// The first time after `time` that was not due already: a clock that steps back a little repeats what was.
    fn after(&self, time: Timestamp) -> Option<Timestamp> {
        let mut next = next_after(&self.cron, self.zone, time.as_second())?;
        if self.last.is_some_and(|last| last.as_second() == next) {
            next = next_after(&self.cron, self.zone, next)?;
        }
        Timestamp::from_second(next).ok()
    }
}

/// The first time after `time`, both in Unix seconds; `None` where none comes.
///
/// Croner is asked for times under one offset from UTC, and the zone's changes of offset are taken in turn: asked for times in
/// a zone it answers, in an hour that comes twice, with times that are over.
fn next_after(cron: &Cron, zone: Tz, time: i64) -> Option<i64> {
    let is_single = is_single(cron);
    let (mut from, mut inclusive) = (time, false);
    loop {
        let offset = offset_at(zone, from)?;
        let found = find(cron, offset, from, inclusive)?;
        let Some(change) = first_change(zone, from, found) else {
            if is_single && comes_again(zone, offset, found) {
                (from, inclusive) = (found, false);
                continue;
            }
            return Some(found);
        };
        let skipped = i64::from(offset_at(zone, change)?.local_minus_utc() - offset.local_minus_utc());
        if is_single && found < change + skipped {
            return Some(change);
        }
        (from, inclusive) = (change, true);
    }
}

/// Whether it names times of day, rather than repeat within the day.
fn is_single(cron: &Cron) -> bool {
    let pattern = &cron.pattern;
    ![&pattern.seconds, &pattern.minutes, &pattern.hours].iter().any(|field| field.from_wildcard)
}

/// The next match of the expression in local time at a fixed offset.
fn find(cron: &Cron, offset: FixedOffset, from: i64, inclusive: bool) -> Option<i64> {
    let from = DateTime::<Utc>::from_timestamp(from, 0)?.with_timezone(&offset);
    cron.find_next_occurrence(&from, inclusive).ok().map(|found| found.timestamp())
}

fn offset_at(zone: Tz, time: i64) -> Option<FixedOffset> {
    Some(zone.offset_from_utc_datetime(&DateTime::<Utc>::from_timestamp(time, 0)?.naive_utc()).fix())
}

/// The first second after `from`, up to `until`, at which the zone has another offset than at `from`.
fn first_change(zone: Tz, from: i64, until: i64) -> Option<i64> {
    let offset = offset_at(zone, from)?;
    let differs = |time: i64| offset_at(zone, time) != Some(offset);
    let mut before = from;
    let mut after = loop {
        let next = (before + DAY).min(until);
        if differs(next) {
            break next;
        }
        if next == until {
            return None;
        }
        before = next;
    };
    while after - before > 1 {
        let middle = before + (after - before) / 2;
        if differs(middle) { after = middle } else { before = middle }
    }
    Some(after)
}

/// Whether the local time at `time` was there before, under an earlier offset.
fn comes_again(zone: Tz, offset: FixedOffset, time: i64) -> bool {
    let Some(local) = DateTime::<Utc>::from_timestamp(time, 0) else { return false };
    let local = local.with_timezone(&offset).naive_local();
    zone.from_local_datetime(&local).earliest().is_some_and(|first| first.timestamp() < time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::value;

    const BERLIN: Tz = Tz::Europe__Berlin;

    fn cron(text: &str) -> Cron {
        value::Cron::try_from(text.to_owned()).and_then(|cron| cron.parse()).expect("an expression")
    }

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    /// The next `n` times after `from`, each asked for at the one before.
    fn times(text: &str, from: &str, n: usize) -> Vec<String> {
        let (cron, mut time) = (cron(text), at(from).as_second());
        let next = |_| {
            time = next_after(&cron, BERLIN, time).expect("a time");
            Timestamp::from_second(time).expect("a time").to_string()
        };
        (0..n).map(next).collect()
    }

    /// When it is due between two times, looked at each `step` seconds.
    fn due(times: &mut Times, from: &str, until: &str, step: i64) -> Vec<String> {
        let (mut now, until, mut found) = (at(from), at(until), Vec::new());
        while now <= until {
            if times.is_due(now) {
                found.push(now.to_string());
            }
            now = Timestamp::from_second(now.as_second() + step).expect("a time");
        }
        found
    }

    #[test]
    fn a_skipped_time_of_day_runs_once() {
        // On 29 March 2026 the clocks of Berlin go from 02:00 to 03:00, at 01:00 UTC.
        let expected = ["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"];
        assert_eq!(times("0 30 2 * * *", "2026-03-27T12:00:00Z", 3), expected);
        let expected = ["2026-03-29T01:00:00Z", "2026-03-30T01:00:00Z"];
        assert_eq!(times("0 0 3 * * *", "2026-03-28T12:00:00Z", 2), expected, "one that exists is not skipped");
        let expected = ["2026-03-29T01:00:00Z", "2027-03-29T00:30:00Z"];
        assert_eq!(times("0 30 2 29 3 *", "2025-12-01T00:00:00Z", 2), expected, "months ahead");
        let expected = ["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:00:00Z"];
        assert_eq!(times("0 0,30 2 * * *", "2026-03-28T01:00:00Z", 3), expected, "two that are skipped are one");
        let expected = ["2026-03-29T22:15:00Z", "2026-03-30T22:15:00Z"];
        assert_eq!(times("0 15 0 * * *", "2026-03-29T01:00:00Z", 2), expected);
    }

    #[test]
    fn a_repeated_time_of_day_runs_once() {
        // On 25 October 2026 they go from 03:00 to 02:00, at 01:00 UTC.
        let expected = ["2026-10-24T00:30:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"];
        assert_eq!(times("0 30 2 * * *", "2026-10-23T12:00:00Z", 3), expected);
        // Also asked for between the two.
        assert_eq!(times("0 30 2 * * *", "2026-10-25T01:10:00Z", 1), ["2026-10-26T01:30:00Z"]);
        assert_eq!(times("0 0 3 * * *", "2026-10-24T12:00:00Z", 1), ["2026-10-25T02:00:00Z"]);
        let expected = ["2026-10-25T00:00:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:00:00Z"];
        assert_eq!(times("0 0,30 2 * * *", "2026-10-24T12:00:00Z", 3), expected);
    }

    #[test]
    fn what_repeats_follows_real_time() {
        let hourly = |from| times("0 0 * * * *", from, 4);
        let expected = ["00", "01", "02", "03"];
        assert_eq!(hourly("2026-03-28T23:30:00Z"), expected.map(|hour| format!("2026-03-29T{hour}:00:00Z")));
        assert_eq!(hourly("2026-10-24T23:30:00Z"), expected.map(|hour| format!("2026-10-25T{hour}:00:00Z")));
        // Every second that is asked for lies ahead, all through the hour that comes twice.
        let every = cron("0 */10 * * * *");
        for time in (at("2026-10-25T00:00:00Z").as_second()..at("2026-10-25T02:00:00Z").as_second()).step_by(61) {
            let next = next_after(&every, BERLIN, time).expect("a time");
            assert!(next > time && next <= time + 600 && next % 600 == 0, "{time} {next}");
        }
    }

    #[test]
    fn each_day_of_years_has_its_run() {
        let daily = cron("0 30 2 * * *");
        let mut time = at("2024-12-31T23:00:00Z").as_second();
        for day in 0..800 {
            let next = next_after(&daily, BERLIN, time).expect("a time");
            let local = DateTime::<Utc>::from_timestamp(next, 0).expect("a time").with_timezone(&BERLIN);
            let expected = chrono::NaiveDate::from_ymd_opt(2025, 1, 1).expect("a date") + chrono::Days::new(day);
            assert_eq!(local.date_naive(), expected);
            time = next;
        }
    }

    #[test]
    fn a_clock_set_back_keeps_the_schedule() {
        let now = at("2026-06-01T10:30:00Z");
        let mut hourly = Times::new(cron("0 0 * * * *"), chrono_tz::UTC, now, None);
        assert_eq!(due(&mut hourly, "2026-06-01T10:30:00Z", "2026-06-01T12:30:00Z", 10).len(), 2);
        // Thirty days ahead: one run makes up for all of them.
        assert_eq!(due(&mut hourly, "2026-07-01T12:30:00Z", "2026-07-01T12:59:50Z", 10), ["2026-07-01T12:30:00Z"]);
        // And back: nothing at once, and nothing waits for July.
        assert!(!hourly.is_due(at("2026-06-01T12:40:00Z")));
        assert_eq!(hourly.next(), Some(at("2026-06-01T13:00:00Z")));
        let found = due(&mut hourly, "2026-06-01T12:40:00Z", "2026-06-01T14:59:50Z", 10);
        assert_eq!(found, ["2026-06-01T13:00:00Z", "2026-06-01T14:00:00Z"]);
        // Back by hours.
        let found = due(&mut hourly, "2026-06-01T11:30:00Z", "2026-06-01T13:30:00Z", 10);
        assert_eq!(found, ["2026-06-01T12:00:00Z", "2026-06-01T13:00:00Z"]);
    }

    #[test]
    fn a_small_step_back_repeats_nothing() {
        let now = at("2026-06-01T10:59:50Z");
        let mut hourly = Times::new(cron("0 0 * * * *"), chrono_tz::UTC, now, None);
        assert_eq!(due(&mut hourly, "2026-06-01T10:59:50Z", "2026-06-01T11:00:05Z", 1), ["2026-06-01T11:00:00Z"]);
        assert!(!hourly.is_due(at("2026-06-01T10:59:55Z")));
        assert_eq!(hourly.next(), Some(at("2026-06-01T12:00:00Z")), "status shows what will be");
        assert_eq!(due(&mut hourly, "2026-06-01T10:59:55Z", "2026-06-01T11:30:00Z", 1), Vec::<String>::new());
        assert_eq!(due(&mut hourly, "2026-06-01T11:30:01Z", "2026-06-01T12:00:00Z", 1), ["2026-06-01T12:00:00Z"]);
    }

    #[test]
    fn a_missed_run_is_made_up_once() {
        let now = at("2026-06-10T10:30:00Z");
        let missed = |last: Option<&str>| {
            let mut daily = Times::new(cron("0 0 2 * * *"), BERLIN, now, last.map(at));
            due(&mut daily, "2026-06-10T10:30:00Z", "2026-06-10T11:30:00Z", 60).len()
        };
        assert_eq!(missed(Some("2026-06-01T00:00:00Z")), 1, "nine were missed");
        assert_eq!(missed(Some("2026-06-10T00:00:00Z")), 0, "today's was run");
        assert_eq!(missed(None), 0, "it never ran: it waits for its time");
        assert_eq!(missed(Some("2026-07-01T00:00:00Z")), 0, "by a clock that was ahead");
        let mut daily = Times::new(cron("0 0 2 * * *"), BERLIN, now, Some(at("2026-07-01T00:00:00Z")));
        let found = due(&mut daily, "2026-06-10T10:30:00Z", "2026-06-11T10:30:00Z", 60);
        assert_eq!(found, ["2026-06-11T00:00:00Z"], "nothing waits for July");
    }
}
