#![no_main]
//! A configuration file in each format: it is read or refused with a line of it, and JSON means what it says.

use inner_universe::config::tree::{Content, Format, Node, parse};
use libfuzzer_sys::fuzz_target;

fn same(node: &Node, value: &serde_json::Value) -> bool {
    match (&node.content, value) {
        (Content::Table(table), serde_json::Value::Object(entries)) => {
            table.len() == entries.len()
                && table.iter().all(|(key, node)| entries.get(key).is_some_and(|value| same(node, value)))
        }
        (Content::Value(found), value) => found == value,
        _ => false,
    }
}

fuzz_target!(|text: &str| {
    for format in [Format::Toml, Format::Json, Format::Yaml] {
        let parsed = parse(format, text);
        if let Err(error) = &parsed {
            // To YAML a carriage return ends a line too, and the end of the text may be a line of its own.
            let breaks = text.matches(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']).count();
            assert!(error.line <= breaks + 2, "{format:?} {error:?}");
        }
        if format == Format::Json {
            match serde_json::from_str::<serde_json::Value>(text) {
                Ok(value @ serde_json::Value::Object(_)) => assert!(parsed.is_ok_and(|node| same(&node, &value))),
                _ => assert!(parsed.is_err()),
            }
        }
    }
});
