//! What users see: results on stdout, logs and errors on stderr.
//!
//! Invariants: no work ends because nobody reads what it prints or a disk is full; a result that could not be printed is
//! noted, and makes the process fail at its end; with `--json`, what is printed is one valid document.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::Serialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::progress;
use crate::observe::own::OwnTelemetry;
use crate::progress::{Progress, Silent};

/// How to print.
pub struct Output {
    json: bool,
    quiet: bool,
    /// Why a result could not be printed.
    unprinted: Mutex<Option<io::Error>>,
}

impl Output {
    pub fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet, unprinted: Mutex::default() }
    }

    /// Prints `report` as JSON, or what `human` makes of it.
    pub fn result<T: Serialize>(&self, report: &T, human: impl FnOnce(&T) -> String) {
        if !self.json {
            return self.print(human(report).trim_end());
        }
        match serde_json::to_string_pretty(report) {
            Ok(text) => self.print(&text),
            Err(error) => {
                let message = format!("the result cannot be written as JSON: {error}");
                self.print(&error_document(&message, ExitStatus::Failed));
                self.unprinted.lock().get_or_insert(io::Error::other(message));
            }
        }
    }

    fn print(&self, text: &str) {
        let mut stdout = io::stdout().lock();
        if let Err(error) = writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
            self.unprinted.lock().get_or_insert(error);
        }
    }

    /// Returns true once nothing more can be printed.
    pub fn is_broken(&self) -> bool {
        self.unprinted.lock().is_some()
    }

    /// What to exit with, after everything was printed or not.
    pub fn ending(&self, status: ExitStatus) -> ExitStatus {
        match self.unprinted.lock().as_ref() {
            // A reader that closes the pipe has what it wanted.
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                line(format_args!("error: the result was not printed: {error}"));
                if status == ExitStatus::Ok { ExitStatus::Failed } else { status }
            }
            _ => status,
        }
    }

    /// Prints a text that is the same with --json.
    pub fn text(&self, text: &str) {
        self.print(text.trim_end());
    }

    /// Something the user should know although the work succeeded.
    pub fn warn(&self, message: &str) {
        line(format_args!("warning: {message}"));
    }

    /// What the user waits for.
    pub fn note(&self, message: &str) {
        if !self.quiet {
            line(format_args!("{message}"));
        }
    }

    pub fn failure(&self, failure: &Failure) {
        if self.json {
            self.print(&error_document(&failure.message, failure.status));
        }
        line(format_args!("error: {}", failure.message));
    }

    /// A bar on a terminal, plain lines otherwise, nothing when quiet.
    pub fn progress(&self) -> Arc<dyn Progress> {
        if self.quiet {
            Arc::new(Silent)
        } else if std::io::stderr().is_terminal() {
            Arc::new(progress::Bar::new())
        } else {
            Arc::new(progress::Lines::default())
        }
    }
}

fn error_document(message: &str, status: ExitStatus) -> String {
    format!("{:#}", serde_json::json!({"error": message, "exit_code": status as u8}))
}

/// Writes a line to stderr, if that is possible.
pub fn line(text: impl Display) {
    let _ = writeln!(Stderr, "{text}");
}

/// Stderr, where nothing that cannot be written matters.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = io::stderr().flush();
        Ok(())
    }
}

/// The forms of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

/// How to log.
#[derive(Debug, Clone, Copy)]
pub struct Logging {
    pub verbose: u8,
    pub quiet: bool,
    pub format: LogFormat,
}

/// It logs an error when a job arrives while it stops, which is harmless. Schedules that do not run are reported by us.
const QUIET: &str = "tokio_cron_scheduler=off";

/// Logs go to stderr, and further as `own` says; `RUST_LOG` refines what the flags choose.
pub fn start_logging(logging: Logging, own: &OwnTelemetry) {
    let Logging { verbose, quiet, format } = logging;
    let level = match (quiet, verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "warn,inner_universe=info",
        (_, 2) => "info,inner_universe=debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("{level},{QUIET}")));
    let lines = tracing_subscriber::fmt::layer().with_writer(|| Stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).boxed(),
    };
    // A second start in one process (tests) keeps the first one's.
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter)).with(own.layer()).try_init();
}

/// `1.5 GiB`
pub fn bytes(n: u64) -> String {
    crate::config::value::approximate(n)
}

/// `1.25 s`
pub fn duration(ms: u64) -> String {
    format!("{}.{:02} s", ms / 1000, ms % 1000 / 10)
}
