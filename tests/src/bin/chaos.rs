//! `cargo xtask chaos --seed S --minutes M`: everything at once, seed after seed, until the time is over.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a program of the tests measures and prints")]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use harness::chaos;

/// How long one seed makes trouble before it is checked.
const ROUND: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |name: &str| {
        let at = words.iter().position(|word| word == name)?;
        words.get(at + 1)?.parse::<u64>().ok()
    };
    let mut seed = number("--seed").unwrap_or_else(|| u64::from(std::process::id()));
    let minutes = number("--minutes").unwrap_or(5);
    let end = Instant::now() + Duration::from_secs(minutes * 60);
    let mut rounds = 0;
    while Instant::now() < end {
        let left = end.saturating_duration_since(Instant::now());
        match chaos::run(seed, ROUND.min(left.max(Duration::from_secs(10)))).await {
            Some(outcome) => println!("{outcome:#?}"),
            None => {
                eprintln!("the S3 server moto could not be installed, and without one there is no chaos");
                return ExitCode::FAILURE;
            }
        }
        seed += 1;
        rounds += 1;
    }
    println!("{rounds} seeds, and every promise was kept");
    ExitCode::SUCCESS
}
