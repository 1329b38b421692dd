//! The promises, as tests on a real server. One binary, a room a promise.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "tests measure and print")]

#[path = "promises/bad_input.rs"]
mod bad_input;
#[path = "promises/bindings.rs"]
mod bindings;
#[path = "promises/bundle.rs"]
mod bundle;
#[path = "promises/chaos.rs"]
mod chaos;
#[path = "promises/compaction.rs"]
mod compaction;
#[path = "promises/config.rs"]
mod config;
#[path = "promises/daemon.rs"]
mod daemon;
#[path = "promises/dashboards.rs"]
mod dashboards;
#[path = "promises/deploy.rs"]
mod deploy;
#[path = "promises/deploy_killed.rs"]
mod deploy_killed;
#[path = "promises/deployment_files.rs"]
mod deployment_files;
#[path = "promises/drill.rs"]
mod drill;
#[path = "promises/endings.rs"]
mod endings;
#[path = "promises/engine.rs"]
mod engine;
#[path = "promises/events.rs"]
mod events;
#[path = "promises/export_edges.rs"]
mod export_edges;
#[path = "promises/exports.rs"]
mod exports;
#[path = "promises/faults.rs"]
mod faults;
#[path = "promises/fixture.rs"]
mod fixture;
#[path = "promises/health.rs"]
mod health;
#[path = "promises/idle.rs"]
mod idle;
#[path = "promises/instance.rs"]
mod instance;
#[path = "promises/module.rs"]
mod module;
#[path = "promises/observe.rs"]
mod observe;
#[path = "promises/official.rs"]
mod official;
#[path = "promises/official_guide.rs"]
mod official_guide;
#[path = "promises/old_repositories.rs"]
mod old_repositories;
#[path = "promises/page.rs"]
mod page;
#[path = "promises/places.rs"]
mod places;
#[path = "promises/prune_local.rs"]
mod prune_local;
#[path = "promises/random_logs.rs"]
mod random_logs;
#[path = "promises/restore_exact.rs"]
mod restore_exact;
#[path = "promises/retention.rs"]
mod retention;
#[path = "promises/runbooks.rs"]
mod runbooks;
#[path = "promises/s3.rs"]
mod s3;
#[path = "promises/server_mode.rs"]
mod server_mode;
#[path = "promises/streams.rs"]
mod streams;
#[path = "promises/supervised.rs"]
mod supervised;
#[path = "promises/synthetic.rs"]
mod synthetic;
#[path = "promises/timelines.rs"]
mod timelines;
#[path = "promises/under_load.rs"]
mod under_load;
#[path = "promises/verify.rs"]
mod verify;
