//! A backup taken under a steady write load restores to a consistent prefix of what was written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use harness::server::Server;
use harness::sidecar::Sidecar;
use harness::workload::{self, Random, TABLES};
use harness::{oracle, tools};

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_restores_to_a_consistent_prefix() {
    let rounds = if tools::all() { 50 } else { 6 };
    let mut random = Random::from_env();
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;

    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3)
        .map(|_| {
            let (client, stop, mut random) = (client.clone(), Arc::clone(&stop), Random::new(random.draw()));
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    workload::run(&client, "ledger", &mut random, 1).await;
                }
            })
        })
        .collect();
    let mut points = Vec::new();
    for _ in 0..rounds {
        tokio::time::sleep(std::time::Duration::from_millis(random.below(200))).await;
        let report = sidecar.backup(&data);
        assert_eq!(report["problems"].as_array().map(Vec::len), Some(0), "{report}");
        let steps = client.sql("ledger", "select * from journal").await.len() as u64;
        points.push((report["restore_point"].as_str().expect("an id").to_owned(), steps, report));
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.expect("a writer");
    }
    // The truth about every prefix is the live journal: a restored one must be its beginning, row for row.
    let journal = client.rows("ledger", &["journal"]).await;
    let by_step = |rows: &[String]| {
        let mut rows: Vec<serde_json::Value> =
            rows.iter().map(|row| serde_json::from_str(row).expect("a row")).collect();
        rows.sort_by_key(|row| row[0].as_u64());
        rows
    };
    let truth = by_step(&journal["journal"]);
    server.kill();

    for (id, steps_after, report) in points {
        let restored = scratch.path().join("restored");
        sidecar.restore(&restored, &id);
        let replica = report["databases"][0]["offset"].as_u64().expect("an offset");
        let server = Server::start(&restored, &keys).await;
        let rows = client.at(&server.url).rows("ledger", &TABLES).await;
        let steps = workload::assert_consistent(&rows);
        assert!(steps <= steps_after, "more than was written by then");
        let found = by_step(&rows["journal"]);
        assert_eq!(found, truth[..found.len()], "the journal is a prefix of the live one");
        server.kill();
        let log =
            std::fs::read_dir(restored.join("replicas")).expect("replicas").next().expect("one").expect("one").path();
        assert!(oracle::last_offset(&log.join("clog")) >= Some(replica));
        std::fs::remove_dir_all(&restored).expect("remove what was restored");
    }
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
}
