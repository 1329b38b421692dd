//! The `inner-universe` binary: parse, run, exit code.

use std::process::ExitCode;

use clap::Parser;
use inner_universe::cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    inner_universe::cli::main(cli)
}
