//! What a daemon waits for before it archives: the data directory, the store, the lease.

use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder as _;
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, patience};
use crate::daemon::conditions::{ConditionKind, Subject};
use crate::daemon::state::State;
use crate::daemon::{DaemonError, DaemonOptions};
use crate::datadir::{DataDir, DataDirError};
use crate::repository::lease::{self, Lease, LeaseWatch, Take};
use crate::repository::remembered::Remembered;
use crate::repository::{Repository, RepositoryError};

/// The server may still be about to make its directory.
pub(super) async fn wait_for_data_dir(
    options: &DaemonOptions,
    clock: &dyn Clock,
    stop: &CancellationToken,
) -> Result<Option<DataDir>, DaemonError> {
    let mut told = false;
    loop {
        match DataDir::open(&options.data_dir) {
            Ok(data) => return Ok(Some(data)),
            Err(error @ (DataDirError::Missing(_) | DataDirError::NotSpacetime { .. })) => {
                if !told && options.server.is_empty() {
                    tracing::warn!(%error, "waiting for the server to make its data directory");
                    told = true;
                }
            }
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            () = clock.sleep(Duration::from_millis(200)) => {}
            () = stop.cancelled() => return Ok(None),
        }
    }
}

pub(super) async fn wait_for_repository(
    options: &DaemonOptions,
    state: &State,
    clock: &dyn Clock,
    stop: &CancellationToken,
) -> Result<Option<Repository>, DaemonError> {
    let config = &options.config.repository;
    let remembered = Remembered::in_dir(options.state_dir.path());
    for delay in patience(Duration::from_millis(500)).build() {
        let error = match remembered.open(&options.url, config, options.keys.clone()).await {
            Ok(repository) => {
                let conditional = repository.conditional();
                if !conditional.create || !conditional.update {
                    tracing::warn!("the store ignores or refuses conditional writes; only one sidecar may run");
                }
                state.clear(ConditionKind::RepositoryMissing, &Subject::Sidecar);
                // Nothing could be continued without it.
                repository.hashing()?;
                return Ok(Some(repository));
            }
            Err(error) if error.is_permanent() => return Err(error.into()),
            Err(error) => error,
        };
        tracing::warn!(%error, ?delay, "failed to open the repository; the log keeps what is written until a retry succeeds");
        state.failed(error.to_string());
        if error.is_other_repository() || matches!(error, RepositoryError::NoRepository { .. }) {
            state.raise(ConditionKind::RepositoryMissing, Subject::Sidecar, error.to_string());
        } else {
            state.clear(ConditionKind::RepositoryMissing, &Subject::Sidecar);
        }
        tokio::select! {
            () = clock.sleep(delay) => {}
            () = stop.cancelled() => return Ok(None),
        }
    }
    Ok(None)
}

/// How the lease is asked for.
pub(super) struct Asking {
    /// Take it from any holder.
    pub force: bool,
    /// Wait for a lease that another holds, rather than end.
    pub wait: bool,
    /// A writer that is known to be gone.
    pub predecessor: Option<String>,
}

pub(super) async fn wait_for_lease(
    options: &DaemonOptions,
    repository: &Repository,
    state: &State,
    clock: &Arc<dyn Clock>,
    asking: &Asking,
    stop: &CancellationToken,
) -> Result<Option<Lease>, DaemonError> {
    let duration = options.config.repository.lease_duration.0;
    let mut told = false;
    let mut watch = LeaseWatch::default();
    loop {
        let take = match (watch.abandoned(), &asking.predecessor) {
            _ if asking.force => Take::Always,
            (Some(abandoned), _) => abandoned,
            (None, Some(writer)) => Take::From(writer.clone()),
            (None, None) => Take::IfFree,
        };
        match Lease::acquire(repository, duration, Arc::clone(clock), take).await {
            Ok(lease) => return Ok(Some(lease)),
            // One whose time seems to be over is watched even by those who do not wait.
            Err(error @ RepositoryError::Locked { expires_at, .. }) if asking.wait || expires_at <= clock.now() => {
                if let Ok(Some(held)) = lease::holder(repository).await {
                    watch.see(held);
                }
                if !told {
                    tracing::warn!(%error, "waiting for the lease");
                    told = true;
                }
                // Nobody archives what this server writes; a sidecar without one is a standby.
                match options.server.is_empty() {
                    true => state.waits(),
                    false => state.failed(error.to_string()),
                }
            }
            Err(error) if error.is_permanent() => return Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, "the lease is tried again");
                state.failed(error.to_string());
            }
        }
        tokio::select! {
            () = clock.sleep((duration / 8).max(Duration::from_millis(100))) => {}
            () = stop.cancelled() => return Ok(None),
        }
    }
}
