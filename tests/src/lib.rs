//! The harness: real servers, the real binary, a workload with an invariant, and oracles that do not use our code.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "tests measure and print")]

pub mod bench;
pub mod browser;
pub mod chaos;
pub mod client;
pub mod collector;
pub mod compose;
pub mod daemon;
pub mod engine;
pub mod faulty;
pub mod gate;
pub mod host;
pub mod measure;
pub mod oracle;
pub mod page;
pub mod pipeline;
pub mod s3;
pub mod scene;
pub mod server;
pub mod shim;
pub mod sidecar;
pub mod stage;
pub mod synthetic;
pub mod tools;
pub mod workload;
