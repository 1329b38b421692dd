use super::*;
use crate::backup::snapshot::tests::{Disk, restore_point, work};
use crate::datadir::commit::encode;
use crate::repository::crypto::Keyring;
use crate::restore::plan::{RestorePlan, RestoreRequest, plan};
use crate::restore::target::Target;

fn minute(n: i64) -> Timestamp {
    let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
    start.checked_add(jiff::SignedDuration::from_mins(n)).unwrap()
}

/// A commit at a minute by the server's clock.
fn commit(offset: u64, n: i64) -> Vec<u8> {
    let inputs = [&[4][..], b"work", &[5; 32], &[0; 16], &minute(n).as_microsecond().to_le_bytes()].concat();
    let record = [&[0xa0][..], &u32::try_from(inputs.len()).unwrap().to_le_bytes(), &inputs].concat();
    encode(1, Offset(offset), 0, 1, &record)
}

fn commits(first: u64, minutes: &[i64]) -> Vec<Vec<u8>> {
    (first..).zip(minutes).map(|(offset, n)| commit(offset, *n)).collect()
}

async fn planned(repository: &Repository, time: Timestamp, timeline: Option<u32>) -> RestorePlan {
    let timeline = timeline.map(TimelineId);
    plan(repository, &RestoreRequest { target: Target::Time(time), timeline, ..RestoreRequest::default() })
        .await
        .unwrap()
}

/// The end of a restore to a minute, and what is said of it, of an archive of an object for each of `objects`.
async fn ends_at(objects: &[&[i64]], wanted: i64) -> (u64, Vec<String>) {
    let (disk, work) = (Disk::new(), work(Keyring::default()).await);
    let (mut first, mut tip) = (0, None);
    for minutes in objects {
        disk.write(first, commits(first, minutes));
        first += minutes.len() as u64;
        tip = work.log(&disk).await.tip;
    }
    restore_point(&work, tip.unwrap()).await;
    let plan = planned(&work.repository, minute(wanted), None).await;
    (plan.databases[0].offset.0, plan.warnings())
}

#[tokio::test]
async fn a_time_after_the_archive_says_where_it_ends() {
    let (disk, work) = (Disk::new(), work(Keyring::default()).await);
    disk.write(0, commits(0, &[0, 1, 2, 3]));
    restore_point(&work, work.log(&disk).await.tip.unwrap()).await;
    let plan = planned(&work.repository, "2099-01-01T00:00:00Z".parse().unwrap(), None).await;
    let warnings = plan.warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("ends at transaction 3, at 2026-01-01T00:03:00Z"), "{warnings:?}");
    // The restore point, which was made later, proves that nothing came in between.
    assert_eq!(planned(&work.repository, minute(60), None).await.warnings(), [""; 0]);
    assert_eq!(planned(&work.repository, minute(2), None).await.warnings(), [""; 0]);
}

#[tokio::test]
async fn another_timeline_that_reaches_the_time_is_named() {
    let (ours, theirs, work) = (Disk::new(), Disk::new(), work(Keyring::default()).await);
    ours.write(0, commits(0, &[0, 1, 2, 3, 4]));
    work.log(&ours).await;
    ours.write(5, commits(5, &[5, 6, 7, 8, 9]));
    restore_point(&work, work.log(&ours).await.tip.unwrap()).await;
    theirs.write(0, commits(0, &[0, 1, 2, 3, 4, 60, 61, 62]));
    assert_eq!(work.log(&theirs).await.timeline, TimelineId(2));

    let plan = planned(&work.repository, minute(7), None).await;
    assert_eq!((plan.databases[0].timeline, plan.databases[0].offset), (TimelineId(2), Offset(4)));
    let warnings = plan.warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    for part in ["timeline 00000001 goes up to transaction 7", "part after 4", "`--timeline 1`"] {
        assert!(warnings[0].contains(part), "{part}: {warnings:?}");
    }
    let chosen = planned(&work.repository, minute(7), Some(1)).await;
    assert_eq!((chosen.databases[0].offset, chosen.warnings()), (Offset(7), vec![]));
    assert_eq!(planned(&work.repository, minute(61), None).await.warnings(), [""; 0]);
    assert_eq!(planned(&work.repository, minute(3), None).await.warnings(), [""; 0]);
}

#[tokio::test]
async fn transactions_after_a_clock_that_was_ahead_are_named() {
    let one: &[i64] = &[0, 1, 2, 63, 64, 5, 6, 7, 68];
    let single: Vec<&[i64]> = one.chunks(1).collect();
    for objects in [vec![one], single] {
        let (offset, warnings) = ends_at(&objects, 6).await;
        assert_eq!((offset, warnings.len()), (2, 1), "{warnings:?}");
        assert!(warnings[0].contains("transactions 5 to 6, or some of them"), "{warnings:?}");
        assert!(warnings[0].contains("--to offset:6"), "{warnings:?}");
        // A time before any of it is what it says.
        assert_eq!(ends_at(&objects, 1).await, (1, vec![]));
    }
}

#[tokio::test]
async fn transactions_of_a_clock_that_was_behind_are_named() {
    for objects in [vec![&[60, 61, 62, 3, 4, 65][..]], vec![&[60, 61, 62], &[3, 4], &[65]]] {
        let (offset, warnings) = ends_at(&objects, 63).await;
        assert_eq!((offset, warnings.len()), (4, 1), "{warnings:?}");
        assert!(warnings[0].contains("transactions 3 to 4 carry times before 2026-01-01T01:02:00Z"), "{warnings:?}");
        assert!(warnings[0].contains("`--to offset:2`"), "{warnings:?}");
    }
}
