//! `cargo xtask`: everything a newcomer or a developer runs, with all set-up done on the way.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a build tool prints and measures")]

mod bench;
mod bindings;
mod debian;
mod engine;
mod fuzz;
mod observers;
mod run;
mod server;
mod stores;
mod test;
mod wasm;

use std::process::ExitCode;

const HELP: &str = "\
cargo xtask demo              the main job on a real server, as a short story
cargo xtask test [--all] [FILTER]
                              every test; --all with the long ones, which also need more tools; `python` for
                              those of the Python client alone
cargo xtask bench [GiB] [N]   ratios, of N rounds, against what users would pick instead, on a real server's data directory;
                              writes docs/benchmarks.md
cargo xtask bench log [GiB] [N]
                              the same on a log without a snapshot; writes docs/benchmarks-log.md
cargo xtask bench s3 [GiB] [N]
                              the same to and from an S3 server; writes docs/benchmarks-s3.md
cargo xtask bench serving [GiB] [N]
                              from a disaster to a server that answers; writes docs/benchmarks-serving.md
cargo xtask bench requests [S]
                              requests and bytes a day by flush interval; writes docs/benchmarks-requests.md
cargo xtask bench growth      how time, memory and objects grow; writes docs/benchmarks-growth.md
cargo xtask bench micro       the hot paths beside their bounds; writes docs/benchmarks-micro.md
cargo xtask bench live [S]    lag, memory and the server's throughput beside the daemon; writes docs/benchmarks-live.md
cargo xtask bench events [N]  the event stream beside the SDK alone, N events waiting; writes docs/benchmarks-events.md
cargo xtask bench export [N]  export and replay of N events beside `spacetime sql` and a script; writes docs/benchmarks-export.md
cargo xtask chaos [--seed S] [--minutes M]
                              everything at once: kills, power cuts, a store and files that fail, a clock that jumps
cargo xtask bindings          regenerate the client bindings from the module
cargo xtask fuzz [SECONDS]    run each fuzz target for that long (600 when left out)
cargo xtask setup             only prepare what the others need

SPACETIMEDB_STANDALONE=/path  use this server instead of the one found or built";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (verb, rest) = match arguments.split_first() {
        Some((verb, rest)) => (verb.as_str(), rest),
        None => ("help", [].as_slice()),
    };
    let result = match verb {
        "demo" => test::demo(),
        "test" => test::test(rest),
        "bench" => bench::bench(rest),
        "chaos" => test::chaos(rest),
        "bindings" => bindings::regenerate(),
        "fuzz" => fuzz::fuzz(rest),
        "setup" => test::prepare().map(|_| ()),
        "help" | "--help" | "-h" => {
            println!("{HELP}");
            Ok(())
        }
        verb => Err(format!("there is no `{verb}`\n\n{HELP}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
