//! Bundles: a database in one file, to another machine; hostile ones are refused and nothing is written outside.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::tools;
use harness::workload::{self, Random, TABLES};
use inner_universe::bundle;
use inner_universe::ids::ContentHash;

/// Everything below a directory, by name.
fn listing(dir: &Path) -> BTreeMap<PathBuf, ContentHash> {
    let (mut found, mut dirs) = (BTreeMap::new(), vec![dir.to_owned()]);
    while let Some(next) = dirs.pop() {
        for entry in std::fs::read_dir(next).expect("list").flatten() {
            let file = entry.path();
            if file.is_dir() {
                dirs.push(file);
            } else {
                let content = ContentHash::of(&std::fs::read(&file).expect("read"));
                found.insert(file, content);
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_carries_a_database_to_another_machine_under_another_name_and_with_keys_of_its_own() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let mut random = Random::from_env();
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    workload::run(&client, "ledger", &mut random, 200).await;
    server.written().await;
    let truth = client.rows("ledger", &TABLES).await;
    // No repository is named: a bundle needs none. The server keeps running.
    let identity = scratch.path().join("identity.txt");
    let sidecar = Sidecar::at(&scratch.path().join("unused"));
    let key = sidecar.run(["key", "generate", "--output", path(&identity)]).ok();
    let recipient = key["recipient"].as_str().expect("a recipient").to_owned();
    let (plain, sealed) = (scratch.path().join("plain.stb"), scratch.path().join("sealed.stb"));
    let create = |output: &Path, more: &[&str]| {
        let words = ["backup", "create", "--data-dir", path(&data), "--output", path(output)];
        sidecar.run([&words[..], more].concat())
    };
    let report = create(&plain, &["--label", "to the new house"]).ok();
    assert_eq!(report["bytes_written"], std::fs::metadata(&plain).expect("a file").len());
    assert_eq!(report["bundle"], path(&plain));
    create(&sealed, &["--recipient", &recipient, "--key-dir", path(&keys)]).ok();
    assert!(create(&plain, &[]).fails_with(6).contains("there already"));
    assert!(!scratch.path().join("unused").exists());
    let text = |file: &Path| String::from_utf8_lossy(&std::fs::read(file).expect("read")).into_owned();
    assert!(!text(&sealed).contains("BEGIN PRIVATE KEY"));
    let hidden: Vec<_> =
        std::fs::read_dir(scratch.path()).expect("list").flatten().map(|entry| entry.file_name()).collect();
    assert!(hidden.iter().all(|name| !name.to_string_lossy().contains("inner-universe-bundle")), "{hidden:?}");
    server.kill();

    // As it was, with the keys that the old tokens need.
    let moved = scratch.path().join("moved");
    assert!(
        sidecar
            .run(["restore", "--input", path(&sealed), "--data-dir", path(&moved)])
            .fails_with(2)
            .contains("--identity")
    );
    let words = ["restore", "--input", path(&sealed), "--data-dir", path(&moved), "--identity", path(&identity)];
    let report = sidecar.run(words).ok();
    let server = Server::start(&moved, Path::new(report["keys"].as_str().expect("keys"))).await;
    let there = client.at(&server.url);
    assert_eq!(there.rows("ledger", &TABLES).await, truth);
    workload::run(&there, "ledger", &mut random, 5).await;
    server.kill();

    // Under another name, with new keys, and the sidecar's own identity signed anew.
    let own = scratch.path().join("token");
    std::fs::write(&own, &client.token).expect("write");
    let renamed = scratch.path().join("renamed");
    let words = [
        "restore",
        "--input",
        path(&plain),
        "--data-dir",
        path(&renamed),
        "--as",
        "second-ledger",
        "--new-identity-keys",
    ];
    let settings = vec![("SPACETIMEDB_CONFIG__TOKEN_FILE".into(), path(&own).into())];
    let report = sidecar.clone().configured(settings).run(words).ok();
    assert_eq!(report["databases"][0]["name"], "second-ledger");
    let server = Server::start(&renamed, Path::new(report["keys"].as_str().expect("keys"))).await;
    let token = std::fs::read_to_string(report["token"].as_str().expect("a token")).expect("read");
    let owner = server.client().await.with_token(&token);
    assert_eq!(owner.rows("second-ledger", &TABLES).await, truth);
    let publish = owner.try_publish("second-ledger", tools::wasm("workload_module")).await;
    assert!(publish.is_ok(), "who owned it owns it: {publish:?}");
    let old = server.client().await.with_token(&client.token);
    assert!(
        old.try_publish("second-ledger", tools::wasm("workload_module")).await.is_err(),
        "an old token is worth nothing"
    );
    // The old name is free.
    assert!(server.client().await.try_publish("ledger", tools::wasm("workload_module")).await.is_ok());
}

#[test]
fn hostile_bundles_are_refused_and_nothing_is_written_outside() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let synthetic = harness::synthetic::Synthetic::new();
    let records: Vec<_> = (0..20).map(|n| harness::synthetic::record(n, b"payload")).collect();
    synthetic.segment(1, 0, &records);
    let sidecar = Sidecar::at(&scratch.path().join("unused"));
    let good = scratch.path().join("good.stb");
    sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path()), "--output", path(&good)]).ok();
    let bytes = std::fs::read(&good).expect("read");
    let record = |name: &str, content: &[u8]| {
        let mut head = (name.len() as u32).to_le_bytes().to_vec();
        head.extend((content.len() as u64).to_le_bytes());
        head.extend(name.as_bytes());
        let hash = *blake3::Hasher::new().update(&head).update(content).finalize().as_bytes();
        let mut record = head;
        record.extend(content);
        record.extend(hash);
        record
    };
    let with_first = |record: Vec<u8>| {
        let mut hostile = bytes[..16].to_vec();
        hostile.extend(record);
        hostile.extend(&bytes[16..]);
        hostile
    };
    let mut newer = bytes.clone();
    newer[8] = 2;
    let mut flipped = bytes.clone();
    flipped[bytes.len() / 2] ^= 1;
    let mut longer = bytes.clone();
    longer.push(0);
    // A capture of eight gigabytes of zeros, under the right name: all hashes are right.
    let bomb = {
        let mut tar = Vec::new();
        let mut header = tar::Header::new_gnu();
        header.set_path("program-bytes/zeros").expect("a name");
        header.set_size(8 << 30);
        header.set_mode(0o644);
        header.set_cksum();
        tar.extend(header.as_bytes());
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).expect("an encoder");
        std::io::Write::write_all(&mut encoder, &tar).expect("compress");
        let zeros = vec![0_u8; 64 << 20];
        for _ in 0..128 {
            std::io::Write::write_all(&mut encoder, &zeros).expect("compress");
        }
        encoder.finish().expect("a frame")
    };
    let id = ContentHash::of(&bomb);
    assert!(bomb.len() < 2 << 20);
    let before = listing(scratch.path());
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("outside.stb", with_first(record("../escaped", b"x")), "names what is no object"),
        ("root.stb", with_first(record("/tmp/escaped", b"x")), "names what is no object"),
        ("deep.stb", with_first(record("instance/../../escaped", b"x")), "names what is no object"),
        ("lease.stb", with_first(record("lease.json", b"x")), "names what is no object"),
        ("twice.stb", with_first(record("repository.json", b"x")), "twice"),
        (
            "huge.stb",
            with_first({
                let mut head = 4_u32.to_le_bytes().to_vec();
                head.extend(u64::MAX.to_le_bytes());
                head
            }),
            "longer than any is",
        ),
        ("newer.stb", newer, "upgrade"),
        ("flipped.stb", flipped, "is damaged at byte"),
        ("longer.stb", longer, "something follows its end"),
        ("empty.stb", Vec::new(), "no bundle"),
        ("other.stb", b"PK\x03\x04 this is something else entirely".to_vec(), "no bundle"),
    ];
    let target = scratch.path().join("target");
    for (name, hostile, said) in &cases {
        let file = scratch.path().join(name);
        std::fs::write(&file, hostile).expect("write");
        let message = sidecar.run(["restore", "--input", path(&file), "--data-dir", path(&target)]).fails_with(1);
        assert!(message.contains(said), "{name}: {message}");
        std::fs::remove_file(&file).expect("remove");
        assert_eq!(listing(scratch.path()), before, "{name}");
    }
    let file = scratch.path().join("cut.stb");
    let mut random = Random::from_env();
    for cut in (0..40).map(|_| random.below(bytes.len() as u64) as usize).chain([bytes.len() - 1]) {
        std::fs::write(&file, &bytes[..cut]).expect("write");
        let message = sidecar.run(["restore", "--input", path(&file), "--data-dir", path(&target)]).fails_with(1);
        assert!(message.contains("ends within") || message.contains("no bundle"), "{cut}: {message}");
    }
    std::fs::remove_file(&file).expect("remove");
    // Links are no links once unpacked, and a bomb is not let off.
    let keyring = inner_universe::repository::crypto::Keyring::default();
    let error = inner_universe::repository::instance::read(&id, &bomb, &keyring).expect_err("a bomb");
    assert!(error.to_string().contains("larger than"), "{error}");
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    tar.append_link(&mut header, "program-bytes/link", "/etc/passwd").expect("a link");
    let linked = zstd::encode_all(&tar.into_inner().expect("a tar")[..], 1).expect("compress");
    let (into, keys) = (scratch.path().join("into"), scratch.path().join("into.keys"));
    std::fs::create_dir(&into).expect("create");
    let extracted =
        inner_universe::repository::instance::extract(&ContentHash::of(&linked), &linked, &keyring, &into, &keys);
    assert!(extracted.expect_err("a link").to_string().contains("no file"));
    let unpacked = scratch.path().join("unpacked");
    bundle::unpack(&good, &unpacked).expect("a good one");
    sidecar.run(["restore", "--input", path(&good), "--data-dir", path(&target)]).ok();
}
