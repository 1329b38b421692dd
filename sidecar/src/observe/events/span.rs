//! Events as spans and log records. Pure: the same event always gives the same ids.
//!
//! A trace is what shares a correlation id. In it, each reducer call is a span, and each of its events a span below.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue, Value as Attribute};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use crate::module_bindings::{EventData, EventLog, Operation, SubjectKind, Value};
use crate::observe::metrics::SCOPE;

/// Subjects whose latest event is remembered, to link the next one to.
const SUBJECTS: usize = 4096;
/// Longer texts are cut: backends refuse what is too long.
const MAX_TEXT: usize = 4096;

/// Turns events into spans, and remembers the latest of each entity.
pub struct Spans {
    database: String,
    scope: InstrumentationScope,
    latest: HashMap<(bool, String), (SpanContext, u64)>,
    clock: u64,
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
        let micros = event.timestamp.to_micros_since_unix_epoch();
        let (trace, caller) = trace_of(&event.correlation_id);
        let call = hash(b"call", &[event.correlation_id.as_bytes(), &micros.to_le_bytes()]);
        let own = hash(b"event", &[event.event_id.as_bytes()]);
        Self { trace, caller, call: span_id(&call), event: span_id(&own) }
    }
}

/// A W3C `traceparent` as correlation id puts events into the caller's own trace; any other text is a trace by its hash.
fn trace_of(correlation: &str) -> (TraceId, SpanId) {
    let parts: Vec<&str> = correlation.split('-').collect();
    if let ["00", trace, span, flags] = parts.as_slice()
        && (trace.len(), span.len(), flags.len()) == (32, 16, 2)
        && let (Ok(trace), Ok(span)) = (TraceId::from_hex(trace), SpanId::from_hex(span))
        && trace != TraceId::INVALID
        && span != SpanId::INVALID
    {
        return (trace, span);
    }
    let hashed = hash(b"trace", &[correlation.as_bytes()]);
    let mut id = [0; 16];
    id.copy_from_slice(&hashed[..16]);
    (TraceId::from_bytes(id), SpanId::INVALID)
}

fn hash(kind: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for part in std::iter::once(&kind).chain(parts) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

fn span_id(hashed: &[u8; 32]) -> SpanId {
    let mut id = [0; 8];
    id.copy_from_slice(&hashed[..8]);
    SpanId::from_bytes(id)
}

/// The time of an event; before 1970 there was none.
pub fn time_of(event: &EventLog) -> SystemTime {
    let micros = u64::try_from(event.timestamp.to_micros_since_unix_epoch()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_micros(micros)
}

impl Spans {
    pub fn new(database: String) -> Self {
        let scope = InstrumentationScope::builder(SCOPE).with_version(env!("CARGO_PKG_VERSION")).build();
        Self { database, scope, latest: HashMap::new(), clock: 0 }
    }

    pub fn scope(&self) -> &InstrumentationScope {
        &self.scope
    }

    pub fn database(&self) -> &str {
        &self.database
    }

    /// The span of an event, and before it that of its reducer call if `last_call` is another one.
    pub fn push(&mut self, event: &EventLog, last_call: &mut Option<SpanId>, spans: &mut Vec<SpanData>) {
        let ids = EventIds::of(event);
        let at = time_of(event);
        if *last_call != Some(ids.call) {
            *last_call = Some(ids.call);
            let mut attributes = self.common();
            attributes.push(KeyValue::new("inner_universe.correlation_id", cut(&event.correlation_id)));
            let name = "reducer call".into();
            spans.push(self.span(ids.trace, ids.call, ids.caller, name, SpanKind::Server, at, attributes, Vec::new()));
        }
        let mut attributes = self.common();
        attributes.extend(describe(event));
        let context = context(ids.trace, ids.event);
        let links = self.link(event, &context);
        let name = event.event_type.clone().into();
        spans.push(self.span(ids.trace, ids.event, ids.call, name, SpanKind::Internal, at, attributes, links));
    }

    fn common(&self) -> Vec<KeyValue> {
        vec![KeyValue::new("db.system.name", "spacetimedb"), KeyValue::new("db.namespace", self.database.clone())]
    }

    #[expect(clippy::too_many_arguments, reason = "a span has as many parts")]
    fn span(
        &self,
        trace: TraceId,
        id: SpanId,
        parent: SpanId,
        name: std::borrow::Cow<'static, str>,
        span_kind: SpanKind,
        at: SystemTime,
        attributes: Vec<KeyValue>,
        links: Vec<Link>,
    ) -> SpanData {
        let mut span_links = SpanLinks::default();
        span_links.links = links;
        SpanData {
            span_context: context(trace, id),
            parent_span_id: parent,
            parent_span_is_remote: false,
            span_kind,
            name,
            start_time: at,
            end_time: at,
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: span_links,
            status: Status::Unset,
            instrumentation_scope: self.scope.clone(),
        }
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
        let attributes = vec![KeyValue::new("inner_universe.version", i64::try_from(version).unwrap_or(i64::MAX))];
        before.map(|before| Link::new(before, attributes, 0)).into_iter().collect()
    }
}

fn context(trace: TraceId, span: SpanId) -> SpanContext {
    SpanContext::new(trace, span, TraceFlags::SAMPLED, false, TraceState::NONE)
}

/// What an event says, as attributes of its span and its log record.
pub fn describe(event: &EventLog) -> Vec<KeyValue> {
    let int = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
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
        EventData::Text(text) => found.push(KeyValue::new("inner_universe.event.text", cut(text))),
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
                    Value::String(text) => cut(text).into(),
                    Value::Bytes(bytes) => format!("{} bytes", bytes.len()).into(),
                };
                found.push(KeyValue::new(format!("inner_universe.data.{}", cut(&field.name)), value));
            }
        }
    }
    found
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MAX_TEXT) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
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
        let run = || {
            let (mut spans, mut last, mut found) = (Spans::new("iu".into()), None, Vec::new());
            events.iter().for_each(|event| spans.push(event, &mut last, &mut found));
            found
        };
        let found = run();
        assert_eq!(found, run());
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
    fn a_traceparent_as_correlation_id_joins_the_callers_trace() {
        let ids = EventIds::of(&event(1, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", EventData::Empty));
        assert_eq!(ids.trace.to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(ids.caller.to_string(), "b7ad6b7169203331");
        let other = EventIds::of(&event(1, "00-zz", EventData::Empty));
        assert_eq!(other.caller, SpanId::INVALID);
        assert_ne!(other.trace, TraceId::INVALID);
    }

    #[test]
    fn the_subjects_that_are_remembered_stay_few() {
        let mut spans = Spans::new("iu".into());
        for n in 0..20_000u64 {
            let mut event = event(n, "c", change(1));
            if let EventData::Change(change) = &mut event.data {
                change.subject_id = n.to_string();
            }
            spans.push(&event, &mut None, &mut Vec::new());
        }
        assert!(spans.latest.len() <= SUBJECTS);
    }
}
