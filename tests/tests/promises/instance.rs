//! A restored instance keeps names, identities, owners' tokens and further publishes; keys are captured only as allowed.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::tools;
use harness::workload::{self, Random, TABLES};
use serde_json::json;

struct Instance {
    scratch: tempfile::TempDir,
    sidecar: Sidecar,
}

impl Instance {
    fn new() -> Self {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let sidecar = Sidecar::at(&scratch.path().join("repository"));
        Self { scratch, sidecar }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    async fn server(&self) -> Server {
        Server::start(&self.path("data"), &self.path("keys")).await
    }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("metadata").permissions().mode() & 0o777
}

#[tokio::test(flavor = "multi_thread")]
async fn names_identities_owners_tokens_and_publishes_survive_with_the_keys_sealed() {
    let instance = Instance::new();
    let identity_file = instance.path("identity.txt");
    let key = instance.sidecar.run(["key", "generate", "--output", path(&identity_file)]).ok();
    let recipient = key["recipient"].as_str().expect("a recipient").to_owned();
    assert_eq!(mode(&identity_file), 0o600);

    let mut random = Random::from_env();
    let server = instance.server().await;
    let (one, other) = (server.client().await, server.client().await);
    let first = one.publish("ledger", tools::wasm("workload_module")).await;
    let second = other.publish("universe", tools::wasm("inner_universe_module")).await;
    workload::run(&one, "ledger", &mut random, 40).await;
    other.call("universe", "create_entity", json!(["a", "star", "{}"])).await.expect("create");
    server.written().await;
    let rows = one.rows("ledger", &TABLES).await;
    let (data, keys) = (instance.path("data"), instance.path("keys"));
    let create = ["backup", "create", "--data-dir", path(&data), "--key-dir", path(&keys), "--recipient", &recipient];
    let report = instance.sidecar.run(create).ok();
    assert_eq!(report["databases"].as_array().map(Vec::len), Some(2));
    server.kill();
    let private_key = std::fs::read(keys.join("id_ecdsa")).expect("the key");
    std::fs::remove_dir_all(&data).expect("destroy");
    std::fs::remove_dir_all(&keys).expect("destroy");

    // No byte of what is sealed lies in the repository.
    let secret = private_key.windows(40).nth(40).expect("some bytes").to_vec();
    for file in files(&instance.path("repository")) {
        let bytes = std::fs::read(&file).expect("read");
        assert!(!bytes.windows(secret.len()).any(|window| window == secret), "{}", file.display());
    }
    let target = instance.path("restored");
    let restore = ["restore", "--data-dir", path(&target)];
    assert!(instance.sidecar.run(restore).fails_with(2).contains("--identity"));
    let wrong = instance.path("wrong.txt");
    instance.sidecar.run(["key", "generate", "--output", path(&wrong)]).ok();
    let run = instance.sidecar.run(["restore", "--data-dir", path(&target), "--identity", path(&wrong)]);
    assert!(run.fails_with(2).contains("right identity"));
    assert!(!target.exists());
    let verify = instance.sidecar.run(["verify", "--identity", path(&identity_file)]).ok();
    assert_eq!(verify["findings"].as_array().map(Vec::len), Some(0));
    let verify = instance.sidecar.run(["verify"]);
    assert_eq!((verify.code, &verify.json["findings"][0]["kind"]), (3, &json!("not-readable")));

    let restore = ["restore", "--data-dir", path(&target), "--identity", path(&identity_file)];
    let report = instance.sidecar.run(restore).ok();
    let keys = PathBuf::from(report["keys"].as_str().expect("the keys"));
    assert_eq!(mode(&keys.join("id_ecdsa")), 0o600);
    assert_eq!(std::fs::read(keys.join("id_ecdsa")).expect("the key"), private_key);
    let server = Server::start(&target, &keys).await;
    let (one, other) = (one.at(&server.url), other.at(&server.url));
    assert_eq!(one.rows("ledger", &TABLES).await, rows);
    other.call("universe", "update_entity", json!(["a", "[]"])).await.expect("the old token is worth something");
    other.try_publish("ledger", tools::wasm("workload_module")).await.expect_err("not the owner");
    assert_eq!(one.publish("ledger", tools::wasm("workload_module_v2")).await, first);
    assert_eq!(other.publish("universe", tools::wasm("inner_universe_module")).await, second);
    workload::run(&one, "ledger", &mut random, 10).await;
    let third = one.publish("third", tools::wasm("workload_module")).await;
    assert!(third != first && third != second);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_database_of_several_is_restored_alone_and_labels_find_restore_points() {
    let instance = Instance::new();
    let mut random = Random::from_env();
    let server = instance.server().await;
    let client = server.client().await;
    let identity = client.publish("ledger", tools::wasm("workload_module")).await;
    client.publish("universe", tools::wasm("inner_universe_module")).await;
    workload::run(&client, "ledger", &mut random, 20).await;
    server.written().await;
    let rows = client.rows("ledger", &TABLES).await;
    let data = instance.path("data");
    let labelled = instance.sidecar.run(["backup", "create", "--data-dir", path(&data), "--label", "before"]).ok();
    assert_eq!(labelled["label"], "before");
    workload::run(&client, "ledger", &mut random, 20).await;
    instance.sidecar.backup(&data);
    server.kill();

    let list = instance.sidecar.run(["backup", "list"]).ok();
    assert_eq!(list["restore_points"].as_array().map(Vec::len), Some(2));
    let id = list["restore_points"][0]["id"].as_str().expect("an id");
    assert_eq!(instance.sidecar.run(["backup", "show", id]).ok()["label"], "before");
    instance.sidecar.run(["backup", "show", "01ARZ3NDEKTSV4RRFFQ69G5FAV"]).fails_with(4);

    let target = instance.path("restored");
    for name in ["ledger", &identity] {
        let run = ["restore", "--data-dir", path(&target), "--to", "label:before", "--database", name];
        let report = instance.sidecar.run(run).ok();
        assert_eq!(report["databases"].as_array().map(Vec::len), Some(1));
        let server = Server::start(&target, &instance.path("keys")).await;
        let client = client.at(&server.url);
        assert_eq!(client.rows("ledger", &TABLES).await, rows);
        client.try_sql("universe", "select * from config").await.expect_err("left out");
        // The name is free again.
        client.publish("universe", tools::wasm("workload_module")).await;
        server.kill();
        std::fs::remove_dir_all(&target).expect("remove");
    }
    let run = instance.sidecar.run(["restore", "--data-dir", path(&target), "--database", "nobody"]);
    assert!(run.fails_with(2).contains("it has"));
    let run = instance.sidecar.run(["restore", "--data-dir", path(&target), "--to", "offset:5"]);
    assert!(run.fails_with(2).contains("--database"));
    instance.sidecar.run(["restore", "--data-dir", path(&target), "--to", "label:nothing"]).fails_with(4);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_kept_plain_only_when_that_is_allowed() {
    let instance = Instance::new();
    let server = instance.server().await;
    server.client().await.publish("ledger", tools::wasm("workload_module")).await;
    server.written().await;
    let (data, keys) = (instance.path("data"), instance.path("keys"));
    let create = ["backup", "create", "--data-dir", path(&data), "--key-dir", path(&keys)];
    assert!(instance.sidecar.run(create).fails_with(2).contains("--allow-plain-keys"));
    assert!(!instance.path("repository").exists(), "a refused backup makes no repository");
    instance.sidecar.run(create.into_iter().chain(["--allow-plain-keys"])).ok();
    let nothing = instance.path("nothing");
    let create = ["backup", "create", "--data-dir", path(&data), "--key-dir", path(&nothing), "--allow-plain-keys"];
    assert!(instance.sidecar.run(create).fails_with(2).contains("--jwt-key-dir"));
    server.kill();
    let (target, key_target) = (instance.path("restored"), instance.path("restored-keys"));
    // An empty directory is as good as none.
    std::fs::create_dir(&key_target).expect("create");
    let restore = ["restore", "--data-dir", path(&target), "--key-dir", path(&key_target)];
    instance.sidecar.run(restore).ok();
    assert_eq!(mode(&key_target.join("id_ecdsa")), 0o600);
    // The same keys stay; other keys that are there are not replaced, or moved aside where that is asked for.
    std::fs::remove_dir_all(&target).expect("remove");
    assert_eq!(instance.sidecar.run(restore).ok()["keys_moved_aside"], serde_json::Value::Null);
    std::fs::remove_dir_all(&target).expect("remove");
    let key = key_target.join("id_ecdsa");
    let ours = std::fs::read(&key).expect("a key");
    std::fs::write(&key, "another").expect("write");
    assert!(instance.sidecar.run(restore).fails_with(6).contains("restored-keys"));
    assert!(!target.exists());
    let report = instance.sidecar.run(restore.into_iter().chain(["--force"])).ok();
    assert_eq!(std::fs::read(&key).expect("a key"), ours);
    let aside = Path::new(report["keys_moved_aside"].as_str().expect("a directory"));
    assert_eq!(std::fs::read(aside.join("id_ecdsa")).expect("a key"), b"another");
    // Keys below the data directory would go with it.
    let inside = target.join("keys");
    let below = ["restore", "--data-dir", path(&target), "--key-dir", path(&inside), "--force"];
    assert!(instance.sidecar.run(below).fails_with(2).contains("--key-dir"));
    assert!(target.join("metadata.toml").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_backup_uploads_only_what_is_new_and_status_tells_the_lag() {
    let instance = Instance::new();
    let mut random = Random::from_env();
    let server = instance.server().await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    workload::run(&client, "ledger", &mut random, 50).await;
    server.written().await;
    let data = instance.path("data");
    let first = instance.sidecar.backup(&data);
    let again = instance.sidecar.backup(&data);
    assert_eq!(again["objects_written"], 1, "only the restore point itself: {again}");
    assert_eq!(first["databases"][0]["offset"], again["databases"][0]["offset"]);
    let status = instance.sidecar.run(["status", "--data-dir", path(&data)]).ok();
    assert_eq!(status["databases"][0]["lag_transactions"], 0);
    workload::run(&client, "ledger", &mut random, 10).await;
    server.written().await;
    let status = instance.sidecar.run(["status", "--data-dir", path(&data)]).ok();
    let database = &status["databases"][0];
    let lag = database["log_offset"].as_u64().zip(database["archived_offset"].as_u64()).map(|(log, done)| log - done);
    assert!(lag > Some(0));
    assert_eq!(database["lag_transactions"].as_u64(), lag);
    assert!(database["lag_seconds"].as_f64() > Some(0.0));
    assert_eq!(status["last_restore_point"]["id"], again["restore_point"]);
}

pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).expect("list").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The server's own settings name its keys before any directory that it is given.
#[tokio::test(flavor = "multi_thread")]
async fn keys_in_files_that_the_servers_settings_name_are_captured_and_no_drill_touches_them() {
    let instance = Instance::new();
    let (data, etc) = (instance.path("data"), instance.path("etc"));
    std::fs::create_dir_all(&data).expect("create");
    std::fs::create_dir_all(&etc).expect("create");
    let (private, public) = (etc.join("private.pem"), etc.join("public.pem"));
    let settings = format!(
        "[certificate-authority]\njwt-priv-key-path = \"{}\"\njwt-pub-key-path = \"{}\"\n",
        private.display(),
        public.display()
    );
    std::fs::write(data.join("config.toml"), settings).expect("the server's settings");
    let server = instance.server().await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    let mut random = Random::from_env();
    workload::run(&client, "ledger", &mut random, 10).await;
    server.written().await;
    let key = std::fs::read(&private).expect("the server used the files that its settings name");
    assert!(!instance.path("keys").join("id_ecdsa").exists());

    let identity_file = instance.path("identity.txt");
    let generated = instance.sidecar.run(["key", "generate", "--output", path(&identity_file)]).ok();
    let recipient = generated["recipient"].as_str().expect("a recipient").to_owned();
    let (server_bin, scratch) = (tools::server(), instance.path("drills"));
    let named = |private: &Path, public: &Path| {
        let setting = |name: &str, value: &Path| (format!("SPACETIMEDB_CONFIG__{name}"), path(value).to_owned());
        vec![
            setting("PRIVATE_KEY_FILE", private),
            setting("PUBLIC_KEY_FILE", public),
            setting("SERVER_BIN", &server_bin),
            ("DRILL__SCRATCH_DIR".to_owned(), path(&scratch).to_owned()),
        ]
    };
    let create = ["backup", "create", "--data-dir", path(&data), "--recipient", &recipient];
    let sidecar = instance.sidecar.clone().configured(named(&private, &etc.join("nowhere.pem")));
    assert!(sidecar.run(create).fails_with(2).contains("nowhere.pem is not there"));
    let sidecar = instance.sidecar.clone().configured(named(&private, &public));
    sidecar.run(create).ok();
    server.kill();

    let target = instance.path("restored");
    let restore = ["restore", "--data-dir", path(&target), "--identity", path(&identity_file)];
    let run = sidecar.run(restore).ok();
    let keys = PathBuf::from(run["keys"].as_str().expect("the keys"));
    assert_eq!(std::fs::read(keys.join("id_ecdsa")).expect("the key"), key);
    // The restored settings still name those files; a drill's server gets its own.
    std::fs::remove_dir_all(&etc).expect("destroy");
    let drill = sidecar.run(["drill", "--identity", path(&identity_file)]);
    assert_eq!(drill.code, 0, "{}", drill.stderr);
    assert!(!etc.exists(), "a drill made keys where the live server's are");
}
