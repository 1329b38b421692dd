//! Parts of the benchmarks: a log of a seed, what users would pick instead, and series of figures as tables.

pub mod log;
pub mod peers;
pub mod remote;
pub mod series;
