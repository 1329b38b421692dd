//! `server start`, `stop`, `status`: server mode in the background.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::signals::{BUT_HANG_UP, cancel_when_told};
use crate::cli::{Context, DataDirArg};
use crate::config::value::Period;
use crate::config::{Config, LogLevel};
use crate::daemon::control::{self, Answer, Request};
use crate::daemon::state::StateDir;
use crate::standalone::background::{self, ServerReport, WatchError};
use crate::standalone::{StandaloneError, ready};

#[derive(Debug, Subcommand)]
pub enum ServerCommand {
    /// Start the server as the configuration says, in the background, and wait until it is ready
    Start(ServerArgs),
    /// Ask the server to stop, and kill it when it does not
    Stop {
        #[command(flatten)]
        data: DataDirArg,
        /// Kill it after this long; spacetimedb_config.stop_timeout when left out
        #[arg(long, value_name = "PERIOD", value_parser = parse_period)]
        timeout: Option<Period>,
    },
    /// Does a server run on the data directory, and is it ready?
    Status(ServerArgs),
    /// What `start` leaves running
    #[command(hide = true)]
    Watch(ServerArgs),
}

/// What server mode may be told on the command line.
#[derive(Debug, Clone, Args)]
pub struct ServerArgs {
    #[command(flatten)]
    pub data: DataDirArg,
    #[command(flatten)]
    pub listen: ListenArgs,
}

/// How a server is to run.
#[derive(Debug, Clone, Default, Args)]
pub struct ListenArgs {
    /// Where the server listens; spacetimedb_config.address when left out
    #[arg(long, value_name = "IP")]
    pub address: Option<std::net::IpAddr>,
    /// Its port; spacetimedb_config.port when left out
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// How much the server logs; spacetimedb_config.log_level when left out
    #[arg(long, value_enum, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
}

impl ListenArgs {
    /// The configuration with what was given on the command line.
    pub fn apply(&self, config: &Config) -> Config {
        let mut config = config.clone();
        let server = &mut config.spacetimedb_config;
        if let Some(address) = self.address {
            server.address = address.to_string();
        }
        server.port = self.port.unwrap_or(server.port);
        server.log_level = self.log_level.unwrap_or(server.log_level);
        if self.address.is_some() || self.port.is_some() {
            server.url = None;
        }
        config
    }

    pub fn words(&self) -> Vec<OsString> {
        let address = self.address.map(|address| ("--address", address.to_string()));
        let port = self.port.map(|port| ("--port", port.to_string()));
        let level = self.log_level.map(|level| ("--log-level", level.name().to_owned()));
        let given = [address, port, level].into_iter().flatten();
        given.flat_map(|(name, value)| [name.into(), value.into()]).collect()
    }
}

fn parse_period(text: &str) -> Result<Period, String> {
    Period::try_from(text.to_owned())
}

#[derive(Serialize)]
struct StopReport {
    #[serde(serialize_with = "crate::lossy::path")]
    data_dir: PathBuf,
    /// `false` when no server ran there.
    stopped: bool,
}

pub async fn run(context: &Context<'_>, command: ServerCommand) -> Result<ExitStatus, Failure> {
    match command {
        ServerCommand::Start(args) => {
            let data_dir = absolute(args.data.path(context)?)?;
            let config = args.listen.apply(context.config());
            let limit = config.deploy.timeout.0.0;
            // A sidecar whose server was stopped for a while starts it again.
            if switch(&config, &data_dir, true).await? {
                if !ready::wait(&config, context.clock.as_ref(), limit, || false).await {
                    let log = StateDir::locate(&config, &data_dir);
                    let url = config.spacetimedb_config.server_url();
                    return Err(StandaloneError::NotReady { url, limit, log }.into());
                }
            } else {
                let mut words = context.words_of_globals();
                words.extend(["server".into(), "watch".into(), "--data-dir".into(), data_dir.clone().into()]);
                words.extend(args.listen.words());
                background::start(&config, &data_dir, &words, context.clock.as_ref(), limit).await?;
            }
            show(context, &background::status(&config, &data_dir).await?);
            Ok(ExitStatus::Ok)
        }
        ServerCommand::Stop { data, timeout } => {
            let data_dir = absolute(data.path(context)?)?;
            let limit = timeout.map(|period| period.0);
            let stopped = match switch(context.config(), &data_dir, false).await? {
                true => true,
                false => background::stop(context.config(), &data_dir, context.clock.as_ref(), limit).await?,
            };
            context.output.result(&StopReport { data_dir, stopped }, |report| match report.stopped {
                true => format!("the server on {} has stopped", report.data_dir.display()),
                false => format!("no server runs on {}", report.data_dir.display()),
            });
            Ok(ExitStatus::Ok)
        }
        ServerCommand::Status(args) => {
            let data_dir = absolute(args.data.path(context)?)?;
            let report = background::status(&args.listen.apply(context.config()), &data_dir).await?;
            show(context, &report);
            Ok(if report.ready { ExitStatus::Ok } else { ExitStatus::Findings })
        }
        ServerCommand::Watch(args) => {
            let data_dir = args.data.path(context)?;
            let config = args.listen.apply(context.config());
            let stop = CancellationToken::new();
            cancel_when_told(stop.clone(), &BUT_HANG_UP)?;
            background::watch(&config, &data_dir, Arc::clone(&context.clock), stop).await.map_err(failure)?;
            Ok(ExitStatus::Ok)
        }
    }
}

fn failure(error: WatchError) -> Failure {
    match error {
        WatchError::Standalone(error) => error.into(),
        error => Failure::new(ExitStatus::Failed, error),
    }
}

/// The background has a working directory of its own.
fn absolute(path: PathBuf) -> Result<PathBuf, Failure> {
    std::path::absolute(&path).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
}

/// Asks a sidecar that runs a server on the directory; `false` where there is none.
async fn switch(config: &Config, data_dir: &std::path::Path, run: bool) -> Result<bool, Failure> {
    let socket = StateDir::locate(config, data_dir).join("control.sock");
    match control::ask(&socket, &Request::Server { run }).await {
        Ok(Some(Answer::Done)) => Ok(true),
        Ok(Some(Answer::Failed(message))) => Err(Failure::new(ExitStatus::Failed, message)),
        Ok(Some(_) | None) => Ok(false),
        Err(error) => Err(Failure::new(ExitStatus::Failed, format!("the daemon went away while it worked: {error}"))),
    }
}

fn show(context: &Context<'_>, report: &ServerReport) {
    context.output.result(report, |report| {
        let state = match (report.running, report.ready) {
            (true, true) => "ready",
            (true, false) => "running, not ready",
            (false, _) => "not running",
        };
        let mut text = format!("server        {state}\ndata          {}\n", report.data_dir.display());
        text += &format!("url           {}\n", report.url);
        if let Some(version) = &report.version {
            text += &format!("version       {version}\n");
        }
        if let Some(pid) = report.server_pid {
            text += &format!("process       {pid} (started by {})\n", report.started_by.unwrap_or("nobody"));
        }
        if let Some(answers) = report.database_answers {
            text += &format!("database      {}\n", if answers { "answers" } else { "does not answer" });
        }
        if let Some(log) = &report.log {
            text += &format!("log           {}\n", log.display());
        }
        if report.stale_lock {
            text += "lock          left by a crash; it does no harm\n";
        }
        text
    });
}
