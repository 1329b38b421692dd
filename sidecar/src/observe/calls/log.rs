//! Reads calls from one database's log, from where the cursor stands in this history.

use std::collections::BTreeMap;
use std::path::Path;

use opentelemetry::KeyValue;
use opentelemetry::trace::SpanKind;
use opentelemetry_sdk::trace::{Sampler, SamplingDecision, ShouldSample as _, SpanData};

use crate::datadir::DataDirError;
use crate::datadir::bytes::{Cursor as Bytes, Malformed};
use crate::datadir::commit::{Commit, Frame, Inputs};
use crate::datadir::log::{LogReader, segments};
use crate::ids::{ContentHash, Offset};
use crate::observe::composed::{CallIds, Composed, Composer, correlation_of_call, cut, int};
use crate::observe::cursor::Cursor;

/// Log that one batch is made of: the smallest calls of so much make a request that collectors take by default (4 MiB).
const BATCH_BYTES: usize = 256 << 10;
/// The bundled module's reducer whose caller chooses the correlation id.
const RECORD_EVENT: &str = "record_event";

/// What one look at the log gave.
pub enum Calls {
    Some(Batch),
    /// Nothing new.
    None,
    /// The log is not what was read before; it is to be opened anew.
    Anew,
}

/// Calls of consecutive transactions.
pub struct Batch {
    pub spans: Vec<SpanData>,
    /// How often each reducer was called, sampled or not.
    pub reducers: Vec<(String, u64)>,
    /// The server's time of the first call.
    pub first_micros: Option<i64>,
    /// One past the last transaction.
    pub next: u64,
    /// The hash of the last commit.
    pub last_commit: String,
}

/// A log, read from the cursor on.
pub struct CallReader {
    log: LogReader,
    buffer: Vec<u8>,
    composer: Composer,
    is_bundled: bool,
    sampler: Sampler,
}

impl CallReader {
    /// Opens the log at the newest place of `known` that is still part of this history, and says where that is.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn open(
        dir: &Path,
        known: Cursor,
        composer: Composer,
        is_bundled: bool,
        sampler: Sampler,
    ) -> Result<(Self, Cursor), DataDirError> {
        let (log, cursor) = continue_from(dir, known, composer.database())?;
        Ok((Self { log, buffer: Vec::new(), composer, is_bundled, sampler }, cursor))
    }

    /// Reads what follows.
    ///
    /// # Errors
    /// When the log is damaged or cannot be read.
    pub fn next(&mut self) -> Result<Calls, DataDirError> {
        if !self.log.is_unchanged()? {
            return Ok(Calls::Anew);
        }
        let Some(read) = self.log.next_batch(BATCH_BYTES, &mut self.buffer)? else { return Ok(Calls::None) };
        // Looked at again after reading: what was read continues what was there before.
        if !self.log.is_unchanged()? {
            return Ok(Calls::Anew);
        }
        let (mut spans, mut reducers, mut first_micros) = (Vec::new(), BTreeMap::<String, u64>::new(), None);
        let (mut rest, mut last): (_, &[u8]) = (self.buffer.as_slice(), &[]);
        while let Frame::Commit(commit) = Frame::parse(read.log_version, rest) {
            rest = &rest[commit.bytes.len()..];
            last = commit.bytes;
            let Some(inputs) = commit.inputs() else { continue };
            first_micros = first_micros.or(Some(inputs.time_micros));
            match reducers.get_mut(inputs.reducer) {
                Some(n) => *n += 1,
                None => drop(reducers.insert(inputs.reducer.to_owned(), 1)),
            }
            spans.extend(self.span(&commit, &inputs));
        }
        Ok(Calls::Some(Batch {
            spans,
            reducers: reducers.into_iter().collect(),
            first_micros,
            next: read.last.0 + 1,
            last_commit: ContentHash::of(last).to_string(),
        }))
    }

    /// All spans of a trace or none: whether it is sent follows from the trace's id alone.
    fn span(&self, commit: &Commit<'_>, inputs: &Inputs<'_>) -> Option<SpanData> {
        let chosen = if self.is_bundled && inputs.reducer == RECORD_EVENT {
            chosen_correlation(inputs.arguments).ok().flatten()
        } else {
            None
        };
        let correlation = chosen.map_or_else(|| correlation_of_call(inputs.time_micros, &inputs.caller), str::to_owned);
        let ids = CallIds::of(&correlation, inputs.time_micros);
        let sampled = self.sampler.should_sample(None, ids.trace, "", &SpanKind::Server, &[], &[]);
        if sampled.decision != SamplingDecision::RecordAndSample {
            return None;
        }
        let mut attributes = vec![
            KeyValue::new("db.operation.name", inputs.reducer.to_owned()),
            KeyValue::new("inner_universe.correlation_id", cut(&correlation)),
            KeyValue::new("inner_universe.caller.identity", inputs.caller.to_string()),
            KeyValue::new("inner_universe.transaction.offset", int(commit.first.0)),
            KeyValue::new("inner_universe.arguments.size", int(inputs.arguments.len() as u64)),
        ];
        if inputs.connection_id != 0 {
            attributes
                .push(KeyValue::new("inner_universe.caller.connection", format!("{:032x}", inputs.connection_id)));
        }
        Some(self.composer.span(Composed {
            trace: ids.trace,
            id: ids.call,
            parent: ids.parent,
            kind: SpanKind::Server,
            name: inputs.reducer.to_owned().into(),
            time_micros: inputs.time_micros,
            attributes,
            links: Vec::new(),
        }))
    }
}

/// The correlation id among the arguments of `record_event(event_type, source, correlation_id, data)`.
fn chosen_correlation(arguments: &[u8]) -> Result<Option<&str>, Malformed> {
    let mut bytes = Bytes::new(arguments);
    text(&mut bytes)?;
    if bytes.u8("the source's tag")? == 0 {
        text(&mut bytes)?;
    }
    if bytes.u8("the correlation id's tag")? != 0 {
        return Ok(None);
    }
    Ok(std::str::from_utf8(text(&mut bytes)?).ok())
}

fn text<'a>(bytes: &mut Bytes<'a>) -> Result<&'a [u8], Malformed> {
    let len = bytes.u32("a text's length")? as usize;
    bytes.take(len, "a text")
}

/// Where to go on: the newest commit of the cursor that is still part of this history. A restore may have taken some back.
fn continue_from(dir: &Path, known: Cursor, database: &str) -> Result<(LogReader, Cursor), DataDirError> {
    for (next, id) in known.checkpoints() {
        let Some(log) = opened_after(dir, next, id)? else { continue };
        if next < known.sequence {
            tracing::warn!(
                database,
                from = known.sequence,
                to = next,
                "the log was set back, by a restore most likely; calls are sent from where histories part"
            );
        }
        let cursor = known.back_to(next);
        return Ok((log, cursor));
    }
    let first = segments(dir)?.first().map_or(0, |segment| segment.first.0);
    if known.sequence > 0 && first >= known.sequence {
        let mut cursor = known;
        if first > cursor.sequence {
            tracing::warn!(database, from = cursor.sequence, to = first, "log was deleted before its calls were sent");
            // Events of what is gone need a stand-in.
            cursor.since = None;
        }
        cursor.skip_to(first);
        return Ok((LogReader::open(dir, Offset(first))?, cursor));
    }
    if known.sequence > 0 {
        tracing::warn!(database, "the log is another one than before; its calls are sent from its start");
    }
    Ok((LogReader::open_first(dir)?, Cursor::default()))
}

/// The log after the commit that ends before `next`, if that is the one with this hash.
fn opened_after(dir: &Path, next: u64, hash: &str) -> Result<Option<LogReader>, DataDirError> {
    let Some(last) = next.checked_sub(1).map(Offset) else { return Ok(None) };
    let mut log = match LogReader::open(dir, last) {
        Ok(log) => log,
        Err(DataDirError::Gone { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut commit = Vec::new();
    let read = log.next_batch(1, &mut commit)?;
    let same = read.is_some_and(|read| read.last == last) && ContentHash::of(&commit).to_string() == hash;
    Ok(same.then_some(log))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(parts: &[Option<&str>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut push = |text: &str| {
            bytes.extend_from_slice(&u32::try_from(text.len()).expect("short").to_le_bytes());
            bytes.extend_from_slice(text.as_bytes());
        };
        push("TYPE");
        let mut out = bytes;
        for part in parts {
            match part {
                Some(text) => {
                    out.push(0);
                    out.extend_from_slice(&u32::try_from(text.len()).expect("short").to_le_bytes());
                    out.extend_from_slice(text.as_bytes());
                }
                None => out.push(1),
            }
        }
        out
    }

    #[test]
    fn a_chosen_correlation_id_is_found_among_the_arguments_and_cuts_are_no_panic() {
        assert_eq!(chosen_correlation(&encoded(&[Some("s"), Some("order-7")])), Ok(Some("order-7")));
        assert_eq!(chosen_correlation(&encoded(&[None, Some("order-7")])), Ok(Some("order-7")));
        assert_eq!(chosen_correlation(&encoded(&[None, None])), Ok(None));
        let whole = encoded(&[Some("s"), Some("order-7")]);
        for cut in 0..whole.len() {
            assert!(chosen_correlation(&whole[..cut]).is_err());
        }
    }
}
