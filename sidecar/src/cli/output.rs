//! What users see: results on stdout, logs and errors on stderr.
#![expect(clippy::disallowed_macros, reason = "this is the room that prints")]

use std::io::IsTerminal;
use std::sync::Arc;

use serde::Serialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::cli::failure::Failure;
use crate::cli::progress;
use crate::observe::own::OwnTelemetry;
use crate::progress::{Progress, Silent};

/// How to print.
pub struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    pub fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet }
    }

    /// Prints `report` as JSON, or what `human` makes of it.
    pub fn result<T: Serialize>(&self, report: &T, human: impl FnOnce(&T) -> String) {
        if self.json {
            println!("{}", serde_json::to_string_pretty(report).unwrap_or_default());
        } else {
            println!("{}", human(report).trim_end());
        }
    }

    /// Prints a text that is the same with --json.
    pub fn text(&self, text: &str) {
        println!("{}", text.trim_end());
    }

    /// Something the user should know although the work succeeded.
    pub fn warn(&self, message: &str) {
        eprintln!("warning: {message}");
    }

    pub fn failure(&self, failure: &Failure) {
        if self.json {
            let document = serde_json::json!({"error": failure.message, "exit_code": failure.status as u8});
            println!("{document:#}");
        }
        eprintln!("error: {}", failure.message);
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
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
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
