//! The benchmark of a disaster: how long until the database serves again, from our repository and from a cold copy.
//! `serving [GiB] [ROUNDS]`.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a benchmark measures and prints")]

use std::fmt::Write as _;
use std::process::Command;

use harness::bench::place::Place;
use harness::bench::report::{self, Spread, machine};
use harness::measure::{Measured, measure};
use harness::sidecar::path;

fn main() {
    let number = |at: usize| std::env::args().nth(at).map(|text| text.parse::<f64>().expect("a number"));
    let (gib, rounds) = (number(1).unwrap_or(2.0), number(2).unwrap_or(3.0) as usize);
    let mut text = format!(
        "# Benchmark of a disaster\n\nWritten by `cargo xtask bench serving`, on {}. A real server's data directory is gone; then the time until a server answers \
         SQL again, with the rows it had before, {rounds} rounds in turn. Ratio above 1: ours is faster. A backup of ours is made while the server may run; for \
         a cold copy it is stopped. Ours is on the disk and has been checked; what `cp` wrote is still in memory alone, where the server reads it.\n",
        machine()
    );
    for (title, has_snapshots) in [("With the server's snapshots", true), ("With the log alone", false)] {
        let place = Place::of_server(gib);
        if !has_snapshots {
            place.forget_snapshots();
        }
        let _ = write!(text, "\n## {title}\n\nData: {}.\n\n", place.describe());
        text += &disaster(&place, rounds);
    }
    report::write("benchmarks-serving.md", &text);
}

fn disaster(place: &Place, rounds: usize) -> String {
    let sidecar = place.sidecar();
    let (cold, copied) = (place.dir("cold"), place.dir("copied"));
    let copy = |from: &std::path::Path, to: &std::path::Path| -> Measured {
        measure(Command::new("cp").args(["-r", path(from), path(to)]))
    };
    let hot = place.back_up(&sidecar);
    let stopped = copy(&place.data(), &cold);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        println!("round {round} of {rounds}");
        let restored = place.restore(&sidecar).seconds;
        ours.push((restored, place.serves(&place.dir("restored")).expect("a server's data")));
        place.clear(&["restored"]);
        let back = copy(&cold, &copied).seconds;
        theirs.push((back, place.serves(&copied).expect("a server's data")));
        place.clear(&["copied"]);
    }
    let ratio = Spread::of(ours.iter().zip(&theirs).map(|(ours, theirs)| (theirs.0 + theirs.1) / (ours.0 + ours.1)));
    let line = |name: &str, backup: f64, stopped: f64, times: &[(f64, f64)]| {
        let middle = |of: fn(&(f64, f64)) -> f64| Spread::of(times.iter().map(of)).middle;
        let (copied, started, both) = (middle(|time| time.0), middle(|time| time.1), middle(|time| time.0 + time.1));
        format!("| {name} | {backup:.2} | {stopped:.2} | {copied:.2} | {started:.2} | {both:.2} |")
    };
    format!(
        "| from | backup s | server stopped for it s | restore s | its start s | serving after s | ratio | spread |\n|---|---|---|---|---|---|---|---|\n\
         {} {:.2} | {:.2} to {:.2} |\n{} | |\n",
        line("our repository", hot.seconds, 0.0, &ours),
        ratio.middle,
        ratio.least,
        ratio.most,
        line("a cold copy (`cp -r`)", stopped.seconds, stopped.seconds, &theirs),
    )
}
