//! Every metric there is: one declaration each, from which instruments, `docs/metrics.md` and the tests follow.
//!
//! Names and units are OpenTelemetry's; Prometheus sees them with underscores, the unit's name and, for counters, `_total`.
//! Until [`crate::observe::provider`] has installed a provider, recording costs nothing and goes nowhere.

use std::sync::OnceLock;

use opentelemetry::metrics::{Counter, Histogram};
use opentelemetry::{KeyValue, global};
use parking_lot::RwLock;

/// The name of the instrumentation scope.
pub const SCOPE: &str = "inner_universe";

/// What a metric counts or measures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Only grows while the process lives.
    Counter,
    /// A value as it is now.
    Gauge,
    /// How values are spread.
    Histogram(&'static [f64]),
}

/// The declaration of a metric.
pub struct Metric {
    /// OpenTelemetry's name: dots between words.
    pub name: &'static str,
    pub kind: Kind,
    /// UCUM: `s`, `By`, or `{thing}` for a number of things.
    pub unit: &'static str,
    pub labels: &'static [&'static str],
    pub meaning: &'static str,
    counter: OnceLock<Counter<u64>>,
    histogram: OnceLock<Histogram<f64>>,
}

/// A gauge's value at this moment.
#[derive(Debug, Clone)]
pub struct Sample {
    pub metric: &'static str,
    pub labels: Vec<KeyValue>,
    pub value: f64,
}

/// Seconds of requests and of short work.
const SHORT: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// Seconds of work on whole databases.
const LONG: &[f64] = &[0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0];

macro_rules! metrics {
    ($($(#[doc = $meaning:literal])+ $constant:ident: $kind:expr, $name:literal, $unit:literal, [$($label:literal),*];)+) => {
        $(
            $(#[doc = $meaning])+
            pub static $constant: Metric = Metric {
                name: $name,
                kind: $kind,
                unit: $unit,
                labels: &[$($label),*],
                meaning: concat!($($meaning),+),
                counter: OnceLock::new(),
                histogram: OnceLock::new(),
            };
        )+
        /// Every metric, in the order of the documentation.
        pub static ALL: &[&Metric] = &[$(&$constant),+];
    };
}

metrics! {
    /// The last transaction of the database that is durable in the repository.
    ARCHIVED_OFFSET: Kind::Gauge, "inner_universe.archive.offset", "{transaction}", ["database"];
    /// The last transaction read from the database's log.
    LOG_OFFSET: Kind::Gauge, "inner_universe.archive.log_offset", "{transaction}", ["database"];
    /// Transactions in the log that are not in the repository yet.
    LAG_TRANSACTIONS: Kind::Gauge, "inner_universe.archive.lag.transactions", "{transaction}", ["database"];
    /// Time since the archive last held everything in the log: what a crash now could lose at most.
    LAG: Kind::Gauge, "inner_universe.archive.lag", "s", ["database"];
    /// The timeline that is written. It grows by one with each fork or gap.
    TIMELINE: Kind::Gauge, "inner_universe.archive.timeline", "{timeline}", ["database"];
    /// 1 while an error keeps the database from being archived, else 0.
    ARCHIVE_FAILING: Kind::Gauge, "inner_universe.archive.failing", "{database}", ["database"];
    /// Log objects written.
    ARCHIVED_OBJECTS: Kind::Counter, "inner_universe.archive.objects", "{object}", ["database"];
    /// Bytes of log objects written, compressed.
    ARCHIVED_BYTES: Kind::Counter, "inner_universe.archive.written", "By", ["database"];
    /// Tries to archive that failed and were made again. Kinds: `store`, `lease`, `log`, `other`.
    ARCHIVE_ERRORS: Kind::Counter, "inner_universe.archive.errors", "{error}", ["database", "kind"];
    /// 1 for each condition that keeps the sidecar from being ready, absent once it is over. A condition is of a database, of a schedule, or of neither; the other label is empty.
    CONDITION: Kind::Gauge, "inner_universe.condition", "{condition}", ["condition", "database", "schedule"];
    /// What happened to logs: `fork`, `gap` (log lost before it was archived), `damage` (of a log or of the repository).
    ARCHIVE_EVENTS: Kind::Counter, "inner_universe.archive.events", "{event}", ["database", "kind"];
    /// When such an event last happened since this process started, Unix time. For alerts: it needs no sample from before.
    ARCHIVE_EVENT_TIME: Kind::Gauge, "inner_universe.archive.event.last.time", "s", ["database", "kind"];
    /// Log objects that were merged into larger ones.
    COMPACTION_MERGED: Kind::Counter, "inner_universe.compaction.merged", "{object}", ["database"];
    /// Merged log objects that were written.
    COMPACTION_WRITTEN: Kind::Counter, "inner_universe.compaction.outputs", "{object}", ["database"];
    /// Log objects that were deleted, their merged form having been read back and their grace being over.
    COMPACTION_DELETED: Kind::Counter, "inner_universe.compaction.deleted", "{object}", ["database"];
    /// Passes of compaction that failed and are made again.
    COMPACTION_ERRORS: Kind::Counter, "inner_universe.compaction.errors", "{error}", ["database"];
    /// Time of requests to the store, retries included. Outcomes: `ok`, `missing`, `conflict`, `denied`, `timeout`, `error`.
    STORE_REQUESTS: Kind::Histogram(SHORT), "inner_universe.store.request.duration", "s", ["operation", "outcome"];
    /// Restore points made or failed. Outcomes: `ok`, `incomplete` (made, with problems), `failed`.
    RESTORE_POINTS: Kind::Counter, "inner_universe.restore_point.runs", "{run}", ["outcome"];
    /// Time that a restore point took.
    RESTORE_POINT_DURATION: Kind::Histogram(LONG), "inner_universe.restore_point.duration", "s", [];
    /// When the newest restore point was made, Unix time.
    RESTORE_POINT_TIME: Kind::Gauge, "inner_universe.restore_point.last.time", "s", [];
    /// Restore points in the repository.
    RESTORE_POINT_COUNT: Kind::Gauge, "inner_universe.restore_point.count", "{restore_point}", [];
    /// Time that a restore of everything to `latest` would take until the server serves again, estimated from bytes and transactions.
    RESTORE_ESTIMATE: Kind::Gauge, "inner_universe.restore.estimate", "s", [];
    /// Bytes in the repository, by database; `instance` is what belongs to none.
    REPOSITORY_BYTES: Kind::Gauge, "inner_universe.repository.size", "By", ["database"];
    /// Objects in the repository, by database; `instance` is what belongs to none.
    REPOSITORY_OBJECTS: Kind::Gauge, "inner_universe.repository.objects", "{object}", ["database"];
    /// 1 while this sidecar holds the repository's lease, else 0.
    LEASE_HELD: Kind::Gauge, "inner_universe.lease.held", "{lease}", [];
    /// The lease's fencing token. It grows with each holder.
    LEASE_TOKEN: Kind::Gauge, "inner_universe.lease.token", "{token}", [];
    /// Renewals of the lease. Outcomes: `ok`, `failed` (tried again), `lost`.
    LEASE_RENEWALS: Kind::Counter, "inner_universe.lease.renewals", "{renewal}", ["outcome"];
    /// Scheduled runs. Outcomes: `ok`, `failed`, `skipped` (the one before was not done).
    SCHEDULE_RUNS: Kind::Counter, "inner_universe.schedule.runs", "{run}", ["schedule", "outcome"];
    /// When the schedule last ran, Unix time.
    SCHEDULE_LAST: Kind::Gauge, "inner_universe.schedule.last.time", "s", ["schedule"];
    /// When a run of the schedule last ended well, Unix time.
    SCHEDULE_SUCCESS: Kind::Gauge, "inner_universe.schedule.last.success.time", "s", ["schedule"];
    /// When the schedule runs next, Unix time.
    SCHEDULE_NEXT: Kind::Gauge, "inner_universe.schedule.next.time", "s", ["schedule"];
    /// 1 when the last run of the schedule that ended succeeded, else 0. It outlives restarts.
    SCHEDULE_OK: Kind::Gauge, "inner_universe.schedule.last.ok", "{run}", ["schedule"];
    /// Exports. Outcomes: `ok`, `failed`.
    EXPORTS: Kind::Counter, "inner_universe.exports", "{export}", ["outcome"];
    /// Rows that were exported.
    EXPORTED_ROWS: Kind::Counter, "inner_universe.export.rows", "{row}", ["table"];
    /// Objects that prunes have deleted.
    PRUNED_OBJECTS: Kind::Counter, "inner_universe.prune.objects", "{object}", [];
    /// Their stored bytes.
    PRUNED_BYTES: Kind::Counter, "inner_universe.prune.size", "By", [];
    /// Findings of the last verification that the daemon made, also before a restart.
    VERIFY_FINDINGS: Kind::Gauge, "inner_universe.verify.findings", "{finding}", [];
    /// When a verification of the daemon last ended without findings, Unix time.
    VERIFY_TIME: Kind::Gauge, "inner_universe.verify.last.time", "s", [];
    /// When the newest drill began, Unix time.
    DRILL_TIME: Kind::Gauge, "inner_universe.drill.last.time", "s", [];
    /// 1 when the newest drill passed, else 0.
    DRILL_OK: Kind::Gauge, "inner_universe.drill.last.ok", "{drill}", [];
    /// The recovery time that the newest drill measured: from the start of the restore until a server served.
    DRILL_RTO: Kind::Gauge, "inner_universe.drill.rto", "s", [];
    /// The recovery point that the newest drill measured: how far the archive was behind the live log.
    DRILL_RPO: Kind::Gauge, "inner_universe.drill.rpo", "s", [];
    /// 1 while the supervised server runs, else 0. Absent when the sidecar supervises none.
    SERVER_UP: Kind::Gauge, "inner_universe.server.up", "{server}", [];
    /// How often the supervised server was started. Absent when the sidecar supervises none.
    SERVER_STARTS: Kind::Gauge, "inner_universe.server.starts", "{start}", [];
    /// Free bytes on the file system of the data directory.
    DISK_FREE: Kind::Gauge, "inner_universe.data_dir.free", "By", [];
    /// Bytes of the file system of the data directory.
    DISK_SIZE: Kind::Gauge, "inner_universe.data_dir.capacity", "By", [];
    /// Bytes of the database's commitlog on disk, which the server never deletes.
    LOG_BYTES: Kind::Gauge, "inner_universe.data_dir.log", "By", ["database"];
    /// Events of the bundled module that the collector has taken, by type. Types beyond the first 50 are `other`.
    EVENTS: Kind::Counter, "inner_universe.events.sent", "{event}", ["event_type"];
    /// Time from an event's own time until the collector had taken it, of the last event of each batch.
    EVENT_DELAY: Kind::Histogram(LONG), "inner_universe.events.delay", "s", [];
    /// What stopped the event stream for a while. Kinds: `source` (the server), `collector`, `cursor` (its file).
    EVENT_ERRORS: Kind::Counter, "inner_universe.events.errors", "{error}", ["kind"];
    /// Reducer calls in the log whose spans the collector has taken, or would have but for sampling. Reducers beyond the first 100 are `other`.
    CALLS: Kind::Counter, "inner_universe.calls.sent", "{call}", ["database", "reducer"];
    /// What stopped a database's call stream for a while. Kinds: `log`, `collector`, `cursor` (its file).
    CALL_ERRORS: Kind::Counter, "inner_universe.calls.errors", "{error}", ["database", "kind"];
    /// What the bundled module says it is: 0 initializing, 1 running, 2 degraded.
    MODULE_STATE: Kind::Gauge, "inner_universe.module.state", "{state}", [];
    /// Time since the module was first published.
    MODULE_UPTIME: Kind::Gauge, "inner_universe.module.uptime", "s", [];
    /// Entities in the module's database.
    MODULE_ENTITIES: Kind::Gauge, "inner_universe.module.entities", "{entity}", [];
    /// Relations in the module's database.
    MODULE_RELATIONS: Kind::Gauge, "inner_universe.module.relations", "{relation}", [];
    /// Events in the module's log, less those that were trimmed.
    MODULE_EVENTS: Kind::Gauge, "inner_universe.module.events", "{event}", [];
    /// Clients that are connected to the module, the sidecar's own one or two among them.
    MODULE_CLIENTS: Kind::Gauge, "inner_universe.module.clients", "{client}", [];
    /// When the module last wrote its status, Unix time of the server.
    MODULE_STATUS_TIME: Kind::Gauge, "inner_universe.module.status.time", "s", [];
    /// The latest measurement of each of the first 500 series that clients record in the module's `metric` table. A measurement's own labels come with the prefix `label_`.
    MODULE_METRIC: Kind::Gauge, "inner_universe.module.metric", "{value}", ["metric", "unit"];
    /// Looks at the module's tables that failed and were made again.
    MODULE_ERRORS: Kind::Counter, "inner_universe.module.errors", "{error}", [];
    /// Transactions that the sidecar itself has caused in databases, at most. Kinds: `connection` (two: opened and closed), `call` (three over HTTP, one over a connection), `sql` (two for a statement over HTTP, none before server 2.2).
    OWN_TRANSACTIONS: Kind::Counter, "inner_universe.own.transactions", "{transaction}", ["kind"];
    /// Lines of modules' own logs that the collector has taken. Levels as the server writes them, in lower case.
    MODULE_LOGS: Kind::Counter, "inner_universe.module.log.sent", "{line}", ["database", "level"];
    /// What stopped the stream of a module's log for a while.
    MODULE_LOG_ERRORS: Kind::Counter, "inner_universe.module.log.errors", "{error}", ["database"];
    /// Records of all streams and of the sidecar's own telemetry that the collector rejected, and that were dropped. Reasons: `refused`, `too_large`, `partial_success`.
    REJECTED: Kind::Counter, "inner_universe.telemetry.rejected", "{record}", ["signal", "reason"];
    /// Calls of the heartbeat address. Outcomes: `ok`, `failed`, `withheld` (not healthy, so not called).
    HEARTBEATS: Kind::Counter, "inner_universe.heartbeat.calls", "{call}", ["outcome"];
    /// Requests to the sidecar's own HTTP interface.
    HTTP_REQUESTS: Kind::Counter, "inner_universe.http.requests", "{request}", ["route", "status"];
    /// 1, with the release as label.
    BUILD_INFO: Kind::Gauge, "inner_universe.build.info", "{build}", ["version"];
    /// When this process started, Unix time.
    START_TIME: Kind::Gauge, "inner_universe.process.start.time", "s", [];
    /// Resident memory of this process.
    MEMORY: Kind::Gauge, "inner_universe.process.memory", "By", [];
}

impl Metric {
    /// Counts `n` more.
    pub fn add(&self, n: u64, labels: &[KeyValue]) {
        let counter = self.counter.get_or_init(|| {
            let meter = global::meter(SCOPE);
            let builder = meter.u64_counter(self.name);
            builder.with_unit(self.unit).with_description(self.meaning.trim()).build()
        });
        counter.add(n, labels);
    }

    /// Records one value.
    pub fn record(&self, value: f64, labels: &[KeyValue]) {
        let histogram = self.histogram.get_or_init(|| {
            let bounds = if let Kind::Histogram(bounds) = self.kind { bounds.to_vec() } else { Vec::new() };
            let meter = global::meter(SCOPE);
            let builder = meter.f64_histogram(self.name).with_boundaries(bounds);
            builder.with_unit(self.unit).with_description(self.meaning.trim()).build()
        });
        histogram.record(value, labels);
    }

    /// A value of this gauge.
    pub fn sample(&self, value: f64, labels: Vec<KeyValue>) -> Sample {
        Sample { metric: self.name, labels, value }
    }

    /// The name that Prometheus sees.
    pub fn prometheus_name(&self) -> String {
        let mut name = self.name.replace('.', "_");
        let unit = match self.unit {
            "s" => "seconds",
            "By" => "bytes",
            _ => "",
        };
        if !unit.is_empty() {
            name = format!("{name}_{unit}");
        }
        if self.kind == Kind::Counter { format!("{name}_total") } else { name }
    }
}

/// Gauges are read from here when somebody asks.
static SAMPLES: RwLock<Vec<Sample>> = RwLock::new(Vec::new());

/// Puts new values of all gauges in place of the old ones. What is left out is no longer reported.
pub fn publish(samples: Vec<Sample>) {
    *SAMPLES.write() = samples;
}

/// Makes every gauge of [`ALL`] answer from what was last published.
pub(super) fn observe_gauges() {
    let meter = global::meter(SCOPE);
    for metric in ALL.iter().filter(|metric| metric.kind == Kind::Gauge) {
        let builder = meter.f64_observable_gauge(metric.name);
        builder
            .with_unit(metric.unit)
            .with_description(metric.meaning.trim())
            .with_callback(|observer| {
                for sample in SAMPLES.read().iter().filter(|sample| sample.metric == metric.name) {
                    observer.observe(sample.value, &sample.labels);
                }
            })
            .build();
    }
}

/// `docs/metrics.md`.
pub fn documentation() -> String {
    let mut text = String::from(
        "# Metrics\n\nEvery metric of the sidecar, as declared in `sidecar/src/observe/metrics.rs`. Prometheus reads them at \
         `/metrics`; with `telemetry.otlp_endpoint` they are also pushed over OTLP under their OpenTelemetry names.\n\n\
         | Prometheus | OpenTelemetry | kind | unit | labels | meaning |\n|---|---|---|---|---|---|\n",
    );
    for metric in ALL {
        let kind = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        };
        let labels: Vec<_> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        text += &format!(
            "| `{}` | `{}` | {kind} | `{}` | {} | {} |\n",
            metric.prometheus_name(),
            metric.name,
            metric.unit,
            labels.join(", "),
            metric.meaning.trim()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_is_what_is_declared() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, documentation()).expect("write docs/metrics.md");
        }
        let found = std::fs::read_to_string(path).expect("docs/metrics.md");
        assert_eq!(found, documentation(), "run `UPDATE_DOCS=1 cargo test -p inner-universe documentation`");
    }

    #[test]
    fn names_are_declared_once_and_say_their_unit() {
        let mut names: Vec<_> = ALL.iter().map(|metric| metric.prometheus_name()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        for metric in ALL {
            assert!(metric.name.starts_with("inner_universe."), "{}", metric.name);
            assert!(metric.meaning.trim().ends_with('.'), "{}", metric.name);
            assert!(matches!(metric.unit, "s" | "By") || metric.unit.starts_with('{'), "{}", metric.unit);
        }
    }
}
