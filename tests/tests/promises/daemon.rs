//! The daemon: everything committed is in the repository a moment later, through crashes of either side.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use harness::daemon::Daemon;
use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::workload::{self, Random, TABLES};
use harness::{oracle, tools};
use inner_universe::config::RepositoryConfig;
use inner_universe::datadir::commit::Frame;
use inner_universe::ids::Offset;
use inner_universe::repository::Repository;
use inner_universe::repository::crypto::Keyring;
use inner_universe::restore::plan::RestoreRequest;
use inner_universe::restore::target::Target;

use crate::synthetic::{self, Synthetic, log_of, record};

async fn open(sidecar: &Sidecar) -> Repository {
    Repository::open(&sidecar.repository, &RepositoryConfig::default(), Keyring::default()).await.expect("open")
}

/// Every offset that was reported archived can be reached, and no range was uploaded twice.
async fn assert_archive_holds(repository: &Repository, reported: &BTreeMap<u32, u64>) {
    for identity in repository.databases().await.expect("databases") {
        let timelines = repository.timelines(&identity).await.expect("timelines");
        for timeline in &timelines {
            let chain = repository.log_chain(&identity, &timelines, timeline.timeline).await.expect("the chain");
            assert_eq!(chain.holes, [], "timeline {}", timeline.timeline);
            if let Some(offset) = reported.get(&timeline.timeline.0) {
                assert!(chain.last() >= Some(Offset(*offset)), "{:?} was reported, {offset} is there", chain.last());
            }
            let mut ranges: Vec<_> = chain.entries.iter().map(|entry| (entry.first, entry.last)).collect();
            ranges.sort();
            for pair in ranges.windows(2) {
                assert_eq!(pair[0].1.0 + 1, pair[1].0.0, "{pair:?}");
            }
            let own = inner_universe::repository::paths::logs(&identity, timeline.timeline);
            let stored = repository.list(&own).await.expect("list").len();
            let used = chain.entries.iter().filter(|entry| entry.timeline == timeline.timeline).count();
            assert_eq!(stored, used, "an object of timeline {} is not part of its log", timeline.timeline);
        }
    }
}

fn last_offset(data: &Path) -> u64 {
    let replica = std::fs::read_dir(data.join("replicas")).expect("replicas").next().expect("one").expect("one").path();
    oracle::last_offset(&replica.join("clog")).expect("a transaction")
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random_moments_it_loses_nothing_that_it_reported_and_uploads_nothing_twice() {
    let rounds = if tools::all() { 200 } else { 10 };
    let mut random = Random::from_env();
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (client, stop, mut random) = (client.clone(), Arc::clone(&stop), Random::new(random.draw()));
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                workload::run(&client, "ledger", &mut random, 1).await;
            }
        })
    };
    let settings =
        [("ARCHIVE__FLUSH_INTERVAL", "20ms"), ("REPOSITORY__LEASE_DURATION", "3s"), ("ARCHIVE__COMPACTION", "false")];
    let mut reported = BTreeMap::new();
    for round in 0..rounds {
        // Without --force a killed daemon's lease would have to expire first.
        let mut daemon = Daemon::start_with(&sidecar, &data, &settings, &["--force"], &[]);
        if round % 4 == 0 {
            daemon.wait("its first object", |status| status.databases.iter().any(|found| found.objects_written > 0));
        }
        tokio::time::sleep(Duration::from_millis(random.below(400))).await;
        let last = daemon.status();
        daemon.kill();
        for database in last.iter().flat_map(|status| &status.databases) {
            if let (Some(timeline), Some(offset)) = (database.timeline, database.archived_offset) {
                reported.insert(timeline.0, offset.0);
            }
        }
    }
    assert!(!reported.is_empty(), "no daemon lived long enough to report anything");
    stop.store(true, Ordering::Relaxed);
    writer.await.expect("the writer");
    let mut daemon = Daemon::start_with(&sidecar, &data, &settings, &["--force"], &[]);
    tokio::time::sleep(Duration::from_millis(700)).await;
    daemon.wait_archived(last_offset(&data));
    sidecar.run(["backup", "create", "--data-dir", path(&data), "--label", "end"]).ok();
    assert_eq!(daemon.stop(), 0);
    let truth = client.rows("ledger", &TABLES).await;
    server.kill();

    assert_archive_holds(&open(&sidecar).await, &reported).await;
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
    let restored = scratch.path().join("restored");
    let report = sidecar.restore(&restored, "label:end");
    assert_eq!(report["databases"][0]["timeline"], 1, "the log never forked");
    let server = Server::start(&restored, &keys).await;
    assert_eq!(client.at(&server.url).rows("ledger", &TABLES).await, truth);
    server.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_under_it_is_started_again_after_each_crash_and_its_log_stays_whole() {
    let rounds = if tools::all() { 50 } else { 3 };
    let mut random = Random::from_env();
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    let port = harness::server::free_port().to_string();
    let address = format!("127.0.0.1:{port}");
    let binary = tools::server();
    let server =
        [path(&binary), "start", "--data-dir", path(&data), "--jwt-key-dir", path(&keys), "--listen-addr", &address];
    let settings = [
        ("ARCHIVE__FLUSH_INTERVAL", "50ms"),
        ("ARCHIVE__COMPACTION", "false"),
        ("SPACETIMEDB_CONFIG__RESTART_BACKOFF_MAX", "1s"),
    ];
    let mut daemon = Daemon::start(&sidecar, &data, &settings, &server);
    let url = format!("http://{address}");
    harness::server::wait_for(&url).await;
    let client = harness::client::Client::new(&url).await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    for round in 0..rounds {
        let calls = 20 + random.below(20);
        workload::run(&client, "ledger", &mut random, calls).await;
        let status =
            daemon.wait("the server", |status| status.server.as_ref().is_some_and(|server| server.pid.is_some()));
        let server = status.server.expect("a server");
        assert_eq!(server.starts, round + 1);
        let pid = server.pid.expect("a process").to_string();
        let writing = {
            let (client, mut random) = (client.clone(), Random::new(random.draw()));
            tokio::spawn(async move { workload::run_until_refused(&client, "ledger", &mut random).await })
        };
        tokio::time::sleep(Duration::from_millis(random.below(150))).await;
        let killed = std::process::Command::new("kill").args(["-9", &pid]).status();
        assert!(killed.is_ok_and(|status| status.success()));
        writing.await.expect("the writer");
        daemon.wait("the next start", |status| {
            status.server.as_ref().is_some_and(|server| server.starts == round + 2 && server.pid.is_some())
        });
        harness::server::wait_for(&url).await;
    }
    workload::run(&client, "ledger", &mut random, 20).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    let truth = client.rows("ledger", &TABLES).await;
    let report = sidecar.run(["backup", "create", "--data-dir", path(&data)]).ok();
    assert_eq!(daemon.stop(), 0);
    assert_archive_holds(&open(&sidecar).await, &BTreeMap::new()).await;
    let restored = scratch.path().join("restored");
    sidecar.restore(&restored, report["restore_point"].as_str().expect("an id"));
    let server = Server::start(&restored, &keys).await;
    assert_eq!(client.at(&server.url).rows("ledger", &TABLES).await, truth);
    server.kill();
}

fn records(range: std::ops::Range<u64>, text: &str) -> Vec<Vec<u8>> {
    range.map(|n| record(n as i64 * 1000, text.as_bytes())).collect()
}

/// Bytes of one commit of [`records`]: all are alike.
fn commits(first: u64, records: &[Vec<u8>]) -> Vec<u8> {
    (first..)
        .zip(records)
        .flat_map(|(offset, record)| inner_universe::datadir::commit::encode(1, Offset(offset), 0, 1, record))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_cut_behind_the_archive_while_it_is_followed_forks_and_both_branches_stay_restorable() {
    let rounds = if tools::all() { 12 } else { 3 };
    let mut random = Random::from_env();
    let synthetic = Synthetic::new();
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let mut history = records(0..2000, "shared by all");
    let segment = synthetic.segment(1, 0, &history);
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &[("ARCHIVE__FLUSH_INTERVAL", "20ms")], &[]);
    let mut branches: Vec<Vec<Vec<u8>>> = Vec::new();
    for round in 0..rounds {
        daemon.wait_archived(history.len() as u64 - 1);
        branches.push(history.clone());
        // Commits of the same size take the place of others, sometimes fewer, sometimes more of them.
        let keep = history.len() as u64 - 1 - random.below(1000);
        let new = 1 + random.below(1500);
        history.truncate(keep as usize);
        history.extend(records(keep..keep + new, &format!("branch number {round:03}")));
        let len = 10 + commits(0, &history[..keep as usize]).len() as u64;
        let file = std::fs::File::options().write(true).open(&segment).expect("the segment");
        file.set_len(len).expect("cut");
        let tail = commits(keep, &history[keep as usize..]);
        // All at once or in pieces, as a server would write.
        for piece in tail.chunks(tail.len().div_ceil(1 + random.below(4) as usize)) {
            use std::io::Write;
            let mut file = std::fs::File::options().append(true).open(&segment).expect("the segment");
            file.write_all(piece).expect("append");
            tokio::time::sleep(Duration::from_millis(random.below(60))).await;
        }
        let wanted = branches.len() as u32 + 1;
        daemon.wait("the fork", |status| {
            status.databases.first().is_some_and(|database| {
                database.timeline.is_some_and(|timeline| timeline.0 == wanted)
                    && database.archived_offset == Some(Offset(history.len() as u64 - 1))
            })
        });
    }
    branches.push(history);
    sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]).ok();
    assert_eq!(daemon.stop(), 0);
    let repository = open(&sidecar).await;
    for (timeline, branch) in (1..).zip(&branches) {
        let target = synthetic.dir.path().join(format!("restored-{timeline}"));
        let request = RestoreRequest {
            target: Target::Offset(Offset(branch.len() as u64 - 1)),
            timeline: Some(inner_universe::ids::TimelineId(timeline)),
            ..RestoreRequest::default()
        };
        synthetic::restore(&repository, &request, &target).await.expect("restore");
        let restored = std::fs::read(log_of(&target).join("00000000000000000000.stdb.log")).expect("the segment");
        assert_eq!(restored[10..], commits(0, branch), "timeline {timeline}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn databases_that_appear_and_vanish_are_followed_and_left() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    let mut daemon = Daemon::start(&sidecar, &data, &[], &[]);
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    for name in ["one", "two", "three"] {
        client.publish(name, tools::wasm("workload_module")).await;
    }
    let followed = |names: &'static [&str]| {
        move |status: &inner_universe::daemon::state::DaemonStatus| {
            let mut found: Vec<_> = status.databases.iter().map(|database| database.name.as_str()).collect();
            found.sort_unstable();
            found == names && status.databases.iter().all(|database| database.archived_offset.is_some())
        }
    };
    daemon.wait("three databases", followed(&["one", "three", "two"]));
    // What was made for the new databases holds them all, without anyone asking.
    daemon.wait("a restore point", |status| {
        status.last_restore_point.is_some_and(|id| {
            let shown = sidecar.run(["backup", "show", &id.to_string()]).ok();
            shown["databases"].as_array().is_some_and(|databases| databases.len() == 3)
        })
    });
    client.delete("two").await;
    daemon.wait("the database to be left", followed(&["one", "three"]));
    assert_eq!(daemon.stop(), 0);
    let restored = scratch.path().join("restored");
    let listed = sidecar.run(["backup", "list"]).ok();
    let with_all = listed["restore_points"]
        .as_array()
        .expect("points")
        .iter()
        .find(|point| point["databases"].as_array().is_some_and(|databases| databases.len() == 3));
    sidecar.restore(&restored, with_all.expect("a point with all")["id"].as_str().expect("an id"));
    let again = Server::start(&restored, &keys).await;
    let served = client.at(&again.url).try_sql("two", "select * from journal").await;
    assert!(served.is_ok(), "the deleted database is served again: {served:?}");
    again.kill();
    server.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn schedules_are_kept_and_a_run_that_was_missed_is_made_up_for_once() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..100, "scheduled"));
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let often = [("SCHEDULE__RESTORE_POINT", "* * * * * *"), ("SCHEDULE__VERIFY", "*/2 * * * * *")];
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &often, &[]);
    let status = daemon.wait("both schedules to have run", |status| {
        status.schedules.len() == 2 && status.schedules.iter().all(|schedule| schedule.last_ok == Some(true))
    });
    assert!(status.schedules.iter().all(|schedule| schedule.next_run > schedule.last_run));
    assert_eq!(daemon.stop(), 0);
    let shown = sidecar.run(["status", "--data-dir", path(&synthetic.path())]).ok();
    assert_eq!(shown["schedules"].as_array().map(Vec::len), Some(2), "{shown}");
    assert_eq!(shown["daemon"]["running"], false);
    let points = || sidecar.run(["backup", "list"]).ok()["restore_points"].as_array().expect("points").len();

    // Down for several runs of a schedule that comes once a year: the last one counts as missed, and is run once.
    let kept = std::fs::read_dir(sidecar.state_dir()).expect("the state").flatten().map(|entry| entry.path());
    let kept = kept.map(|dir| dir.join("schedules/restore_point")).find(|path| path.is_file()).expect("the last run");
    std::fs::write(&kept, "2020-01-01T00:00:00Z").expect("turn back the last run");
    let before = points();
    let yearly = [("SCHEDULE__RESTORE_POINT", "0 0 0 1 1 *"), ("SCHEDULE__TIME_ZONE", "Europe/Berlin")];
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &yearly, &[]);
    daemon.wait("the missed run", |status| status.schedules.iter().any(|schedule| schedule.last_ok == Some(true)));
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(daemon.stop(), 0);
    assert_eq!(points(), before + 1);
    // It was made up for: the next start has nothing to make up.
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &yearly, &[]);
    daemon.wait_archived(99);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(daemon.stop(), 0);
    assert_eq!(points(), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_meant_for_the_server_reach_it_and_it_stops_with_the_sidecar() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..10, "under a server"));
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let heard = synthetic.dir.path().join("heard");
    let told = |signal: &str| format!("trap 'echo {signal} >> {}' {signal};", heard.display());
    let script = ["HUP", "USR1", "USR2"].map(told).concat()
        + &format!(
            "trap 'echo TERM >> {0}; exit 0' TERM; echo ready >> {0}; while :; do sleep 0.05; done",
            heard.display()
        );
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &[], &["sh", "-c", &script]);
    daemon.wait("the server", |status| status.server.as_ref().is_some_and(|server| server.pid.is_some()));
    let read = || std::fs::read_to_string(&heard).unwrap_or_default();
    let wait = |expected: &str| {
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while read() != expected {
            assert!(std::time::Instant::now() < deadline, "{expected:?} expected, {:?} heard", read());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let mut expected = String::from("ready\n");
    wait(&expected);
    for signal in ["HUP", "USR1", "USR2", "HUP"] {
        daemon.signal(signal);
        expected += &format!("{signal}\n");
        wait(&expected);
    }
    assert_eq!(daemon.stop(), 0);
    wait(&(expected + "TERM\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_was_killed_goes_on_at_once_and_a_copy_of_its_notes_takes_nothing() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let server = Server::start(&data, &keys).await;
    server.client().await.publish("ledger", tools::wasm("workload_module")).await;
    // Whoever had to wait for it would wait longer than any test.
    let sidecar = Sidecar::at(&scratch.path().join("repository")).and("REPOSITORY__LEASE_DURATION", "1h");
    let archives = |status: &inner_universe::daemon::state::DaemonStatus| {
        status.databases.first().is_some_and(|database| database.archived_offset.is_some())
    };
    let mut daemon = Daemon::start(&sidecar, &data, &[], &[]);
    assert_eq!(daemon.wait("the archive", archives).lease_token, Some(1));
    sidecar.run(["status", "--ready", "--data-dir", path(&data)]).ok();
    daemon.kill();
    let run = sidecar.run(["status", "--ready", "--data-dir", path(&data)]);
    assert_eq!(run.code, 3, "{}", run.stderr);
    assert!(run.json["reasons"][0].as_str().is_some_and(|reason| reason.contains("has died")), "{}", run.json);
    let mut daemon = Daemon::start(&sidecar, &data, &[], &[]);
    assert_eq!(daemon.wait("the archive again", archives).lease_token, Some(2));

    let copy = Sidecar::with(&sidecar.repository).and("REPOSITORY__LEASE_DURATION", "1h");
    let from = sidecar.state_dir().join(".");
    let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(copy.state_dir()).status();
    assert!(copied.expect("cp").success());
    let refused = copy.run(["run", "--no-wait", "--data-dir", path(&data)]);
    assert!(refused.fails_with(5).contains("is writing to this repository"));
    assert_eq!(daemon.wait("the archive still", archives).lease_token, Some(2));
    assert_eq!(daemon.stop(), 0);
    server.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_appends_behind_a_torn_header_and_would_drop_is_archived_told_of_and_comes_back() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let dir = |name: &str| scratch.path().join(name);
    let (data, keys) = (dir("data"), dir("keys"));
    let sidecar = Sidecar::at(&dir("repository"));
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    let mut random = Random::from_env();
    workload::run(&client, "ledger", &mut random, 40).await;
    server.written().await;
    let mut daemon = Daemon::start(&sidecar, &data, &[("ARCHIVE__FLUSH_INTERVAL", "20ms")], &[]);
    daemon.wait_archived(30);
    server.kill();
    // The power goes while a commit is written: 13 bytes of its header reach the disk.
    let replica = inner_universe::datadir::DataDir::open(&data).expect("open").replicas().expect("replicas").remove(0);
    let segment = inner_universe::datadir::log::segments(&replica.log_path()).expect("segments").remove(0).path;
    let bytes = std::fs::read(&segment).expect("the segment");
    let (mut at, mut last) = (10, 10);
    while let Frame::Commit(commit) = Frame::parse(1, &bytes[at..]) {
        last = at;
        at += commit.bytes.len();
    }
    let file = std::fs::File::options().write(true).open(&segment).expect("the segment");
    file.set_len(last as u64 + 13).expect("cut");

    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    workload::run(&client, "ledger", &mut random, 60).await;
    server.written().await;
    let truth = client.rows("ledger", &TABLES).await;
    let end = inner_universe::datadir::log::end(&replica.log_path()).expect("the log's end");
    assert!(end.0 > 90, "the log is read to {end}");
    daemon.wait_archived(end.0 - 1);
    let label = ["backup", "create", "--label", "before-the-restart", "--data-dir", path(&data)];
    sidecar.run(label).ok();
    server.kill();
    let server = Server::start(&data, &keys).await;
    let after = server.client().await.rows("ledger", &TABLES).await;
    let is_told = |status: &inner_universe::daemon::state::DaemonStatus| {
        status.databases[0].events.iter().any(|event| event.message.contains("has written on behind 13 bytes"))
    };
    if after == truth {
        println!("this server cuts a torn header off, and loses nothing");
        assert!(daemon.status().is_none_or(|status| !is_told(&status)), "something is told that is not so");
    } else {
        println!("this server dropped what it had appended");
        daemon.wait("the loss to be told", is_told);
    }
    server.kill();
    assert_eq!(daemon.stop(), 0);
    let restored = dir("restored");
    sidecar.restore(&restored, "label:before-the-restart");
    let server = Server::start(&restored, &keys).await;
    assert!(server.client().await.rows("ledger", &TABLES).await == truth, "what was archived comes back");
}
