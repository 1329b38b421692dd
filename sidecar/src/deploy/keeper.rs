//! Who keeps restore points and the history: the daemon that holds the lease, or this process under a lease of its own.

use std::path::PathBuf;
use std::sync::Arc;

use crate::backup::{self, BackupError, BackupOptions, BackupReport};
use crate::daemon::control::{self, Answer, Request};
use crate::datadir::DataDir;
use crate::deploy::record::{self, DeploymentRecord};
use crate::deploy::{DeployError, Setup};
use crate::repository::Repository;

/// Where a deployment keeps what it must not lose.
pub enum Keeper {
    /// No repository is named, and the server is on another machine.
    Nobody,
    /// The daemon on this data directory, which writes to this repository.
    Daemon { url: String },
    /// The repository, under a lease that is held meanwhile.
    Own(Box<Repository>),
}

impl Keeper {
    /// Takes a restore point; `None` where there is nothing to keep, or nobody who could.
    pub(super) async fn restore_point(&self, setup: &Setup, label: &str) -> Result<Option<BackupReport>, DeployError> {
        let Some(data_dir) = &setup.data_dir else { return Ok(None) };
        let made = match self {
            Self::Nobody => return Ok(None),
            Self::Daemon { url } => {
                let request =
                    Request::BackupCreate { url: url.clone(), label: Some(label.to_owned()), options: Vec::new() };
                return match control::ask(&setup.state_dir.socket(), &request).await {
                    Ok(Some(Answer::Created(report))) => Ok(Some(report)),
                    Ok(Some(Answer::Empty(_))) => Ok(None),
                    other => Err(unhelpful(other)),
                };
            }
            Self::Own(repository) => {
                let seals = repository.keys.seals();
                let options = BackupOptions {
                    label: Some(label.to_owned()),
                    token_keys: setup.config.spacetimedb_config.named_keys().filter(|_| seals),
                    allow_plain_keys: false,
                    level: Some(setup.config.repository.compression_level),
                };
                let data = DataDir::open(data_dir)?;
                backup::create(repository, &data, &options, Arc::clone(&setup.clock), Arc::clone(&setup.progress)).await
            }
        };
        match made {
            Ok(report) => Ok(Some(report)),
            Err(BackupError::Empty(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn record(
        &self,
        setup: &Setup,
        record: DeploymentRecord,
        programs: Vec<PathBuf>,
    ) -> Result<(), DeployError> {
        match self {
            Self::Nobody => Ok(()),
            Self::Daemon { url } => {
                let request = Request::Deployed { url: url.clone(), record: Box::new(record), programs };
                match control::ask(&setup.state_dir.socket(), &request).await {
                    Ok(Some(Answer::Done)) => Ok(()),
                    other => Err(unhelpful(other)),
                }
            }
            Self::Own(repository) => record::keep(repository, &record, &programs).await,
        }
    }
}

fn unhelpful(answer: std::io::Result<Option<Answer>>) -> DeployError {
    DeployError::Daemon(match answer {
        Ok(Some(Answer::Failed(message) | Answer::Empty(message))) => message,
        Ok(Some(Answer::NotArchiving(reason))) => {
            format!("it archives nothing now, which it tries again by itself ({reason}); see `inner-universe status`")
        }
        Ok(Some(_)) => "it writes to another repository; give the same --repository to both".into(),
        Ok(None) => "it has ended meanwhile".into(),
        Err(error) => error.to_string(),
    })
}
