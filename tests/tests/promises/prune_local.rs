//! The log that grows without end: on a real server with a native snapshot at transaction 1,000,000, segments before it go
//! while the server runs, it starts again without them, and they are restored from the archive.

use harness::client::Client;
use harness::pipeline;
use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::tools;
use inner_universe::datadir::DataDir;
use inner_universe::datadir::commit::{Frame, SegmentHeader};
use inner_universe::datadir::log::{LogReader, segment_name, segments};
use inner_universe::ids::Offset;
use serde_json::Value;

/// The same note again and again: the table stays small and the log grows.
async fn write(server: &Server, client: &Client, count: u64) {
    let note = |n: u64| [&(n % 7).to_le_bytes()[..], &4_u32.to_le_bytes(), b"note"].concat();
    pipeline::calls(&server.url, client, "ledger", "put_note", (0..count).map(note)).await;
}

/// Cuts the one segment of a stopped server into several, as a rotation would have.
fn split(dir: &std::path::Path, at: &[u64]) {
    let whole = segments(dir).expect("segments").remove(0);
    let mut reader = LogReader::open_first(dir).expect("open");
    let (mut buffer, mut parts): (Vec<u8>, Vec<(Offset, Vec<u8>)>) = (Vec::new(), Vec::new());
    let mut starts = at.iter().copied().peekable();
    while let Some(batch) = reader.next_batch(1 << 20, &mut buffer).expect("read") {
        let mut rest = buffer.as_slice();
        while let Frame::Commit(commit) = Frame::parse(batch.log_version, rest) {
            if parts.is_empty() || starts.peek().is_some_and(|start| commit.first.0 >= *start) {
                if !parts.is_empty() {
                    starts.next();
                }
                let header = SegmentHeader { log_version: batch.log_version, checksum_algorithm: 0 };
                parts.push((commit.first, header.to_bytes().to_vec()));
            }
            parts.last_mut().expect("a part").1.extend(commit.bytes);
            rest = &rest[commit.bytes.len()..];
        }
    }
    std::fs::remove_file(&whole.path).expect("remove");
    let _ = std::fs::remove_file(whole.path.with_extension("ofs"));
    for (first, bytes) in parts {
        std::fs::write(dir.join(segment_name(first)), bytes).expect("write");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_goes_on_without_the_segments_before_its_snapshot_and_they_are_restored_from_the_archive() {
    if !tools::all() {
        println!("skipped: a million transactions take minutes; `cargo xtask test --all` writes them");
        return;
    }
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    write(&server, &client, 1_000_200).await;
    server.written().await;
    let replica = DataDir::open(&data).expect("open").replicas().expect("replicas").remove(0);
    let snapshots = inner_universe::datadir::snapshot::list(&replica.snapshots_path()).expect("list");
    assert!(snapshots.iter().any(|snapshot| snapshot.offset.0 >= 1_000_000), "{snapshots:?}");
    server.kill();
    split(&replica.log_path(), &[300_000, 600_000, 900_000]);
    let server = Server::start(&data, &keys).await;
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    let named = |report: &Value| report["databases"][0]["segments"].as_array().map(Vec::len);
    let prune = |more: &[&str]| sidecar.run([&["prune-local", "--data-dir", path(&data)], more].concat()).ok();
    sidecar.backup(&data);
    assert_eq!(named(&prune(&[])), Some(0), "two snapshots are to stand for it, and the second is at transaction 0");
    // Beside the running server, under load.
    let (done, ()) = tokio::join!(
        tokio::task::spawn_blocking({
            let (sidecar, data) = (sidecar.clone(), data.clone());
            move || sidecar.run(["prune-local", "--data-dir", path(&data), "--keep-snapshots", "1", "--apply"]).ok()
        }),
        write(&server, &client, 5_000)
    );
    let done = done.expect("a prune");
    assert_eq!((named(&done), &done["applied"]), (Some(3), &Value::Bool(true)), "{done}");
    assert!(done["bytes"].as_u64() > Some(30_000_000), "{done}");
    write(&server, &client, 100).await;
    server.written().await;
    let truth = client.at(&server.url).rows("ledger", &["note", "account"]).await;
    let steps = client.at(&server.url).sql("ledger", "select count(*) as n from journal").await;
    server.kill();
    let server = Server::start(&data, &keys).await;
    assert_eq!(client.at(&server.url).rows("ledger", &["note", "account"]).await, truth);
    assert_eq!(client.at(&server.url).sql("ledger", "select count(*) as n from journal").await, steps);
    write(&server, &client, 100).await;
    server.written().await;
    let report = sidecar.backup(&data);
    assert_eq!(report["databases"][0]["timeline"], 1, "{report}");
    server.kill();
    let target = scratch.path().join("restored");
    sidecar.restore(&target, "offset:450000");
    let server = Server::start(&target, &keys).await;
    let there = client.at(&server.url).sql("ledger", "select count(*) as n from journal").await;
    // Transaction 0 published, and the connections that wrote were a transaction or two of their own.
    let there = there[0].to_string();
    assert!((449_990..=450_000).any(|n| there.contains(&n.to_string())), "{there}");
}
