//! Compaction: many small log objects become few large ones, so that a restore makes few requests.
//!
//! Invariants: an output is read back and compared with its inputs before anything is deleted; inputs are deleted only after
//! a grace period, so that a restore that began before goes on; a crash at any moment leaves inputs, output, or both, and
//! both read the same. It holds no state: what is left to do shows in the names.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::backup::{BackupError, OBJECT_SIZE, Work, blocking};
use crate::ids::{Identity, TimelineId};
use crate::repository::chain::LogEntry;
use crate::repository::large::LargePut;
use crate::repository::log_object::{LogHeader, Merge};
use crate::repository::{InObject, Repository, RepositoryError, paths};

/// The highest level.
pub const TOP: u8 = 2;
/// Stored bytes of one level 1 object: it is put together in memory.
const LEVEL_1_BYTES: u64 = 16 << 20;
/// Stored bytes of one level 2 object, which is copied part by part.
const LEVEL_2_BYTES: u64 = 512 << 20;
/// No object has more inputs: it bounds the header.
const MOST_INPUTS: usize = 4096;
/// So many level 1 objects are worth a level 2 object even when they are small.
const ENOUGH_FOR_LEVEL_2: usize = 16;
/// zstd level: what is merged is kept for long.
const LEVEL: i32 = 3;

/// What a pass did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pass {
    pub merged: u64,
    pub written: u64,
    pub deleted: u64,
}

/// Merges what can be merged on one timeline, and deletes inputs whose grace is over.
///
/// # Errors
/// When the store fails. What is done stays done.
pub(crate) async fn pass(
    work: &Arc<Work>,
    database: Identity,
    timeline: TimelineId,
    grace: Duration,
) -> Result<Pass, BackupError> {
    let mut done = Pass::default();
    for level in 0..TOP {
        let entries = work.repository.log_entries(&database, timeline).await?;
        for run in runs(&entries, level) {
            if let Some(inputs) = merge(work, database, timeline, level + 1, &run).await? {
                done.merged += inputs as u64;
                done.written += 1;
            }
        }
    }
    done.deleted = delete_inputs(work, &work.repository.log_entries(&database, timeline).await?, grace).await?;
    Ok(done)
}

/// The runs of objects of `level` that are to become one object of the next: adjoining, and not covered yet.
fn runs(entries: &[LogEntry], level: u8) -> Vec<Vec<LogEntry>> {
    let covered = |entry: &LogEntry| {
        entries.iter().any(|other| other.level > level && other.first <= entry.first && other.last >= entry.last)
    };
    let mut candidates: Vec<_> =
        entries.iter().filter(|entry| entry.level == level && !covered(entry)).cloned().collect();
    candidates.sort_by_key(|entry| entry.first);
    let most = if level == 0 { LEVEL_1_BYTES } else { LEVEL_2_BYTES };
    let mut runs: Vec<(u64, Vec<LogEntry>)> = Vec::new();
    for entry in candidates {
        match runs.last_mut() {
            Some((bytes, run))
                if run.last().is_some_and(|last| last.last.0 + 1 == entry.first.0)
                    && *bytes + entry.size <= most
                    && run.len() < MOST_INPUTS =>
            {
                *bytes += entry.size;
                run.push(entry);
            }
            _ => runs.push((entry.size, vec![entry])),
        }
    }
    let last = runs.len().saturating_sub(1);
    let is_full = |(index, (bytes, run)): &(usize, (u64, Vec<LogEntry>))| {
        run.len() > 1 && (level == 0 || *index < last || *bytes >= most / 2 || run.len() >= ENOUGH_FOR_LEVEL_2)
    };
    runs.into_iter().enumerate().filter(is_full).map(|(_, (_, run))| run).collect()
}

/// Writes one object from `run`, reads it back, and returns how many inputs it took; `None` when there is nothing to merge.
async fn merge(
    work: &Arc<Work>,
    database: Identity,
    timeline: TimelineId,
    level: u8,
    run: &[LogEntry],
) -> Result<Option<usize>, BackupError> {
    let repository = &work.repository;
    let mut headers: Vec<LogHeader> = Vec::with_capacity(run.len());
    for entry in run {
        let header = repository.log_header(&entry.key()).await?;
        // Format versions never share an object, and what does not continue is left to `verify`.
        let fits = headers.last().is_none_or(|before| {
            before.log_version == header.log_version
                && before.tip().chain == header.previous_chain
                && before.tip().next == header.first
        });
        if !fits {
            break;
        }
        headers.push(header);
    }
    let count = headers.len();
    if count < 2 {
        return Ok(None);
    }
    let archived_at = work.clock.now().as_microsecond();
    let mut merge = Merge::new(database, timeline, level, archived_at);
    // Sealed bodies cannot be opened with recipients alone, and large ones are compressed well already: both are copied.
    let copy = level > 1 || repository.keys.seals();
    if copy {
        headers.iter().for_each(|header| merge.copy(header));
        let header = merge.header();
        let key = paths::log(&database, timeline, level, header.first, header.last);
        if !repository.exists(&key).await? {
            let mut output = repository.put_large(&key, header.to_bytes().into()).await?;
            if let Err(error) = copy_bodies(repository, &run[..count], &mut output).await {
                output.abandon().await;
                return Err(error.into());
            }
        }
    } else {
        let mut body = Vec::new();
        let mut gathered: Vec<u8> = Vec::new();
        for (entry, header) in run.iter().zip(&headers) {
            let open = repository.open_log(entry).await?;
            for index in 0..header.parts.len() {
                let stored = repository.log_part(&open, index).await?;
                let (header, key, keys) = (Arc::clone(&open.header), entry.key(), repository.keys.clone());
                let commits = blocking(move || header.decode_part(&key, index, &stored, &keys)).await??;
                if !gathered.is_empty() && gathered.len() + commits.len() > OBJECT_SIZE {
                    merge.seal(&gathered, LEVEL, &repository.keys, &mut body)?;
                    gathered.clear();
                }
                gathered.extend_from_slice(&commits);
                merge.add(&open.header, index);
            }
        }
        merge.seal(&gathered, LEVEL, &repository.keys, &mut body)?;
        let header = merge.header();
        let mut bytes = header.to_bytes();
        bytes.append(&mut body);
        let key = paths::log(&database, timeline, level, header.first, header.last);
        if !repository.exists(&key).await? {
            repository.put(&key, bytes.into()).await?;
        }
    }
    read_back(work, database, timeline, level, &headers).await?;
    Ok(Some(count))
}

/// Copies the bodies of log objects behind one another, checked.
async fn copy_bodies(
    repository: &Repository,
    run: &[LogEntry],
    output: &mut LargePut<'_>,
) -> Result<(), RepositoryError> {
    for entry in run {
        let open = repository.open_log(entry).await?;
        for index in 0..open.header.parts.len() {
            let stored = repository.log_part(&open, index).await?;
            open.header.check_part(index, &stored).in_object(&entry.key())?;
            output.write(stored).await?;
        }
    }
    output.finish().await
}

/// The output must hold what the inputs held, as their chain proves.
async fn read_back(
    work: &Arc<Work>,
    database: Identity,
    timeline: TimelineId,
    level: u8,
    inputs: &[LogHeader],
) -> Result<(), BackupError> {
    let (Some(first), Some(last)) = (inputs.first(), inputs.last()) else { return Ok(()) };
    let key = paths::log(&database, timeline, level, first.first, last.last);
    let size = work.repository.log_header(&key).await?.object_len();
    let entry = LogEntry::new(&database, timeline, level, first.first, last.last, size);
    let open = work.repository.open_log(&entry).await?;
    let header = &open.header;
    if header.previous_chain != first.previous_chain || header.tip().chain != last.tip().chain {
        return Err(RepositoryError::damaged(&key, "it does not hold what it was made from").into());
    }
    for index in 0..header.parts.len() {
        let stored = work.repository.log_part(&open, index).await?;
        let (header, key, keys) = (Arc::clone(header), key.clone(), work.repository.keys.clone());
        let checked = move || match header.sealed {
            true => header.check_part(index, &stored).map_err(|malformed| RepositoryError::damaged(&key, malformed)),
            false => header.decode_part(&key, index, &stored, &keys).map(|_| ()),
        };
        blocking(checked).await??;
    }
    Ok(())
}

/// Deletes objects that a higher level covers since `grace` ago.
async fn delete_inputs(work: &Arc<Work>, entries: &[LogEntry], grace: Duration) -> Result<u64, BackupError> {
    let mut deleted = 0;
    for output in entries.iter().filter(|entry| entry.level > 0) {
        let inputs: Vec<_> = entries
            .iter()
            .filter(|entry| entry.level < output.level && entry.first >= output.first && entry.last <= output.last)
            .collect();
        if inputs.is_empty() {
            continue;
        }
        let header = work.repository.log_header(&output.key()).await?;
        let written = Timestamp::from_microsecond(header.archived_at).unwrap_or(Timestamp::MAX);
        let age = work.clock.now().duration_since(written);
        if Duration::try_from(age).is_ok_and(|age| age >= grace) {
            for input in inputs {
                work.repository.delete(&input.key()).await?;
                deleted += 1;
            }
        }
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests {
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
    use crate::repository::store::Store;
    use crate::restore::plan::{RestoreRequest, plan};
    use crate::restore::target::Target;

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
        let repository = Repository::open_or_create_in(store.clone(), "memory://", Keyring::default(), clock.as_ref())
            .await
            .unwrap();
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
            entries
                .iter()
                .any(|other| other.level > entry.level && other.first <= entry.first && other.last >= entry.last)
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

    async fn put_restore_point(work: &Work, tip: ChainTip) {
        let database = DatabasePoint {
            identity: DATABASE,
            name: "day".into(),
            owner: DATABASE,
            replica: 1,
            timeline: TimelineId::FIRST,
            offset: Offset(tip.next.0 - 1),
            time: None,
            chain: tip.chain,
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
            has_keys: false,
            databases: vec![database],
        };
        work.repository.put_restore_point(&point).await.unwrap();
    }

    fn entry(level: u8, first: u64, last: u64, size: u64) -> LogEntry {
        LogEntry::new(&Identity([1; 32]), TimelineId::FIRST, level, Offset(first), Offset(last), size)
    }

    fn ranges(runs: &[Vec<LogEntry>]) -> Vec<(u64, u64)> {
        runs.iter().map(|run| (run[0].first.0, run[run.len() - 1].last.0)).collect()
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
}
