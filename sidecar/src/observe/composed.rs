//! Spans composed from what databases recorded. Pure: the same record always gives the same ids.
//!
//! A trace is what shares a correlation id. In it, each reducer call is a span, and each of its events a span below.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue, StringValue, Value};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use crate::ids::Identity;
use crate::observe::metrics::SCOPE;

/// Bytes; longer texts are cut: backends refuse what is too long.
const MAX_TEXT: usize = 4096;

/// Where one reducer call stands among all traces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallIds {
    pub trace: TraceId,
    /// The call's own span.
    pub call: SpanId,
    /// What the call's span is below, if the correlation id names it.
    pub parent: SpanId,
}

impl CallIds {
    /// A W3C `traceparent` as correlation id puts the call into the caller's own trace; any other text is a trace by its
    /// hash.
    pub fn of(correlation_id: &str, time_micros: i64) -> Self {
        let (trace, parent) = trace_of(correlation_id);
        let call = span_id(b"call", &[correlation_id.as_bytes(), &time_micros.to_le_bytes()]);
        Self { trace, call, parent }
    }
}

/// The correlation id that the bundled module gives a call's events when the caller names none.
pub fn correlation_of_call(time_micros: i64, caller: &Identity) -> String {
    let tail = caller
        .to_le()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{:016x}{tail:016x}", time_micros.cast_unsigned())
}

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

/// A span's id from what makes it one of a kind.
pub fn span_id(kind: &[u8], parts: &[&[u8]]) -> SpanId {
    let mut id = [0; 8];
    id.copy_from_slice(&hash(kind, parts)[..8]);
    SpanId::from_bytes(id)
}

/// A server's time; before 1970 there was none.
pub fn time_of(micros: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

/// OpenTelemetry has no unsigned integers.
pub fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A text as the value of an attribute; copies of it share it.
pub fn cut(text: &str) -> Value {
    let shared = |text: &str| Value::String(StringValue::from(Arc::<str>::from(text)));
    if text.len() <= MAX_TEXT {
        return shared(text);
    }
    let end = (0..=MAX_TEXT).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    shared(&format!("{}…", &text[..end]))
}

pub fn context(trace: TraceId, span: SpanId) -> SpanContext {
    SpanContext::new(trace, span, TraceFlags::SAMPLED, false, TraceState::NONE)
}

/// Makes spans of one database.
#[derive(Debug, Clone)]
pub struct Composer {
    database: Arc<str>,
    scope: InstrumentationScope,
}

/// What differs from span to span.
pub struct Composed {
    pub trace: TraceId,
    pub id: SpanId,
    pub parent: SpanId,
    pub kind: SpanKind,
    pub name: Cow<'static, str>,
    pub time_micros: i64,
    pub attributes: Vec<KeyValue>,
    pub links: Vec<Link>,
}

impl Composer {
    pub fn new(database: String) -> Self {
        let scope = InstrumentationScope::builder(SCOPE).with_version(env!("CARGO_PKG_VERSION")).build();
        Self { database: database.into(), scope }
    }

    pub fn scope(&self) -> &InstrumentationScope {
        &self.scope
    }

    pub fn database(&self) -> &str {
        &self.database
    }

    /// The database's name as the value of an attribute.
    pub fn namespace(&self) -> StringValue {
        Arc::clone(&self.database).into()
    }

    /// A span that took no time: the server keeps a call's beginning and not its end.
    pub fn span(&self, span: Composed) -> SpanData {
        let mut attributes = Vec::with_capacity(span.attributes.len() + 2);
        attributes.push(KeyValue::new("db.system.name", "spacetimedb"));
        attributes.push(KeyValue::new("db.namespace", Value::String(self.namespace())));
        attributes.extend(span.attributes);
        let mut links = SpanLinks::default();
        links.links = span.links;
        let at = time_of(span.time_micros);
        SpanData {
            span_context: context(span.trace, span.id),
            parent_span_id: span.parent,
            parent_span_is_remote: false,
            span_kind: span.kind,
            name: span.name,
            start_time: at,
            end_time: at,
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links,
            status: Status::Unset,
            instrumentation_scope: self.scope.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        for (text, len) in [("x".repeat(4096), 4096), ("x".repeat(4097), 4099), ("é".repeat(2049), 4099)] {
            assert_eq!(cut(&text).as_str().len(), len);
        }
        assert!(cut(&format!("x{}", "é".repeat(2048))).as_str().ends_with("é…"));
    }

    #[test]
    fn a_traceparent_as_correlation_id_joins_the_callers_trace() {
        let ids = CallIds::of("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", 1);
        assert_eq!(ids.trace.to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(ids.parent.to_string(), "b7ad6b7169203331");
        let other = CallIds::of("00-zz", 1);
        assert_eq!(other.parent, SpanId::INVALID);
        assert_ne!(other.trace, TraceId::INVALID);
    }
}
