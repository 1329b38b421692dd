//! A model of everything that writes, merges, removes and reads log objects at once, driven by random steps: two archivers without
//! a fence, writes that take effect late or twice, lost answers, incomplete listings, servers that lose commits or are restored,
//! compaction, retention. After it, whatever was reported archived must be readable, commit for commit.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::path::Path as Key;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use parking_lot::Mutex;

use crate::archiver::compaction::pass;
use crate::backup::log::{find_continuation, write_batch};
use crate::backup::{Unobserved, Work};
use crate::clock::Clock;
use crate::datadir::commit::{SegmentHeader, encode};
use crate::datadir::log::{Batch, Times, segment_name};
use crate::ids::{ContentHash, Identity, Offset, RestorePointId, TimelineId};
use crate::progress::Silent;
use crate::repository::chain::LogEntry;
use crate::repository::crypto::Keyring;
use crate::repository::hashing::Hashing;
use crate::repository::log_object::{ChainTip, LogContent};
use crate::repository::manifest::{DatabasePoint, FORMAT, RestorePoint};
use crate::repository::proof::Proof;
use crate::repository::store::Store;
use crate::repository::timeline::ChainChoice;
use crate::repository::{Repository, paths};
use crate::restore::log_source::read_all;
use crate::retention::policy::Policy;
use crate::retention::{apply, plan};

const DATABASE: Identity = Identity([1; 32]);
const GRACE: Duration = Duration::from_secs(3600);

struct ModelClock(Mutex<jiff::Timestamp>);

impl Clock for ModelClock {
    fn now(&self) -> jiff::Timestamp {
        *self.0.lock()
    }

    fn sleep(&self, _: Duration) -> futures::future::BoxFuture<'static, ()> {
        std::future::ready(()).boxed()
    }
}

/// A store whose listings may leave out log objects.
struct Veiled {
    inner: object_store::memory::InMemory,
    hidden: Mutex<HashSet<Key>>,
}

impl fmt::Display for Veiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("veiled")
    }
}

impl fmt::Debug for Veiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("veiled")
    }
}

#[async_trait]
impl ObjectStore for Veiled {
    async fn put_opts(&self, key: &Key, payload: PutPayload, options: PutOptions) -> object_store::Result<PutResult> {
        self.inner.put_opts(key, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        key: &Key,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(key, options).await
    }

    async fn get_opts(&self, key: &Key, options: GetOptions) -> object_store::Result<GetResult> {
        self.inner.get_opts(key, options).await
    }

    fn delete_stream(
        &self,
        keys: BoxStream<'static, object_store::Result<Key>>,
    ) -> BoxStream<'static, object_store::Result<Key>> {
        self.inner.delete_stream(keys)
    }

    fn list(&self, prefix: Option<&Key>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let hidden = self.hidden.lock().clone();
        let shown = move |meta: &ObjectMeta| std::future::ready(!hidden.contains(&meta.location));
        self.inner.list(prefix).try_filter(shown).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Key>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Key, to: &Key, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// Random numbers from a seed.
struct Draw(u64);

impl Draw {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit.max(1)
    }

    /// True in so many of a hundred.
    fn hits(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// What an archiver reported: transactions up to the point's offset are archived, and this is what they are.
struct Acknowledged {
    point: DatabasePoint,
    commits: Vec<Arc<[u8]>>,
}

/// How a write ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Acknowledged,
    /// It took effect, and nobody was told.
    AnswerLost,
    /// It takes effect later, if at all.
    Late,
}

struct World {
    draw: Draw,
    clock: Arc<ModelClock>,
    veiled: Arc<Veiled>,
    work: Arc<Work>,
    dir: tempfile::TempDir,
    /// The server's log: the commits that it has now.
    log: Vec<Arc<[u8]>>,
    nonce: u64,
    /// What two archivers know of where they are.
    archivers: [Option<(TimelineId, ChainTip)>; 2],
    late: Vec<(Key, Bytes)>,
    acknowledged: Vec<Acknowledged>,
    restore_points: Vec<(RestorePointId, Acknowledged)>,
    history: Vec<String>,
}

impl World {
    async fn new(seed: u64) -> Self {
        let clock = Arc::new(ModelClock(Mutex::new("2026-01-01T00:00:00Z".parse().unwrap())));
        let veiled = Arc::new(Veiled { inner: object_store::memory::InMemory::new(), hidden: Mutex::default() });
        let store = Store::around(Arc::clone(&veiled) as _);
        let repository =
            Repository::open_or_create_in(store, "memory://", Keyring::default(), clock.as_ref()).await.unwrap();
        let work = Arc::new(Work {
            repository,
            clock: Arc::clone(&clock) as _,
            progress: Arc::new(Silent),
            tally: Arc::default(),
            level: 1,
            observer: Arc::new(Unobserved),
            witness: None,
        });
        let world = Self {
            draw: Draw(seed),
            clock,
            veiled,
            work,
            dir: tempfile::tempdir().unwrap(),
            log: Vec::new(),
            nonce: 0,
            archivers: [None, None],
            late: Vec::new(),
            acknowledged: Vec::new(),
            restore_points: Vec::new(),
            history: Vec::new(),
        };
        world.write_log();
        world
    }

    fn segment(&self) -> PathBuf {
        self.dir.path().join(segment_name(Offset(0)))
    }

    fn write_log(&self) {
        let header = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes();
        let mut file = std::fs::File::create(self.segment()).unwrap();
        file.write_all(&header).unwrap();
        file.write_all(&self.log.concat()).unwrap();
    }

    /// The server commits.
    fn commit(&mut self) {
        let mut file = std::fs::File::options().append(true).open(self.segment()).unwrap();
        for _ in 0..=self.draw.below(5) {
            self.nonce += 1;
            let records = [&[0], self.nonce.to_le_bytes().as_slice()].concat();
            let commit: Arc<[u8]> = encode(1, Offset(self.log.len() as u64), 0, 1, &records).into();
            file.write_all(&commit).unwrap();
            self.log.push(commit);
        }
    }

    /// The server lost its last commits in a power cut, or was restored to an earlier moment.
    fn go_back(&mut self) {
        let kept = self.draw.below(self.log.len() as u64 + 1).max(1) as usize;
        self.history.push(format!("the server goes back from {} to {kept}", self.log.len()));
        self.log.truncate(kept);
        self.write_log();
        self.commit();
        self.archivers = [None, None];
    }

    fn pass_time(&mut self, by: Duration) {
        let now = self.clock.now().checked_add(jiff::SignedDuration::try_from(by).unwrap()).unwrap();
        *self.clock.0.lock() = now;
    }

    /// One archiver writes some of what is new.
    async fn archive(&mut self, which: usize) {
        let hides = self.archivers[which].is_none() && self.draw.hits(15);
        if hides {
            self.hide().await;
        }
        let found = match self.archivers[which] {
            Some(known) => Some(known),
            None => {
                match find_continuation(&self.work, DATABASE, self.dir.path()).await {
                    Ok(found) => found.map(|found| (found.timeline, found.tip)),
                    // An incomplete listing can look like damage. It is tried again.
                    Err(_) if hides => None,
                    Err(error) => self.fail(&error.to_string()),
                }
            }
        };
        self.veiled.hidden.lock().clear();
        let Some((timeline, tip)) = found else { return };
        let from = tip.next.0 as usize;
        let waiting = self.log.len().saturating_sub(from);
        if waiting == 0 {
            self.archivers[which] = Some((timeline, tip));
            return;
        }
        let taken = 1 + self.draw.below(waiting as u64) as usize;
        let each = &self.log[from..from + taken];
        let time = Some(self.clock.now().as_microsecond());
        let batch = Batch {
            log_version: 1,
            first: Offset(from as u64),
            last: Offset((from + taken - 1) as u64),
            commits: taken as u64,
            times: Times { first: time, last: time, max: time },
            last_len: each.last().map_or(0, |commit| commit.len()),
        };
        let ending = match self.draw.below(10) {
            0 => Ending::AnswerLost,
            1 | 2 => Ending::Late,
            _ => Ending::Acknowledged,
        };
        self.archivers[which] = None;
        let (first, last) = (batch.first, batch.last);
        let commits = each.concat();
        self.history.push(format!(
            "archiver {which} writes {first} to {last} on {timeline}{}{}",
            ["", ", answer lost", ", late"][ending as usize],
            if hides { ", after an incomplete listing" } else { "" }
        ));
        if ending == Ending::Late {
            let after = tip.extend(&batch, &commits, Hashing::Plain);
            let archived_at = self.clock.now().as_microsecond();
            let content =
                LogContent { database: DATABASE, timeline, batch, before: tip, after, archived_at, commits: &commits };
            self.late.push((content.key(), content.encode(1, &self.work.repository.keys).unwrap().into()));
            return;
        }
        let Ok(after) = write_batch(&self.work, DATABASE, timeline, tip, batch, commits).await else { return };
        if ending == Ending::Acknowledged {
            self.archivers[which] = Some((timeline, after));
            let acknowledged = self.acknowledge(timeline, after);
            self.acknowledged.push(acknowledged);
        }
    }

    fn acknowledge(&self, timeline: TimelineId, tip: ChainTip) -> Acknowledged {
        let point = DatabasePoint {
            identity: DATABASE,
            name: "model".into(),
            owner: DATABASE,
            replica: 1,
            timeline,
            offset: Offset(tip.next.0 - 1),
            time: None,
            chain: tip.chain,
            history: Some(tip.history),
            initial_program: ContentHash([0; 32]),
        };
        Acknowledged { point, commits: self.log[..tip.next.0 as usize].to_vec() }
    }

    /// The next listings lack some of the newest objects.
    async fn hide(&mut self) {
        let folder = paths::timelines(&DATABASE);
        let mut logs: Vec<Key> =
            self.work.repository.list(&folder).await.unwrap().into_iter().map(|(key, _)| key).collect();
        logs.retain(|key| paths::parse_log(key).is_some());
        let hidden = self.draw.below(logs.len() as u64 + 1) as usize;
        logs.sort_by_key(paths::parse_log);
        self.veiled.hidden.lock().extend(logs.into_iter().rev().take(hidden));
    }

    /// A late write takes effect, and perhaps once more later.
    async fn arrive(&mut self) {
        if self.late.is_empty() {
            return;
        }
        let index = self.draw.below(self.late.len() as u64) as usize;
        let (key, bytes) = match self.draw.hits(20) {
            true => self.late[index].clone(),
            false => self.late.swap_remove(index),
        };
        self.history.push(format!("{key} arrives"));
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let _ = self.veiled.put_opts(&key, bytes.into(), options).await;
    }

    async fn compact(&mut self) {
        self.history.push("compaction".into());
        for timeline in self.work.repository.timelines(&DATABASE).await.unwrap() {
            pass(&self.work, DATABASE, timeline.timeline, GRACE).await.unwrap();
        }
    }

    /// Of an archiver that has just reported, a restore point is made.
    async fn restore_point(&mut self) {
        self.leave_old_timelines().await;
        let Some((timeline, tip)) = self.archivers[0].filter(|(_, tip)| tip.next.0 as usize <= self.log.len()) else {
            return;
        };
        if tip.next.0 == 0 {
            return;
        }
        let acknowledged = self.acknowledge(timeline, tip);
        let id = RestorePointId::after(self.restore_points.last().map(|(id, _)| *id), self.clock.now());
        let point = RestorePoint {
            format: FORMAT,
            id,
            label: None,
            created_at: self.clock.now(),
            server_version: None,
            tool_version: "0".into(),
            instance: ContentHash([0; 32]),
            instance_state: ContentHash([0; 32]),
            promises: Vec::new(),
            sealed_promises: None,
            has_keys: false,
            databases: vec![acknowledged.point.clone()],
        };
        let instance = paths::instance(point.instance);
        let _ = self.work.repository.put(&instance, Bytes::from_static(b"instance")).await;
        self.work.repository.put_restore_point(&point).await.unwrap();
        self.history.push(format!("restore point at {} on {timeline}", acknowledged.point.offset));
        self.restore_points.push((id, acknowledged));
    }

    /// Before a restore point is made or objects are removed: has another writer begun a newer timeline?
    async fn leave_old_timelines(&mut self) {
        let timelines = self.work.repository.timelines(&DATABASE).await.unwrap();
        let newest = timelines.last().map(|newest| newest.timeline);
        for archiver in &mut self.archivers {
            *archiver = archiver.filter(|(timeline, _)| Some(*timeline) == newest);
        }
    }

    /// Retention keeps two restore points. What nothing keeps is not promised any more.
    async fn prune(&mut self) {
        if self.restore_points.is_empty() {
            return;
        }
        self.leave_old_timelines().await;
        let policy = Policy { last: 2, ..Policy::default() };
        let grace = Duration::from_secs(60);
        for _ in 0..2 {
            let repository = &self.work.repository;
            let planned = plan(repository, &policy, grace, self.clock.now()).await.unwrap();
            apply(repository, &planned, self.clock.as_ref())
                .await
                .unwrap_or_else(|error| self.fail(&error.to_string()));
            self.pass_time(grace);
        }
        let kept: BTreeSet<_> = self.work.repository.restore_point_ids().await.unwrap().into_iter().collect();
        self.restore_points.retain(|(id, _)| kept.contains(id));
        self.history.push("prune".into());
        // Of the current timeline, what was reported stays promised from the newest restore point on; others end with their last.
        let timelines = self.work.repository.timelines(&DATABASE).await.unwrap();
        let current = timelines.last().map(|timeline| timeline.timeline);
        let newest =
            self.restore_points.iter().map(|(_, found)| &found.point).filter(|point| Some(point.timeline) == current);
        let newest = newest.map(|point| point.offset).max();
        self.acknowledged.retain(|found| {
            Some(found.point.timeline) == current && newest.is_none_or(|newest| found.point.offset >= newest)
        });
    }

    fn fail(&self, what: &str) -> ! {
        panic!("{what}\n{}", self.history.join("\n"));
    }

    async fn step(&mut self) {
        self.pass_time(Duration::from_secs(1));
        match self.draw.below(100) {
            0..40 => self.commit(),
            40..66 => self.archive(0).await,
            66..72 => self.archive(1).await,
            72..80 => self.arrive().await,
            80..86 => self.compact().await,
            86..90 => self.pass_time(GRACE),
            90..92 => self.archivers = [None, None],
            92..94 => self.go_back(),
            94..99 => self.restore_point().await,
            _ => self.prune().await,
        }
    }

    /// Everything that was reported archived can be read back.
    async fn check(&self) {
        // Of each timeline the last that was reported holds all before.
        let mut last: BTreeMap<TimelineId, &Acknowledged> = BTreeMap::new();
        for found in &self.acknowledged {
            let held = last.entry(found.point.timeline).or_insert(found);
            if held.point.offset <= found.point.offset {
                *held = found;
            }
        }
        let points = self.restore_points.iter().map(|(_, found)| found);
        for found in last.into_values().chain(points) {
            // As a restore does: names first, and the headers of all objects where these mislead.
            let Err(first) = self.read(found, false).await else { continue };
            if let Err(error) = self.read(found, true).await {
                let point = &found.point;
                self.fail(&format!("timeline {} up to {}: {first}; {error}", point.timeline, point.offset));
            }
        }
    }

    async fn read(&self, found: &Acknowledged, every_joint: bool) -> Result<(), String> {
        let (repository, point) = (&self.work.repository, &found.point);
        let timelines = repository.timelines(&DATABASE).await.unwrap();
        let choice = ChainChoice { every_joint, ..ChainChoice::default() };
        let chain = repository.log_chain_by(&DATABASE, &timelines, point.timeline, &choice).await.unwrap();
        let chain = match repository.prove(point, &chain).await {
            Ok(Proof::Holds) => chain,
            Ok(Proof::HoldsThrough(entries)) => chain.through(&entries, point.offset),
            other => return Err(format!("{other:?}")),
        };
        let start = chain.piece_start(point.offset).unwrap_or(point.offset);
        let entries = chain.unbroken(start, point.offset).ok_or("it lies in a hole")?;
        let entries: Vec<_> = entries.iter().map(|entry| entry.within(start, point.offset)).collect();
        let ranges = |entries: &[LogEntry]| -> Vec<_> {
            entries.iter().map(|entry| (entry.level, entry.first.0, entry.last.0)).collect()
        };
        let used = ranges(&entries);
        match read_all(repository, DATABASE, entries).await {
            Ok(read) if read == found.commits[start.0 as usize..].concat() => Ok(()),
            Ok(_) => Err(format!("other commits, read from {used:?}")),
            Err(error) => {
                let all = repository.log_entries(&DATABASE, point.timeline).await.unwrap();
                Err(format!("{error}: {used:?} of {:?}", ranges(&all)))
            }
        }
    }
}

/// So many random steps, in worlds of a hundred.
async fn run(seed: u64, steps: u64) {
    for world in 0..steps / 100 {
        let seed = seed.wrapping_add(world);
        let checked = tokio::spawn(async move {
            let mut world = World::new(seed).await;
            for step in 0..100 {
                world.step().await;
                if step % 25 == 24 {
                    world.check().await;
                }
            }
        });
        if let Err(error) = checked.await {
            panic!("seed {seed}: {error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_was_reported_archived_can_be_read() {
    let all = std::env::var_os("INNER_UNIVERSE_TEST_ALL").is_some();
    let given = std::env::var("INNER_UNIVERSE_MODEL").ok().and_then(|text| {
        let (seed, steps) = text.split_once(':')?;
        Some((seed.parse().ok()?, steps.parse().ok()?))
    });
    let (seed, steps) = given.unwrap_or((20_261_127, if all { 2_000_000 } else { 20_000 }));
    run(seed, steps).await;
}
