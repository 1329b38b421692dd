//! The values of all gauges, from what the daemon knows of itself.

use std::path::Path;

use jiff::Timestamp;
use opentelemetry::KeyValue;

use crate::backup::log::LogEventKind;
use crate::daemon::conditions::ConditionKind;
use crate::daemon::state::DaemonStatus;
use crate::daemon::survey::Survey;
use crate::observe::metrics::{self, Sample};

/// Every gauge at this moment.
pub(super) fn samples(status: &DaemonStatus, survey: &Survey, data_dir: &Path) -> Vec<Sample> {
    let mut found = vec![
        metrics::BUILD_INFO.sample(1.0, vec![KeyValue::new("version", env!("CARGO_PKG_VERSION"))]),
        metrics::START_TIME.sample(unix(status.started_at), Vec::new()),
        metrics::LEASE_HELD.sample(f64::from(u8::from(holds_lease(status))), Vec::new()),
    ];
    found.extend(status.conditions.iter().map(|condition| {
        let labels = vec![
            KeyValue::new("condition", condition.kind.name()),
            KeyValue::new("database", condition.database.clone().unwrap_or_default()),
            KeyValue::new("schedule", condition.schedule.clone().unwrap_or_default()),
        ];
        metrics::CONDITION.sample(1.0, labels)
    }));
    let mut plain = |metric: &metrics::Metric, value: Option<f64>| {
        found.extend(value.map(|value| metric.sample(value, Vec::new())));
    };
    plain(&metrics::LEASE_TOKEN, status.lease_token.map(|token| token as f64));
    plain(&metrics::MEMORY, resident());
    let disk = rustix::fs::statvfs(data_dir).ok();
    plain(&metrics::DISK_FREE, disk.as_ref().map(|disk| (disk.f_bavail * disk.f_frsize) as f64));
    plain(&metrics::DISK_SIZE, disk.as_ref().map(|disk| (disk.f_blocks * disk.f_frsize) as f64));
    if let Some(server) = &status.server {
        plain(&metrics::SERVER_UP, Some(f64::from(u8::from(server.is_up()))));
        plain(&metrics::SERVER_STARTS, Some(server.starts as f64));
    }
    plain(&metrics::RESTORE_POINT_TIME, survey.newest_restore_point.map(unix));
    plain(&metrics::RESTORE_POINT_COUNT, survey.restore_points.map(|count| count as f64));
    plain(&metrics::RESTORE_ESTIMATE, survey.restore_estimate);
    plain(&metrics::VERIFY_FINDINGS, survey.findings.map(|count| count as f64));
    plain(&metrics::VERIFY_TIME, survey.verified_at.map(unix));
    let drill = survey.drill.as_ref();
    let seconds = |ms: u64| ms as f64 / 1000.0;
    plain(&metrics::DRILL_TIME, drill.map(|drill| unix(drill.started_at)));
    plain(&metrics::DRILL_OK, drill.map(|drill| f64::from(u8::from(drill.passed))));
    plain(&metrics::DRILL_RTO, drill.and_then(|drill| drill.rto_ms).map(seconds));
    plain(&metrics::DRILL_RPO, drill.and_then(|drill| drill.rpo_ms).map(seconds));
    let mut events = Vec::new();
    for database in &status.databases {
        let mut of = |metric: &metrics::Metric, value: Option<f64>| {
            let label = vec![KeyValue::new("database", database.name.clone())];
            found.extend(value.map(|value| metric.sample(value, label)));
        };
        let (log, archived) = (database.log_offset, database.archived_offset);
        of(&metrics::ARCHIVED_OFFSET, archived.map(|offset| offset.0 as f64));
        of(&metrics::LOG_OFFSET, log.map(|offset| offset.0 as f64));
        let next = |offset: Option<crate::ids::Offset>| offset.map_or(0, |offset| offset.0 + 1);
        of(&metrics::LAG_TRANSACTIONS, Some(next(log).saturating_sub(next(archived)) as f64));
        of(&metrics::LAG, Some(database.behind_seconds));
        of(&metrics::TIMELINE, database.timeline.map(|timeline| f64::from(timeline.0)));
        for kind in [LogEventKind::Fork, LogEventKind::Gap, LogEventKind::Damage] {
            let last = database.events.iter().rev().find(|event| event.kind == kind);
            let labels = vec![KeyValue::new("database", database.name.clone()), KeyValue::new("kind", kind.name())];
            events.extend(last.map(|event| metrics::ARCHIVE_EVENT_TIME.sample(unix(event.at), labels)));
        }
        of(&metrics::ARCHIVE_FAILING, Some(f64::from(u8::from(database.error.is_some()))));
    }
    found.extend(events);
    for (name, usage) in &survey.usage {
        let label = || vec![KeyValue::new("database", name.clone())];
        found.push(metrics::REPOSITORY_BYTES.sample(usage.bytes as f64, label()));
        found.push(metrics::REPOSITORY_OBJECTS.sample(usage.objects as f64, label()));
    }
    for (name, bytes) in &survey.log_bytes {
        found.push(metrics::LOG_BYTES.sample(*bytes as f64, vec![KeyValue::new("database", name.clone())]));
    }
    for schedule in &status.schedules {
        let mut of = |metric: &metrics::Metric, value: Option<f64>| {
            let label = vec![KeyValue::new("schedule", schedule.name.clone())];
            found.extend(value.map(|value| metric.sample(value, label)));
        };
        of(&metrics::SCHEDULE_LAST, schedule.last_run.map(unix));
        of(&metrics::SCHEDULE_SUCCESS, schedule.last_success.map(unix));
        of(&metrics::SCHEDULE_NEXT, schedule.next_run.map(unix));
        of(&metrics::SCHEDULE_OK, schedule.last_ok.map(|ok| f64::from(u8::from(ok))));
    }
    found
}

fn holds_lease(status: &DaemonStatus) -> bool {
    status.lease_token.is_some() && !status.conditions.iter().any(|found| found.kind == ConditionKind::LeaseExpired)
}

fn unix(time: Timestamp) -> f64 {
    time.as_millisecond() as f64 / 1000.0
}

/// Bytes; `None` where there is no `/proc`.
fn resident() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib * 1024.0)
}
