//! The bundled module on a real server: initialisation, access, versions, events, import.

use harness::client::{Client, none, some};
use harness::server::Server;
use harness::tools;
use serde_json::{Value, json};

const DATABASE: &str = "iu";

struct Deployed {
    _scratch: tempfile::TempDir,
    server: Server,
    owner: Client,
}

impl Deployed {
    async fn new() -> Self {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let server = Server::start(&scratch.path().join("data"), &scratch.path().join("keys")).await;
        let owner = server.client().await;
        owner.publish(DATABASE, tools::wasm("inner_universe_module")).await;
        Self { _scratch: scratch, server, owner }
    }

    async fn call(&self, reducer: &str, arguments: Value) {
        let result = self.owner.call(DATABASE, reducer, arguments).await;
        result.unwrap_or_else(|error| panic!("{reducer}: {error}"));
    }

    async fn refused(&self, reducer: &str, arguments: Value) -> String {
        self.owner.call(DATABASE, reducer, arguments).await.expect_err(reducer)
    }

    async fn rows(&self, statement: &str) -> Vec<Value> {
        let mut rows = self.owner.sql(DATABASE, statement).await;
        rows.sort_by_key(Value::to_string);
        rows
    }
}

fn identity(client: &Client) -> Value {
    json!({"__identity__": format!("0x{}", client.identity)})
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_publish_initialises_admin_configuration_event_and_status() {
    let deployed = Deployed::new().await;
    let admins = deployed.rows("select * from admin").await;
    assert_eq!(admins.len(), 1);
    assert!(admins[0].to_string().contains(&deployed.owner.identity));
    let events = deployed.rows("select * from event_log").await;
    assert_eq!((events.len(), &events[0][0], &events[0][2]), (1, &json!(1), &json!("SYSTEM_INITIALIZED")));
    let id = events[0][1].as_str().expect("an id");
    assert_eq!((id.len(), id.as_bytes()[14]), (36, b'8'), "a UUID of version 8: {id}");
    let config = deployed.rows("select * from config").await;
    for (key, value) in [("auth_required", "true"), ("max_connections", "100"), ("enable_distribution", "false")] {
        assert!(config.iter().any(|row| row[0] == key && row[1] == value), "{key}");
    }
    let status = deployed.rows("select * from system_status").await;
    assert_eq!(status.len(), 1);
    assert_eq!(status[0][2], json!("0.1.0"));
    // Publishing the same module again initialises nothing anew.
    deployed.owner.publish(DATABASE, tools::wasm("inner_universe_module")).await;
    assert_eq!(deployed.rows("select * from event_log").await, events);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused_members_may_write_and_only_admins_administer() {
    let deployed = Deployed::new().await;
    let stranger = deployed.server.client().await;
    let create = json!(["x", "star", "{}"]);
    let error = stranger.call(DATABASE, "create_entity", create.clone()).await.expect_err("a stranger");
    assert!(error.contains("add_member") || error.contains("unauthorized"), "{error}");
    deployed.call("add_member", json!([identity(&stranger), "a friend"])).await;
    stranger.call(DATABASE, "create_entity", create).await.expect("a member writes");
    let set = json!(["max_connections", "5"]);
    let error = stranger.call(DATABASE, "set_config", set.clone()).await.expect_err("a member administers");
    assert!(error.contains("not an admin"), "{error}");
    deployed.call("grant_admin", json!([identity(&stranger)])).await;
    stranger.call(DATABASE, "set_config", set).await.expect("an admin administers");
    deployed.call("revoke_admin", json!([identity(&stranger)])).await;
    let error = deployed.refused("revoke_admin", json!([identity(&deployed.owner)])).await;
    assert!(error.contains("last admin"), "{error}");
    deployed.call("remove_member", json!([identity(&stranger)])).await;
    stranger.call(DATABASE, "create_entity", json!(["y", "star", "{}"])).await.expect_err("no member any more");
    deployed.call("set_config", json!(["auth_required", "false"])).await;
    stranger.call(DATABASE, "create_entity", json!(["y", "star", "{}"])).await.expect("anybody may write now");
    let events = deployed.rows("select event_type from event_log").await;
    for expected in ["ADMIN_GRANTED", "ADMIN_REVOKED", "MEMBER_ADDED", "MEMBER_REMOVED", "CONFIG_CHANGED"] {
        assert!(events.contains(&json!([expected])), "{expected}");
    }
    let error = deployed.refused("set_config", json!(["max_connections", "many"])).await;
    assert!(error.contains("takes a value like"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_raises_the_version_keeps_the_old_state_and_leaves_an_event() {
    let deployed = Deployed::new().await;
    deployed.call("create_entity", json!(["a", "star", "1"])).await;
    deployed.call("create_entity", json!(["b", "star", "1"])).await;
    deployed.call("update_entity", json!(["a", "2"])).await;
    deployed.call("create_relation", json!(["r", "a", "b", "orbits", "{}"])).await;
    deployed.call("update_relation", json!(["r", "{\"x\":1}"])).await;
    deployed.refused("create_entity", json!(["a", "star", "3"])).await;
    deployed.refused("create_relation", json!(["s", "a", "nowhere", "orbits", "{}"])).await;
    deployed.refused("update_entity", json!(["nowhere", "3"])).await;
    // Deleting an entity takes its relations with it.
    deployed.call("delete_entity", json!(["b"])).await;
    assert!(deployed.rows("select * from relation").await.is_empty());
    let first = deployed.rows("select version_id from state_version where subject_id = 'a' and version = 1").await;
    deployed.call("restore_state_version", json!([first[0][0]])).await;
    let a = deployed.rows("select data, version from entity where entity_id = 'a'").await;
    assert_eq!(a, [json!(["1", 3])]);
    // An entity that comes back goes on counting.
    deployed.call("create_entity", json!(["b", "star", "again"])).await;
    let b = deployed.rows("select version from entity where entity_id = 'b'").await;
    assert_eq!(b, [json!([3])]);
    let deletion = deployed.rows("select version_id from state_version where subject_id = 'b' and version = 2").await;
    assert!(deployed.refused("restore_state_version", json!([deletion[0][0]])).await.contains("deletion"));

    let number = |rows: Vec<Value>| {
        let mut numbers: Vec<u64> = rows.iter().map(|row| row[0].as_u64().expect("a number")).collect();
        numbers.sort_unstable();
        numbers
    };
    let sequences = number(deployed.rows("select sequence from event_log").await);
    assert_eq!(sequences, (1..=sequences.len() as u64).collect::<Vec<_>>(), "no hole in the event log");
    let versions = number(deployed.rows("select version_id from state_version").await);
    assert_eq!(versions, (1..=9).collect::<Vec<_>>());

    // The flags have their effect.
    deployed.call("set_config", json!(["enable_state_versioning", "false"])).await;
    deployed.call("set_config", json!(["enable_audit_log", "false"])).await;
    let before = deployed.rows("select sequence from event_log").await.len();
    deployed.call("update_entity", json!(["a", "5"])).await;
    assert_eq!(deployed.rows("select version_id from state_version").await.len(), 9);
    assert_eq!(deployed.rows("select sequence from event_log").await.len(), before);
    deployed.call("set_config", json!(["enable_metrics", "false"])).await;
    assert!(deployed.refused("record_metric", json!(["m", 1.0, "s", []])).await.contains("enable_metrics"));
}

#[tokio::test(flavor = "multi_thread")]
async fn events_metrics_and_status_are_recorded_and_trimmed() {
    let deployed = Deployed::new().await;
    let data = json!({"Custom": [{"name": "n", "value": {"UInt": 7}}]});
    deployed.call("record_event", json!(["SEEN", some("me"), some("correlation"), data])).await;
    deployed.call("record_event", json!(["SEEN", none(), none(), {"Empty": []}])).await;
    deployed.refused("record_event", json!([" ", none(), none(), {"Empty": []}])).await;
    deployed.call("record_metric", json!(["latency", 1.5, "ms", [{"name": "host", "value": {"String": "a"}}]])).await;
    deployed.call("get_system_status", json!([])).await;
    let status = deployed.rows("select entity_count, event_count from system_status").await;
    assert_eq!(status, [json!([0, 3])]);
    let correlations = deployed.rows("select correlation_id from event_log").await;
    assert!(correlations.contains(&json!(["correlation"])));
    // Too young to go.
    deployed.call("trim_event_log", json!([2, 3600])).await;
    assert_eq!(deployed.rows("select sequence from event_log").await.len(), 3);
    deployed.call("trim_event_log", json!([2, 0])).await;
    assert_eq!(deployed.rows("select sequence from event_log").await, [json!([3])]);
    deployed.call("record_event", json!(["AFTER", none(), none(), {"Empty": []}])).await;
    assert_eq!(deployed.rows("select sequence from event_log").await, [json!([3]), json!([4])]);
    deployed.call("trim_metrics", json!([1])).await;
    assert!(deployed.rows("select * from metric").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn imports_are_idempotent_and_never_replace_history() {
    let deployed = Deployed::new().await;
    let event = |sequence: u64, id: &str| {
        json!({
            "sequence": sequence, "event_id": id, "event_type": "OLD", "source": none(),
            "timestamp": {"__timestamp_micros_since_unix_epoch__": 5}, "correlation_id": "c", "data": {"Text": "x"},
        })
    };
    for _ in 0..2 {
        deployed.call("import_events", json!([[event(10, "one"), event(11, "two")]])).await;
    }
    assert_eq!(deployed.rows("select sequence from event_log").await.len(), 3);
    let error = deployed.refused("import_events", json!([[event(11, "another")]])).await;
    assert!(error.contains("sequence 11"), "{error}");
    // New events go on after the imported ones.
    deployed.call("record_event", json!(["NEW", none(), none(), {"Empty": []}])).await;
    assert!(deployed.rows("select sequence from event_log").await.contains(&json!([12])));

    let entity = |version: u64, data: &str| {
        json!({
            "entity_id": "e", "entity_type": "star", "data": data, "version": version,
            "created_at": {"__timestamp_micros_since_unix_epoch__": 1},
            "updated_at": {"__timestamp_micros_since_unix_epoch__": 2},
            "updated_by": identity(&deployed.owner),
        })
    };
    deployed.call("import_entities", json!([[entity(3, "three")]])).await;
    deployed.call("import_entities", json!([[entity(2, "two")]])).await;
    assert_eq!(deployed.rows("select data, version from entity").await, [json!(["three", 3])]);
    let stranger = deployed.server.client().await;
    deployed.call("add_member", json!([identity(&stranger), "m"])).await;
    let error =
        stranger.call(DATABASE, "import_entities", json!([[entity(9, "nine")]])).await.expect_err("not an admin");
    assert!(error.contains("not an admin"), "{error}");
}
