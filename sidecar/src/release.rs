//! What differs between the server's releases, by the version that a server reports.

/// A server's release. One that does not tell is taken for a recent one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release(Option<(u32, u32)>);

impl Release {
    /// From a version such as `2.8.3`.
    pub fn of(version: Option<&str>) -> Self {
        let numbers = |version: &str| {
            let mut parts = version.trim_start_matches('v').split('.');
            Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
        };
        Self(version.and_then(numbers))
    }

    /// Is this the version of a release at all?
    pub fn is_known(self) -> bool {
        self.0.is_some()
    }

    fn is_since(self, major: u32, minor: u32) -> bool {
        self.0.is_none_or(|release| release >= (major, minor))
    }

    /// Does it open a data directory that release `written` used last? Newer ones open older ones, and no other way: the data
    /// names its release, and a log of 1.5 or later may hold what releases before cannot replay.
    pub fn opens(self, written: Self) -> bool {
        match (self.0, written.0) {
            (Some(release), Some(written)) => release >= written,
            _ => true,
        }
    }

    /// Each SQL statement over HTTP is two transactions: its caller comes and goes.
    pub fn writes_when_asked(self) -> bool {
        self.is_since(2, 2)
    }

    /// `start` takes a size for its page pool. 1.2.0 knows the option and ends in a panic when it is given.
    pub fn bounds_page_pool(self) -> bool {
        self.is_known() && self.is_since(1, 3)
    }

    /// The `.ofs` index beside a segment is as 1.2.0 writes it. 2.8.3 is known to write another; the releases between are not.
    pub fn writes_index_of_1_2(self) -> bool {
        self.is_known() && !self.is_since(2, 0)
    }

    /// `start` can be told not to ask on its standard input what to do about a port that is taken.
    pub fn asks_questions(self) -> bool {
        self.is_known() && self.is_since(2, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_told_apart_by_number_and_not_by_text() {
        let writes = |version| Release::of(Some(version)).writes_when_asked();
        assert_eq!(["1.2.0", "1.12.0", "2.1.9"].map(writes), [false; 3]);
        assert_eq!(["2.2.0", "v2.10.1", "3.0.0-rc1", "nightly"].map(writes), [true; 4]);
        let unknown = Release::of(None);
        assert!(unknown.writes_when_asked() && !unknown.bounds_page_pool() && !unknown.asks_questions());
        assert!(!Release::of(Some("1.2.0")).bounds_page_pool() && Release::of(Some("1.10.0")).bounds_page_pool());
        let opens = |server, written| Release::of(Some(server)).opens(Release::of(Some(written)));
        assert!(opens("1.2.0", "1.2.3") && opens("2.8.3", "1.2.0") && opens("2.14.0", "2.8.3") && opens("?", "2.8.3"));
        assert!(!opens("1.2.0", "1.5.0") && !opens("2.8.3", "2.14.0") && !opens("1.12.0", "2.0.1"));
        assert!(!Release::of(Some("1.12.0")).asks_questions() && Release::of(Some("2.0.1")).asks_questions());
    }
}
