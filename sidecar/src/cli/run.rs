//! `run`

use std::ffi::OsString;
use std::sync::Arc;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::{self, Logging};
use crate::cli::{Context, DataDirArg};
use crate::daemon::state::StateDir;
use crate::daemon::{self, DaemonError, DaemonOptions, TELEMETRY_LIMIT};
use crate::http::Server;
use crate::observe::own::OwnTelemetry;

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    data: DataDirArg,
    /// Capture token keys even though the repository is not encrypted
    #[arg(long)]
    allow_plain_keys: bool,
    /// Take the lease from another sidecar; only when that one is dead
    #[arg(long)]
    force: bool,
    /// Exit with code 5 when another sidecar holds the lease, rather than wait for it
    #[arg(long)]
    no_wait: bool,
    /// A server to start, watch and stop: everything after `--`
    #[arg(last = true, value_name = "SERVER COMMAND")]
    server: Vec<OsString>,
}

pub async fn run(context: &Context<'_>, args: RunArgs, logging: Logging) -> Result<ExitStatus, Failure> {
    let config = context.config().clone();
    let data_dir = args.data.path(context)?;
    let state_dir = StateDir::open(&config, &data_dir).map_err(DaemonError::from)?;
    let own = OwnTelemetry::start(&config.telemetry, &state_dir.instance()).map_err(DaemonError::from)?;
    output::start_logging(logging, &own);
    let keys = context.keyring(&[])?;
    let key_dir = config.spacetimedb_config.key_dir.is_some();
    if key_dir && config.repository.recipients.is_empty() && !args.allow_plain_keys {
        context.output.warn(
            "token keys are captured only into an encrypted repository; set repository.recipients, or allow it with \
             --allow-plain-keys",
        );
    }
    let options = DaemonOptions {
        data_dir,
        state_dir,
        url: context.url()?.to_owned(),
        config,
        keys,
        force: args.force,
        wait: !args.no_wait,
        allow_plain_keys: args.allow_plain_keys,
        server: args.server,
        interface: Server::interface,
    };
    let stop = CancellationToken::new();
    let listening = |kind| signal(kind).map_err(|error| Failure::new(ExitStatus::Failed, error));
    let (mut terminate, mut interrupt) = (listening(SignalKind::terminate())?, listening(SignalKind::interrupt())?);
    let told = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("told to stop");
        told.cancel();
    });
    let result = daemon::run(options, Arc::clone(&context.clock), stop).await;
    if let Err(error) = &result {
        tracing::error!(%error, "ended");
    }
    tokio::select! {
        () = own.stop() => {}
        () = context.clock.sleep(TELEMETRY_LIMIT) => {}
    }
    result?;
    Ok(ExitStatus::Ok)
}
