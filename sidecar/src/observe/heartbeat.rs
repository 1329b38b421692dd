//! The heartbeat: a request to an address that raises an alarm when it hears nothing, sent only while all is well.

use std::time::Duration;

use opentelemetry::KeyValue;

use crate::clock::Clock;
use crate::config::TelemetryConfig;
use crate::observe::metrics::HEARTBEATS;
use crate::observe::otlp::{self, OtlpError};
use crate::outbound;

/// The longest that one call may take.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// Calls the address for ever, as often as configured, whenever `healthy` finds no reason against it.
///
/// # Errors
/// When no client can be made. Without an address it waits for ever.
pub async fn beat(
    config: &TelemetryConfig,
    clock: &dyn Clock,
    healthy: impl Fn() -> Result<(), String>,
) -> Result<(), OtlpError> {
    let Some(address) = &config.heartbeat_url else { return std::future::pending().await };
    let client = otlp::client(CALL_LIMIT, None)?;
    let count = |outcome: &'static str| HEARTBEATS.add(1, &[KeyValue::new("outcome", outcome)]);
    loop {
        match healthy() {
            Ok(()) => match client.get(address.reveal()).send().await.and_then(reqwest::Response::error_for_status) {
                Ok(_) => count("ok"),
                Err(error) => {
                    count("failed");
                    let proxy = outbound::proxy_of(&error).map(tracing::field::display);
                    // The address is a secret: who knows it can keep the alarm silent.
                    tracing::warn!(error = %error.without_url(), proxy, "the heartbeat was not taken and is tried again");
                }
            },
            Err(reason) => {
                count("withheld");
                tracing::warn!(%reason, "no heartbeat is sent");
            }
        }
        clock.sleep(config.heartbeat_interval.0).await;
    }
}
