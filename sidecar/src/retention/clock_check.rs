//! Whether the clock can be right by which retention counts: seen from a clock that is far ahead, a window holds nothing.
//!
//! What the store says of the time decides where it has a clock of its own. A directory on this machine has not, so there the
//! repository's own signs of life do: no pause is believed that takes the whole window, is out of the ordinary, and ended so
//! lately that the window has not filled again.

use jiff::{SignedDuration, Timestamp, Unit};

use crate::repository::{Repository, RepositoryError, paths};
use crate::retention::policy::Policy;

/// A pause that nobody needs to explain.
const ORDINARY_PAUSE: SignedDuration = SignedDuration::from_hours(8 * 24);
/// As far as a machine's clock and the store's may be apart: signed requests allow a quarter of it.
const SKEW_MAX: SignedDuration = SignedDuration::from_hours(1);

/// Says why `now` is not to be believed by what the repository shows; `None` where it is plausible. `made` are the times of
/// restore points in the order in which they were made, `pruned_at` is when retention last ran: it believed the clock then.
pub(super) fn doubt(
    made: impl Iterator<Item = Timestamp>,
    pruned_at: Option<Timestamp>,
    policy: &Policy,
    now: Timestamp,
) -> Option<String> {
    // Rules that count hours, days and so on count only those that have a restore point.
    if policy.window.is_zero() {
        return None;
    }
    let extraordinary = policy.window.max(ORDINARY_PAUSE);
    let (mut last, mut longest): (Option<Timestamp>, SignedDuration) = (None, SignedDuration::ZERO);
    // What was made by a clock that is ahead of this one does not count.
    for at in made.filter(|at| *at <= now).chain([now]) {
        let Some(before) = last.filter(|before| *before < at) else {
            last = last.or(Some(at));
            continue;
        };
        let believed = pruned_at.map_or(before, |pruned_at| before.max(pruned_at));
        let pause = at.duration_since(believed);
        if pause > extraordinary && pause > longest.saturating_mul(2) && now.duration_since(at) < extraordinary {
            return Some(format!(
                "by this machine's clock nothing was backed up or pruned from {} to {}, {} days, and no pause before was \
                 nearly as long",
                rounded(believed),
                rounded(at),
                pause.as_hours() / 24,
            ));
        }
        longest = longest.max(at.duration_since(before));
        last = Some(at);
    }
    None
}

/// As [`doubt`], by the time that the store gave the lease, which its holder renews every few seconds. That it agrees clears no
/// doubt: the store may run on the same machine, by the same clock.
pub(super) async fn doubt_of_store(repository: &Repository, now: Timestamp) -> Result<Option<String>, RepositoryError> {
    let Some(stored) = repository.modified_at(&paths::lease()).await? else { return Ok(None) };
    let apart = now.duration_since(stored).abs();
    Ok((apart > SKEW_MAX)
        .then(|| format!("this machine's clock says {} where the store's says {}", rounded(now), rounded(stored))))
}

fn rounded(at: Timestamp) -> Timestamp {
    at.round(Unit::Second).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn day(n: i64) -> Timestamp {
        let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        start.checked_add(SignedDuration::from_hours(24 * n)).unwrap()
    }

    fn is_doubted(made: &[i64], pruned_at: Option<i64>, window: i64, now: i64) -> bool {
        let policy = Policy { window: SignedDuration::from_hours(24 * window), ..Policy::default() };
        doubt(made.iter().map(|n| day(*n)), pruned_at.map(day), &policy, day(now)).is_some()
    }

    #[test]
    fn a_clock_far_ahead_is_not_believed() {
        let month: Vec<i64> = (0..=30).collect();
        assert!(is_doubted(&month, None, 30, 430));
        assert!(is_doubted(&month, Some(30), 30, 430));
        // Nor once restore points were made by it.
        let ahead = [&month[..], &[430, 431, 432]].concat();
        assert!(is_doubted(&ahead, None, 30, 432));
        assert!(is_doubted(&ahead, Some(30), 30, 432));
        assert!(!is_doubted(&month, None, 30, 31));
        assert!(!is_doubted(&month, None, 0, 430), "nothing counts by the clock");
    }

    #[test]
    fn a_clock_that_was_set_right_is_believed_in_spite_of_what_was_made_ahead_of_it() {
        let made: Vec<i64> = (0..=30).chain([430, 31, 32]).collect();
        assert!(!is_doubted(&made, None, 30, 33));
    }

    #[test]
    fn a_pause_is_believed_once_it_was_or_the_window_has_filled_again() {
        let paused: Vec<i64> = (0..=30).chain(100..=110).collect();
        assert!(is_doubted(&paused, None, 30, 110));
        assert!(!is_doubted(&paused, Some(109), 30, 110));
        assert!(is_doubted(&paused, Some(30), 30, 129));
        assert!(!is_doubted(&paused, Some(30), 30, 130));
    }

    #[test]
    fn ordinary_pauses_are_believed() {
        for (every, window) in [(1, 30), (7, 1), (7, 30), (30, 7), (90, 30)] {
            let made: Vec<i64> = (0..5).map(|n| n * every).collect();
            assert!(!is_doubted(&made, None, window, 4 * every), "every {every} days, a window of {window}");
            assert!(!is_doubted(&made, None, window, 5 * every), "every {every} days, a window of {window}");
        }
        assert!(!is_doubted(&[0, 1, 2], None, 7, 10), "a week without the machine");
        assert!(!is_doubted(&[], None, 7, 100));
        assert!(!is_doubted(&[5], None, 7, 6));
    }
}
