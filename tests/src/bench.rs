//! Parts of the benchmarks: data from a seed, by hand and by a real server, what users would pick instead, and series of
//! figures as tables.

pub mod compare;
pub mod flushes;
pub mod growth;
pub mod log;
pub mod micro;
pub mod peers;
pub mod place;
pub mod prepared;
pub mod remote;
pub mod report;
pub mod series;
