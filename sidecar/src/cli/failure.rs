//! Exit codes, and which error ends in which.

use std::process::ExitCode;

use crate::backup::BackupError;
use crate::bundle::BundleError;
use crate::daemon::DaemonError;
use crate::datadir::DataDirError;
#[cfg(feature = "client")]
use crate::deploy::DeployError;
#[cfg(feature = "client")]
use crate::drill::DrillError;
use crate::durable::FileError;
#[cfg(feature = "client")]
use crate::export::{ExportError, archive::ArchiveError};
#[cfg(feature = "client")]
use crate::replay::ReplayError;
use crate::repository::RepositoryError;
use crate::repository::crypto::CryptoError;
use crate::repository::instance::InstanceError;
use crate::restore::RestoreError;
use crate::retention::RetentionError;
use crate::retention::local::LocalError;
use crate::standalone::StandaloneError;
use crate::standalone::supervisor::SupervisorError;
use crate::status::StatusError;

/// What the process exits with. The numbers are a contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    Ok = 0,
    Failed = 1,
    Usage = 2,
    Findings = 3,
    NothingToRestore = 4,
    Locked = 5,
    Refused = 6,
    StoreUnreachable = 7,
    NotArchived = 8,
    HungUp = 129,
    Interrupted = 130,
    Quit = 131,
    Terminated = 143,
}

impl ExitStatus {
    pub const HELP: &str = "Exit codes:
  0  done
  1  failed
  2  wrong usage or configuration
  3  findings (verify, doctor), a backup that lacks something (backup create), rows refused (replay), or a server that is
     not ready (server status)
  4  nothing to restore
  5  the repository is being written by another sidecar
  6  refused: it would overwrite something, or break what runs
  7  the store cannot be reached
  8  stopped before everything was archived (run); the next start archives what is left
  128 and the number of the signal that ended it";
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

/// An error on its way to the user: one message that says what to do, and an exit code.
#[derive(Debug)]
pub struct Failure {
    pub status: ExitStatus,
    pub message: String,
}

impl Failure {
    pub fn new(status: ExitStatus, message: impl ToString) -> Self {
        Self { status, message: message.to_string() }
    }

    pub fn usage(message: impl ToString) -> Self {
        Self::new(ExitStatus::Usage, message)
    }
}

impl From<DataDirError> for Failure {
    fn from(error: DataDirError) -> Self {
        Self::new(of_data_dir(&error), error)
    }
}

impl From<RepositoryError> for Failure {
    fn from(error: RepositoryError) -> Self {
        Self::new(of_repository(&error), error)
    }
}

impl From<CryptoError> for Failure {
    fn from(error: CryptoError) -> Self {
        Self::new(of_crypto(&error), error)
    }
}

impl From<BackupError> for Failure {
    fn from(error: BackupError) -> Self {
        let status = match &error {
            BackupError::DataDir(error) => of_data_dir(error),
            BackupError::Repository(error) => of_repository(error),
            BackupError::Instance(error) => of_instance(error),
            BackupError::PlainKeys => ExitStatus::Usage,
            BackupError::Empty(_)
            | BackupError::LogVanished { .. }
            | BackupError::NoLog { .. }
            | BackupError::NotFollowed { .. }
            | BackupError::Worker(_) => ExitStatus::Failed,
        };
        Self::new(status, error)
    }
}

#[cfg(feature = "client")]
impl From<DrillError> for Failure {
    fn from(error: DrillError) -> Self {
        match error {
            DrillError::Repository(error) => error.into(),
            DrillError::DataDir(error) => error.into(),
            DrillError::Standalone(error) => error.into(),
            error @ DrillError::NoPoint => Self::new(ExitStatus::NothingToRestore, error),
            error @ (DrillError::File(_) | DrillError::Scratch { .. }) => Self::new(ExitStatus::Failed, error),
        }
    }
}

impl From<BundleError> for Failure {
    fn from(error: BundleError) -> Self {
        match error {
            BundleError::Repository(error) => error.into(),
            error @ BundleError::Exists(_) => Self::new(ExitStatus::Refused, error),
            error => Self::new(ExitStatus::Failed, error),
        }
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        Self::new(ExitStatus::Failed, error)
    }
}

impl From<LocalError> for Failure {
    fn from(error: LocalError) -> Self {
        match error {
            LocalError::Backup(error) => error.into(),
            LocalError::DataDir(error) => error.into(),
            LocalError::Repository(error) => error.into(),
            error @ (LocalError::File(_)
            | LocalError::Changed(_)
            | LocalError::Rewriting(_)
            | LocalError::Returned(_)) => Self::new(ExitStatus::Failed, error),
        }
    }
}

impl From<RetentionError> for Failure {
    fn from(error: RetentionError) -> Self {
        let status = match &error {
            RetentionError::Repository(error) => of_repository(error),
            RetentionError::NoPolicy => ExitStatus::Usage,
            RetentionError::Unproven(_) | RetentionError::PinnedBroken { .. } | RetentionError::Lost { .. } => {
                ExitStatus::Findings
            }
            RetentionError::Pinned(_) | RetentionError::BeingDeleted(_) | RetentionError::ClockInDoubt(_) => {
                ExitStatus::Failed
            }
        };
        Self::new(status, error)
    }
}

impl From<DaemonError> for Failure {
    fn from(error: DaemonError) -> Self {
        match error {
            DaemonError::DataDir(error) => error.into(),
            DaemonError::Repository(error) => error.into(),
            DaemonError::Backup(error) => error.into(),
            DaemonError::Supervisor(error @ SupervisorError::Running { .. }) => Self::new(ExitStatus::Refused, error),
            error @ (DaemonError::Telemetry(_) | DaemonError::Otlp(_)) => Self::new(ExitStatus::Usage, error),
            error @ DaemonError::NotArchived(_) => Self::new(ExitStatus::NotArchived, error),
            error @ (DaemonError::File(_)
            | DaemonError::Schedule(_)
            | DaemonError::Supervisor(_)
            | DaemonError::Panicked) => Self::new(ExitStatus::Failed, error),
        }
    }
}

impl From<StandaloneError> for Failure {
    fn from(error: StandaloneError) -> Self {
        Self::new(of_standalone(&error), error)
    }
}

impl From<RestoreError> for Failure {
    fn from(error: RestoreError) -> Self {
        let status = match &error {
            RestoreError::DataDir(error) => of_data_dir(error),
            RestoreError::Repository(error) => of_repository(error),
            RestoreError::Instance(error) => of_instance(error),
            RestoreError::NothingToRestore(_) => ExitStatus::NothingToRestore,
            RestoreError::Usage(_) => ExitStatus::Usage,
            RestoreError::ServerRunning { .. }
            | RestoreError::WouldOverwrite(_)
            | RestoreError::MountPoint(_)
            | RestoreError::OlderServer { .. } => ExitStatus::Refused,
            RestoreError::File(_)
            | RestoreError::NoSpace { .. }
            | RestoreError::DiskFull(_)
            | RestoreError::SelfCheck(_)
            | RestoreError::Unreachable { .. }
            | RestoreError::BrokenLog(_)
            | RestoreError::Worker(_) => ExitStatus::Failed,
        };
        Self::new(status, error)
    }
}

#[cfg(feature = "client")]
impl From<ExportError> for Failure {
    fn from(error: ExportError) -> Self {
        let status = match &error {
            ExportError::Repository(error) => of_repository(error),
            ExportError::NoTable { .. }
            | ExportError::EventTable { .. }
            | ExportError::View { .. }
            | ExportError::Private { .. }
            | ExportError::NoSequence { .. }
            | ExportError::NotFirst { .. } => ExitStatus::Usage,
            ExportError::SchemaChanged { .. } => ExitStatus::Refused,
            _ => ExitStatus::Failed,
        };
        Self::new(status, error)
    }
}

#[cfg(feature = "client")]
impl From<ReplayError> for Failure {
    fn from(error: ReplayError) -> Self {
        let status = match &error {
            ReplayError::Archive(ArchiveError::Repository(error)) => of_repository(error),
            ReplayError::Archive(ArchiveError::Nothing(_)) | ReplayError::NotExported { .. } => {
                ExitStatus::NothingToRestore
            }
            ReplayError::Archive(ArchiveError::Several(_)) | ReplayError::NoReducer { .. } => ExitStatus::Usage,
            _ => ExitStatus::Failed,
        };
        Self::new(status, error)
    }
}

#[cfg(feature = "client")]
impl From<DeployError> for Failure {
    fn from(error: DeployError) -> Self {
        let status = match &error {
            DeployError::NoModule
            | DeployError::NoModuleDir
            | DeployError::Module { .. }
            | DeployError::NotOwner { .. } => ExitStatus::Usage,
            DeployError::Breaking(_)
            | DeployError::MajorUpgrade
            | DeployError::NeedsData(_)
            | DeployError::CannotStop => ExitStatus::Refused,
            DeployError::Busy => ExitStatus::Locked,
            DeployError::NothingToUndo(_) => ExitStatus::NothingToRestore,
            DeployError::Standalone(error) => of_standalone(error),
            DeployError::Repository(error) | DeployError::Backup(BackupError::Repository(error)) => {
                of_repository(error)
            }
            DeployError::DataDir(error) => of_data_dir(error),
            _ => ExitStatus::Failed,
        };
        Self::new(status, error)
    }
}

impl From<StatusError> for Failure {
    fn from(error: StatusError) -> Self {
        let status = match &error {
            StatusError::DataDir(error) => of_data_dir(error),
            StatusError::Repository(error) => of_repository(error),
            StatusError::Worker(_) => ExitStatus::Failed,
        };
        Self::new(status, error)
    }
}

fn of_standalone(error: &StandaloneError) -> ExitStatus {
    match error {
        StandaloneError::NotFound(_) | StandaloneError::NoDataDir | StandaloneError::Settings { .. } => {
            ExitStatus::Usage
        }
        StandaloneError::Older { .. }
        | StandaloneError::Running { .. }
        | StandaloneError::PortTaken { .. }
        | StandaloneError::Foreign { .. } => ExitStatus::Refused,
        _ => ExitStatus::Failed,
    }
}

fn of_data_dir(error: &DataDirError) -> ExitStatus {
    match error {
        DataDirError::Missing(_) | DataDirError::NotSpacetime { .. } => ExitStatus::Usage,
        _ => ExitStatus::Failed,
    }
}

fn of_repository(error: &RepositoryError) -> ExitStatus {
    match error {
        RepositoryError::BadUrl { .. } => ExitStatus::Usage,
        RepositoryError::NoRepository { .. } | RepositoryError::Vanished { .. } => ExitStatus::NothingToRestore,
        RepositoryError::Conflict { .. } | RepositoryError::Locked { .. } | RepositoryError::LeaseLost { .. } => {
            ExitStatus::Locked
        }
        RepositoryError::Store { .. } | RepositoryError::Denied { .. } | RepositoryError::Timeout { .. } => {
            ExitStatus::StoreUnreachable
        }
        RepositoryError::NotEmpty { .. }
        | RepositoryError::Replaced { .. }
        | RepositoryError::OtherRecipients { .. }
        | RepositoryError::Forgotten(_) => ExitStatus::Refused,
        RepositoryError::Crypto(error) => of_crypto(error),
        RepositoryError::UnknownFormat { .. } | RepositoryError::Missing { .. } | RepositoryError::Damaged { .. } => {
            ExitStatus::Failed
        }
    }
}

fn of_instance(error: &InstanceError) -> ExitStatus {
    match error {
        InstanceError::DataDir(error) => of_data_dir(error),
        InstanceError::Crypto(error) => of_crypto(error),
        InstanceError::NoKey(_) => ExitStatus::Usage,
        InstanceError::File(_) | InstanceError::Damaged(_) | InstanceError::TooLarge { .. } => ExitStatus::Failed,
    }
}

fn of_crypto(error: &CryptoError) -> ExitStatus {
    match error {
        CryptoError::Damaged(_) | CryptoError::Seal(_) | CryptoError::File(_) => ExitStatus::Failed,
        _ => ExitStatus::Usage,
    }
}
