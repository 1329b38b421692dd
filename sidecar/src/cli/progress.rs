//! Progress on stderr.

use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::output;
use crate::progress::Progress;

/// A bar for terminals.
pub struct Bar(ProgressBar);

impl Bar {
    pub fn new() -> Self {
        let bar = ProgressBar::no_length();
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        Self(bar)
    }
}

const UNKNOWN_TOTAL: &str = "{spinner} {msg} {bytes} ({bytes_per_sec})";
const KNOWN_TOTAL: &str = "{spinner} {msg} [{bar:30}] {bytes}/{total_bytes} ({bytes_per_sec}, {eta} left)";

impl Progress for Bar {
    fn phase(&self, name: &str, total: Option<u64>) {
        let template = if total.is_some() { KNOWN_TOTAL } else { UNKNOWN_TOTAL };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.0.set_style(style);
        }
        self.0.reset();
        match total {
            Some(total) => self.0.set_length(total),
            None => self.0.unset_length(),
        }
        self.0.set_message(name.to_owned());
    }

    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A line a phase, for logs and pipes.
#[derive(Default)]
pub struct Lines(Mutex<Option<String>>);

impl Progress for Lines {
    fn phase(&self, name: &str, total: Option<u64>) {
        let Ok(mut last) = self.0.lock() else { return };
        if last.as_deref() == Some(name) {
            return;
        }
        match total {
            Some(total) => output::line(format_args!("{name} ({})", indicatif::BinaryBytes(total))),
            None => output::line(format_args!("{name}")),
        }
        *last = Some(name.to_owned());
    }

    fn advance(&self, _bytes: u64) {}
}
