//! What keeps the sidecar from being ready, and that a restart does not end it.

use std::time::Duration;

use harness::client::http;
use harness::daemon::Daemon;
use harness::sidecar::{Sidecar, path};
use harness::synthetic::{Synthetic, record};
use inner_universe::daemon::conditions::ConditionKind;
use serde_json::Value;

fn records(n: u64) -> Vec<Vec<u8>> {
    (0..n).map(|at| record(1_700_000_000_000_000 + at as i64 * 1000, b"healthy")).collect()
}

async fn get(url: &str, path: &str) -> (u16, String) {
    let answer = http().get(format!("{url}{path}")).send().await.expect("an answer");
    (answer.status().as_u16(), answer.text().await.expect("text"))
}

/// Waits until `/readyz` answers with `wanted`; its reasons.
async fn until(url: &str, wanted: u16) -> Vec<String> {
    let mut last = String::new();
    for _ in 0..600 {
        let (status, body) = get(url, "/readyz").await;
        if status == wanted {
            let body: Value = serde_json::from_str(&body).expect("JSON");
            return serde_json::from_value(body["reasons"].clone()).expect("reasons");
        }
        last = body;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{wanted} never comes: {last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_tmpdir_it_archives_and_is_not_ready() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(100));
    let missing = synthetic.dir.path().join("missing");
    let environment = vec![("TMPDIR".to_owned(), path(&missing).to_owned())];
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let mut daemon = Daemon::start(&sidecar.clone().with_environment(environment.clone()), &synthetic.path(), &[], &[]);
    daemon.wait_archived(99);
    let url = daemon.wait_http();
    let reasons = until(&url, 503).await;
    assert!(reasons.iter().any(|reason| reason.contains("TMPDIR") && reason.contains("missing")), "{reasons:?}");
    let ready = sidecar.run(["status", "--ready", "--data-dir", path(&synthetic.path())]);
    assert_eq!(ready.code, 3, "{}", ready.json);
    let status = sidecar.run(["status", "--data-dir", path(&synthetic.path())]).ok();
    assert_eq!(status["conditions"][0]["kind"], "temporary_directory", "{status}");
    let (_, metrics) = get(&url, "/metrics").await;
    assert!(metrics.contains("inner_universe_condition{condition=\"temporary_directory\""), "{metrics}");
    // A restore point needs a copy of the control database; it is made elsewhere.
    daemon.wait("a restore point", |status| status.last_restore_point.is_some());
    std::fs::create_dir(&missing).expect("create");
    until(&url, 200).await;
    assert_eq!(daemon.stop(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_log_makes_it_unready_until_it_is_back() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(100));
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &[], &[]);
    daemon.wait_archived(99);
    let url = daemon.wait_http();
    until(&url, 200).await;
    let (log, aside) = (synthetic.log(), synthetic.dir.path().join("aside"));
    std::fs::rename(&log, &aside).expect("take it away");
    let status = daemon.wait("the condition", |status| {
        status.conditions.iter().any(|condition| condition.kind == ConditionKind::LogMissing)
    });
    let missing = status.conditions.iter().find(|condition| condition.kind == ConditionKind::LogMissing);
    assert_eq!(missing.and_then(|missing| missing.database.as_deref()), Some("synthetic"));
    let reasons = until(&url, 503).await;
    assert!(reasons.iter().any(|reason| reason.contains("its log is missing from")), "{reasons:?}");
    std::fs::rename(&aside, &log).expect("put it back");
    until(&url, 200).await;
    assert_eq!(daemon.stop(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_not_captured_makes_it_unready() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(100));
    let keys = synthetic.dir.path().join("keys");
    std::fs::create_dir(&keys).expect("create");
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let settings = [("SPACETIMEDB_CONFIG__KEY_DIR", path(&keys))];
    let mut daemon = Daemon::start_with(&sidecar, &synthetic.path(), &settings, &["--allow-plain-keys"], &[]);
    daemon.wait_archived(99);
    let url = daemon.wait_http();
    daemon.wait("the condition", |status| {
        status.conditions.iter().any(|condition| condition.kind == ConditionKind::InstanceNotCaptured)
    });
    let reasons = until(&url, 503).await;
    assert!(reasons.iter().any(|reason| reason.contains("id_ecdsa is not there")), "{reasons:?}");
    for key in ["id_ecdsa", "id_ecdsa.pub"] {
        std::fs::write(keys.join(key), "a key").expect("write");
    }
    until(&url, 200).await;
    assert_eq!(daemon.stop(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_snapshot_makes_it_unready() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(100));
    synthetic.snapshot(50, 100);
    let snapshots = synthetic.log().with_file_name("snapshots");
    for object in walk(&snapshots).into_iter().filter(|file| path(file).contains("/objects/")) {
        let mut bytes = std::fs::read(&object).expect("read");
        bytes.iter_mut().for_each(|byte| *byte ^= 1);
        std::fs::write(&object, bytes).expect("damage it");
    }
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &[], &[]);
    daemon.wait_archived(99);
    let url = daemon.wait_http();
    daemon.wait("the condition", |status| {
        status.conditions.iter().any(|condition| condition.kind == ConditionKind::SnapshotFailing)
    });
    let reasons = until(&url, 503).await;
    assert!(
        reasons.iter().any(|reason| reason.contains("the snapshot at transaction 50 is not usable")),
        "{reasons:?}"
    );
    std::fs::remove_dir_all(&snapshots).expect("remove");
    until(&url, 200).await;
    assert_eq!(daemon.stop(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_verification_outlives_restarts() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(100));
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &[], &[]);
    daemon.wait_archived(99);
    daemon.wait("a restore point", |status| status.last_restore_point.is_some());
    assert_eq!(daemon.stop(), 0);
    let object = walk(&synthetic.dir.path().join("repository")).into_iter().find(|file| path(file).ends_with(".iulog"));
    let object = object.expect("a log object");
    let mut bytes = std::fs::read(&object).expect("read");
    let late = bytes.len() - 20;
    bytes[late] ^= 1;
    std::fs::write(&object, bytes).expect("damage it");

    let often = [("SCHEDULE__VERIFY", "* * * * * *")];
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &often, &[]);
    daemon.wait("a failed verification", |status| {
        status.schedules.iter().any(|schedule| schedule.last_ok == Some(false))
    });
    // A run that is under way still shows what the last one found.
    for _ in 0..40 {
        let status = daemon.status().expect("a status");
        assert_eq!(status.schedules[0].last_ok, Some(false), "{:?}", status.schedules);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    daemon.kill();

    let yearly = [("SCHEDULE__VERIFY", "0 0 0 1 1 *")];
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &yearly, &[]);
    let url = daemon.wait_http();
    let status = daemon.wait("the schedule", |status| !status.schedules.is_empty());
    assert_eq!((status.schedules[0].last_ok, status.schedules[0].running), (Some(false), false));
    let reasons = until(&url, 503).await;
    assert!(reasons.iter().any(|reason| reason.contains("the last scheduled verify failed")), "{reasons:?}");
    let mut metrics = String::new();
    for _ in 0..100 {
        metrics = get(&url, "/metrics").await.1;
        if metrics.contains("inner_universe_schedule_last_ok{schedule=\"verify\"} 0")
            && metrics.contains("inner_universe_verify_findings")
        {
            assert_eq!(daemon.stop(), 0);
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{metrics}");
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let (mut found, mut dirs) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(next) = dirs.pop() {
        for entry in std::fs::read_dir(next).expect("list").flatten() {
            if entry.path().is_dir() { dirs.push(entry.path()) } else { found.push(entry.path()) }
        }
    }
    found
}
