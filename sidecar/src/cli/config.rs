//! `config check`, `config schema`, `config show`

use clap::Subcommand;
use serde::Serialize;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::Output;
use crate::config::Config;
use crate::config::load::{ConfigError, Loaded, Problem};

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Say everything that is wrong with the configuration
    Check,
    /// Print the JSON Schema of the configuration
    Schema,
    /// Print every key with its value and where that comes from; secrets are redacted
    Show,
}

#[derive(Serialize)]
struct CheckReport {
    ok: bool,
    problems: Vec<Problem>,
}

pub fn run(
    output: &Output,
    command: ConfigCommand,
    loaded: Result<Loaded, ConfigError>,
) -> Result<ExitStatus, Failure> {
    match command {
        ConfigCommand::Check => {
            let problems = loaded.err().map(|error| error.0).unwrap_or_default();
            let status = if problems.is_empty() { ExitStatus::Ok } else { ExitStatus::Usage };
            output.result(&CheckReport { ok: problems.is_empty(), problems }, |report| {
                let lines: Vec<_> = report.problems.iter().map(Problem::to_string).collect();
                if lines.is_empty() { "the configuration is good".into() } else { lines.join("\n") }
            });
            Ok(status)
        }
        ConfigCommand::Schema => {
            let schema = schemars::schema_for!(Config);
            output.result(&schema, |schema| serde_json::to_string_pretty(schema).unwrap_or_default());
            Ok(ExitStatus::Ok)
        }
        ConfigCommand::Show => {
            let loaded = loaded.map_err(|error| Failure::usage(format!("the configuration is wrong: {error}")))?;
            output.result(&loaded.effective(), |keys| {
                let line =
                    |key: &crate::config::load::Effective| format!("{} = {}  # {}", key.key, key.value, key.source);
                keys.iter().map(line).collect::<Vec<_>>().join("\n")
            });
            Ok(ExitStatus::Ok)
        }
    }
}
