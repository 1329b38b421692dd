//! One database of a running server over its binary protocol: its tables, their rows without loss, and reducer calls.
//!
//! With `observe/server.rs` the only room that knows how this release of the server speaks; see ARCHITECTURE.md on server
//! versions. JSON, which the server offers too, writes infinities as null and so loses them.

pub mod cell;
pub mod control;
pub mod description;
pub mod link;
pub mod reader;
pub mod schema;
pub mod shape;
pub mod tls;
