//! Ranges of transactions, both ends included.

/// As few ranges as hold the same.
pub(crate) fn merged(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (first, last) in ranges {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = (*end).max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// What is left of `range` without `held`, which is sorted.
pub(crate) fn without(range: (u64, u64), held: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let (mut at, mut left) = (range.0, Vec::new());
    for (first, last) in held {
        if *first > at && at <= range.1 {
            left.push((at, (first - 1).min(range.1)));
        }
        at = at.max(last.saturating_add(1));
    }
    if at <= range.1 {
        left.push((at, range.1));
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_held_is_left() {
        let held = merged(vec![(5, 7), (0, 3), (6, 9), (15, 40)]);
        assert_eq!(held, [(0, 3), (5, 9), (15, 40)]);
        assert_eq!(without((3, 20), &held), [(4, 4), (10, 14)]);
        assert_eq!(without((3, 20), &[]), [(3, 20)]);
        assert_eq!(without((3, 20), &[(0, 50)]), []);
        assert_eq!(without((3, 20), &[(30, 50)]), [(3, 20)]);
    }
}
