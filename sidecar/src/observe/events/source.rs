//! Events as they happen, by a subscription through the SDK.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use spacetimedb_sdk::{DbContext as _, SubscriptionHandle as _, Table as _};
use tokio::sync::mpsc;

use crate::database::tls::Relay;
use crate::module_bindings::{DbConnection, EventLog, EventLogTableAccess as _, SubscriptionHandle};
use crate::observe::server::{Database, SourceError, caused};

/// Rows that may wait between the SDK and us.
const LIVE_QUEUE: usize = 8_192;
/// Until a subscription is applied.
const APPLY_LIMIT: Duration = Duration::from_secs(30);

/// What came from a subscription.
pub enum Received {
    Some,
    /// More than the queue holds: what was left out is to be read in ranges.
    Overflow,
}

/// A subscription to everything after a sequence.
pub struct Live {
    connection: DbConnection,
    subscription: SubscriptionHandle,
    rows: mpsc::Receiver<EventLog>,
    overflow: Arc<AtomicBool>,
    ended: Arc<parking_lot::Mutex<Option<String>>>,
    wake: Arc<tokio::sync::Notify>,
    /// What the connection goes through, where the server's certificate is of a private authority.
    _relay: Option<Relay>,
}

impl Live {
    /// Subscribes to what comes after `after`.
    ///
    /// # Errors
    /// When the server refuses, or gives no answer in time.
    pub async fn start(source: &Database, after: u64) -> Result<Self, SourceError> {
        let relay = match &source.ca_file {
            Some(ca_file) => Some(Relay::start(&source.url, ca_file).await?),
            None => None,
        };
        let url = relay.as_ref().map_or_else(|| source.url.clone(), |relay| relay.url.clone());
        let (database, token) = (source.name.clone(), source.token.clone());
        let wake = Arc::new(tokio::sync::Notify::new());
        let overflow = Arc::new(AtomicBool::new(false));
        let ended: Arc<parking_lot::Mutex<Option<String>>> = Arc::default();
        let (ended_too, wake_too) = (Arc::clone(&ended), Arc::clone(&wake));
        // The SDK connects before it returns.
        let connecting = tokio::task::spawn_blocking(move || {
            let builder = DbConnection::builder().with_uri(url).with_module_name(database).with_token(token);
            let builder = builder.on_disconnect(move |_, error| {
                let reason = error.map_or("the connection was closed".to_owned(), |error| error.to_string());
                ended_too.lock().get_or_insert(reason);
                wake_too.notify_one();
            });
            builder.build().map_err(|error| SourceError::Subscription(error.to_string()))
        });
        let connection = tokio::time::timeout(APPLY_LIMIT, connecting)
            .await
            .map_err(|_| SourceError::Subscription("the server gave no answer".into()))?
            .map_err(|error| SourceError::Subscription(error.to_string()))??;
        caused("connection", 2);
        let (sender, rows) = mpsc::channel(LIVE_QUEUE);
        let (full, wake_again) = (Arc::clone(&overflow), Arc::clone(&wake));
        connection.db().event_log().on_insert(move |_, event| {
            if sender.try_send(event.clone()).is_err() {
                full.store(true, Ordering::Relaxed);
                wake_again.notify_one();
            }
        });
        connection.run_threaded();
        let (applied, is_applied) = tokio::sync::oneshot::channel();
        let subscription = subscribe(&connection, after, Some(applied), Arc::clone(&ended), Arc::clone(&wake));
        match tokio::time::timeout(APPLY_LIMIT, is_applied).await {
            Ok(Ok(())) => Ok(Self { connection, subscription, rows, overflow, ended, wake, _relay: relay }),
            _ => {
                let reason = ended.lock().take().unwrap_or_else(|| "it was not applied in time".into());
                // It may be closed already.
                let _ = connection.disconnect();
                Err(SourceError::Subscription(reason))
            }
        }
    }

    /// Waits for rows, and takes up to `most` of those that are there.
    ///
    /// # Errors
    /// When the subscription has ended.
    pub async fn next(&mut self, most: usize, rows: &mut Vec<EventLog>) -> Result<Received, SourceError> {
        loop {
            if self.overflow.load(Ordering::Relaxed) {
                return Ok(Received::Overflow);
            }
            if let Some(reason) = self.ended.lock().take() {
                return Err(SourceError::Subscription(reason));
            }
            tokio::select! {
                // Cancelled, it has taken nothing.
                taken = self.rows.recv_many(rows, most) => {
                    return if taken > 0 { Ok(Received::Some) } else { Err(SourceError::Subscription("it was dropped".into())) };
                }
                () = self.wake.notified() => {}
            }
        }
    }

    /// Subscribes to what comes after `after` and lets go of all before, which the SDK forgets then.
    ///
    /// # Errors
    /// When the subscription has ended.
    pub fn renew(&mut self, after: u64) -> Result<(), SourceError> {
        let next = subscribe(&self.connection, after, None, Arc::clone(&self.ended), Arc::clone(&self.wake));
        let before = std::mem::replace(&mut self.subscription, next);
        before.unsubscribe().map_err(|error| SourceError::Subscription(error.to_string()))
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // It may be closed already.
        let _ = self.connection.disconnect();
    }
}

fn subscribe(
    connection: &DbConnection,
    after: u64,
    applied: Option<tokio::sync::oneshot::Sender<()>>,
    ended: Arc<parking_lot::Mutex<Option<String>>>,
    wake: Arc<tokio::sync::Notify>,
) -> SubscriptionHandle {
    let applied = parking_lot::Mutex::new(applied);
    let builder = connection.subscription_builder().on_applied(move |_| {
        if let Some(applied) = applied.lock().take() {
            // Who waited may have given up.
            let _ = applied.send(());
        }
    });
    let builder = builder.on_error(move |_, error| {
        ended.lock().get_or_insert(error.to_string());
        wake.notify_one();
    });
    builder.subscribe(format!("SELECT * FROM event_log WHERE sequence > {after}"))
}
