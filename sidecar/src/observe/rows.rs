//! The tables of the bundled module that are followed by their sequences.

use crate::database::reader::Sequenced;
use crate::module_bindings::{EventLog, Metric, StateVersion};

impl Sequenced for EventLog {
    const TABLE: &'static str = "event_log";
    const KEY: &'static str = "sequence";

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

    fn sequence(&self) -> u64 {
        self.version_id
    }

    fn id(&self) -> String {
        self.timestamp.to_micros_since_unix_epoch().to_string()
    }
}
