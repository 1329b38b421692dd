//! Compaction: fewer objects, the same history.

use std::time::Duration;

use harness::daemon::Daemon;
use harness::s3::{ACCESS_KEY, BUCKET, S3, SECRET_KEY};
use harness::sidecar::{Sidecar, path};
use harness::synthetic::{Synthetic, log_of, record};
use harness::tools;
use harness::workload::Random;
use inner_universe::config::RepositoryConfig;
use inner_universe::datadir::commit::encode;
use inner_universe::ids::{Offset, TimelineId};
use inner_universe::repository::Repository;
use inner_universe::repository::crypto::Keyring;

fn commits(first: u64, n: u64, text: &str) -> Vec<u8> {
    (first..first + n)
        .flat_map(|at| encode(1, Offset(at), 0, 1, &record(at as i64 * 1000, format!("{text} {at:08}").as_bytes())))
        .collect()
}

/// Archives in hundreds of small objects while they are merged, cuts the log inside a merged one, goes on, and restores.
async fn merged_objects_restore_at_any_offset(encrypted: bool, server: Option<&S3>) {
    let mut random = Random::from_env();
    let synthetic = Synthetic::new();
    let mut sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let (mut settings_of_store, mut config) = (Vec::new(), RepositoryConfig::default());
    if let Some(server) = server {
        sidecar = Sidecar::with(&format!("s3://{BUCKET}/merged"));
        settings_of_store = server.settings();
        config.endpoint = Some(server.endpoint.clone());
        config.region = Some("us-east-1".into());
        config.access_key_id = Some(ACCESS_KEY.to_owned().try_into().expect("a key"));
        config.secret_access_key = Some(SECRET_KEY.to_owned().try_into().expect("a secret"));
        sidecar = sidecar.configured(settings_of_store.clone());
    }
    let identity = synthetic.dir.path().join("identity.txt");
    if encrypted {
        let key = sidecar.run(["key", "generate", "--output", path(&identity)]).ok();
        let recipient = key["recipient"].as_str().expect("a recipient").to_owned();
        settings_of_store.push(("REPOSITORY__RECIPIENTS".into(), recipient));
        sidecar = sidecar.configured(settings_of_store);
    }
    let segment = synthetic.segment(1, 0, &[]);
    let header = std::fs::read(&segment).expect("the header");
    let mut log = header.clone();
    let append = |bytes: &[u8]| {
        use std::io::Write;
        let mut file = std::fs::File::options().append(true).open(&segment).expect("the segment");
        file.write_all(bytes).expect("append");
    };
    let settings = [
        ("ARCHIVE__FLUSH_INTERVAL", "10ms"),
        ("ARCHIVE__COMPACTION_INTERVAL", "1s"),
        ("ARCHIVE__COMPACTION_GRACE", "1s"),
    ];
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &settings, &[]);
    let mut written = 0;
    while written < 6000 {
        let n = 10 + random.below(30);
        let bytes = commits(written, n, "before the cut");
        append(&bytes);
        log.extend(&bytes);
        written += n;
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
    daemon.wait_archived(written - 1);
    let repository = Repository::open(&sidecar.repository, &config, Keyring::default()).await.expect("open");
    let database = repository.databases().await.expect("databases")[0];
    let levels = async || {
        let entries = repository.log_entries(&database, TimelineId(1)).await.expect("the log");
        (entries.iter().filter(|entry| entry.level == 0).count(), entries.iter().map(|entry| entry.level).max())
    };
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while levels().await.0 > 3 {
        assert!(std::time::Instant::now() < deadline, "small objects stay: {}", daemon.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(levels().await.1 >= Some(1));

    // The log loses its end, in the middle of a merged object, and goes on otherwise.
    let first_branch = log.clone();
    let keep = written - 700 - random.below(2000);
    let kept = header.len() + commits(0, keep, "before the cut").len();
    let file = std::fs::File::options().write(true).open(&segment).expect("the segment");
    file.set_len(kept as u64).expect("cut");
    log.truncate(kept);
    let bytes = commits(keep, 500, "after the cut!");
    append(&bytes);
    log.extend(&bytes);
    daemon.wait("the fork", |status| {
        status.databases.first().is_some_and(|database| {
            database.timeline == Some(TimelineId(2)) && database.archived_offset == Some(Offset(keep + 499))
        })
    });
    sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]).ok();
    assert_eq!(daemon.stop(), 0);

    let identity_flags: &[&str] = if encrypted { &["--identity", path(&identity)] } else { &[] };
    let verified = sidecar.run([&["verify"], identity_flags].concat()).ok();
    assert_eq!(verified["findings"].as_array().map(Vec::len), Some(0), "{verified}");
    for (timeline, branch, last) in [("1", &first_branch, written - 1), ("2", &log, keep + 499)] {
        let mut offsets = vec![last, keep - 1, keep, 0];
        offsets.extend((0..6).map(|_| random.below(last + 1)));
        for offset in offsets {
            let restored = synthetic.dir.path().join("restored");
            let target = format!("offset:{offset}");
            let arguments = ["restore", "--data-dir", path(&restored), "--timeline", timeline, "--to", &target];
            let report = sidecar.run([&arguments, identity_flags].concat()).ok();
            assert_eq!(report["databases"][0]["offset"], offset);
            let found = std::fs::read(log_of(&restored).join("00000000000000000000.stdb.log")).expect("the log");
            assert_eq!(found, branch[..found.len()], "timeline {timeline}, offset {offset}");
            let expected = if timeline == "2" && offset >= keep {
                kept + commits(keep, offset + 1 - keep, "after the cut!").len()
            } else {
                header.len() + commits(0, offset + 1, "before the cut").len()
            };
            assert_eq!(found.len(), expected, "timeline {timeline}, offset {offset}");
            std::fs::remove_dir_all(&restored).expect("remove");
        }
        // The time of a transaction finds it, in merged objects too.
        let offset = random.below(last);
        let restored = synthetic.dir.path().join("restored");
        let time = jiff::Timestamp::from_microsecond(offset as i64 * 1000 + 500).expect("a time");
        let target = format!("time:{time}");
        let arguments =
            ["restore", "--data-dir", path(&restored), "--timeline", timeline, "--to", &target, "--dry-run"];
        let plan = sidecar.run([&arguments, identity_flags].concat()).ok();
        assert_eq!(plan["databases"][0]["offset"], offset);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn merged_objects_restore_at_any_offset_of_both_branches_of_a_fork_inside_one() {
    merged_objects_restore_at_any_offset(false, None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sealed_objects_are_merged_on_s3_without_a_key_and_restore_as_well() {
    let Some(server) = S3::moto().await else { return };
    merged_objects_restore_at_any_offset(true, Some(&server)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn merged_objects_are_merged_again_in_parts_on_s3() {
    if !tools::all() {
        eprintln!("skipped: it takes half a minute and runs with `cargo xtask test --all`");
        return;
    }
    let Some(server) = S3::moto().await else { return };
    let mut random = Random::from_env();
    let synthetic = Synthetic::new();
    let sidecar = Sidecar::with(&format!("s3://{BUCKET}/top")).configured(server.settings());
    let segment = synthetic.segment(1, 0, &[]);
    let settings = [
        ("ARCHIVE__FLUSH_INTERVAL", "10ms"),
        ("ARCHIVE__COMPACTION_INTERVAL", "1s"),
        ("ARCHIVE__COMPACTION_GRACE", "1s"),
    ];
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &settings, &[]);
    let at_top = async || {
        let url = format!("{}/{BUCKET}?list-type=2&max-keys=1000", server.endpoint);
        let listed = harness::client::http().get(url).send().await.expect("an answer").text().await.expect("a list");
        listed.contains("/log/L2/")
    };
    let mut written = 0;
    let deadline = std::time::Instant::now() + Duration::from_secs(180);
    // Text that does not compress, a megabyte a second: each pass makes one object of level 1, sixteen of them one of level 2.
    while !at_top().await {
        assert!(std::time::Instant::now() < deadline, "no object of level 2: {}", daemon.log());
        for _ in 0..10 {
            let noise: Vec<u8> = (0..13_000).flat_map(|_| random.draw().to_le_bytes()).collect();
            let bytes = encode(1, Offset(written), 0, 1, &record(written as i64 * 1000, &noise));
            use std::io::Write;
            let mut file = std::fs::File::options().append(true).open(&segment).expect("the segment");
            file.write_all(&bytes).expect("append");
            written += 1;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    daemon.wait_archived(written - 1);
    sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]).ok();
    assert_eq!(daemon.stop(), 0);
    let restored = synthetic.dir.path().join("restored");
    sidecar.restore(&restored, "latest");
    let found = std::fs::read(log_of(&restored).join("00000000000000000000.stdb.log")).expect("the log");
    assert!(found == std::fs::read(&segment).expect("the segment"), "the restored log differs");
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
}
