//! On what a 2.8.3 server answered, recorded in `tests/fixtures/api-2.8.3`.

use serde_json::json;

use super::*;
use crate::database::schema::Schema;
use crate::database::shape::Shape;

fn recorded(name: &str) -> Value {
    let path = format!("{}/../tests/fixtures/api-2.8.3/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn described(name: &str) -> Description {
    Description::parse(recorded(name).to_string().as_bytes()).unwrap()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn every_form_of_a_description_says_the_same_of_tables_and_reducers() {
    for module in ["features_v1", "features_v2", "inner_universe_module"] {
        let served = described(&format!("schema-v10-{module}"));
        let extracted = described(&format!("extract-schema-{module}"));
        assert_eq!(extracted.differences(&served), [""; 0], "{module}");
        assert_eq!(extracted.reducers, served.reducers);
        let mut before = described(&format!("schema-v9-{module}"));
        assert_eq!(before.reducers, served.reducers);
        // Version 9 does not tell event tables apart.
        for (name, table) in &mut before.tables {
            table.is_event = served.tables[name].is_event;
        }
        assert_eq!(before.differences(&served), [""; 0], "{module}");
    }
}

#[test]
fn tables_are_as_the_module_declares_them() {
    let module = described("schema-v10-features_v2");
    let tables = [
        "LedgerBook",
        "account",
        "audit_event",
        "counter",
        "doc",
        "extra",
        "gadget",
        "job",
        "job_log",
        "kinds",
        "loose",
        "odd_floats",
        "owned",
        "ping_event",
        "secret",
    ];
    assert_eq!(module.tables.keys().map(String::as_str).collect::<Vec<_>>(), tables);
    let which = |is: fn(&TableDescription) -> bool| -> Vec<&str> {
        module.tables.iter().filter(|(_, table)| is(table)).map(|(name, _)| name.as_str()).collect()
    };
    assert_eq!(which(|table| table.is_event), ["audit_event", "ping_event"]);
    assert_eq!(which(|table| table.private), ["audit_event", "secret"]);
    assert_eq!(which(|table| table.schedule.as_deref() == Some("run_job")), ["job"]);
    assert_eq!(which(|table| table.sequences.contains(&2)), ["loose"]);
    let account = &module.tables["account"];
    let names: Vec<_> = account.columns.as_ref().unwrap().iter().map(|column| column.name.as_str()).collect();
    assert_eq!(names, ["id", "name", "slot", "grp", "score", "color", "rating"]);
    assert_eq!(account.columns.as_ref().unwrap()[6].shape, Shape::I32);
    assert_eq!(account.primary_key, Some(0));
    assert!(account.indexes.contains(r#"{"Hash":[3]}"#) && account.indexes.contains(r#"{"Direct":2}"#));
    assert_eq!(module.views, set(&["group_one", "high_score", "my_owned"]));
    assert_eq!(module.procedures, set(&["loose_via_procedure", "tally"]));
    assert_eq!(module.http_handlers, set(&["status_page"]));
    assert_eq!(module.unknown, set(&[]));
    let before = described("schema-v9-features_v2");
    assert_eq!((before.views, before.procedures), (module.views, module.procedures));
}

#[test]
fn exports_tell_event_tables_and_views_from_tables() {
    let schema = Schema::from(described("schema-v10-features_v2"));
    let is_event = |name| schema.table(name).and_then(Result::ok).map(|table| table.is_event);
    assert_eq!((is_event("audit_event"), is_event("account")), (Some(true), Some(false)));
    assert!(schema.is_view("group_one") && !schema.is_view("account") && schema.table("group_one").is_none());
}

#[test]
fn a_changed_table_is_named_with_what_changed() {
    let (before, after) = (described("schema-v10-features_v1"), described("schema-v10-features_v2"));
    assert_eq!(
        after.differences(&before),
        [
            "table account: another set of columns",
            "table account: another set of indexes",
            "table audit_event: another set of columns",
            "table extra is missing",
            "table kinds: another set of columns",
            "table legacy is not in the module",
        ]
    );
}

#[test]
fn what_a_later_release_adds_is_kept_by_name() {
    let mut module = recorded("schema-v10-features_v2");
    let sections = module["sections"].as_array_mut().unwrap();
    sections.push(json!({"Outboxes": [{"whatever": 1}]}));
    for section in sections.iter_mut() {
        if let Some(table) = section.pointer_mut("/Tables/0") {
            table["shard_key"] = json!([3]);
            table["indexes"] = json!([{"algorithm": {"RTree": {"columns": [0], "order": 7}}, "further": null}]);
        }
    }
    let module = Description::parse(module.to_string().as_bytes()).unwrap();
    assert_eq!(module.unknown, set(&["Outboxes"]));
    assert_eq!(module.tables.len(), 15);
    let mut module = recorded("schema-v9-features_v2");
    module["misc_exports"].as_array_mut().unwrap().push(json!({"Later": {"name": "x"}}));
    let module = Description::parse(module.to_string().as_bytes()).unwrap();
    assert_eq!(module.unknown, set(&["Later"]));
    assert!(module.version_9.is_none(), "the rules of 1.2.0 do not know all of it");
}

#[test]
fn names_of_submodules_stand_behind_their_namespace() {
    let within = |module: Value| json!({"sections": [{"Submodules": [{"namespace": "shop", "module": module}]}]});
    let module = within(within(recorded("schema-v10-inner_universe_module")));
    let module = Description::parse(module.to_string().as_bytes()).unwrap();
    assert!(
        module.tables.contains_key("shop.shop.event_log") && module.reducers.contains_key("shop.shop.record_event")
    );
    assert_eq!(module.submodules, set(&["shop", "shop.shop"]));
}

#[test]
fn what_is_no_description_is_refused_with_the_part_that_is_wrong() {
    let refused = |text: &str| Description::parse(text.as_bytes()).unwrap_err();
    assert!(refused(r#"{"V8BackCompat":{}}"#).contains("version 8"));
    assert!(refused("[]").contains("not a JSON object"));
    assert!(refused("abi version").contains("the module's schema: "));
    assert!(refused(r#"{"V10":{"sections":[{"Tables":[{"source_name":1}]}]}}"#).contains("its Tables: "));
    let mut deep = json!({"sections": []});
    for _ in 0..20 {
        deep = json!({"sections": [{"Submodules": [{"namespace": "a", "module": deep}]}]});
    }
    assert!(refused(&deep.to_string()).contains("nest too deep"));
}
