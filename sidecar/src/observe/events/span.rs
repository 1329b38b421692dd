//! Events as spans and log records. Pure: the same event always gives the same ids.

use std::collections::HashMap;

use opentelemetry::trace::{Link, SpanContext, SpanId, SpanKind, TraceId};
use opentelemetry::{KeyValue, Value as Attribute};
use opentelemetry_sdk::trace::SpanData;

use crate::module_bindings::{EventData, EventLog, Operation, SubjectKind, Value};
use crate::observe::composed::{CallIds, Composed, Composer, context, cut, int, span_id};

/// Subjects whose latest event is remembered, to link the next one to.
const SUBJECTS: usize = 4096;
/// The attribute with the text of an event.
pub const EVENT_TEXT: &str = "inner_universe.event.text";

/// Turns events into spans, and remembers the latest of each entity.
pub struct Spans {
    composer: Composer,
    latest: HashMap<(bool, String), (SpanContext, u64)>,
    clock: u64,
    /// What earlier processes sent was remembered.
    is_warm: bool,
}

/// The ids of one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventIds {
    pub trace: TraceId,
    /// The reducer call's span.
    pub call: SpanId,
    /// What the reducer call's span is below, if the correlation id names it.
    pub caller: SpanId,
    pub event: SpanId,
}

impl EventIds {
    pub fn of(event: &EventLog) -> Self {
        let ids = CallIds::of(&event.correlation_id, event.timestamp.to_micros_since_unix_epoch());
        let own = span_id(b"event", &[event.event_id.as_bytes()]);
        Self { trace: ids.trace, caller: ids.parent, call: ids.call, event: own }
    }
}

impl Spans {
    pub fn new(database: String) -> Self {
        Self { composer: Composer::new(database), latest: HashMap::new(), clock: 0, is_warm: false }
    }

    pub fn composer(&self) -> &Composer {
        &self.composer
    }

    /// The span of an event that is `described`. Before it a stand-in for that of its reducer call, if the call is from
    /// before `calls_since`, where the log that has its name is gone or was never on this server, and is not `last_call`.
    pub fn push(
        &mut self,
        event: &EventLog,
        (ids, described): (&EventIds, Vec<KeyValue>),
        calls_since: i64,
        last_call: &mut Option<SpanId>,
        spans: &mut Vec<SpanData>,
    ) {
        let time_micros = event.timestamp.to_micros_since_unix_epoch();
        if *last_call != Some(ids.call) && time_micros < calls_since {
            *last_call = Some(ids.call);
            spans.push(self.composer.span(Composed {
                trace: ids.trace,
                id: ids.call,
                parent: ids.caller,
                kind: SpanKind::Server,
                name: "reducer call".into(),
                time_micros,
                attributes: vec![KeyValue::new("inner_universe.correlation_id", cut(&event.correlation_id))],
                links: Vec::new(),
            }));
        }
        let links = self.link(event, &context(ids.trace, ids.event));
        spans.push(self.composer.span(Composed {
            trace: ids.trace,
            id: ids.event,
            parent: ids.call,
            kind: SpanKind::Internal,
            name: cut(&event.event_type).as_str().into_owned().into(),
            time_micros,
            attributes: described,
            links,
        }));
    }

    /// Has this not been asked before?
    pub fn is_fresh(&mut self) -> bool {
        !std::mem::replace(&mut self.is_warm, true)
    }

    /// An event that was sent before this process began.
    pub fn remember(&mut self, event: &EventLog) {
        let ids = EventIds::of(event);
        self.link(event, &context(ids.trace, ids.event));
    }

    /// The link to the event before of the same entity or relation.
    fn link(&mut self, event: &EventLog, context: &SpanContext) -> Vec<Link> {
        let EventData::Change(change) = &event.data else { return Vec::new() };
        if self.latest.len() >= SUBJECTS {
            // The half that was not heard of for longest goes.
            let mut ages: Vec<u64> = self.latest.values().map(|(_, age)| *age).collect();
            ages.sort_unstable();
            let median = ages.get(ages.len() / 2).copied().unwrap_or(0);
            self.latest.retain(|_, (_, age)| *age > median);
        }
        self.clock += 1;
        let key = (matches!(change.subject, SubjectKind::Entity), change.subject_id.clone());
        let before = self.latest.insert(key, (context.clone(), self.clock));
        // An event that is sent again does not link to itself.
        let before = before.map(|(before, _)| before).filter(|before| before.span_id() != context.span_id());
        let version = change.version.saturating_sub(1);
        let attributes = vec![KeyValue::new("inner_universe.version", int(version))];
        before.map(|before| Link::new(before, attributes, 0)).into_iter().collect()
    }
}

/// What an event says, as attributes of its span and its log record.
pub fn describe(event: &EventLog) -> Vec<KeyValue> {
    let mut found = vec![
        KeyValue::new("db.operation.name", cut(&event.event_type)),
        KeyValue::new("inner_universe.event.id", event.event_id.clone()),
        KeyValue::new("inner_universe.event.sequence", int(event.sequence)),
        KeyValue::new("inner_universe.correlation_id", cut(&event.correlation_id)),
    ];
    if let Some(source) = &event.source {
        found.push(KeyValue::new("inner_universe.event.source", cut(source)));
    }
    match &event.data {
        EventData::Empty => {}
        EventData::Text(text) => found.push(KeyValue::new(EVENT_TEXT, cut(text))),
        EventData::Change(change) => {
            let subject = if matches!(change.subject, SubjectKind::Entity) { "entity" } else { "relation" };
            let operation = match change.operation {
                Operation::Create => "create",
                Operation::Update => "update",
                Operation::Delete => "delete",
                Operation::Restore => "restore",
            };
            found.push(KeyValue::new("inner_universe.subject.kind", subject));
            found.push(KeyValue::new("inner_universe.subject.id", cut(&change.subject_id)));
            found.push(KeyValue::new("inner_universe.subject.version", int(change.version)));
            found.push(KeyValue::new("inner_universe.subject.operation", operation));
        }
        EventData::Custom(fields) => {
            for field in fields {
                let value: Attribute = match &field.value {
                    Value::Bool(value) => (*value).into(),
                    Value::Int(value) => (*value).into(),
                    Value::UInt(value) => int(*value).into(),
                    Value::Float(value) => (*value).into(),
                    Value::String(text) => cut(text),
                    Value::Bytes(bytes) => format!("{} bytes", bytes.len()).into(),
                };
                found.push(KeyValue::new(format!("inner_universe.data.{}", cut(&field.name).as_str()), value));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module_bindings::SubjectChange;

    fn event(sequence: u64, correlation: &str, data: EventData) -> EventLog {
        EventLog {
            sequence,
            event_id: format!("id-{sequence}"),
            event_type: "ENTITY_UPDATED".into(),
            source: None,
            timestamp: spacetimedb_sdk::Timestamp::from_micros_since_unix_epoch(1_700_000_000_000_000),
            correlation_id: correlation.into(),
            data,
        }
    }

    fn change(version: u64) -> EventData {
        let (subject, operation) = (SubjectKind::Entity, Operation::Update);
        EventData::Change(SubjectChange { subject, subject_id: "a".into(), version, operation })
    }

    #[test]
    fn events_of_one_call_are_below_one_span_and_ids_are_the_same_each_time() {
        let events = [event(1, "c", change(1)), event(2, "c", change(2)), event(3, "d", EventData::Empty)];
        let run = |calls_since: i64| {
            let (mut spans, mut last, mut found) = (Spans::new("iu".into()), None, Vec::new());
            events.iter().for_each(|event| {
                spans.push(event, (&EventIds::of(event), describe(event)), calls_since, &mut last, &mut found)
            });
            found
        };
        let found = run(i64::MAX);
        assert_eq!(found, run(i64::MAX));
        // Calls that the log names need no stand-in, and events are below the same ids.
        let alone = run(0);
        assert_eq!(alone, [&found[1], &found[2], &found[4]].map(Clone::clone));
        let names: Vec<_> = found.iter().map(|span| span.name.as_ref()).collect();
        assert_eq!(names, ["reducer call", "ENTITY_UPDATED", "ENTITY_UPDATED", "reducer call", "ENTITY_UPDATED"]);
        let id = |at: usize| found[at].span_context.span_id();
        assert_eq!([found[1].parent_span_id, found[2].parent_span_id, found[4].parent_span_id], [id(0), id(0), id(3)]);
        assert_eq!(found[0].span_context.trace_id(), found[2].span_context.trace_id());
        assert_ne!(found[0].span_context.trace_id(), found[4].span_context.trace_id());
        assert_eq!(found[2].links.links[0].span_context.span_id(), id(1));
        assert!(found[1].links.links.is_empty());
    }

    #[test]
    fn the_subjects_that_are_remembered_stay_few() {
        let mut spans = Spans::new("iu".into());
        for n in 0..20_000u64 {
            let mut event = event(n, "c", change(1));
            if let EventData::Change(change) = &mut event.data {
                change.subject_id = n.to_string();
            }
            spans.push(&event, (&EventIds::of(&event), describe(&event)), i64::MAX, &mut None, &mut Vec::new());
        }
        assert!(spans.latest.len() <= SUBJECTS);
    }
}
