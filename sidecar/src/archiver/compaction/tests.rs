//! Compaction on a store in memory, with a clock that the test moves.

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;

use super::*;
use crate::backup::Unobserved;
use crate::backup::log::write_batch;
use crate::clock::Clock;
use crate::datadir::commit::{Frame, encode};
use crate::datadir::log::{Batch, Times};
use crate::ids::Offset;
use crate::progress::Silent;
use crate::repository::Repository;
use crate::repository::crypto::Keyring;
use crate::repository::log_object::ChainTip;
use crate::repository::manifest::{DatabasePoint, RestorePoint, Timeline, TimelineReason};
use crate::repository::proof::Proof;
use crate::repository::store::Store;
use crate::restore::plan::{RestoreRequest, plan};
use crate::restore::target::Target;
use crate::verify::{VerifyOptions, verify};

/// A clock that only the test moves.
struct TestClock(Mutex<Timestamp>);

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        *self.0.lock()
    }

    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        std::future::ready(()).boxed()
    }
}

const DATABASE: Identity = Identity([1; 32]);
const GRACE: Duration = Duration::from_secs(3600);

async fn work(clock: &Arc<TestClock>) -> (Arc<Work>, Store) {
    let store = Store::around(Arc::new(object_store::memory::InMemory::new()));
    let repository =
        Repository::open_or_create_in(store.clone(), "memory://", Keyring::default(), clock.as_ref()).await.unwrap();
    let timeline = Timeline {
        timeline: TimelineId::FIRST,
        parent: None,
        fork_offset: None,
        start: Offset(0),
        reason: TimelineReason::First,
        created_at: clock.now(),
    };
    repository.put_timeline(&DATABASE, &timeline).await.unwrap();
    let clock: Arc<dyn Clock> = clock.clone();
    let work = Work {
        repository,
        clock,
        progress: Arc::new(Silent),
        tally: Arc::default(),
        level: 1,
        observer: Arc::new(Unobserved),
        witness: None,
    };
    (Arc::new(work), store)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_of_flushes_every_second_leaves_few_objects_and_a_plan_that_reads_few() {
    let hours: u64 = if std::env::var_os("INNER_UNIVERSE_TEST_ALL").is_some() { 24 } else { 3 };
    let clock = Arc::new(TestClock(Mutex::new("2026-01-01T00:00:00Z".parse().unwrap())));
    let (work, store) = work(&clock).await;
    let mut tip = ChainTip::origin(&DATABASE, Offset(0));
    for second in 0..hours * 3600 {
        let now = clock.now().checked_add(jiff::SignedDuration::from_secs(1)).unwrap();
        *clock.0.lock() = now;
        let commits = encode(1, Offset(second), 0, 1, b"\0what one second brings");
        let times = Times { first: Some(now.as_microsecond()), last: Some(now.as_microsecond()), max: None };
        let (first, last, last_len) = (Offset(second), Offset(second), commits.len());
        let batch =
            Batch { log_version: 1, first, last, commits: 1, times: Times { max: times.last, ..times }, last_len };
        tip = write_batch(&work, DATABASE, TimelineId::FIRST, tip, batch, commits).await.unwrap();
        if (second + 1) % 300 == 0 {
            pass(&work, DATABASE, TimelineId::FIRST, GRACE).await.unwrap();
        }
    }
    let entries = work.repository.log_entries(&DATABASE, TimelineId::FIRST).await.unwrap();
    let covered = |entry: &&LogEntry| {
        entries.iter().any(|other| other.level > entry.level && other.first <= entry.first && other.last >= entry.last)
    };
    let in_grace = entries.iter().filter(covered).count();
    assert!(entries.len() - in_grace <= 500, "{} objects", entries.len() - in_grace);
    // Everything in grace was merged within the last hour: seconds into minutes, minutes into hours.
    assert!(in_grace <= 3600 + 300 + 3 * ENOUGH_FOR_LEVEL_2, "{in_grace} objects in their grace period");
    let timelines = work.repository.timelines(&DATABASE).await.unwrap();
    let chain = work.repository.log_chain(&DATABASE, &timelines, TimelineId::FIRST).await.unwrap();
    assert_eq!((chain.holes.len(), chain.last()), (0, Some(Offset(hours * 3600 - 1))));
    // Every commit is there, and the chain is what it would be without compaction.
    let mut next = 0;
    for entry in &chain.entries {
        let open = work.repository.open_log(entry).await.unwrap();
        for index in 0..open.header.parts.len() {
            let stored = work.repository.log_part(&open, index).await.unwrap();
            let commits = open.header.decode_part(&open.key, index, &stored, &work.repository.keys).unwrap();
            let mut at = 0;
            while let Frame::Commit(commit) = Frame::parse(1, &commits[at..]) {
                assert_eq!(commit.first, Offset(next));
                next += 1;
                at += commit.bytes.len();
            }
            assert_eq!(at, commits.len());
        }
    }
    assert_eq!(next, hours * 3600);
    assert_eq!(work.repository.log_header(&chain.entries.last().unwrap().key()).await.unwrap().tip(), tip);

    put_restore_point(&work, tip).await;
    for target in [Target::Offset(Offset(hours * 1800)), Target::Latest, Target::Time(clock.now())] {
        let before = store.requests();
        let request = RestoreRequest { target: target.clone(), ..RestoreRequest::default() };
        let plan = plan(&work.repository, &request).await.unwrap();
        let requests = store.requests() - before;
        assert!(requests <= 30, "{target:?} took {requests} requests");
        assert!(plan.databases[0].log.len() <= 30, "{target:?} reads {} objects", plan.databases[0].log.len());
    }
}

/// Writes commits `first` to `last`, each with its own content, after `before`.
async fn write(work: &Arc<Work>, before: ChainTip, first: u64, last: u64) -> ChainTip {
    let each: Vec<Vec<u8>> =
        (first..=last).map(|offset| encode(1, Offset(offset), 0, 1, &offset.to_le_bytes())).collect();
    let last_len = each.last().map_or(0, Vec::len);
    let (first, last) = (Offset(first), Offset(last));
    let batch = Batch { log_version: 1, first, last, commits: each.len() as u64, times: Times::default(), last_len };
    write_batch(work, DATABASE, TimelineId::FIRST, before, batch, each.concat()).await.unwrap()
}

/// The offsets of all commits of the chain, as a restore would read them.
async fn read(work: &Work) -> Vec<u64> {
    let timelines = work.repository.timelines(&DATABASE).await.unwrap();
    let chain = work.repository.log_chain(&DATABASE, &timelines, TimelineId::FIRST).await.unwrap();
    assert_eq!(chain.holes, []);
    let commits = crate::restore::log_source::read_all(&work.repository, DATABASE, chain.entries).await.unwrap();
    let offsets = commits.chunks(encode(1, Offset(0), 0, 1, &[0; 8]).len()).map(|commit| {
        let Frame::Commit(commit) = Frame::parse(1, commit) else { panic!("no commit") };
        assert_eq!(commit.records, commit.first.0.to_le_bytes());
        commit.first.0
    });
    offsets.collect()
}

async fn names(work: &Work) -> Vec<(u8, u64, u64)> {
    let entries = work.repository.log_entries(&DATABASE, TimelineId::FIRST).await.unwrap();
    entries.iter().map(|entry| (entry.level, entry.first.0, entry.last.0)).collect()
}

fn pass_time(clock: &TestClock, by: Duration) {
    let now = clock.now().checked_add(jiff::SignedDuration::try_from(by).unwrap()).unwrap();
    *clock.0.lock() = now;
}

fn clock() -> Arc<TestClock> {
    Arc::new(TestClock(Mutex::new("2026-01-01T00:00:00Z".parse().unwrap())))
}

#[tokio::test(flavor = "multi_thread")]
async fn late_shorter_object_leaves_no_hole() {
    let clock = clock();
    let (work, _) = work(&clock).await;
    let origin = ChainTip::origin(&DATABASE, Offset(0));
    let tip = write(&work, origin, 0, 49).await;
    let tip = write(&work, tip, 50, 99).await;
    // The answer to 100 to 149 was lost, and the object appears after 100 to 200 was written in its place.
    let longer = write(&work, tip, 100, 200).await;
    write(&work, tip, 100, 149).await;
    let longer = write(&work, longer, 201, 250).await;
    write(&work, longer, 251, 300).await;
    pass(&work, DATABASE, TimelineId::FIRST, GRACE).await.unwrap();
    pass_time(&clock, GRACE);
    pass(&work, DATABASE, TimelineId::FIRST, GRACE).await.unwrap();
    assert_eq!(read(&work).await, (0..=300).collect::<Vec<_>>());
    // The late object was in no chain. All of it is in the merged one, but not its last link: it stays for `prune`.
    assert_eq!(names(&work).await, [(0, 100, 149), (1, 0, 300)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn overlapping_merged_objects_are_read_through() {
    let clock = clock();
    let (work, _) = work(&clock).await;
    let tip = write(&work, ChainTip::origin(&DATABASE, Offset(0)), 0, 99).await;
    write(&work, tip, 100, 149).await;
    pass(&work, DATABASE, TimelineId::FIRST, GRACE).await.unwrap();
    let longer = write(&work, tip, 100, 200).await;
    write(&work, longer, 201, 300).await;
    // As an older release merged them: along names.
    let entries = work.repository.log_entries(&DATABASE, TimelineId::FIRST).await.unwrap();
    let run: Vec<_> = entries.into_iter().filter(|entry| entry.level == 0 && entry.last.0 >= 200).collect();
    let compaction = Compaction { work: &work, database: DATABASE, timeline: TimelineId::FIRST };
    compaction.merge(1, &run, &mut Pass::default()).await.unwrap();
    for (level, first, last) in names(&work).await.into_iter().filter(|(level, ..)| *level == 0) {
        let key = paths::log(&DATABASE, TimelineId::FIRST, level, Offset(first), Offset(last));
        work.repository.delete(&key).await.unwrap();
    }
    assert_eq!(names(&work).await, [(1, 0, 149), (1, 100, 300)]);
    assert_eq!(read(&work).await, (0..=300).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn inputs_outlive_an_output_that_cannot_be_read() {
    for at_header in [true, false] {
        let clock = clock();
        let (work, store) = work(&clock).await;
        let tip = write(&work, ChainTip::origin(&DATABASE, Offset(0)), 0, 49).await;
        write(&work, tip, 50, 99).await;
        pass(&work, DATABASE, TimelineId::FIRST, GRACE).await.unwrap();
        // The store damaged the merged object, or the process ended before it was read back.
        let key = paths::log(&DATABASE, TimelineId::FIRST, 1, Offset(0), Offset(99));
        let mut bytes = work.repository.get(&key).await.unwrap().to_vec();
        let at = if at_header { 100 } else { bytes.len() - 1 };
        bytes[at] ^= 1;
        store.put(&key, bytes.into(), object_store::PutMode::Overwrite).await.unwrap();
        pass_time(&clock, GRACE);
        assert!(pass(&work, DATABASE, TimelineId::FIRST, GRACE).await.is_err());
        assert_eq!(names(&work).await, [(0, 0, 49), (0, 50, 99)], "the damaged output is gone, its inputs are not");
        assert_eq!(read(&work).await, (0..100).collect::<Vec<_>>());
        // It is made again.
        pass(&work, DATABASE, TimelineId::FIRST, GRACE).await.unwrap();
        pass_time(&clock, GRACE);
        pass(&work, DATABASE, TimelineId::FIRST, GRACE).await.unwrap();
        assert_eq!(names(&work).await, [(1, 0, 99)]);
        assert_eq!(read(&work).await, (0..100).collect::<Vec<_>>());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_use_inputs_where_the_output_is_damaged() {
    let clock = clock();
    let (work, store) = work(&clock).await;
    let tip = write(&work, ChainTip::origin(&DATABASE, Offset(0)), 0, 49).await;
    write(&work, tip, 50, 99).await;
    pass(&work, DATABASE, TimelineId::FIRST, GRACE).await.unwrap();
    let key = paths::log(&DATABASE, TimelineId::FIRST, 1, Offset(0), Offset(99));
    let mut bytes = work.repository.get(&key).await.unwrap().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    store.put(&key, bytes.into(), object_store::PutMode::Overwrite).await.unwrap();
    assert_eq!(read(&work).await, (0..100).collect::<Vec<_>>());
    let report = verify(&work.repository, &VerifyOptions::default(), Arc::new(Silent)).await.unwrap();
    assert!(report.findings.iter().any(|finding| finding.object == key.to_string()), "{:?}", report.findings);
    assert_eq!(report.lost, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_follows_what_compaction_replaced() {
    let clock = clock();
    let (work, _) = work(&clock).await;
    let tip = write(&work, ChainTip::origin(&DATABASE, Offset(0)), 0, 49).await;
    write(&work, tip, 50, 99).await;
    let timelines = work.repository.timelines(&DATABASE).await.unwrap();
    // Planned before the objects were merged, and read after their grace.
    let planned = work.repository.log_chain(&DATABASE, &timelines, TimelineId::FIRST).await.unwrap();
    pass(&work, DATABASE, TimelineId::FIRST, GRACE).await.unwrap();
    pass_time(&clock, GRACE);
    pass(&work, DATABASE, TimelineId::FIRST, GRACE).await.unwrap();
    assert_eq!(names(&work).await, [(1, 0, 99)]);
    let commits = crate::restore::log_source::read_all(&work.repository, DATABASE, planned.entries).await.unwrap();
    assert_eq!(commits.len(), 100 * encode(1, Offset(0), 0, 1, &[0; 8]).len());
}

#[tokio::test(flavor = "multi_thread")]
async fn promises_hold_however_commits_were_cut() {
    let clock = clock();
    let (work, _) = work(&clock).await;
    let origin = ChainTip::origin(&DATABASE, Offset(0));
    let early = write(&work, origin, 0, 9).await;
    let promised = write(&work, early, 10, 19).await;
    let point = put_restore_point(&work, promised).await;
    // A writer that saw an incomplete listing uploads the same commits in other pieces.
    let other = write(&work, origin, 0, 4).await;
    let other = write(&work, other, 5, 29).await;
    let timelines = work.repository.timelines(&DATABASE).await.unwrap();
    let chain = work.repository.log_chain(&DATABASE, &timelines, TimelineId::FIRST).await.unwrap();
    assert_eq!(work.repository.prove(&point, &chain).await.unwrap(), Proof::Holds);
    for (first, last) in [(0, 9), (10, 19)] {
        let key = paths::log(&DATABASE, TimelineId::FIRST, 0, Offset(first), Offset(last));
        work.repository.delete(&key).await.unwrap();
    }
    let chain = work.repository.log_chain(&DATABASE, &timelines, TimelineId::FIRST).await.unwrap();
    assert_eq!(work.repository.prove(&point, &chain).await.unwrap(), Proof::Holds);
    let report = verify(&work.repository, &VerifyOptions::default(), Arc::new(Silent)).await.unwrap();
    let about_log = report.findings.iter().filter(|finding| finding.object.contains("/log")).collect::<Vec<_>>();
    assert!(about_log.is_empty(), "{about_log:?}");
    // Another history at the same offset does not pass.
    let wrong = DatabasePoint { chain: other.chain, history: Some(other.history), ..point };
    assert_eq!(work.repository.prove(&wrong, &chain).await.unwrap(), Proof::Differs);
    let entry = chain.range(Offset(19), Offset(19)).first().unwrap();
    let cut = [entry.within(Offset(0), Offset(19))];
    let commits = crate::restore::log_source::read_all(&work.repository, DATABASE, cut.to_vec()).await.unwrap();
    assert_eq!(commits.len(), 15 * encode(1, Offset(0), 0, 1, &[0; 8]).len());
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_have_a_bounded_number_of_links() {
    let clock = clock();
    let (work, _) = work(&clock).await;
    let mut tip = ChainTip::origin(&DATABASE, Offset(0));
    let many = 20u64;
    for n in 0..many {
        tip = write(&work, tip, n, n).await;
    }
    let mut group = Group::default();
    let entries = work.repository.log_entries(&DATABASE, TimelineId::FIRST).await.unwrap();
    let header = work.repository.log_header(&entries[0].key()).await.unwrap();
    let link = header.links[0];
    let full = LogHeader { links: vec![link; LINKS_MAX], ..header.clone() };
    group.headers.push(full);
    let next = work.repository.log_header(&entries[1].key()).await.unwrap();
    assert!(!group.takes(&next), "{LINKS_MAX} links are the most");
    group.headers[0].links.pop();
    assert!(group.takes(&next));
}

async fn put_restore_point(work: &Work, tip: ChainTip) -> DatabasePoint {
    let database = DatabasePoint {
        identity: DATABASE,
        name: "day".into(),
        owner: DATABASE,
        replica: 1,
        timeline: TimelineId::FIRST,
        offset: Offset(tip.next.0 - 1),
        time: None,
        chain: tip.chain,
        history: Some(tip.history),
        initial_program: crate::ids::ContentHash([0; 32]),
    };
    let point = RestorePoint {
        format: crate::repository::manifest::FORMAT,
        id: crate::ids::RestorePointId(ulid::Ulid::new()),
        label: None,
        created_at: work.clock.now(),
        server_version: None,
        tool_version: "0".into(),
        instance: crate::ids::ContentHash([0; 32]),
        instance_state: crate::ids::ContentHash([0; 32]),
        promises: Vec::new(),
        sealed_promises: None,
        has_keys: false,
        databases: vec![database.clone()],
    };
    work.repository.put_restore_point(&point).await.unwrap();
    database
}

fn entry(level: u8, first: u64, last: u64, size: u64) -> LogEntry {
    LogEntry::new(&Identity([1; 32]), TimelineId::FIRST, level, Offset(first), Offset(last), size)
}

fn ranges(runs: &[Vec<LogEntry>]) -> Vec<(u64, u64)> {
    runs.iter().map(|run| (run[0].first.0, run[run.len() - 1].last.0)).collect()
}

/// The runs along the chain of `entries`.
fn runs(entries: &[LogEntry], level: u8) -> Vec<Vec<LogEntry>> {
    super::runs(crate::repository::chain::test_chain(entries.to_vec()).entries, level)
}

#[test]
fn only_adjoining_objects_that_no_larger_one_covers_are_merged() {
    let entries = [
        entry(1, 0, 9, 10),
        entry(0, 0, 4, 5),
        entry(0, 5, 9, 5),
        entry(0, 10, 11, 5),
        entry(0, 12, 19, 5),
        entry(0, 25, 29, 5),
        entry(0, 30, 31, 5),
        entry(0, 40, 41, 5),
    ];
    assert_eq!(ranges(&runs(&entries, 0)), [(10, 19), (25, 31)]);
    assert!(runs(&entries, 1).is_empty());
}

#[test]
fn an_output_is_bounded_in_bytes_and_inputs() {
    let large: Vec<_> = (0..10).map(|n| entry(0, n, n, LEVEL_1_BYTES / 4)).collect();
    assert_eq!(ranges(&runs(&large, 0)), [(0, 3), (4, 7), (8, 9)]);
    let few: Vec<_> = (0..5).map(|n| entry(1, n, n, 1)).collect();
    assert!(runs(&few, 1).is_empty(), "too few small ones are left alone");
    let enough: Vec<_> = (0..40).map(|n| entry(1, n, n, 1)).collect();
    assert_eq!(ranges(&runs(&enough, 1)), [(0, 39)]);
}
