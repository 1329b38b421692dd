//! Retention keeps what a model of it keeps, through a year of hours, and every kept restore point stays restorable, also
//! when a prune dies at any of its steps.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use harness::faulty::{DiesAt, FaultyStore, Moment, Operation, Script};
use harness::synthetic::record;
use harness::tools;
use harness::workload::Random;
use inner_universe::clock::Clock;
use inner_universe::datadir::commit::{Frame, encode};
use inner_universe::datadir::log::{Batch, Times};
use inner_universe::ids::{ContentHash, Identity, Offset, RestorePointId, TimelineId};
use inner_universe::progress::Silent;
use inner_universe::repository::crypto::Keyring;
use inner_universe::repository::hashing::Hashing;
use inner_universe::repository::log_object::{ChainTip, LogContent};
use inner_universe::repository::manifest::{
    DatabasePoint, FORMAT, PackUse, RestorePoint, SnapshotManifest, Timeline, TimelineReason,
};
use inner_universe::repository::pack::{self, EntryKind, PackBuilder};
use inner_universe::repository::store::Store;
use inner_universe::repository::{Repository, paths};
use inner_universe::restore::plan::{RestoreRequest, plan};
use inner_universe::restore::target::Target;
use inner_universe::retention::policy::Policy;
use inner_universe::retention::{self, PruneReport};
use inner_universe::verify::{VerifyOptions, verify};
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use object_store::memory::InMemory;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt as _};

const DATABASE: Identity = Identity([1; 32]);
const HOUR: SignedDuration = SignedDuration::from_hours(1);
const GRACE: Duration = Duration::from_secs(24 * 3600);

struct TestClock(Mutex<Timestamp>);

impl TestClock {
    fn pass(&self, time: SignedDuration) {
        let mut now = self.0.lock().expect("the clock");
        *now = now.checked_add(time).expect("a time");
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        *self.0.lock().expect("the clock")
    }

    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        std::future::ready(()).boxed()
    }
}

/// A repository that grows by the hour: a commit, a restore point, and every sixth hour a snapshot.
struct Life {
    clock: TestClock,
    objects: Arc<InMemory>,
    repository: Repository,
    tip: ChainTip,
    hour: u64,
    points: Vec<(RestorePointId, Timestamp, Offset)>,
    shared: ContentHash,
}

impl Life {
    async fn begin() -> Self {
        let clock = TestClock(Mutex::new("2026-01-01T00:00:00Z".parse().expect("a time")));
        let objects = Arc::new(InMemory::new());
        let repository = open(Arc::clone(&objects) as Arc<dyn ObjectStore>, &clock).await;
        let timeline = Timeline {
            timeline: TimelineId::FIRST,
            parent: None,
            fork_offset: None,
            start: Offset(0),
            reason: TimelineReason::First,
            created_at: clock.now(),
        };
        repository.put_timeline(&DATABASE, &timeline).await.expect("a timeline");
        let tip = ChainTip::origin(&DATABASE, Offset(0));
        let mut life =
            Self { clock, objects, repository, tip, hour: 0, points: Vec::new(), shared: ContentHash([0; 32]) };
        life.shared = life.pack(b"pages that never change").await.0;
        life
    }

    async fn pack(&self, content: &[u8]) -> (ContentHash, u64, ContentHash) {
        let mut builder = PackBuilder::default();
        let entry = ContentHash::of(content);
        builder.add(entry, EntryKind::Manifest, content);
        let (id, bytes) = builder.finish(1, &Keyring::default()).expect("a pack");
        let len = bytes.len() as u64;
        self.repository.put_pack(&DATABASE, id, bytes.into()).await.expect("a pack");
        (id, len, entry)
    }

    async fn hour(&mut self) {
        self.clock.pass(HOUR);
        let (now, offset) = (self.clock.now(), Offset(self.hour));
        let micros = now.as_microsecond();
        let commits = encode(1, offset, 0, 1, &record(micros, b"what an hour brings"));
        let times = Times { first: Some(micros), last: Some(micros), max: Some(micros) };
        let batch = Batch { log_version: 1, first: offset, last: offset, commits: 1, times, last_len: commits.len() };
        let after = self.tip.extend(&batch, &commits, Hashing::Plain);
        let content = LogContent {
            database: DATABASE,
            timeline: TimelineId::FIRST,
            batch,
            before: self.tip,
            after,
            archived_at: micros,
            commits: &commits,
        };
        let bytes = content.encode(1, &Keyring::default()).expect("a log object");
        self.repository.put(&content.key(), bytes.into()).await.expect("a log object");
        self.tip = after;
        if self.hour % 6 == 5 {
            let (own, own_len, native) = self.pack(format!("pages of hour {}", self.hour).as_bytes()).await;
            let (shared, shared_len, entry) = self.pack(b"pages that never change").await;
            let packs = vec![
                PackUse { pack: own, stored_bytes: own_len, entries: vec![native] },
                PackUse { pack: shared, stored_bytes: shared_len, entries: vec![entry] },
            ];
            let manifest = SnapshotManifest {
                format: FORMAT,
                identity: DATABASE,
                timeline: TimelineId::FIRST,
                offset,
                replica: 1,
                native_manifest: native,
                raw_bytes: 1,
                history: None,
                packs,
            };
            self.repository.put_snapshot(&manifest).await.expect("a snapshot");
        }
        // The instance changes once a week.
        let instance = format!("instance of week {}", self.hour / 168);
        let id = ContentHash::of(instance.as_bytes());
        self.repository.put(&paths::instance(id), instance.into_bytes().into()).await.expect("an instance");
        let point = RestorePoint {
            format: FORMAT,
            id: RestorePointId(ulid::Ulid::from_parts(now.as_millisecond() as u64, u128::from(self.hour))),
            label: None,
            created_at: now,
            server_version: None,
            tool_version: String::new(),
            instance: id,
            instance_state: id,
            has_keys: false,
            promises: Vec::new(),
            sealed_promises: None,
            databases: vec![DatabasePoint {
                identity: DATABASE,
                name: "hours".into(),
                owner: Identity([2; 32]),
                replica: 1,
                timeline: TimelineId::FIRST,
                offset,
                time: Some(now),
                chain: self.tip.chain,
                history: Some(self.tip.history),
                initial_program: ContentHash([3; 32]),
            }],
        };
        self.repository.put_restore_point(&point).await.expect("a restore point");
        self.points.push((point.id, now, offset));
        self.hour += 1;
    }

    async fn prune(&self, repository: &Repository) -> Result<PruneReport, retention::RetentionError> {
        let plan = retention::plan(repository, &policy(), GRACE, self.clock.now()).await?;
        retention::apply(repository, &plan, &self.clock).await
    }

    /// The restore points whose documents are there.
    async fn present(&self) -> BTreeSet<RestorePointId> {
        self.repository.restore_point_ids().await.expect("ids").into_iter().collect()
    }

    /// Reads all that a restore reads, and checks each byte of it.
    async fn can_restore(&self, target: Target, expected: Offset) {
        let request = RestoreRequest { target: target.clone(), ..RestoreRequest::default() };
        let plan = plan(&self.repository, &request).await.unwrap_or_else(|error| panic!("{target}: {error}"));
        let database = &plan.databases[0];
        assert_eq!(database.offset, expected, "{target}");
        self.repository.get(&paths::instance(plan.instance.instance)).await.expect("the instance");
        for used in database.snapshot.iter().flat_map(|snapshot| &snapshot.packs) {
            let bytes = self.repository.get(&paths::pack(&DATABASE, used.pack)).await.expect("a pack");
            pack::check(&used.pack, &bytes).expect("a whole pack");
        }
        let mut next = database.log_from.0;
        for entry in &database.log {
            let open = self.repository.open_log(entry).await.expect("a log object");
            let stored = self.repository.log_part(&open, 0).await.expect("its part");
            let commits = open.header.decode_part(&open.key, 0, &stored, &Keyring::default()).expect("its commits");
            let Frame::Commit(commit) = Frame::parse(1, &commits) else { panic!("no commit in {}", open.key) };
            assert_eq!(commit.first, Offset(next));
            next += 1;
        }
        assert_eq!(next, expected.0 + 1, "{target}");
    }
}

async fn open(objects: Arc<dyn ObjectStore>, clock: &TestClock) -> Repository {
    let store = Store::around(objects);
    Repository::open_or_create_in(store, "memory://", Keyring::default(), clock).await.expect("a repository")
}

fn policy() -> Policy {
    Policy {
        last: 3,
        hourly: 12,
        daily: 10,
        weekly: 6,
        monthly: 8,
        yearly: 2,
        window: SignedDuration::from_hours(7 * 24),
        minimum: 1,
        zone: chrono_tz::UTC,
    }
}

/// What is to be kept, worked out another way: period by period from the calendar, over all restore points there ever were.
fn model(points: &[(RestorePointId, Timestamp, Offset)], now: Timestamp) -> BTreeSet<RestorePointId> {
    let civil = |at: Timestamp| -> DateTime { at.to_zoned(TimeZone::UTC).datetime() };
    let mut kept: BTreeSet<RestorePointId> = points.iter().rev().take(3).map(|point| point.0).collect();
    let rules: [(usize, &dyn Fn(DateTime) -> String); 5] = [
        (12, &|at| at.strftime("%Y-%m-%d %H").to_string()),
        (10, &|at| at.strftime("%Y-%m-%d").to_string()),
        (6, &|at| at.strftime("%G-%V").to_string()),
        (8, &|at| at.strftime("%Y-%m").to_string()),
        (2, &|at| at.strftime("%Y").to_string()),
    ];
    for (count, name) in rules {
        let mut last_of: BTreeMap<String, RestorePointId> = BTreeMap::new();
        for (id, at, _) in points {
            last_of.insert(name(civil(*at)), *id);
        }
        kept.extend(last_of.into_values().rev().take(count));
    }
    let start = now.checked_sub(SignedDuration::from_hours(7 * 24)).expect("a time");
    kept.extend(points.iter().filter(|point| point.1 > start).map(|point| point.0));
    kept.extend(points.iter().rev().find(|point| point.1 <= start).map(|point| point.0));
    kept
}

#[tokio::test(flavor = "multi_thread")]
async fn a_year_of_hourly_restore_points_is_kept_as_a_model_of_retention_says() {
    let days = if tools::all() { 365 } else { 75 };
    let mut random = Random::from_env();
    let mut life = Life::begin().await;
    let mut expected_present: BTreeSet<RestorePointId> = BTreeSet::new();
    let mut marked: BTreeMap<RestorePointId, Timestamp> = BTreeMap::new();
    for _ in 0..days {
        for _ in 0..24 {
            life.hour().await;
        }
        expected_present.extend(life.points.iter().rev().take(24).map(|point| point.0));
        let report = life.prune(&life.repository).await.expect("a prune");
        // The model only knows what was there: what is gone cannot come back.
        let there: Vec<_> = life.points.iter().filter(|point| expected_present.contains(&point.0)).copied().collect();
        let kept = model(&there, life.clock.now());
        let told: BTreeSet<_> = report.kept.iter().map(|point| point.id).collect();
        assert_eq!(told, kept, "hour {}", life.hour);
        marked.retain(|id, _| !kept.contains(id));
        for id in expected_present.difference(&kept) {
            marked.entry(*id).or_insert(life.clock.now());
        }
        let over = |since: &Timestamp| life.clock.now().duration_since(*since) >= SignedDuration::from_hours(24);
        for id in marked.iter().filter(|(_, since)| over(since)).map(|(id, _)| *id).collect::<Vec<_>>() {
            expected_present.remove(&id);
            marked.remove(&id);
        }
        assert_eq!(life.present().await, expected_present, "hour {}", life.hour);
        assert_eq!(report.problems, Vec::<String>::new());

        let kept: Vec<_> = there.iter().filter(|point| kept.contains(&point.0)).collect();
        let (id, _, offset) = kept[random.below(kept.len() as u64) as usize];
        life.can_restore(Target::Point(*id), *offset).await;
        life.can_restore(Target::Latest, Offset(life.hour - 1)).await;
        // Any moment of the window.
        let back = random.below(life.hour.min(7 * 24));
        let at = life.clock.now().checked_sub(SignedDuration::from_secs((back * 3600) as i64 - 1)).expect("a time");
        life.can_restore(Target::Time(at), Offset(life.hour - 1 - back)).await;
    }
    let options = VerifyOptions { read_data: 0, ..VerifyOptions::default() };
    let found = verify(&life.repository, &options, Arc::new(Silent)).await.expect("verify");
    assert_eq!((found.lost.as_slice(), found.orphans.as_slice()), (&[][..], &[][..]));
    let logs = life.repository.log_entries(&DATABASE, TimelineId::FIRST).await.expect("entries").len();
    println!("{} restore points and {logs} log objects are left of {}", life.present().await.len(), life.hour);
    assert!(logs < 9 * 24 + 40 * 6 + 24, "{logs} log objects are left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prune_that_dies_at_any_step_leaves_every_kept_restore_point_whole_and_the_next_one_ends_it() {
    let mut life = Life::begin().await;
    for _ in 0..24 * 20 {
        life.hour().await;
    }
    life.prune(&life.repository).await.expect("the first prune marks");
    for _ in 0..30 {
        life.hour().await;
    }
    let snapshot = |objects: &Arc<InMemory>| {
        let objects = Arc::clone(objects);
        async move { Arc::new(objects.fork()) }
    };
    let before = snapshot(&life.objects).await;
    let kept: Vec<_> = {
        let kept = model(&life.points, life.clock.now());
        life.points.iter().filter(|point| kept.contains(&point.0)).copied().collect()
    };
    let (mut step, mut deaths) = (0, 0);
    loop {
        for moment in [Moment::Before, Moment::After] {
            let objects = snapshot(&before).await;
            let script = Arc::new(DiesAt::new(step, moment));
            let faulty = Arc::new(FaultyStore::new(Arc::clone(&objects) as Arc<dyn ObjectStore>, script.clone()));
            // Opened in advance: its probe of the store is no step of the prune.
            let repository = Repository::open_in(Store::around(faulty), "memory://", Keyring::default()).await;
            let result = life.prune(&repository.expect("a repository")).await;
            life.repository = open(Arc::clone(&objects) as Arc<dyn ObjectStore>, &life.clock).await;
            if result.is_ok() {
                assert!(step > 100, "only {step} steps");
                println!("{deaths} deaths in {step} steps");
                return;
            }
            deaths += 1;
            for (id, _, offset) in kept.iter().rev().step_by(1 + kept.len() / 12) {
                life.can_restore(Target::Point(*id), *offset).await;
            }
            // The next run ends it, and all are whole after that too.
            life.prune(&life.repository).await.expect("a prune after a death");
            let present = life.present().await;
            assert!(kept.iter().all(|point| present.contains(&point.0)), "step {step}");
            let listed = life.repository.list(&Key::default()).await.expect("a listing");
            let retentions = listed.iter().filter(|(key, _)| key.as_ref().starts_with("retention/")).count();
            assert_eq!(retentions, 2, "step {step}: the newest, and the one before");
        }
        // The first steps each, later ones of a kind in larger strides.
        step += if tools::all() || step < 12 { 1 } else { 1 + step / 6 };
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_removed_while_a_kept_restore_point_is_broken_or_nothing_says_what_to_keep() {
    let mut life = Life::begin().await;
    for _ in 0..24 * 12 {
        life.hour().await;
    }
    let nothing = Policy::default();
    let refused = retention::plan(&life.repository, &nothing, GRACE, life.clock.now()).await.expect_err("no policy");
    assert!(refused.to_string().contains("everything is kept"), "{refused}");
    life.prune(&life.repository).await.expect("marks");
    for _ in 0..25 {
        life.hour().await;
    }
    let entries = life.repository.log_entries(&DATABASE, TimelineId::FIRST).await.expect("entries");
    // One that a kept restore point needs, in the window.
    let lost = &entries[entries.len() - 3];
    life.objects.delete(&lost.key()).await.expect("to delete");
    let before = life.repository.list(&Key::default()).await.expect("a listing");
    let refused = life.prune(&life.repository).await.expect_err("broken restore points");
    assert!(refused.to_string().starts_with("nothing was removed: restore point"), "{refused}");
    assert_eq!(life.repository.list(&Key::default()).await.expect("a listing"), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_keeps_a_restore_point_and_one_that_is_set_in_the_grace_period_takes_it_back() {
    let mut life = Life::begin().await;
    for _ in 0..24 * 12 {
        life.hour().await;
    }
    let (early, early_offset) = (life.points[30].0, life.points[30].2);
    let report = life.prune(&life.repository).await.expect("marks");
    assert!(report.removed.iter().any(|point| point.id == early) && report.deleted.objects == 0, "{report:?}");
    life.repository.pin(early, life.clock.now()).await.expect("a pin");
    for _ in 0..48 {
        life.hour().await;
    }
    let report = life.prune(&life.repository).await.expect("a prune");
    assert!(report.deleted.objects > 100, "{report:?}");
    life.can_restore(Target::Point(early), early_offset).await;
    life.repository.unpin(early).await.expect("to unpin");
    life.prune(&life.repository).await.expect("marks");
    life.clock.pass(HOUR * 25);
    life.prune(&life.repository).await.expect("a prune");
    assert!(!life.present().await.contains(&early));
}

/// Deletes of restore points are refused, as a bucket with object lock does for the youngest objects.
struct Locks;

impl Script for Locks {
    fn next(&self, operation: Operation, key: Option<&Key>) -> Option<Moment> {
        let is_point = key.is_some_and(|key| key.as_ref().starts_with("restore-points/"));
        (operation == Operation::Delete && is_point).then_some(Moment::Refused)
    }
}

async fn aged() -> Life {
    let mut life = Life::begin().await;
    for _ in 0..24 * 12 {
        life.hour().await;
    }
    life.prune(&life.repository).await.expect("marks");
    for _ in 0..25 {
        life.hour().await;
    }
    life
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_point_that_the_store_keeps_keeps_what_it_names() {
    let life = aged().await;
    let faulty = Arc::new(FaultyStore::new(Arc::clone(&life.objects) as Arc<dyn ObjectStore>, Arc::new(Locks)));
    let locked =
        Repository::open_in(Store::around(faulty), "memory://", Keyring::default()).await.expect("a repository");
    let before = life.present().await;
    let report = life.prune(&locked).await.expect("a prune");
    assert!(!report.refused.is_empty() && report.deleted.objects == 0, "{:?}", report.deleted);
    assert_eq!(life.present().await, before);
    for (id, _, offset) in life.points.iter().filter(|point| before.contains(&point.0)).step_by(9) {
        life.can_restore(Target::Point(*id), *offset).await;
    }
    // Without the lock, the next one ends it.
    assert!(life.prune(&life.repository).await.expect("a prune").deleted.objects > 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_between_plan_and_prune_stops_it() {
    let life = aged().await;
    let plan = retention::plan(&life.repository, &policy(), GRACE, life.clock.now()).await.expect("a plan");
    let going = plan.removed.first().expect("one that goes").id;
    life.repository.pin(going, life.clock.now()).await.expect("a pin");
    let before = life.present().await;
    let refused = retention::apply(&life.repository, &plan, &life.clock).await.expect_err("pinned in between");
    assert!(refused.to_string().contains("was pinned during the prune"), "{refused}");
    assert_eq!(life.present().await, before);
    life.prune(&life.repository).await.expect("a prune");
    assert!(life.present().await.contains(&going));
}

/// Does something before the request of a number, or of none if there are fewer.
struct Between<F> {
    at: u64,
    done: AtomicU64,
    act: F,
}

impl<F> Between<F> {
    fn new(at: u64, act: F) -> Arc<Self> {
        Arc::new(Self { at, done: AtomicU64::new(0), act })
    }

    fn is_over(&self) -> bool {
        self.done.load(Ordering::SeqCst) > self.at
    }
}

impl<F: Fn() + Send + Sync> Script for Between<F> {
    fn next(&self, _: Operation, _: Option<&Key>) -> Option<Moment> {
        if self.done.fetch_add(1, Ordering::SeqCst) == self.at {
            (self.act)();
        }
        None
    }
}

fn wait_for<T>(work: impl Future<Output = T>) -> T {
    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work))
}

async fn through(objects: &Arc<InMemory>, script: Arc<dyn Script>) -> Repository {
    let store = FaultyStore::new(Arc::clone(objects) as Arc<dyn ObjectStore>, script);
    Repository::open_in(Store::around(Arc::new(store)), "memory://", Keyring::default()).await.expect("a repository")
}

/// Three restore points, of which one is about to be deleted.
async fn about_to_prune() -> (Life, RestorePointId) {
    let mut life = Life::begin().await;
    for _ in 0..3 {
        life.hour().await;
    }
    let plan = retention::plan(&life.repository, &newest_two(), GRACE, life.clock.now()).await.expect("a plan");
    let going = plan.removed.first().expect("one that goes").id;
    retention::apply(&life.repository, &plan, &life.clock).await.expect("marks");
    life.clock.pass(HOUR * 25);
    (life, going)
}

fn newest_two() -> Policy {
    Policy { last: 2, minimum: 1, ..Policy::default() }
}

/// A pin that is reported set is kept; if its restore point is gone, that is reported.
async fn pin_holds(life: &Life, going: RestorePointId, pinned: Result<(), retention::RetentionError>, at: u64) {
    let is_there = life.present().await.contains(&going);
    assert!(pinned.is_err() || is_there, "request {at}: the pin was reported set and its restore point is gone");
    if is_there {
        let offset = life.points.iter().find(|point| point.0 == going).expect("its offset").2;
        life.can_restore(Target::Point(going), offset).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_at_any_step_of_a_prune_holds_or_reports_that_it_does_not() {
    let (mut kept, mut lost) = (0, 0);
    for at in 0.. {
        let (life, going) = about_to_prune().await;
        let pinned = Arc::new(Mutex::new(None));
        let (repository, now) = (life.repository.clone(), life.clock.now());
        let act = {
            let pinned = Arc::clone(&pinned);
            move || *pinned.lock().expect("a lock") = Some(wait_for(retention::pins::pin(&repository, going, now)))
        };
        let script = Between::new(at, act);
        let between = through(&life.objects, Arc::clone(&script) as Arc<dyn Script>).await;
        let plan = retention::plan(&between, &newest_two(), GRACE, now).await.expect("a plan");
        let _ = retention::apply(&between, &plan, &life.clock).await;
        let pinned = pinned.lock().expect("a lock").take();
        if let Some(pinned) = pinned {
            if pinned.is_ok() {
                kept += 1
            } else {
                lost += 1
            }
            pin_holds(&life, going, pinned, at).await;
        }
        if !script.is_over() {
            break;
        }
    }
    assert!(kept > 5 && lost > 1, "{kept} pins in time, {lost} too late");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prune_at_any_step_of_a_pin_leaves_it_true() {
    let (mut kept, mut lost) = (0, 0);
    for at in 0.. {
        let (life, going) = about_to_prune().await;
        let (repository, now) = (life.repository.clone(), life.clock.now());
        let act = move || {
            wait_for(async {
                let plan = retention::plan(&repository, &newest_two(), GRACE, now).await.expect("a plan");
                let _ = retention::apply(&repository, &plan, &TestClock(Mutex::new(now))).await;
            });
        };
        let script = Between::new(at, act);
        let between = through(&life.objects, Arc::clone(&script) as Arc<dyn Script>).await;
        let pinned = retention::pins::pin(&between, going, now).await;
        if pinned.is_ok() {
            kept += 1
        } else {
            lost += 1
        }
        pin_holds(&life, going, pinned, at).await;
        if !script.is_over() {
            break;
        }
    }
    assert!(kept > 2 && lost > 1, "{kept} pins in time, {lost} too late");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_of_what_cannot_be_restored_is_reported() {
    let mut life = Life::begin().await;
    life.hour().await;
    life.hour().await;
    let log = paths::log(&DATABASE, TimelineId::FIRST, 0, Offset(0), Offset(0));
    life.objects.delete(&log).await.expect("delete");
    let refused = retention::pins::pin(&life.repository, life.points[1].0, life.clock.now()).await.expect_err("broken");
    assert!(refused.to_string().contains("is pinned and cannot be restored"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_far_ahead_removes_nothing() {
    let life = aged().await;
    let documents = async || life.repository.list(&paths::retentions()).await.expect("a listing");
    let before = (life.present().await, documents().await);
    life.clock.pass(HOUR * 24 * 400);
    for _ in 0..2 {
        let refused = life.prune(&life.repository).await.expect_err("the clock").to_string();
        assert!(refused.contains("the clock is in doubt") && refused.contains("--trust-clock"), "{refused}");
        life.clock.pass(HOUR * 25);
    }
    assert_eq!((life.present().await, documents().await), before);
    let plan = retention::plan(&life.repository, &policy(), GRACE, life.clock.now()).await.expect("a plan");
    assert!(plan.report().clock_doubt.is_some_and(|doubt| doubt.contains("402 days")), "{:?}", plan.report());
    // The operator knows better, and then it is believed.
    retention::apply(&life.repository, &plan.trusting_clock(true), &life.clock).await.expect("marks");
    life.clock.pass(HOUR * 25);
    assert!(life.prune(&life.repository).await.expect("a prune").deleted.objects > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_the_store_contradicts_removes_nothing() {
    let life = aged().await;
    let before = life.present().await;
    // The store stamps what is written by its own clock, which is not that of the test.
    life.objects.put(&paths::lease(), "{}".into()).await.expect("a lease");
    let refused = life.prune(&life.repository).await.expect_err("the clock").to_string();
    assert!(refused.contains("this machine's clock says 2026-01-14T01:00:00Z where the store's says"), "{refused}");
    assert_eq!(life.present().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_alone_proves_nothing() {
    let life = aged().await;
    let listed = life.repository.list(&Key::default()).await.expect("a listing");
    let keys = |part: &str| -> Vec<Key> {
        listed.iter().map(|(key, _)| key.clone()).filter(|key| key.as_ref().contains(part)).collect()
    };
    let prune = async || life.prune(&life.repository).await.expect_err("not proven").to_string();
    let put = async |key: &Key, bytes: Vec<u8>| {
        life.objects.put(key, bytes.into()).await.expect("put");
    };
    let get = async |key: &Key| life.objects.get(key).await.expect("get").bytes().await.expect("bytes").to_vec();
    // A log object that was cut off, one that is another's bytes, and one that is not there at all.
    let logs = keys("/log/");
    let (victim, other) = (&logs[logs.len() - 5], &logs[logs.len() - 9]);
    let good = get(victim).await;
    for bad in [good[..good.len() / 2].to_vec(), get(other).await, Vec::new()] {
        put(victim, bad).await;
        let said = prune().await;
        assert!(said.starts_with("nothing was removed"), "{said}");
    }
    put(victim, good).await;
    // A timeline that is gone with its whole folder, and a database.
    for part in ["/timelines/", "databases/"] {
        let objects = Arc::new(life.objects.fork());
        for key in keys(part) {
            objects.delete(&key).await.expect("delete");
        }
        let repository = open(objects as Arc<dyn ObjectStore>, &life.clock).await;
        let said = life.prune(&repository).await.expect_err("not proven").to_string();
        assert!(said.contains("is missing") || said.contains("cannot be reached"), "{said}");
    }
    // A snapshot whose pack was cut off is none: what an older one needs stays.
    let snapshots = keys("/snapshots/");
    let newest = snapshots.last().expect("a snapshot");
    let (older, manifest) = (
        &snapshots[snapshots.len() - 2],
        life.repository.snapshot(&DATABASE, TimelineId::FIRST, paths::parse_snapshot(newest).expect("an offset")).await,
    );
    let pack = paths::pack(&DATABASE, manifest.expect("a manifest").packs[0].pack);
    let whole = get(&pack).await;
    put(&pack, whole[..10].to_vec()).await;
    let only_newest = Policy { last: 1, ..Policy::default() };
    let plan = retention::plan(&life.repository, &only_newest, GRACE, life.clock.now()).await.expect("a plan");
    assert!(plan.unneeded.iter().all(|marked| marked.object != older.as_ref()), "{older} is needed now");
    put(&pack, whole).await;
    let plan = retention::plan(&life.repository, &only_newest, GRACE, life.clock.now()).await.expect("a plan");
    assert!(plan.unneeded.iter().any(|marked| marked.object == older.as_ref()), "{older} is needed no more");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_retention_did_is_known_from_the_document_before_and_reads_go_on_without_either() {
    let life = aged().await;
    life.prune(&life.repository).await.expect("a prune");
    let kept: Vec<_> = life
        .points
        .iter()
        .filter(|point| point.1 > life.clock.now().checked_sub(HOUR * 100).expect("a time"))
        .collect();
    let documents: Vec<Key> =
        life.repository.list(&paths::retentions()).await.expect("a listing").into_iter().map(|(key, _)| key).collect();
    assert_eq!(documents.len(), 2);
    for key in documents.iter().rev() {
        life.objects.put(key, b"{}".to_vec().into()).await.expect("damage");
        life.can_restore(Target::Point(kept[3].0), kept[3].2).await;
        life.can_restore(Target::Latest, Offset(life.hour - 1)).await;
    }
    // A prune must know.
    assert!(life.prune(&life.repository).await.is_err());
}
