//! What modules log, of every database, from the server's files to the collector: one log record a line.
//!
//! Invariants: lines leave in their order and at least once; the position moves only after the collector has taken what it
//! passes; memory is bounded by one piece of a file. The files themselves are the queue.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder;
use opentelemetry::KeyValue;
use opentelemetry::logs::Severity;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::backup::{BackupError, blocking};
use crate::clock::{Clock, patience};
use crate::config::TelemetryConfig;
use crate::durable::{self, FileError, OnPath};
use crate::ids::Identity;
use crate::observe::composed::{Composer, cut, int};
use crate::observe::metrics;
use crate::observe::otlp::{OtlpError, SendError, less_rejected};
use crate::observe::records::{Record, Records};

/// How often the files are looked at.
const POLL: Duration = Duration::from_secs(1);
/// Read at once; a longer line is cut in pieces of this.
const PIECE: usize = 256 << 10;

/// What can stop a stream for a while.
#[derive(Debug, thiserror::Error)]
enum LogError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Work(#[from] BackupError),
    #[error(transparent)]
    Export(#[from] SendError),
}

/// What the streams of all databases share.
pub struct ModuleLogs {
    records: Option<Records>,
    state_dir: PathBuf,
    clock: Arc<dyn Clock>,
}

/// How far a database's files were sent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Position {
    /// The file's name, which is its date.
    file: String,
    offset: u64,
    /// The file's inode: after a restore another file has its name.
    #[serde(default)]
    inode: u64,
}

impl ModuleLogs {
    /// # Errors
    /// When the configuration cannot be used.
    pub fn new(
        config: &TelemetryConfig,
        instance: &str,
        state_dir: &Path,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, OtlpError> {
        let records = if config.module_logs { Records::new(config, instance)? } else { None };
        Ok(Self { records, state_dir: state_dir.to_owned(), clock })
    }

    /// Sends what the module of `database` logs into `dir` until told to stop, if anybody wants it.
    pub async fn follow(self: Arc<Self>, database: String, identity: Identity, dir: PathBuf, stop: CancellationToken) {
        let Some(records) = &self.records else { return };
        let file = self.state_dir.join(format!("module-log-{identity}.json"));
        let mut position: Position =
            std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        metrics::MODULE_LOG_ERRORS.add(0, &[KeyValue::new("database", database.clone())]);
        let composer = Composer::new(database);
        let mut delays = patience(Duration::from_millis(500)).build();
        loop {
            let result = tokio::select! {
                result = self.send(records, &composer, &dir, &file, &mut position) => result,
                () = stop.cancelled() => return,
            };
            let delay = match result {
                Ok(()) => {
                    delays = patience(Duration::from_millis(500)).build();
                    POLL
                }
                Err(error) => {
                    metrics::MODULE_LOG_ERRORS.add(1, &[KeyValue::new("database", composer.database().to_owned())]);
                    let delay = delays.next().unwrap_or(Duration::from_secs(15));
                    tracing::warn!(database = composer.database(), %error, ?delay, "the module's log is sent later");
                    delay
                }
            };
            tokio::select! {
                () = self.clock.sleep(delay) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Sends everything there is.
    async fn send(
        &self,
        records: &Records,
        composer: &Composer,
        dir: &Path,
        file: &Path,
        position: &mut Position,
    ) -> Result<(), LogError> {
        loop {
            let (dir, from) = (dir.to_owned(), position.clone());
            let Some((lines, next)) = blocking(move || read(&dir, &from)).await?? else { return Ok(()) };
            let mut levels: BTreeMap<&'static str, u64> = BTreeMap::new();
            let parsed = lines.iter().map(|line| {
                let (record, level) = parse(line, self.clock.now().as_microsecond());
                *levels.entry(level).or_default() += 1;
                record
            });
            let sent = records.send(composer, parsed).await?;
            let mut levels: Vec<_> = levels.into_iter().collect();
            less_rejected(&mut levels, sent.rejected);
            for (level, n) in levels {
                let labels = [KeyValue::new("database", composer.database().to_owned()), KeyValue::new("level", level)];
                metrics::MODULE_LOGS.add(n, &labels);
            }
            let (file, text) = (file.to_owned(), serde_json::to_vec(&next).unwrap_or_default());
            blocking(move || durable::replace(&file, &text)).await??;
            *position = next;
        }
    }
}

/// The lines that follow `from`, and where they end; `None` at the end of everything.
fn read(dir: &Path, from: &Position) -> Result<Option<(Vec<String>, Position)>, FileError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).on("list", dir),
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(".log"))
        .collect();
    names.sort();
    names.retain(|name| *name >= from.file);
    let newest = names.last().cloned();
    for name in names {
        let path = dir.join(&name);
        let open = File::open(&path).on("open", &path)?;
        let kind = open.metadata().on("inspect", &path)?;
        let (len, inode) = (kind.len(), kind.ino());
        // Another inode, or shorter than what was sent: the directory was restored or replaced.
        let same = name == from.file && inode == from.inode && from.offset <= len;
        let start = if same { from.offset } else { 0 };
        let mut bytes = vec![0; usize::try_from(len - start).unwrap_or(PIECE).min(PIECE)];
        let read = read_at(&open, &mut bytes, start).on("read", &path)?;
        bytes.truncate(read);
        let whole = match bytes.iter().rposition(|byte| *byte == b'\n') {
            Some(at) => at + 1,
            // Too long a line, or one that was cut off when the server went on to the next file.
            None if bytes.len() == PIECE || newest.as_ref() != Some(&name) => bytes.len(),
            None => 0,
        };
        if whole == 0 {
            continue;
        }
        let text = String::from_utf8_lossy(&bytes[..whole]);
        let lines = text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
        return Ok(Some((lines, Position { file: name, offset: start + whole as u64, inode })));
    }
    Ok(None)
}

fn read_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < bytes.len() {
        match file.read_at(&mut bytes[read..], at + read as u64) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

/// A line as the server writes it; what is left out there is left out here.
#[derive(Deserialize)]
struct Line {
    level: String,
    /// Microseconds.
    ts: i64,
    target: Option<String>,
    filename: Option<String>,
    line_number: Option<u64>,
    message: String,
    /// Of a panic.
    trace: Option<serde_json::Value>,
}

/// A line that is none of the server's is sent as it stands, at the time of its reading.
fn parse(line: &str, now: i64) -> (Record, &'static str) {
    let Ok(parsed) = serde_json::from_str::<Line>(line) else {
        return (record(now, Severity::Info, cut(line).as_str().into_owned(), Vec::new()), "other");
    };
    let (severity, level) = match parsed.level.as_str() {
        "Error" => (Severity::Error, "error"),
        "Warn" => (Severity::Warn, "warn"),
        "Info" => (Severity::Info, "info"),
        "Debug" => (Severity::Debug, "debug"),
        "Trace" => (Severity::Trace, "trace"),
        "Panic" => (Severity::Fatal, "panic"),
        _ => (Severity::Info, "other"),
    };
    let mut attributes = Vec::new();
    let mut add = |name: &'static str, value: Option<String>| {
        attributes.extend(value.map(|value| KeyValue::new(name, cut(&value))));
    };
    add("inner_universe.log.target", parsed.target);
    add("code.file.path", parsed.filename);
    add("exception.stacktrace", parsed.trace.map(|trace| trace.to_string()));
    attributes.extend(parsed.line_number.map(|line| KeyValue::new("code.line.number", int(line))));
    (record(parsed.ts, severity, cut(&parsed.message).as_str().into_owned(), attributes), level)
}

fn record(time_micros: i64, severity: Severity, body: String, attributes: Vec<KeyValue>) -> Record {
    Record { time_micros, severity, body, event_name: "module.log".into(), within: None, attributes }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(dir: &Path, position: &mut Position) -> Vec<String> {
        let mut found = Vec::new();
        while let Some((lines, next)) = read(dir, position).expect("read") {
            found.extend(lines);
            *position = next;
        }
        found
    }

    #[test]
    fn lines_come_once_over_days_and_unfinished_ones_later() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("write");
        let mut position = Position::default();
        assert!(all(&dir.path().join("missing"), &mut position).is_empty());
        write("2026-01-01.log", "a\nb\nunfin");
        assert_eq!(all(dir.path(), &mut position), ["a", "b"]);
        write("2026-01-01.log", "a\nb\nunfinished\ncut of");
        assert_eq!(all(dir.path(), &mut position), ["unfinished"]);
        write("2026-01-02.log", "c\n");
        assert_eq!(all(dir.path(), &mut position), ["cut of", "c"]);
        assert!(all(dir.path(), &mut position).is_empty());
        // Another history: the day's file is shorter than what was sent of it.
        write("2026-01-02.log", "d\n");
        assert!(all(dir.path(), &mut position).is_empty(), "written in place and as long, it cannot be told apart");
        std::fs::write(dir.path().join("new"), "z\n").expect("write");
        std::fs::rename(dir.path().join("new"), dir.path().join("2026-01-02.log")).expect("rename");
        assert_eq!(all(dir.path(), &mut position), ["z"]);
        write("2026-01-02.log", "");
        write("2026-01-03.log", "e\n");
        assert_eq!(all(dir.path(), &mut position), ["e"]);
        write("2026-01-03.log", &"x".repeat(PIECE + 10));
        // Without an end in sight a piece goes; the rest waits for its end.
        assert_eq!(all(dir.path(), &mut position).iter().map(String::len).sum::<usize>(), PIECE);
    }

    #[test]
    fn a_line_of_the_server_is_understood_and_any_other_is_passed_on() {
        let (panic, level) =
            parse(r#"{"level":"Panic","ts":7,"target":"t","line_number":3,"message":"m","trace":[]}"#, 1);
        assert_eq!((panic.time_micros, panic.severity, panic.body.as_str(), level), (7, Severity::Fatal, "m", "panic"));
        assert_eq!(panic.attributes.len(), 3);
        let (other, level) = parse("not JSON", 1);
        assert_eq!((other.time_micros, other.body.as_str(), level), (1, "not JSON", "other"));
    }
}
