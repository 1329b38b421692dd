//! Inner Universe: backup and recovery for SpacetimeDB, beside an unmodified server. This file is the directory of rooms.
//!
//! Data flows one way: `datadir` reads the server's files, `backup` turns them into objects, `repository` names and keeps
//! the objects, `restore` plans and rebuilds a data directory from them, `verify` proves them. `cli` is the only room
//! that prints.

pub mod backup;
pub mod cli;
pub mod clock;
pub mod datadir;
pub mod durable;
pub mod ids;
pub mod progress;
pub mod repository;
pub mod restore;
pub mod status;
pub mod verify;
