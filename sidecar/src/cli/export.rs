//! `export`

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::{bytes, duration};
use crate::cli::{Context, DatabaseArg, while_held};
use crate::config::{Config, Format};
use crate::daemon::control::{self, Answer, Request};
use crate::daemon::state::StateDir;
use crate::export::history::{History, Subject, history};
use crate::export::{self, ExportOptions, ExportReport, Places};
use crate::ids::Identity;

#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    database: DatabaseArg,
    /// The server's data directory, to find a daemon that holds the repository and to export the server's configuration;
    /// spacetimedb_config.db_path when left out
    #[arg(long, alias = "db-path", global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The form of the files; may be given twice; export.formats when left out
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    format: Vec<Format>,
    /// Leave out rows up to this number; for the first export of a table that only grows
    #[arg(long, global = true, value_name = "CURSOR")]
    since: Option<u64>,
    /// Begin a new series of files where a column changed its type
    #[arg(long, global = true)]
    new_series: bool,
    /// Take the lease from another sidecar; only when that one is dead
    #[arg(long, global = true)]
    force: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Events that came since the last export
    EventLog,
    /// Versions of entities and relations that came since the last export; or, with --entity or --relation, every version
    /// of one that the module or its exports have
    StateVersions(StateVersionsArgs),
    /// The module's settings, the sidecar's configuration without secrets, and the server's
    Config,
    /// Tables by name
    Table {
        #[arg(required = true)]
        name: Vec<String>,
    },
    /// Every table that the token may read and that outlives a connection
    All,
}

#[derive(Debug, Args)]
struct StateVersionsArgs {
    /// Tell the history of this entity and export nothing
    #[arg(long, value_name = "ID", conflicts_with = "relation")]
    entity: Option<String>,
    /// Tell the history of this relation and export nothing
    #[arg(long, value_name = "ID")]
    relation: Option<String>,
    /// The identity of the database that was exported, where there are several
    #[arg(long, value_name = "IDENTITY")]
    from: Option<Identity>,
}

impl StateVersionsArgs {
    fn subject(&self) -> Option<Subject> {
        let of = |kind, id: &Option<String>| id.clone().map(|id| Subject { kind, id });
        of("Entity", &self.entity).or_else(|| of("Relation", &self.relation))
    }
}

pub async fn run(context: &Context<'_>, args: ExportArgs) -> Result<ExitStatus, Failure> {
    let config = args.database.apply(context.config())?;
    if let What::StateVersions(of) = &args.what
        && let Some(subject) = of.subject()
    {
        return tell_history(context, &config, of.from, subject).await;
    }
    let (tables, configuration) = match &args.what {
        What::EventLog => (vec!["event_log".to_owned()], false),
        What::StateVersions(_) => (vec!["state_version".to_owned()], false),
        What::Config => (vec!["config".to_owned()], true),
        What::Table { name } => (name.clone(), false),
        What::All => (Vec::new(), false),
    };
    let formats = if args.format.is_empty() { config.export.formats.clone() } else { args.format.clone() };
    let options = ExportOptions { tables, configuration, formats, new_series: args.new_series, since: args.since };
    let data_dir = args.data_dir.clone().or_else(|| config.spacetimedb_config.db_path.clone());
    if let (Some(data_dir), false) = (&data_dir, args.force)
        && let Some(report) = ask_daemon(context, &config, data_dir, &options).await?
    {
        return Ok(show(context, &report));
    }
    let repository = context.writable(context.keyring(&[])?).await?;
    let lease = context.lease(&repository, args.force).await?;
    let fenced = lease.fenced();
    let state_dir = data_dir.as_ref().map(|data_dir| StateDir::locate(&config, data_dir));
    let places = Places { data_dir: data_dir.as_deref(), state_dir: state_dir.as_deref() };
    let work = export::export(&fenced, &config, options, places, Arc::clone(&context.clock));
    let report = while_held(&lease, context.clock.as_ref(), work).await;
    lease.release().await;
    Ok(show(context, &report?))
}

/// A daemon on the same data directory and repository holds the lease: it exports for us, from the database that is in
/// its configuration.
async fn ask_daemon(
    context: &Context<'_>,
    config: &Config,
    data_dir: &std::path::Path,
    options: &ExportOptions,
) -> Result<Option<ExportReport>, Failure> {
    let socket = StateDir::locate(config, data_dir).join("control.sock");
    let request = Request::Export {
        url: context.url()?.to_owned(),
        server: config.spacetimedb_config.server_url(),
        database: config.spacetimedb_config.database.clone(),
        options: options.clone(),
    };
    match control::ask(&socket, &request).await {
        Ok(Some(Answer::Exported(report))) => Ok(Some(report)),
        Ok(Some(Answer::Failed(message))) => {
            Err(Failure::new(ExitStatus::Failed, format!("the daemon did not export: {message}")))
        }
        Ok(Some(_) | None) => Ok(None),
        Err(error) => Err(Failure::new(ExitStatus::Failed, format!("the daemon went away while it worked: {error}"))),
    }
}

async fn tell_history(
    context: &Context<'_>,
    config: &Config,
    from: Option<Identity>,
    subject: Subject,
) -> Result<ExitStatus, Failure> {
    let repository = match &config.repository.url {
        Some(_) => Some(context.repository().await?),
        None => None,
    };
    let found = history(repository.as_ref(), from, config, subject).await?;
    if found.versions.is_empty() {
        let message = format!(
            "no version of the {} `{}` is in the module or among what was exported",
            found.subject.to_lowercase(),
            found.subject_id
        );
        return Err(Failure::new(ExitStatus::Failed, message));
    }
    context.output.result(&found, describe_history);
    Ok(ExitStatus::Ok)
}

fn describe_history(history: &History) -> String {
    let mut text = format!("{} {}\n", history.subject.to_lowercase(), history.subject_id);
    for version in &history.versions {
        let gone = if version.in_module { "" } else { "  (in the exports only)" };
        text += &format!(
            "  {:>8} version {:<4} {:8} {}  {}{gone}\n",
            version.text("version_id"),
            version.text("version"),
            version.text("operation"),
            version.text("timestamp"),
            version.text("data"),
        );
    }
    text + "to bring one back: inner-universe replay --version-id N, with N from the first column"
}

fn show(context: &Context<'_>, report: &ExportReport) -> ExitStatus {
    context.output.result(report, |report| {
        let mut text = format!("database {}\n", report.database);
        for table in &report.tables {
            text += &match table.rows {
                0 => format!("  {:20} nothing new\n", table.series),
                rows => format!(
                    "  {:20} {rows} rows in {} objects, {}{}\n",
                    table.series,
                    table.objects,
                    bytes(table.bytes),
                    table.through.map(|through| format!(", up to {through}")).unwrap_or_default(),
                ),
            };
        }
        if !report.event_tables.is_empty() {
            let tables = report.event_tables.join(", ");
            text += &format!("  not exported, since their rows are in the log and its archive alone: {tables}\n");
        }
        if !report.not_readable.is_empty() {
            let tables = report.not_readable.join(", ");
            text += &format!("  not exported, since they are private and the token is not their owner's: {tables}\n");
        }
        if let Some(through) = report.trimmed_through {
            text += &format!("  events up to {through} were removed from the database\n");
        }
        if let Some(reason) = &report.not_trimmed {
            text += &format!("  events that are old enough stay in the database: {reason}\n");
        }
        text += &format!("in {}", duration(report.duration_ms));
        text
    });
    ExitStatus::Ok
}
