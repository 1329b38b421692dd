//! Proofs that the archive holds a place of a history, whichever objects hold it by now.
//!
//! A place lies between two commits. It has a chain hash, which depends on how commits were cut into objects, and since format
//! version 2 a history hash, which does not. A place is proven if either is found there.
//!
//! Names alone do not tell histories apart. Where two objects of a timeline overlap other than an input and what it was merged
//! into, a write took effect late, or two wrote: then the headers decide which objects belong together.

use std::collections::{BTreeMap, BTreeSet};

use futures::FutureExt;
use futures::future::BoxFuture;
use object_store::path::Path as Key;

use crate::ids::{Offset, TimelineId};
use crate::repository::chain::{LogChain, LogEntry};
use crate::repository::log_object::{LogHeader, Place};
use crate::repository::manifest::DatabasePoint;
use crate::repository::{Repository, RepositoryError};

/// Every log object of some timelines.
pub(super) type Objects = BTreeMap<TimelineId, Vec<LogEntry>>;

/// Whether a promise holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// The chain leads to it.
    Holds,
    /// Other objects than those of the chain lead to it: see [`LogChain::through`].
    HoldsThrough(Vec<LogEntry>),
    /// What would tell lies inside an encrypted body, and no identity is here to open it.
    NotReadable,
    /// The history at this offset is another one.
    Differs,
}

impl DatabasePoint {
    /// Where the history stands after its offset.
    pub fn place(&self) -> Place {
        Place { chain: Some(self.chain), history: self.history }
    }
}

/// A search for the objects that lead to a place.
struct Search<'a> {
    repository: &'a Repository,
    chain: &'a LogChain,
    objects: &'a Objects,
    /// Objects that were tried, each for the place after a transaction.
    tried: BTreeSet<(Key, Offset)>,
}

impl Repository {
    /// Looks for the place that `point` promised, on the chain of its timeline and in every other object of it.
    ///
    /// # Errors
    /// When the store fails, or the object that the chain has there is missing or damaged.
    pub async fn prove(&self, point: &DatabasePoint, chain: &LogChain) -> Result<Proof, RepositoryError> {
        let Some(entry) = chain.range(point.offset, point.offset).first() else { return Ok(Proof::Differs) };
        let header = self.log_header(&entry.key()).await?;
        let (found, promised) = (header.place_after(point.offset), point.place());
        if found.is(&promised) {
            return Ok(Proof::Holds);
        }
        let inside = !found.is_known() && point.history.is_some();
        let can_read = !header.sealed || self.keys.can_open();
        if inside && can_read && self.place_at(entry, &header, point.offset).await?.is(&promised) {
            return Ok(Proof::Holds);
        }
        let entries = self.log_entries(&point.identity, entry.timeline).await?;
        let objects = Objects::from([(entry.timeline, entries)]);
        let mut search =
            Search { repository: self, chain, objects: &objects, tried: [(entry.key(), point.offset)].into() };
        match search.around(entry.timeline, point.offset, promised).await? {
            Some(entries) => Ok(Proof::HoldsThrough(entries)),
            None if inside && !can_read => Ok(Proof::NotReadable),
            None => Ok(Proof::Differs),
        }
    }

    /// Where the history stands after transaction `offset` of an object, read from its commits where the header cannot tell.
    ///
    /// # Errors
    /// When the object is missing, damaged or cannot be opened.
    pub async fn place_at(
        &self,
        entry: &LogEntry,
        header: &LogHeader,
        offset: Offset,
    ) -> Result<Place, RepositoryError> {
        let told = match offset < header.first {
            true => header.place_before(Offset(offset.0.saturating_add(1))),
            false => header.place_after(offset),
        };
        if told.is_known() {
            return Ok(told);
        }
        let index = header.part_of_link(header.links.partition_point(|link| link.last < offset));
        let open = self.open_log(&entry.whole()).await?;
        let stored = self.log_part(&open, index).await?;
        let keys = self.keys.clone();
        let cut = tokio::task::spawn_blocking(move || {
            let mut commits = open.header.decode_part(&open.key, index, &stored, &keys)?;
            Ok::<_, RepositoryError>(open.header.cut_part(index, &mut commits, (Offset(0), offset), keys.hashing()?))
        });
        let span = cut.await.map_err(|error| RepositoryError::damaged(&entry.key(), error))??;
        // A commit of several transactions may reach over the offset.
        let is_there = span.next.0 == offset.0.saturating_add(1);
        Ok(if is_there { span.after } else { Place { chain: None, history: None } })
    }

    /// Puts objects that belong together in place of those that contradict each other. Reads headers only where names leave a
    /// doubt, unless `every` joint is to be looked at.
    ///
    /// # Errors
    /// When the store fails.
    pub(super) async fn resolved(
        &self,
        mut chain: LogChain,
        objects: &Objects,
        every: bool,
    ) -> Result<LogChain, RepositoryError> {
        let odd: Vec<_> = objects.values().flatten().filter(|entry| is_odd(&chain, entry)).cloned().collect();
        let is_doubtful = |left: &LogEntry, entry: &LogEntry| {
            let overlaps = |odd: &LogEntry, held: &LogEntry| {
                odd.timeline == held.timeline && odd.last >= held.first && odd.first <= held.last
            };
            let is_near = |odd: &LogEntry| overlaps(odd, left) || overlaps(odd, entry);
            let is_cut = left.timeline == entry.timeline && !(left.is_whole() && entry.is_whole());
            every || is_cut || odd.iter().any(is_near)
        };
        let mut at = 1;
        while let (Some(left), Some(entry)) = (chain.entries.get(at - 1), chain.entries.get(at)) {
            let adjoin = left.last.0.checked_add(1) == Some(entry.first.0);
            if adjoin
                && is_doubtful(left, entry)
                && let Some(better) = self.resolved_at(&chain, at, objects).await?
            {
                // What comes after stays; what comes before is looked at no more: it was proven from here.
                at = better.entries.len() - (chain.entries.len() - at);
                chain = better;
            }
            at += 1;
        }
        Ok(chain)
    }

    /// The chain with other objects before the one at index `at`, if the headers do not prove that it continues those there.
    async fn resolved_at(
        &self,
        chain: &LogChain,
        at: usize,
        objects: &Objects,
    ) -> Result<Option<LogChain>, RepositoryError> {
        let (Some(left), Some(entry)) = (chain.entries.get(at - 1), chain.entries.get(at)) else { return Ok(None) };
        let (before, header) = (self.log_header(&left.key()).await, self.log_header(&entry.key()).await);
        let (before, header) = match (before, header) {
            (Ok(before), Ok(header)) => (before, header),
            // What is damaged is for the reader to avoid.
            (Err(error), _) | (_, Err(error)) if error.is_damage() => return Ok(None),
            (Err(error), _) | (_, Err(error)) => return Err(error),
        };
        // Where the headers cannot tell, objects are preferred of which they can.
        if before.place_after(left.last).is(&header.place_before(entry.first)) {
            return Ok(None);
        }
        let tried = [(left.key(), left.last)].into();
        let mut search = Search { repository: self, chain, objects, tried };
        let Some(found) = search.around(left.timeline, left.last, header.place_before(entry.first)).await? else {
            return Ok(None);
        };
        let mut better = chain.through(&found, left.last);
        better.entries.extend_from_slice(chain.entries.get(at..).unwrap_or_default());
        better.holes.extend(chain.holes.iter().filter(|hole| hole.missing >= entry.first));
        Ok(Some(better))
    }
}

impl Search<'_> {
    /// The objects, beside those of the chain, that lead to `place` after transaction `offset`. They begin where the chain is at
    /// the right place.
    fn around(
        &mut self,
        timeline: TimelineId,
        offset: Offset,
        place: Place,
    ) -> BoxFuture<'_, Result<Option<Vec<LogEntry>>, RepositoryError>> {
        async move {
            let Some(objects) = self.objects.get(&timeline) else { return Ok(None) };
            for other in objects.iter().filter(|other| other.first <= offset && offset <= other.last) {
                if self.tried.contains(&(other.key(), offset)) {
                    continue;
                }
                let header = match self.repository.log_header(&other.key()).await {
                    Ok(header) => header,
                    Err(error) if error.is_damage() => continue,
                    Err(error) => return Err(error),
                };
                // What leads elsewhere may be wanted for another place.
                if !header.place_after(offset).is(&place) || !self.tried.insert((other.key(), offset)) {
                    continue;
                }
                if let Some(mut found) = self.before(other, &header).await? {
                    found.push(other.within(other.first, offset));
                    return Ok(Some(found));
                }
            }
            Ok(None)
        }
        .boxed()
    }

    /// The objects that lead to where `other` starts.
    async fn before(&mut self, other: &LogEntry, header: &LogHeader) -> Result<Option<Vec<LogEntry>>, RepositoryError> {
        let (before, place) = (Offset(other.first.0.saturating_sub(1)), header.place_before(other.first));
        let held = self.chain.range(before, before).first().filter(|_| other.first > Offset(0));
        let Some(entry) = held else {
            // The history begins here, or after a hole.
            return Ok(Some(Vec::new()));
        };
        match self.repository.log_header(&entry.key()).await {
            Ok(found) if found.place_after(before).is(&place) => return Ok(Some(Vec::new())),
            Err(error) if !error.is_damage() => return Err(error),
            _ => {}
        }
        self.around(entry.timeline, before, place).await
    }
}

/// Returns true if an object is neither in the chain nor an input of one that is.
pub(crate) fn is_odd(chain: &LogChain, entry: &LogEntry) -> bool {
    let holders = chain.range(entry.first, entry.last);
    !holders.iter().any(|holder| {
        let whole = holder.whole();
        let is_output = holder.timeline == entry.timeline
            && holder.level > entry.level
            && whole.first <= entry.first
            && entry.last <= whole.last;
        holder.is_of(entry) || is_output
    })
}
