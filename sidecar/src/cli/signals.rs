//! Signals that ask this process to end, for every verb.
//!
//! Invariant: a signal that was ignored when this process was started, as a hang-up is under `nohup`, stays ignored.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::cli::failure::{ExitStatus, Failure};
use crate::process::ignored_signals;

/// A signal with its name and what the process exits with.
#[derive(Debug, Clone, Copy)]
pub struct Ending {
    pub name: &'static str,
    pub status: ExitStatus,
    number: i32,
}

impl Ending {
    fn bit(self) -> u64 {
        1 << (self.number - 1)
    }
}

const TERMINATE: Ending = Ending { name: "SIGTERM", status: ExitStatus::Terminated, number: libc::SIGTERM };
const INTERRUPT: Ending = Ending { name: "SIGINT", status: ExitStatus::Interrupted, number: libc::SIGINT };
const HANG_UP: Ending = Ending { name: "SIGHUP", status: ExitStatus::HungUp, number: libc::SIGHUP };
const QUIT: Ending = Ending { name: "SIGQUIT", status: ExitStatus::Quit, number: libc::SIGQUIT };

/// Everything that ends a verb.
pub const ALL: [Ending; 4] = [TERMINATE, INTERRUPT, HANG_UP, QUIT];
/// Where a hang-up is passed on to the server that is watched.
pub const BUT_HANG_UP: [Ending; 3] = [TERMINATE, INTERRUPT, QUIT];

/// Listens for signals, which from then on do not end the process by themselves.
pub struct Endings(Vec<(Ending, Signal)>);

impl Endings {
    /// # Errors
    /// When signals cannot be received.
    pub fn listen(endings: &[Ending]) -> Result<Self, Failure> {
        Self::listen_but(ignored_signals(), endings)
    }

    fn listen_but(ignored: u64, endings: &[Ending]) -> Result<Self, Failure> {
        let mut listening = Vec::new();
        for ending in endings.iter().filter(|ending| ignored & ending.bit() == 0) {
            let listener = signal(SignalKind::from_raw(ending.number));
            listening.push((*ending, listener.map_err(|error| Failure::new(ExitStatus::Failed, error))?));
        }
        Ok(Self(listening))
    }

    /// The next signal.
    pub async fn next(&mut self) -> Ending {
        let waits = self.0.iter_mut().map(|(ending, listener)| {
            Box::pin(async {
                listener.recv().await;
                *ending
            })
        });
        let waits: Vec<_> = waits.collect();
        if waits.is_empty() {
            return std::future::pending().await;
        }
        futures::future::select_all(waits).await.0
    }
}

/// Cancels `stop` on a signal that asks this process to end. For what starts servers, which would ignore what we ignore: only a
/// hang-up stays ignored.
///
/// # Errors
/// When signals cannot be received.
pub fn cancel_when_told(stop: CancellationToken, endings: &[Ending]) -> Result<(), Failure> {
    let mut endings = Endings::listen_but(ignored_signals() & HANG_UP.bit(), endings)?;
    tokio::spawn(async move {
        let ending = endings.next().await;
        tracing::info!(signal = ending.name, "told to stop");
        stop.cancel();
    });
    Ok(())
}
