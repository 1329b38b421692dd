//! The benchmark: ours and what users would pick instead, in turn, in one run. Machines are noisy, so only ratios count.
//! `bench [GiB] [ROUNDS]` compares on this disk, `bench s3 [GiB] [ROUNDS]` over S3, `bench growth` shows how ours grows.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a benchmark measures and prints")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::bench::log::{Writer, assert_same, size};
use harness::bench::peers::Peer;
use harness::bench::remote::Remote;
use harness::bench::series::Table;
use harness::measure::{Measured, measure};
use harness::s3::{BUCKET, S3};
use harness::sidecar::{Sidecar, path};
use harness::synthetic::Synthetic;

const GIB: f64 = (1u64 << 30) as f64;

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("growth") => write("benchmarks-growth.md", &growth()),
        Some("s3") => write("benchmarks-s3.md", &over_s3(gib(2), rounds(3))),
        _ => write("benchmarks.md", &compare(gib(1), rounds(2))),
    }
}

fn gib(argument: usize) -> f64 {
    std::env::args().nth(argument).map_or(2.0, |text| text.parse().expect("a size in GiB"))
}

fn rounds(argument: usize) -> usize {
    std::env::args().nth(argument).map_or(3, |text| text.parse().expect("a number of rounds"))
}

fn write(name: &str, text: &str) {
    println!("{text}");
    let docs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs");
    std::fs::write(docs.join(name), text).unwrap_or_else(|error| panic!("write docs/{name}: {error}"));
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": ?");
    format!("{cores} cores of {}", model.trim_start_matches([' ', '\t', ':']))
}

/// What a benchmark of one data directory works with.
struct Place {
    synthetic: Synthetic,
    writer: Writer,
    bytes: u64,
}

impl Place {
    fn new(gib: f64) -> Self {
        let (synthetic, mut writer) = (Synthetic::new(), Writer::default());
        println!("writing a log of {gib} GiB");
        let bytes = writer.add(&synthetic, (gib * GIB) as u64);
        Self { synthetic, writer, bytes }
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.synthetic.dir.path().join(name)
    }

    fn sidecar(&self) -> Sidecar {
        Sidecar::at(&self.dir("repository"))
    }

    fn back_up(&self) -> Measured {
        self.back_up_with(&self.sidecar())
    }

    fn back_up_with(&self, sidecar: &Sidecar) -> Measured {
        let data = self.synthetic.path();
        measure(sidecar.command().args(["--quiet", "backup", "create", "--data-dir", path(&data)]))
    }

    fn restore(&self) -> Measured {
        self.restore_with(&self.sidecar())
    }

    fn restore_with(&self, sidecar: &Sidecar) -> Measured {
        let to = self.dir("restored");
        measure(sidecar.command().args(["--quiet", "restore", "--data-dir", path(&to)]))
    }

    fn verify(&self) -> Measured {
        measure(self.sidecar().command().args(["--quiet", "verify"]))
    }

    fn clear(&self, names: &[&str]) {
        for name in names {
            let dir = self.dir(name);
            let removed = if dir.is_dir() { std::fs::remove_dir_all(&dir) } else { std::fs::remove_file(&dir) };
            removed.unwrap_or_else(|error| panic!("remove {}: {error}", dir.display()));
        }
    }
}

fn compare(gib: f64, rounds: usize) -> String {
    let mut place = Place::new(gib);
    let peers = Peer::all();
    let mut table = Table::default();
    let mut first_seconds = 0.0;
    let mut incremental = Vec::new();
    for round in 1..=rounds {
        println!("round {round} of {rounds}");
        let data = place.synthetic.path();
        let ours = place.back_up();
        first_seconds = if round == 1 { ours.seconds } else { first_seconds };
        let our_bytes = size(&place.dir("repository"));
        let restored = place.restore();
        let restored_bytes = size(&place.dir("restored"));
        assert_same(&data, &place.dir("restored"));
        let nothing = place.back_up();
        let verified = place.verify();
        table.row("backup of nothing new", "our first backup", None).ours.add(nothing, 0);
        table.row("backup of nothing new", "our first backup", None).theirs.add(ours, 0);
        for peer in &peers {
            println!("  {}", peer.name);
            let (repository, unpacked) = (place.dir("theirs"), place.dir("unpacked"));
            std::fs::create_dir(&unpacked).expect("a directory");
            peer.init(&repository);
            let backed_up = measure(&mut peer.backup(&data, &repository, 1));
            let row = table.row("first backup", peer.name, peer.wanted("backup"));
            row.ours.add(ours, our_bytes);
            row.theirs.add(backed_up, size(&repository));
            let back = measure(&mut peer.restore(&repository, &unpacked, 1));
            let row = table.row("restore", peer.name, peer.wanted("restore"));
            row.ours.add(restored, restored_bytes);
            row.theirs.add(back, size(&unpacked));
            // They copy files as they are.
            let differs = Command::new("diff").args(["-r", "--brief"]).arg(&data).arg(&unpacked).status();
            assert!(differs.is_ok_and(|status| status.success()), "{} restored something else", peer.name);
            if let Some(mut check) = peer.check(&repository) {
                let row = table.row("verify, every byte", peer.name, None);
                row.ours.add(verified, 0);
                row.theirs.add(measure(&mut check), 0);
            }
            place.clear(&["unpacked"]);
            if peer.is_incremental() {
                std::fs::rename(&repository, place.dir(&peer.file_name())).expect("keep it");
            } else {
                place.clear(&["theirs"]);
            }
        }
        // One percent more log.
        let before: Vec<_> = segments(&place.synthetic);
        place.bytes += place.writer.add(&place.synthetic, place.bytes / 100);
        let new: Vec<_> = segments(&place.synthetic).into_iter().filter(|file| !before.contains(file)).collect();
        let compressed = compressed(&new);
        let small = place.back_up();
        let added = size(&place.dir("repository")) - our_bytes;
        incremental.push((added as f64 / compressed as f64, ours.seconds / small.seconds));
        for peer in peers.iter().filter(|peer| peer.is_incremental()) {
            let repository = place.dir(&peer.file_name());
            let size_before = size(&repository);
            let theirs = measure(&mut peer.backup(&place.synthetic.path(), &repository, 2));
            let row = table.row("backup after 1% more log", peer.name, None);
            row.ours.add(small, added);
            row.theirs.add(theirs, size(&repository) - size_before);
            place.clear(&[&peer.file_name()]);
        }
        place.clear(&["repository", "restored"]);
    }
    let mut text = format!(
        "# Benchmarks\n\nWritten by `cargo xtask bench`. A log of {gib:.2} GiB of transactions of about 560 bytes from a seed, {rounds} rounds, ours and the \
         others in turn within each, {}. Ratios are of times within one round, their middle and their spread over the rounds: above 1, ours is faster. \
         CPU seconds and memory are ours / theirs (memory of the largest process), bytes ours divided by theirs. What is restored is compared byte for \
         byte. Ours makes durable what it writes (fsync) and reads a restore back before it counts; of the others restic syncs what it stores, tar, zstd and \
         cp sync nothing.\n\n",
        machine()
    );
    for peer in &peers {
        let _ = writeln!(text, "- {}: {}", peer.name, peer.version);
    }
    let _ = write!(text, "\n{}", table.text());
    let worst =
        |of: fn(&(f64, f64)) -> f64, pick: fn(f64, f64) -> f64| incremental.iter().map(of).reduce(pick).unwrap_or(0.0);
    let _ = writeln!(
        text,
        "\nAfter 1% more log, ours adds {:.3} times the bytes that `zstd -3` makes of the new log alone (at most, of {rounds} rounds; must be at most 1.05) \
         and is {:.1} times as fast as the first backup (at least; must be 20).",
        worst(|(bytes, _)| *bytes, f64::max),
        worst(|(_, times)| *times, f64::min),
    );
    text
}

/// The same over a real S3 server on this machine, which takes its share of the cores.
fn over_s3(gib: f64, rounds: usize) -> String {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let place = Place::new(gib);
    let remotes = Remote::all();
    let mut table = Table::default();
    for round in 1..=rounds {
        println!("round {round} of {rounds}");
        let server = runtime.block_on(S3::s3s()).expect("s3s-fs");
        let sidecar = Sidecar::with(&format!("s3://{BUCKET}/ours")).configured(server.settings());
        let ours = place.back_up_with(&sidecar);
        let restored = place.restore_with(&sidecar);
        assert_same(&place.synthetic.path(), &place.dir("restored"));
        place.clear(&["restored"]);
        for remote in &remotes {
            println!("  {}", remote.name);
            remote.init(&server);
            let row = table.row("first backup", remote.name, None);
            row.ours.add(ours, 0);
            row.theirs.add(measure(&mut remote.backup(&place.synthetic.path(), &server)), 0);
            let unpacked = place.dir("unpacked");
            std::fs::create_dir(&unpacked).expect("a directory");
            let row = table.row("restore", remote.name, None);
            row.ours.add(restored, 0);
            row.theirs.add(measure(&mut remote.restore(&server, &unpacked)), 0);
            assert_same(&place.synthetic.path(), &unpacked);
            place.clear(&["unpacked"]);
        }
    }
    let mut text = format!(
        "# Benchmarks over S3\n\nWritten by `cargo xtask bench s3`. A log of {gib:.2} GiB as in benchmarks.md, {rounds} rounds, to and from s3s-fs on the same \
         machine, {}. rclone and s5cmd move the files as they are; ours and restic compress. Ratios above 1: ours is faster. CPU seconds and memory are \
         ours / theirs, without the server's.\n\n",
        machine()
    );
    for remote in &remotes {
        let _ = writeln!(text, "- {}: {}", remote.name, remote.version);
    }
    let _ = write!(text, "\n{}", table.text());
    text
}

fn segments(synthetic: &Synthetic) -> Vec<PathBuf> {
    let files = std::fs::read_dir(synthetic.log()).expect("the log").flatten().map(|entry| entry.path());
    files.filter(|path| path.extension().is_some_and(|kind| kind == "log")).collect()
}

fn compressed(files: &[PathBuf]) -> u64 {
    files
        .iter()
        .map(|file| {
            let output = Command::new("zstd").args(["-q", "-3", "-c"]).arg(file).output().expect("zstd");
            output.stdout.len() as u64
        })
        .sum()
}

/// How time and memory grow with the log, and with the objects of a repository.
fn growth() -> String {
    let mut text = format!(
        "# How it grows\n\nWritten by `cargo xtask bench growth`, on {}. One run each: what counts is how a column grows, not its figures.\n\n\
         | log GiB | first backup s | MiB | restore s | MiB | verify s | MiB | objects |\n|---|---|---|---|---|---|---|---|\n",
        machine()
    );
    for gib in [0.25, 0.5, 1.0, 2.0, 4.0] {
        let place = Place::new(gib);
        let (first, restored, verified) = (place.back_up(), place.restore(), place.verify());
        let _ = writeln!(
            text,
            "| {gib} | {:.2} | {:.0} | {:.2} | {:.0} | {:.2} | {:.0} | {} |",
            first.seconds,
            first.peak_mib,
            restored.seconds,
            restored.peak_mib,
            verified.seconds,
            verified.peak_mib,
            count(&place.dir("repository")),
        );
    }
    text += "\n`restore --dry-run` over a repository with that many log objects (names only, which is what a plan reads), beside `find` that lists them:\n\n\
             | log objects | plan s | MiB | find s | plan without its listing s |\n|---|---|---|---|---|\n";
    for objects in [1_000u64, 10_000, 100_000, 1_000_000] {
        let place = Place::new(0.001);
        place.back_up();
        let log = log_objects(&place.dir("repository"), objects);
        let to = place.dir("restored");
        let dry = ["--quiet", "restore", "--dry-run", "--data-dir", path(&to), "--to", "offset:100"];
        let plan = measure(place.sidecar().command().args(dry));
        let find = measure(Command::new("find").arg(&log).args(["-type", "f", "-printf", "%f %s\\n"]));
        let _ = writeln!(
            text,
            "| {objects} | {:.2} | {:.0} | {:.2} | {:.2} |",
            plan.seconds,
            plan.peak_mib,
            find.seconds,
            plan.seconds - find.seconds
        );
    }
    text
}

fn count(dir: &Path) -> usize {
    std::fs::read_dir(dir).map_or(0, |entries| {
        entries.flatten().map(|entry| if entry.path().is_dir() { count(&entry.path()) } else { 1 }).sum()
    })
}

/// Continues a log's first level with empty objects, up to `objects` in all.
fn log_objects(repository: &Path, objects: u64) -> PathBuf {
    let output = Command::new("find").arg(repository).args(["-name", "*.iulog"]).output().expect("find");
    let found = String::from_utf8(output.stdout).expect("names");
    let mut files: Vec<_> = found.lines().map(PathBuf::from).collect();
    files.sort();
    let last = files.last().expect("a log object");
    let name = last.file_stem().and_then(|name| name.to_str()).expect("a name");
    let mut next: u64 = name.split_once('-').and_then(|(_, last)| last.parse::<u64>().ok()).expect("an offset") + 1;
    let folder = last.parent().expect("a folder");
    for _ in files.len() as u64..objects {
        std::fs::File::create(folder.join(format!("{next:020}-{:020}.iulog", next + 9))).expect("an object");
        next += 10;
    }
    folder.to_owned()
}
