//! Is the daemon doing its work? Every reason against it, in words for whoever is called at night.

use serde::Serialize;

use crate::config::Config;
use crate::daemon::state::DaemonStatus;

/// The answer of `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Readiness {
    pub ready: bool,
    /// Why not; empty when ready.
    pub reasons: Vec<String>,
}

/// Looks at what the daemon tells of itself.
pub fn readiness(status: &DaemonStatus, config: &Config) -> Readiness {
    let mut reasons = Vec::new();
    if !status.running {
        reasons.push("the daemon is stopping".to_owned());
    }
    if status.lease_token.is_none() {
        reasons.push(match &status.last_error {
            Some(error) => format!("nothing is archived yet: {error}"),
            None => {
                "nothing is archived yet: the data directory, the store or the lease is being waited for".to_owned()
            }
        });
    }
    if status.server.as_ref().is_some_and(|server| server.pid.is_none()) {
        reasons.push("the server is down and is about to be started again".to_owned());
    }
    let alert = config.archive.lag_alert;
    for database in &status.databases {
        let name = &database.name;
        if let Some(error) = &database.error {
            reasons.push(format!("database {name} is not being archived: {error}"));
        } else if database.behind_seconds > alert.0.as_secs_f64() {
            reasons.push(format!(
                "database {name} is {:.0} s behind, more than archive.lag_alert ({alert})",
                database.behind_seconds
            ));
        }
    }
    for schedule in status.schedules.iter().filter(|schedule| schedule.last_ok == Some(false)) {
        let message = schedule.last_message.as_deref().unwrap_or("no reason is known");
        reasons.push(format!("the last scheduled {} failed: {message}", schedule.name));
    }
    Readiness { ready: reasons.is_empty(), reasons }
}
