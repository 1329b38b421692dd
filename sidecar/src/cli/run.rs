//! `run`

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use clap::Args;
use rustix::process::Signal;
use tokio_util::sync::CancellationToken;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::{self, Logging};
use crate::cli::server::ListenArgs;
use crate::cli::signals::{ALL, BUT_HANG_UP, cancel_when_told};
use crate::cli::{Context, DataDirArg};
use crate::config::Config;
use crate::daemon::state::StateDir;
use crate::daemon::{self, DaemonError, DaemonOptions, TELEMETRY_LIMIT};
use crate::datadir::lock::{self, ServerLock};
use crate::http::Server;
use crate::observe::own::OwnTelemetry;
use crate::standalone::command::{Binary, listen_address};
use crate::standalone::temporary::STOP;
use crate::standalone::{StandaloneError, settings};

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
    /// Exit with code 5 when another sidecar holds the lease, rather than wait for it; with a server to watch, it is waited
    /// for in any case
    #[arg(long)]
    no_wait: bool,
    /// Start, watch and stop the server of spacetimedb_config too
    #[arg(long, conflicts_with = "server")]
    serve: bool,
    #[command(flatten)]
    listen: ListenArgs,
    /// A server to start, watch and stop: everything after `--`
    #[arg(last = true, value_name = "SERVER COMMAND")]
    server: Vec<OsString>,
}

/// What asks a server to shut down cleanly. SpacetimeDB since 2.0 does so on an interrupt, and TERM kills it with what is not
/// on the disk yet; scripts and containers around a server expect TERM.
fn stop_signal(program: Option<&OsString>) -> Signal {
    let name = program.and_then(|program| Path::new(program).file_name()).unwrap_or_default();
    if name.as_encoded_bytes().starts_with(b"spacetime") { STOP } else { Signal::TERM }
}

pub async fn run(context: &Context<'_>, args: RunArgs, logging: Logging) -> Result<ExitStatus, Failure> {
    let config = args.listen.apply(context.config());
    let data_dir = args.data.path(context)?;
    let (server, server_stop_signal) = match args.serve {
        true => (server_of(&config, &data_dir)?, STOP),
        false => {
            let signal = stop_signal(args.server.first());
            (args.server, signal)
        }
    };
    let state_dir = StateDir::open(&config, &data_dir).map_err(DaemonError::from)?;
    let own = OwnTelemetry::start(&config.telemetry, &state_dir.instance()).map_err(DaemonError::from)?;
    output::start_logging(logging, &own);
    let keys = context.keyring(&[])?;
    let named = config.spacetimedb_config.named_keys().is_some();
    if named && config.repository.recipients.is_empty() && !args.allow_plain_keys {
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
        server,
        server_stop_signal,
        interface: Server::interface,
    };
    let stop = CancellationToken::new();
    cancel_when_told(stop.clone(), if options.server.is_empty() { &ALL } else { &BUT_HANG_UP })?;
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

/// The command that serves as the configuration says, and the server's own settings made ready for it.
fn server_of(config: &Config, data_dir: &Path) -> Result<Vec<OsString>, Failure> {
    let binary = Binary::find(config)?;
    binary.check(data_dir)?;
    // One that runs is followed until it ends, and its settings stay as they are.
    if lock::probe_file(&data_dir.join("spacetime.pid")).map_err(StandaloneError::from)? == ServerLock::Free {
        settings::set_log_level(data_dir, config.spacetimedb_config.log_level)?;
    }
    Ok(binary.serve(config, data_dir, &listen_address(config)))
}
