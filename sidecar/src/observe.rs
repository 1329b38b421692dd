//! What the sidecar tells the outside: its own metrics, and the server's events as OpenTelemetry.
//!
//! Invariants: every metric is declared in [`metrics`] and nowhere else, with its unit, labels and meaning; labels are
//! bounded by what the operator named or the code lists; an outage of whoever listens costs no memory and stops no backup.

pub mod calls;
pub mod composed;
pub mod cursor;
#[cfg(feature = "client")]
pub mod events;
pub mod heartbeat;
pub mod metrics;
#[cfg(feature = "client")]
pub mod module;
pub mod module_logs;
pub mod otlp;
pub mod own;
pub mod provider;
pub mod records;
#[cfg(feature = "client")]
pub mod rows;
pub mod server;
