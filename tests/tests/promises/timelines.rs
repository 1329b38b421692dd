//! History forks, never overwrites.

use inner_universe::ids::{Offset, TimelineId};
use inner_universe::restore::plan::RestoreRequest;
use inner_universe::restore::target::Target;

use crate::synthetic::{self, Synthetic, log_of, record};

fn request(offset: u64, timeline: u32) -> RestoreRequest {
    RestoreRequest {
        target: Target::Offset(Offset(offset)),
        timeline: Some(TimelineId(timeline)),
        ..RestoreRequest::default()
    }
}

fn records(range: std::ops::Range<i64>, text: &str) -> Vec<Vec<u8>> {
    range.map(|n| record(n * 1000, text.as_bytes())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_cut_and_went_on_forks_and_both_branches_stay_restorable() {
    let synthetic = Synthetic::new();
    let (repository, _) = synthetic::repository().await;
    let first = records(0..10, "shared");
    synthetic.segment(1, 0, &first);
    synthetic::back_up(&repository, &synthetic.path()).await.expect("the first backup");
    let lost: Vec<_> = first.iter().cloned().chain(records(10..20, "lost in the power cut")).collect();
    synthetic.segment(1, 0, &lost);
    synthetic::back_up(&repository, &synthetic.path()).await.expect("the second backup");
    // The power cut takes 15 to 19, and other transactions take their offsets.
    let kept: Vec<_> = lost[..15].iter().cloned().chain(records(15..30, "written after")).collect();
    synthetic.segment(1, 0, &kept);
    let report = synthetic::back_up(&repository, &synthetic.path()).await.expect("the third backup");
    assert_eq!(report.databases[0].timeline, TimelineId(2));
    assert!(report.problems[0].contains("no longer continues"), "{:?}", report.problems);
    let again = synthetic::back_up(&repository, &synthetic.path()).await.expect("the fourth backup");
    assert_eq!((again.databases[0].timeline, again.problems.len()), (TimelineId(2), 0));

    for (timeline, offset, expected) in [(1, 19, &lost), (1, 12, &lost), (2, 29, &kept), (2, 17, &kept), (2, 3, &kept)]
    {
        let target = synthetic.dir.path().join(format!("restored-{timeline}-{offset}"));
        synthetic::restore(&repository, &request(offset, timeline), &target).await.expect("restore");
        let restored = std::fs::read(log_of(&target).join("00000000000000000000.stdb.log")).expect("the segment");
        let whole = Synthetic::new();
        let expected = whole.segment(1, 0, &expected[..=offset as usize]);
        assert_eq!(restored, std::fs::read(expected).expect("the segment"), "timeline {timeline}, offset {offset}");
    }
    let beyond = synthetic.dir.path().join("beyond");
    assert!(synthetic::restore(&repository, &request(25, 1), &beyond).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shorter_log_forks_and_a_deleted_one_is_a_gap() {
    let synthetic = Synthetic::new();
    let (repository, _) = synthetic::repository().await;
    let all = records(0..20, "one");
    synthetic.segment(1, 0, &all[..10]);
    synthetic::back_up(&repository, &synthetic.path()).await.expect("the first backup");
    synthetic.segment(1, 0, &all);
    synthetic::back_up(&repository, &synthetic.path()).await.expect("the second backup");
    // Restored to 12: shorter than what is archived.
    synthetic.segment(1, 0, &all[..13]);
    let report = synthetic::back_up(&repository, &synthetic.path()).await.expect("the third backup");
    assert_eq!((report.databases[0].timeline, report.databases[0].offset), (TimelineId(2), Offset(12)));
    let target = synthetic.dir.path().join("old");
    synthetic::restore(&repository, &request(19, 1), &target).await.expect("the old branch");

    // Everything up to 39 is gone before it was archived.
    std::fs::remove_file(synthetic.log().join("00000000000000000000.stdb.log")).expect("delete");
    synthetic.segment(1, 40, &records(40..45, "after the gap"));
    let report = synthetic::back_up(&repository, &synthetic.path()).await.expect("the fourth backup");
    assert_eq!(report.databases[0].timeline, TimelineId(3));
    assert!(report.problems.iter().any(|problem| problem.contains("deleted before they were archived")));
    // Without a snapshot nothing can be restored from it, and that is said.
    let target = synthetic.dir.path().join("gap");
    let error = synthetic::restore(&repository, &request(44, 3), &target).await.expect_err("no snapshot");
    assert!(error.to_string().contains("no snapshot"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_server_that_goes_on_starts_a_new_timeline() {
    use harness::server::Server;
    use harness::sidecar::Sidecar;
    use harness::tools;
    use harness::workload::{self, Random, TABLES};

    let mut random = Random::from_env();
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    workload::run(&client, "ledger", &mut random, 60).await;
    let first = sidecar.backup(&data);
    workload::run(&client, "ledger", &mut random, 60).await;
    server.written().await;
    let before = client.rows("ledger", &TABLES).await;
    let second = sidecar.backup(&data);
    server.kill();

    let id = first["restore_point"].as_str().expect("an id");
    let run = sidecar.run(["restore", "--force", "--data-dir", data.to_str().expect("UTF-8"), "--to", id]).ok();
    assert!(std::path::Path::new(run["moved_aside"].as_str().expect("what was there is kept")).is_dir());
    let server = Server::start(&data, &keys).await;
    let client = client.at(&server.url);
    workload::run(&client, "ledger", &mut random, 60).await;
    server.written().await;
    let after = client.rows("ledger", &TABLES).await;
    let third = sidecar.backup(&data);
    assert_eq!(third["databases"][0]["timeline"], 2);
    server.kill();

    for (report, expected) in [(second, before), (third, after)] {
        let restored = scratch.path().join("restored");
        sidecar.restore(&restored, report["restore_point"].as_str().expect("an id"));
        let server = Server::start(&restored, &keys).await;
        assert_eq!(client.at(&server.url).rows("ledger", &TABLES).await, expected);
        server.kill();
        std::fs::remove_dir_all(&restored).expect("remove what was restored");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_latest_of_a_history_that_went_back_is_where_it_went_back_to() {
    let synthetic = Synthetic::new();
    let (repository, store) = synthetic::repository().await;
    let all = records(0..20, "history");
    synthetic.segment(1, 0, &all[..10]);
    synthetic::back_up(&repository, &synthetic.path()).await.expect("the first backup");
    synthetic.segment(1, 0, &all);
    synthetic::back_up(&repository, &synthetic.path()).await.expect("the second backup");
    // Taken back to transaction 9, and nothing written since.
    synthetic.segment(1, 0, &all[..10]);
    let report = synthetic::back_up(&repository, &synthetic.path()).await.expect("the third backup");
    let timeline = report.databases[0].timeline;
    assert_eq!((timeline, report.databases[0].offset), (TimelineId(2), Offset(9)));
    let target = synthetic.dir.path().join("latest");
    let report = synthetic::restore(&repository, &RestoreRequest::default(), &target).await.expect("the latest");
    assert_eq!(report.databases[0].offset, Offset(9), "what was taken back does not come back");
    // A second look begins no third timeline.
    let report = synthetic::back_up(&repository, &synthetic.path()).await.expect("the fourth backup");
    assert_eq!((report.databases[0].timeline, report.problems), (TimelineId(2), Vec::new()));
    // And if its log is lost once it has some, that is an error and no older state.
    let mut more = all[..10].to_vec();
    more.extend(records(0..5, "another history"));
    synthetic.segment(1, 0, &more);
    synthetic::back_up(&repository, &synthetic.path()).await.expect("the fifth backup");
    let database = report.databases[0].identity;
    for (key, _) in repository.list(&inner_universe::repository::paths::logs(&database, timeline)).await.expect("list")
    {
        object_store::ObjectStoreExt::delete(store.as_ref(), &key).await.expect("delete");
    }
    let target = synthetic.dir.path().join("lost");
    let error =
        synthetic::restore(&repository, &RestoreRequest::default(), &target).await.expect_err("its log is lost");
    assert!(error.to_string().contains("are missing from timeline"), "{error}");
}
