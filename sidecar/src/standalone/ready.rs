//! Is a server ready? It answers, and if a database is named, that database answers a query.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::{Clock, Stopwatch};
use crate::config::Config;
use crate::observe::server::{Database, SourceError};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

/// What a server says of itself.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Health {
    /// `None` where the server does not tell.
    pub version: Option<String>,
    /// Does the configured database answer a query? `None` when none is configured, or the server does not know it.
    pub database_answers: Option<bool>,
}

/// Asks the server of the configuration.
///
/// # Errors
/// When it does not answer.
pub async fn health(config: &Config) -> Result<Health, SourceError> {
    let name = config.spacetimedb_config.database.as_deref();
    let mut server = config.spacetimedb_config.clone();
    // One that a deployment has yet to make says nothing of the server's health.
    server.token_file = server.token_file.filter(|path| path.exists());
    let database = Database::new(&server, &config.server_config, name.unwrap_or_default())?;
    let version = database.server_version().await?;
    let database_answers = match name {
        Some(_) if database.find().await?.is_some() => Some(database.answers().await.is_ok()),
        _ => None,
    };
    Ok(Health { version, database_answers })
}

/// Waits until the server of the configuration is ready, or `ended` says that it never will be; `false` when the limit is
/// over first.
pub async fn wait(config: &Config, clock: &dyn Clock, limit: Duration, mut ended: impl FnMut() -> bool) -> bool {
    let waited = Stopwatch::start();
    loop {
        let left = limit.saturating_sub(Duration::from_secs_f64(waited.elapsed_seconds()));
        // A request has a limit of its own, which may be longer than what is left.
        match tokio::time::timeout(left.max(LOOK), health(config)).await {
            Ok(Ok(health)) if health.database_answers != Some(false) => return true,
            _ => {}
        }
        if ended() || waited.elapsed_seconds() > limit.as_secs_f64() {
            return false;
        }
        clock.sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;

    #[tokio::test]
    async fn a_silent_server_is_waited_for_within_the_limit() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let mut config = Config::default();
        config.spacetimedb_config.url = Some(format!("http://{}", silent.local_addr().expect("an address")));
        config.server_config.timeout_ms = 600_000;
        let waiting = wait(&config, &SystemClock, Duration::from_millis(300), || false);
        let ready = tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("an end");
        assert!(!ready);
    }
}
