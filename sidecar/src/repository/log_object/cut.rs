//! Parts of a log object's history: where it stands between two commits, and a part cut to the transactions that count.

use crate::buffers::Buffer;
use crate::ids::{ContentHash, Offset};
use crate::repository::chain::LogEntry;
use crate::repository::hashing::Hashing;
use crate::repository::log_object::{Link, LogHeader, history};

/// The commits of a part, or some of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartSpan {
    pub first: Offset,
    /// One past the last transaction.
    pub next: Offset,
    /// Where the history stands before it, and after it.
    pub before: Place,
    pub after: Place,
    /// Bytes of the commits.
    pub len: u64,
}

/// Where a history stands between two commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The chain hash; `None` inside a link.
    pub chain: Option<ContentHash>,
    /// The history hash; `None` where it is not known.
    pub history: Option<ContentHash>,
}

impl Place {
    /// Returns true if there is anything to compare.
    pub fn is_known(&self) -> bool {
        self.chain.is_some() || self.history.is_some()
    }

    /// Returns true if both are the same place of one history. Places of which nothing comparable is known differ.
    pub fn is(&self, other: &Self) -> bool {
        let same = |a: Option<ContentHash>, b| a.is_some() && a == b;
        same(self.chain, other.chain) || same(self.history, other.history)
    }
}

impl PartSpan {
    /// The last transaction; before the first where there is none.
    pub fn last(&self) -> Offset {
        Offset(self.next.0.saturating_sub(1))
    }
}

impl Link {
    /// Where the history stands after it.
    fn place(&self) -> Place {
        Place { chain: Some(self.chain), history: Some(self.history_after()) }
    }
}

impl LogHeader {
    /// Where the history stands before transaction `first`, as far as the header alone can say.
    pub fn place_before(&self, first: Offset) -> Place {
        match first.0.checked_sub(1).map(Offset) {
            Some(last) if first > self.first => self.place_after(last),
            _ if first == self.first => {
                Place { chain: Some(self.previous_chain), history: Some(self.history_before()) }
            }
            _ => Place { chain: None, history: None },
        }
    }

    /// Where the history stands after transaction `last`, as far as the header alone can say: inside a link it cannot.
    pub fn place_after(&self, last: Offset) -> Place {
        let found = self.links.binary_search_by_key(&last, |link| link.last).ok().and_then(|at| self.links.get(at));
        Place { chain: found.map(|link| link.chain), history: found.map(Link::history_after) }
    }

    /// Returns true if this object, of which the transactions of `entry` count, does not continue `before`, of which those of
    /// `left` count. Where one of them is cut inside a link the headers cannot tell, and the commits must.
    pub fn contradicts(&self, entry: &LogEntry, before: &Self, left: &LogEntry) -> bool {
        let adjoin = left.last.0.checked_add(1) == Some(entry.first.0);
        let (ends, starts) = (before.place_after(left.last), self.place_before(entry.first));
        adjoin && ends.is_known() && starts.is_known() && !ends.is(&starts)
    }

    /// All of part `index`.
    pub fn whole_part(&self, index: usize) -> PartSpan {
        let (_, first, links) = self.span(index);
        let next = links.last().map_or(first, |link| Offset(link.last.0.saturating_add(1)));
        let after = links.last().map_or_else(|| self.place_before(first), Link::place);
        PartSpan {
            first,
            next,
            before: self.place_before(first),
            after,
            len: links.iter().map(|link| link.raw_len).sum(),
        }
    }

    /// Cuts the opened part `index` to the transactions from `first` to `last`, both included. Commits are never split: one that
    /// reaches over an end of the range is left out.
    pub fn cut_part(
        &self,
        index: usize,
        commits: &mut Buffer,
        (first, last): (Offset, Offset),
        hashing: Hashing,
    ) -> PartSpan {
        let whole = self.whole_part(index);
        if first <= whole.first && whole.last() <= last {
            return whole;
        }
        let (_, starts, links) = self.span(index);
        let mut kept =
            Kept { at: 0, here: whole.before, next: starts, bytes: 0..0, span: PartSpan { next: starts, ..whole } };
        kept.span.after = whole.before;
        for link in links {
            if !kept.take(link, self.log_version, commits, (first, last), hashing) {
                break;
            }
        }
        let Kept { bytes, mut span, .. } = kept;
        commits.truncate(bytes.end);
        commits.drain(..bytes.start.min(bytes.end));
        span.len = commits.len() as u64;
        span
    }
}

/// What is kept of a part, while its links are looked at in order.
struct Kept {
    /// Bytes of the links before.
    at: usize,
    /// Where the history stands after them, and the next transaction.
    here: Place,
    next: Offset,
    bytes: std::ops::Range<usize>,
    span: PartSpan,
}

impl Kept {
    /// Looks at one more link. Returns false behind the end of the range.
    fn take(
        &mut self,
        link: &Link,
        log_version: u8,
        commits: &[u8],
        (first, last): (Offset, Offset),
        hashing: Hashing,
    ) -> bool {
        let end = self.at.saturating_add(usize::try_from(link.raw_len).unwrap_or(usize::MAX));
        let run = commits.get(self.at..end).unwrap_or_default();
        let within = if link.last < first || (self.next >= first && link.last <= last) {
            self.pass(self.next, link.last, end, link.place(), first);
            true
        } else {
            // Inside a link only the history hash tells where the history stands, if the link has one.
            let start = self.here.history.filter(|_| link.history.is_some());
            let at = self.at;
            history::walk(start.unwrap_or(ContentHash([0; 32])), log_version, run, hashing).all(|boundary| {
                if boundary.last > last {
                    return false;
                }
                let inside = Place { chain: None, history: start.map(|_| boundary.history) };
                let place = if boundary.last == link.last { link.place() } else { inside };
                self.pass(boundary.first, boundary.last, at + boundary.end, place, first);
                true
            })
        };
        self.at = end;
        within
    }

    /// Passes commits that are wholly before the range, or wholly inside.
    fn pass(&mut self, starts: Offset, last: Offset, end: usize, place: Place, first: Offset) {
        self.here = place;
        self.next = Offset(last.0.saturating_add(1));
        if starts < first {
            self.bytes.start = end;
            self.span.first = self.next;
            self.span.before = place;
        }
        self.bytes.end = end;
        self.span.next = self.next;
        self.span.after = place;
    }
}
