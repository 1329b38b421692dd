//! The benchmark: ours and what users would pick instead, in turn, in one run. Machines are noisy, so only ratios count.
//! `bench [GiB] [ROUNDS]` compares on the data of a real server, `bench log [GiB] [ROUNDS]` on a log alone, `bench s3 [GiB]
//! [ROUNDS]` over S3; `bench growth` shows how ours grows (`growth objects` and `growth flushes` print one table alone); `bench micro DIR` tells
//! what criterion has measured.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a benchmark measures and prints")]

use harness::bench::place::Place;
use harness::bench::{compare, flushes, growth, micro, report};

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("growth") if std::env::args().nth(2).as_deref() == Some("objects") => {
            println!("{}", growth::with_objects())
        }
        Some("growth") if std::env::args().nth(2).as_deref() == Some("flushes") => {
            println!("{}", flushes::with_flushes())
        }
        Some("growth") => report::write("benchmarks-growth.md", &growth::all()),
        Some("micro") => {
            let figures = std::env::args().nth(2).expect("where criterion leaves its figures");
            report::write("benchmarks-micro.md", &micro::report(figures.as_ref()));
        }
        Some("s3") => {
            let text = compare::over_s3(&Place::of_log(gib(2)), rounds(3), "cargo xtask bench s3");
            report::write("benchmarks-s3.md", &format!("# Benchmarks over S3\n\n{text}"));
        }
        Some("log") => {
            let text = compare::on_disk(Place::of_log(gib(2)), rounds(3), "cargo xtask bench log");
            report::write("benchmarks-log.md", &format!("# Benchmarks of a log alone\n\n{text}"));
        }
        _ => {
            let text = compare::on_disk(Place::of_server(gib(1)), rounds(2), "cargo xtask bench");
            report::write("benchmarks.md", &format!("# Benchmarks\n\n{text}"));
        }
    }
}

fn gib(argument: usize) -> f64 {
    std::env::args().nth(argument).map_or(2.0, |text| text.parse().expect("a size in GiB"))
}

fn rounds(argument: usize) -> usize {
    std::env::args().nth(argument).map_or(3, |text| text.parse().expect("a number of rounds"))
}
