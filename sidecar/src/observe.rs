//! What the sidecar tells the outside: its own metrics, and the server's events as OpenTelemetry.
//!
//! Invariants: every metric is declared in [`metrics`] and nowhere else, with its unit, labels and meaning; labels are
//! bounded by what the operator named or the code lists; an outage of whoever listens costs no memory and stops no backup.

#[cfg(feature = "client")]
pub mod events;
pub mod heartbeat;
pub mod metrics;
pub mod otlp;
pub mod provider;
