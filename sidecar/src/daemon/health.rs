//! Is the daemon doing its work? Every reason against it, in words for the operator.

use serde::Serialize;

use crate::config::value::Period;
use crate::daemon::conditions::{ConditionKind, Finding, Subject};
use crate::daemon::state::DaemonStatus;

/// The answer of `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Readiness {
    pub ready: bool,
    /// Why not; empty when ready.
    pub reasons: Vec<String>,
}

/// Ready is a daemon that runs and reports no condition.
pub fn readiness(status: &DaemonStatus) -> Readiness {
    let mut reasons = Vec::new();
    if !status.running {
        reasons.push("the daemon is stopping".to_owned());
    }
    reasons.extend(status.conditions.iter().map(|held| format!("{}; {}", held.message, held.advice)));
    Readiness { ready: reasons.is_empty(), reasons }
}

/// What the rest of a status shows to be wrong.
pub(super) fn conditions(status: &DaemonStatus, lag_alert: Period) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut add = |kind, subject: Subject, message: String| found.push(Finding { kind, subject, message });
    if status.lease_token.is_none() {
        let message = match &status.last_error {
            Some(error) => format!("nothing is archived yet: {error}"),
            None => {
                "nothing is archived yet: the data directory, the store or the lease is being waited for".to_owned()
            }
        };
        add(ConditionKind::NotArchiving, Subject::Sidecar, message);
    } else if let Some(error) = &status.lease_error {
        add(ConditionKind::LeaseExpired, Subject::Sidecar, format!("nothing is written: {error}"));
    }
    if status.server.as_ref().is_some_and(|server| !server.is_up()) {
        let message = "the server is down and is about to be started again";
        add(ConditionKind::ServerDown, Subject::Sidecar, message.to_owned());
    }
    for database in &status.databases {
        let (name, subject) = (&database.name, || Subject::Database(database.name.clone()));
        if let Some(error) = &database.error {
            let message = format!("database {name} is not being archived: {error}");
            add(ConditionKind::ArchiveFailing, subject(), message);
        } else if database.behind_seconds > lag_alert.0.as_secs_f64() {
            let behind = database.behind_seconds;
            let message = format!("database {name} is {behind:.0} s behind, more than archive.lag_alert ({lag_alert})");
            add(ConditionKind::ArchiveBehind, subject(), message);
        }
        if let Some(damage) = &database.damage {
            add(ConditionKind::LogDamaged, subject(), format!("database {name}: {damage}"));
        }
    }
    for schedule in status.schedules.iter().filter(|schedule| schedule.last_ok == Some(false)) {
        let message = schedule.last_message.as_deref().unwrap_or("no reason is known");
        let message = format!("the last scheduled {} failed: {message}", schedule.name);
        add(ConditionKind::ScheduleFailed, Subject::Schedule(schedule.name.clone()), message);
    }
    found
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::clock::SystemClock;
    use crate::daemon::state::{FollowedStatus, ScheduleStatus, State};
    use crate::ids::Identity;
    use crate::repository::Repository;
    use crate::repository::crypto::Keyring;
    use crate::repository::lease::Lease;
    use crate::repository::store::Store;

    async fn leased(duration: Duration) -> (Arc<State>, Lease) {
        let store = Store::around(Arc::new(object_store::memory::InMemory::new()));
        let repository = Repository::open_or_create_in(store, "memory://", Keyring::default(), &SystemClock).await;
        let lease = Lease::acquire(&repository.expect("a repository"), duration, Arc::new(SystemClock), false).await;
        let lease = lease.expect("a lease");
        let state = Arc::new(State::new(Arc::new(SystemClock), Path::new("/"), Period::seconds(60)));
        state.leased(lease.token(), lease.fence());
        (state, lease)
    }

    fn kinds(found: &[Finding]) -> Vec<ConditionKind> {
        found.iter().map(|found| found.kind).collect()
    }

    #[tokio::test]
    async fn a_lease_past_its_time_is_unready() {
        let (state, _lease) = leased(Duration::from_secs(3600)).await;
        let status = state.status();
        assert_eq!(readiness(&status), Readiness { ready: true, reasons: Vec::new() });
        let (state, _lease) = leased(Duration::ZERO).await;
        let found = readiness(&state.status());
        assert!(!found.ready && found.reasons[0].contains("expired before it was renewed"), "{found:?}");
        state.stopped();
        assert_eq!(state.status().conditions, [], "one that was released is not one that was lost");
    }

    #[tokio::test]
    async fn what_a_task_raises_is_a_reason() {
        let (state, _lease) = leased(Duration::from_secs(3600)).await;
        state.raise(ConditionKind::InstanceNotCaptured, Subject::Sidecar, "no restore point holds the change");
        let found = readiness(&state.status());
        assert!(!found.ready && found.reasons[0].starts_with("no restore point holds the change; "), "{found:?}");
        state.clear(ConditionKind::InstanceNotCaptured, &Subject::Sidecar);
        assert!(readiness(&state.status()).ready);
    }

    #[tokio::test]
    async fn each_part_of_a_status_counts() {
        let (state, _lease) = leased(Duration::from_secs(3600)).await;
        let mut status = state.status();
        let alert = Period::seconds(60);
        status.databases = vec![FollowedStatus {
            identity: Identity([0; 32]),
            name: "d".to_owned(),
            timeline: None,
            archived_offset: None,
            log_offset: None,
            behind_seconds: 0.5,
            objects_written: 0,
            bytes_written: 0,
            error: None,
            damage: None,
            events: Vec::new(),
        }];
        status.schedules = vec![ScheduleStatus {
            name: "verify".to_owned(),
            cron: String::new(),
            time_zone: String::new(),
            next_run: None,
            running: true,
            last_run: None,
            last_ok: Some(true),
            last_message: None,
            last_success: None,
        }];
        assert_eq!(conditions(&status, alert), []);
        status.databases[0].behind_seconds = 61.0;
        status.databases[0].damage = Some("the log ends in bytes that are not a commit".to_owned());
        status.schedules[0].last_ok = Some(false);
        let found = conditions(&status, alert);
        assert_eq!(
            kinds(&found),
            [ConditionKind::ArchiveBehind, ConditionKind::LogDamaged, ConditionKind::ScheduleFailed]
        );
        assert_eq!(found[1].subject, Subject::Database("d".to_owned()));
        assert_eq!(found[2].subject, Subject::Schedule("verify".to_owned()));
        status.databases[0].error = Some("the store is full".to_owned());
        assert_eq!(kinds(&conditions(&status, alert))[0], ConditionKind::ArchiveFailing, "the reason, not the lag");
        status.lease_token = None;
        assert_eq!(kinds(&conditions(&status, alert))[0], ConditionKind::NotArchiving);
    }
}
