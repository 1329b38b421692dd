//! A short piece of chaos; `cargo xtask chaos` runs it for as long as you like.

use std::time::Duration;

use harness::{chaos, tools};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_was_reported_archived_is_lost_whatever_happens() {
    if !tools::all() {
        println!("skipped: chaos takes minutes; `cargo xtask test --all` and `cargo xtask chaos` run it");
        return;
    }
    let seed = std::env::var("INNER_UNIVERSE_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    let length = Duration::from_secs(120);
    if let Some(outcome) = chaos::run(seed, length).await {
        println!("{outcome:#?}");
    }
}
