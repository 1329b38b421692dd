//! Is what was deployed what runs, and does it work? The program, its tables, its status, and an event there and back.

use serde_json::{Value, json};

use crate::database::description::Description;
use crate::database::schema::Schema;
use crate::deploy::DeployError;
use crate::ids::{ContentHash, RestorePointId};
use crate::observe::server::Database;

/// Checks a deployment; returns what was seen.
///
/// # Errors
/// [`DeployError::Verification`] with what is not as it should be.
pub async fn verify(
    database: &Database,
    module: &ContentHash,
    described: Option<&Description>,
    id: RestorePointId,
) -> Result<String, DeployError> {
    let wrong = |reason: String| DeployError::Verification(reason);
    match database.program().await? {
        Some(program) if program == *module => {}
        Some(program) => return Err(wrong(format!("program {program} runs, not {module}"))),
        None => return Err(wrong("no program runs".into())),
    }
    let served = database.description().await?;
    let mut seen = vec!["the program runs".to_owned()];
    if let Some(described) = described {
        let differences = described.differences(&served);
        if !differences.is_empty() {
            return Err(wrong(format!("its tables are not those of the module: {}", differences.join("; "))));
        }
        seen.push("its tables are those of the module".into());
    }
    let schema = Schema::from(served);
    if schema.is_bundled() {
        let refused = |error| wrong(format!("get_system_status: {error}"));
        database.call("get_system_status").await.map_err(refused)?;
        let rows: Vec<Value> = database.all("system_status").await?;
        match rows.len() {
            1 => seen.push("it tells its status".into()),
            n => return Err(wrong(format!("system_status has {n} rows, not one"))),
        }
        let correlation = format!("deployment-{id}");
        let field = json!({"name": "module", "value": {"String": module.to_string()}});
        let event =
            json!(["DEPLOYMENT_VERIFIED", {"some": "inner-universe"}, {"some": correlation}, {"Custom": [field]}]);
        database.call_with("record_event", &event).await.map_err(|error| wrong(format!("record_event: {error}")))?;
        let statement = format!("SELECT event_type FROM event_log WHERE correlation_id = '{correlation}'");
        let rows: Vec<(String,)> = database.rows(statement).await?;
        if !rows.iter().any(|(event_type,)| event_type == "DEPLOYMENT_VERIFIED") {
            return Err(wrong("an event that was recorded is not in the event log".into()));
        }
        seen.push("an event came back".into());
    }
    Ok(seen.join(", "))
}
