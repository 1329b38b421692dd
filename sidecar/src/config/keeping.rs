//! How long backups are kept, and how they are tried.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::value::Period;

/// Which restore points `prune` keeps: any that one of these rules names. Nothing is removed while all are 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionConfig {
    /// Every moment since so long ago can be restored. `7d` is a week.
    pub window: Period,
    /// The newest so many.
    pub keep_last: u32,
    /// The newest one of each of the last so many hours that have one.
    pub keep_hourly: u32,
    pub keep_daily: u32,
    /// Weeks begin on Monday.
    pub keep_weekly: u32,
    pub keep_monthly: u32,
    pub keep_yearly: u32,
    /// So many restore points are kept whatever their age.
    pub minimum: u32,
    /// How long what nothing needs stays before it is deleted; longer than any restore takes.
    pub grace: Period,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        Self {
            window: Period::seconds(0),
            keep_last: 0,
            keep_hourly: 0,
            keep_daily: 0,
            keep_weekly: 0,
            keep_monthly: 0,
            keep_yearly: 0,
            minimum: 1,
            grace: Period::seconds(24 * 3600),
        }
    }
}

impl RetentionConfig {
    /// Is no rule given?
    pub fn keeps_nothing(&self) -> bool {
        let counts =
            [self.keep_last, self.keep_hourly, self.keep_daily, self.keep_weekly, self.keep_monthly, self.keep_yearly];
        self.window.0.is_zero() && counts.iter().all(|count| *count == 0)
    }
}

/// How restores are rehearsed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DrillConfig {
    /// Where to restore to; a directory of its own is made in it and removed again. The system's temporary directory when
    /// left out.
    pub scratch_dir: Option<PathBuf>,
    /// Another server binary than spacetimedb_config.server_bin, as to rehearse an upgrade.
    pub server_bin: Option<PathBuf>,
    /// The longest that the server may take to come up.
    pub boot_timeout: Period,
    /// Results older than the newest so many are removed from the repository.
    pub keep_results: u32,
    /// The largest table, in rows, that is read from the live server for the promise of a restore point, which drills compare
    /// with what they restored. Of larger ones rows are counted only; 0 for no promise.
    pub promise_rows: u64,
}

impl Default for DrillConfig {
    fn default() -> Self {
        Self {
            scratch_dir: None,
            server_bin: None,
            boot_timeout: Period::seconds(300),
            keep_results: 30,
            promise_rows: 20_000,
        }
    }
}
