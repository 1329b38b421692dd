//! Rows of the bundled module's tables, from the server's JSON.

use serde_json::Value as Json;
use spacetimedb_sdk::{Identity, Timestamp};

use crate::module_bindings::{
    EventData, EventLog, Field, Metric, Operation, StateVersion, SubjectChange, SubjectKind, SystemState, SystemStatus,
    Value,
};
use crate::observe::server::Sequenced;

/// A sum: its tag and its payload.
type Sum = (u8, Json);

impl Sequenced for EventLog {
    const TABLE: &'static str = "event_log";
    const KEY: &'static str = "sequence";
    type Json = (u64, String, String, Sum, (i64,), String, Sum);

    fn from_json(row: Self::Json) -> Result<Self, String> {
        let (sequence, event_id, event_type, source, (micros,), correlation_id, data) = row;
        let data = payload(data.0, data.1).ok_or_else(|| format!("the data of event {sequence}"))?;
        let timestamp = Timestamp::from_micros_since_unix_epoch(micros);
        let source = optional(source)?;
        Ok(Self { sequence, event_id, event_type, source, timestamp, correlation_id, data })
    }

    fn sequence(&self) -> u64 {
        self.sequence
    }

    fn id(&self) -> String {
        self.event_id.clone()
    }
}

impl Sequenced for Metric {
    const TABLE: &'static str = "metric";
    const KEY: &'static str = "metric_id";
    type Json = (u64, String, f64, String, Vec<Json>, (i64,));

    fn from_json(row: Self::Json) -> Result<Self, String> {
        let (metric_id, name, value, unit, labels, (micros,)) = row;
        let labels = labels.iter().map(field).collect::<Option<_>>().ok_or("its labels")?;
        let timestamp = Timestamp::from_micros_since_unix_epoch(micros);
        Ok(Self { metric_id, name, value, unit, labels, timestamp })
    }

    fn sequence(&self) -> u64 {
        self.metric_id
    }

    fn id(&self) -> String {
        self.timestamp.to_micros_since_unix_epoch().to_string()
    }
}

impl Sequenced for StateVersion {
    const TABLE: &'static str = "state_version";
    const KEY: &'static str = "version_id";
    type Json = (u64, Json, String, String, Sum, Sum, u64, Json, String, (i64,), Json);

    fn from_json(row: Self::Json) -> Result<Self, String> {
        let (version_id, subject, subject_id, subject_type, from, to, version, operation, data, (micros,), by) = row;
        Ok(Self {
            version_id,
            subject: subject_of(&subject).ok_or("its subject")?,
            subject_id,
            subject_type,
            from_entity: optional(from)?,
            to_entity: optional(to)?,
            version,
            operation: operation_of(&operation).ok_or("its operation")?,
            data,
            timestamp: Timestamp::from_micros_since_unix_epoch(micros),
            changed_by: identity(&by).ok_or("its author")?,
        })
    }

    fn sequence(&self) -> u64 {
        self.version_id
    }

    fn id(&self) -> String {
        self.timestamp.to_micros_since_unix_epoch().to_string()
    }
}

/// The row of `system_status` in the server's JSON.
pub type StatusJson = (u8, Sum, String, u64, u64, u64, u64, u32, (i64,));

/// What `get_system_status` wrote.
pub fn system_status(row: StatusJson) -> SystemStatus {
    let (id, (state, _), version, uptime_seconds, entity_count, relation_count, event_count, connected_clients, at) =
        row;
    let status = match state {
        0 => SystemState::Initializing,
        1 => SystemState::Running,
        _ => SystemState::Degraded,
    };
    let updated_at = Timestamp::from_micros_since_unix_epoch(at.0);
    SystemStatus {
        id,
        status,
        version,
        uptime_seconds,
        entity_count,
        relation_count,
        event_count,
        connected_clients,
        updated_at,
    }
}

fn optional(value: Sum) -> Result<Option<String>, String> {
    match value {
        (0, Json::String(text)) => Ok(Some(text)),
        (0, other) => Err(format!("an optional text of the form {other}")),
        _ => Ok(None),
    }
}

/// An identity comes as text inside its product.
fn identity(json: &Json) -> Option<Identity> {
    let text = json.as_str().or_else(|| json.as_array()?.first()?.as_str())?;
    Identity::from_hex(text.trim_start_matches("0x")).ok()
}

fn subject_of(json: &Json) -> Option<SubjectKind> {
    Some(match tag_of(json)? {
        0 => SubjectKind::Entity,
        _ => SubjectKind::Relation,
    })
}

fn operation_of(json: &Json) -> Option<Operation> {
    Some(match tag_of(json)? {
        0 => Operation::Create,
        1 => Operation::Update,
        2 => Operation::Delete,
        _ => Operation::Restore,
    })
}

fn payload(tag: u8, json: Json) -> Option<EventData> {
    Some(match tag {
        0 => EventData::Empty,
        1 => EventData::Text(match json {
            Json::String(text) => text,
            _ => return None,
        }),
        2 => {
            let [subject, id, version, operation] = json.as_array()?.as_slice() else { return None };
            EventData::Change(SubjectChange {
                subject: subject_of(subject)?,
                subject_id: id.as_str()?.to_owned(),
                version: version.as_u64()?,
                operation: operation_of(operation)?,
            })
        }
        _ => EventData::Custom(json.as_array()?.iter().map(field).collect::<Option<_>>()?),
    })
}

fn tag_of(json: &Json) -> Option<u64> {
    json.as_array()?.first()?.as_u64()
}

fn field(json: &Json) -> Option<Field> {
    let [name, value] = json.as_array()?.as_slice() else { return None };
    let [tag, value] = value.as_array()?.as_slice() else { return None };
    let value = match tag.as_u64()? {
        0 => Value::Bool(value.as_bool()?),
        1 => Value::Int(value.as_i64()?),
        2 => Value::UInt(value.as_u64()?),
        // JSON has no number that is none, and no infinity: the server writes null.
        3 => Value::Float(if value.is_null() { f64::NAN } else { value.as_f64()? }),
        4 => Value::String(value.as_str()?.to_owned()),
        _ => Value::Bytes(bytes(value)?),
    };
    Some(Field { name: name.as_str()?.to_owned(), value })
}

/// Bytes come as hexadecimal text or as a list of numbers, depending on the server.
fn bytes(json: &Json) -> Option<Vec<u8>> {
    match json {
        Json::Array(items) => items.iter().map(|item| u8::try_from(item.as_u64()?).ok()).collect(),
        Json::String(text) if text.len().is_multiple_of(2) && text.is_ascii() => {
            (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(data: Json) -> Result<EventLog, String> {
        let row = json!([7, "id", "TYPE", [0, "source"], [1_700_000_000_000_000_i64], "c", data]);
        EventLog::from_json(serde_json::from_value(row).expect("a row"))
    }

    #[test]
    fn every_kind_of_value_is_read_and_what_is_none_is_an_error() {
        let values = json!([[0, true], [1, -1], [2, u64::MAX], [3, 1.5], [4, "text"], [5, "00ff"], [5, [0, 255]]]);
        let fields: Vec<Json> = values.as_array().expect("values").iter().map(|value| json!(["n", value])).collect();
        let EventData::Custom(fields) = parse(json!([3, fields])).expect("an event").data else { panic!("other data") };
        let bytes = || Value::Bytes(vec![0, 255]);
        let expected = [
            Value::Bool(true),
            Value::Int(-1),
            Value::UInt(u64::MAX),
            Value::Float(1.5),
            Value::String("text".into()),
            bytes(),
            bytes(),
        ];
        assert!(fields.iter().map(|field| &field.value).eq(&expected), "{fields:?}");
        for wrong in
            [json!([1, 5]), json!([2, []]), json!([3, "x"]), json!([3, [["n", [1, "x"]]]]), json!([3, [["n"]]])]
        {
            assert!(parse(wrong).is_err());
        }
    }

    #[test]
    fn numbers_that_json_cannot_write_hold_nothing_up() {
        let event = parse(json!([3, [["n", [3, null]]]])).expect("an event");
        assert!(
            matches!(&event.data, EventData::Custom(fields) if matches!(fields[0].value, Value::Float(n) if n.is_nan()))
        );
    }
}
