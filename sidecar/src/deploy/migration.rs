//! What a publish would do to the tables that are there: nothing, additions, or something that the server refuses.

use serde::{Deserialize, Serialize};
use spacetimedb_lib::db::raw_def::v9::RawModuleDefV9;
use spacetimedb_schema::auto_migrate::{AutoMigrateStep, ponder_auto_migrate};
use spacetimedb_schema::def::ModuleDef;

use crate::database::description::Description;

/// A comparison of two schemas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Migration {
    /// The database is new.
    First,
    /// No table changes.
    None,
    /// Tables and indexes come or change in a way that keeps every row.
    Additive { steps: Vec<String> },
    /// Rows that are there do not fit; the server refuses it.
    Breaking { reasons: Vec<String> },
    /// It could not be compared; the server decides.
    Unknown { reason: String },
}

impl Migration {
    /// Compares by the rules of the 1.2.0 family, for a server that does not preview a publish itself.
    pub fn between(old: &Description, new: &Description) -> Self {
        let (Some(old_9), Some(new_9)) = (&old.version_9, &new.version_9) else {
            return match new.differences(old) {
                differences if differences.is_empty() => Self::None,
                differences => Self::Unknown { reason: differences.join("; ") },
            };
        };
        Self::by_rules((**old_9).clone(), (**new_9).clone())
    }

    /// As the server has previewed it.
    pub fn of_steps(steps: Vec<String>) -> Self {
        if steps.is_empty() { Self::None } else { Self::Additive { steps } }
    }

    fn by_rules(old: RawModuleDefV9, new: RawModuleDefV9) -> Self {
        let parsed = |raw: RawModuleDefV9| ModuleDef::try_from(raw).map_err(|errors| lines(&errors.to_string()));
        let (old, new) = match (parsed(old), parsed(new)) {
            (Ok(old), Ok(new)) => (old, new),
            (_, Err(reasons)) => return Self::Breaking { reasons },
            (Err(reasons), _) => return Self::Unknown { reason: reasons.join("; ") },
        };
        match ponder_auto_migrate(&old, &new) {
            Ok(plan) => Self::of_steps(plan.steps.iter().filter_map(describe).collect()),
            Err(errors) => Self::Breaking { reasons: lines(&errors.to_string()) },
        }
    }

    pub fn describe(&self) -> String {
        match self {
            Self::First => "the database is new".into(),
            Self::None => "no table changes".into(),
            Self::Additive { steps } => steps.join("; "),
            Self::Breaking { reasons } => reasons.join("; "),
            Self::Unknown { reason } => format!("not compared: {reason}"),
        }
    }
}

/// In words; `None` for what is no change of tables.
fn describe(step: &AutoMigrateStep<'_>) -> Option<String> {
    Some(match step {
        AutoMigrateStep::RemoveRowLevelSecurity(_) | AutoMigrateStep::AddRowLevelSecurity(_) => return None,
        AutoMigrateStep::AddTable(name) => format!("table {name} comes in"),
        AutoMigrateStep::AddIndex(name) => format!("index {name} comes in"),
        AutoMigrateStep::RemoveIndex(name) => format!("index {name} goes"),
        AutoMigrateStep::AddSequence(name) => format!("sequence {name} comes in"),
        AutoMigrateStep::RemoveSequence(name) => format!("sequence {name} goes"),
        AutoMigrateStep::AddSchedule(name) => format!("schedule {name} comes in"),
        AutoMigrateStep::RemoveSchedule(name) => format!("schedule {name} goes"),
        AutoMigrateStep::RemoveConstraint(name) => format!("constraint {name} goes"),
        AutoMigrateStep::ChangeAccess(name) => format!("table {name} changes who may read it"),
    })
}

fn lines(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && *line != "Errors occurred:");
    lines.map(str::to_owned).collect()
}
