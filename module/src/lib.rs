//! The Inner Universe module: the directory of its rooms.
//!
//! Invariants every room keeps:
//! - a reducer checks who calls it before it changes anything;
//! - `event_log.sequence` and `state_version.version_id` count up without a hole, so that a reader who saw N and N+2
//!   knows that N+1 is missing;
//! - a refused call changes nothing, because the server rolls back what a reducer did before it returned an error.

mod access;
mod config;
mod entities;
mod events;
mod import;
mod lifecycle;
mod metrics;
mod relations;
mod sequence;
mod status;
mod tables;
mod types;
mod versions;
