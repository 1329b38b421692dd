//! One object from several: the header is put together, the bodies are copied or made anew.

use crate::datadir::log::Times;
use crate::ids::{ContentHash, Identity, Offset, TimelineId};
use crate::repository::RepositoryError;
use crate::repository::crypto::Keyring;
use crate::repository::log_object::{LogHeader, seal_part};

/// A header put together from others: their links, in parts that are copied or made anew.
pub(crate) struct Merge {
    header: LogHeader,
    /// Links added since the last part was closed.
    open_links: u32,
}

impl Merge {
    pub(crate) fn new(database: Identity, timeline: TimelineId, level: u8, archived_at: i64) -> Self {
        let header = LogHeader {
            sealed: false,
            database,
            timeline,
            log_version: 0,
            level,
            first: Offset(0),
            last: Offset(0),
            times: Times::default(),
            archived_at,
            raw_len: 0,
            body_len: 0,
            previous_chain: ContentHash([0; 32]),
            previous_history: None,
            links: Vec::new(),
            parts: Vec::new(),
            len: 0,
        };
        Self { header, open_links: 0 }
    }

    /// Takes an object over as it is, parts and all.
    pub(crate) fn copy(&mut self, input: &LogHeader) {
        self.join(input);
        self.header.links.extend_from_slice(&input.links);
        self.header.parts.extend_from_slice(&input.parts);
    }

    /// Adds the links of one part; its commits go into the next [`Self::seal`].
    pub(crate) fn add(&mut self, input: &LogHeader, index: usize) {
        if index == 0 {
            self.join(input);
        }
        let (_, _, links) = input.span(index);
        self.header.links.extend_from_slice(links);
        self.open_links += u32::try_from(links.len()).unwrap_or(u32::MAX);
    }

    /// Closes a part that holds `commits`, those of all links added since the last, and appends it to `body`.
    pub(crate) fn seal(
        &mut self,
        commits: &[u8],
        level: i32,
        keys: &Keyring,
        body: &mut Vec<u8>,
    ) -> Result<(), RepositoryError> {
        let links = std::mem::take(&mut self.open_links);
        seal_part(commits, links, level, keys, |part, stored| {
            self.header.parts.push(part);
            body.extend_from_slice(stored);
        })
    }

    fn join(&mut self, input: &LogHeader) {
        let header = &mut self.header;
        if header.links.is_empty() {
            header.sealed = input.sealed;
            header.log_version = input.log_version;
            header.first = input.first;
            header.previous_chain = input.previous_chain;
            header.previous_history = input.previous_history;
        }
        header.last = input.last;
        header.times.merge(input.times);
        header.raw_len += input.raw_len;
    }

    pub(crate) fn header(&self) -> LogHeader {
        let body_len = self.header.parts.iter().map(|part| part.stored_len).sum();
        LogHeader { body_len, ..self.header.clone() }
    }
}
