//! The benchmark: ours and what users would pick instead, in turn, in one run. Machines are noisy, so only ratios count.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a benchmark measures and prints")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::measure::{Measured, measure, median};
use harness::sidecar::{Sidecar, path};
use harness::synthetic::{Synthetic, record};
use harness::tools;
use harness::workload::Random;

const ROUNDS: usize = 3;
/// About what the server writes for a reducer that inserts a row of 200 bytes.
const PAYLOAD: usize = 450;
const SEGMENT: u64 = 1 << 30;

fn main() {
    let gib: f64 = std::env::args().nth(1).map_or(2.0, |text| text.parse().expect("a size in GiB"));
    let synthetic = Synthetic::new();
    println!("writing a log of {gib} GiB");
    let bytes = write_log(&synthetic, (gib * f64::from(1 << 30)) as u64);
    let scratch = synthetic.dir.path();
    let mut rows: Vec<Row> = Vec::new();
    for round in 0..ROUNDS {
        println!("round {} of {ROUNDS}", round + 1);
        let (repository, restored) = (scratch.join("repository"), scratch.join("restored"));
        let (archive, unpacked) = (scratch.join("archive.tar.zst"), scratch.join("unpacked"));
        let sidecar = Sidecar::at(&repository);
        let data = synthetic.path();
        std::fs::create_dir_all(&unpacked).expect("create");

        let pack = format!("tar -C '{}' -cf - . | zstd -q -3 -T2 -o '{}'", data.display(), archive.display());
        let tar = measure(Command::new("sh").args(["-c", &pack]));
        let ours = measure(sidecar.command().args(["--quiet", "backup", "create", "--data-dir", path(&data)]));
        push(&mut rows, "first backup", "tar | zstd -3 -T2", &ours, &tar, size(&repository), size(&archive));

        let unpack = format!("zstd -q -d -c '{}' | tar -C '{}' -xf -", archive.display(), unpacked.display());
        let tar = measure(Command::new("sh").args(["-c", &unpack]));
        let ours = measure(sidecar.command().args(["--quiet", "restore", "--data-dir", path(&restored)]));
        push(&mut rows, "restore", "zstd -d | tar -x", &ours, &tar, size(&restored), size(&unpacked));
        same_log(&data, &restored);

        let ours = measure(sidecar.command().args(["--quiet", "backup", "create", "--data-dir", path(&data)]));
        let first = rows.iter().find(|row| row.work == "first backup").expect("a row").ours.seconds.clone();
        let nothing = Measured { seconds: *first.last().expect("a figure"), peak_mib: 0.0 };
        push(&mut rows, "backup of nothing new", "our first backup", &ours, &nothing, 0, 0);

        let ours = measure(sidecar.command().args(["--quiet", "verify"]));
        let first = Measured { seconds: *first.last().expect("a figure"), peak_mib: 0.0 };
        push(&mut rows, "verify", "our first backup", &ours, &first, 0, 0);
        for dir in [&repository, &restored, &unpacked] {
            std::fs::remove_dir_all(dir).expect("remove");
        }
        std::fs::remove_file(archive).expect("remove");
    }
    let table = table(&rows, bytes);
    println!("{table}");
    let docs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs");
    std::fs::create_dir_all(&docs).expect("create docs/");
    std::fs::write(docs.join("benchmarks.md"), table).expect("write docs/benchmarks.md");
}

#[derive(Default)]
struct Series {
    seconds: Vec<f64>,
    peak_mib: f64,
    bytes: u64,
}

struct Row {
    work: &'static str,
    peer: &'static str,
    ours: Series,
    theirs: Series,
}

fn push(
    rows: &mut Vec<Row>,
    work: &'static str,
    peer: &'static str,
    ours: &Measured,
    theirs: &Measured,
    our_bytes: u64,
    their_bytes: u64,
) {
    let found = rows.iter().position(|row| row.work == work);
    let at = found.unwrap_or_else(|| {
        rows.push(Row { work, peer, ours: Series::default(), theirs: Series::default() });
        rows.len() - 1
    });
    rows[at].ours.add(ours, our_bytes);
    rows[at].theirs.add(theirs, their_bytes);
}

impl Series {
    fn add(&mut self, measured: &Measured, bytes: u64) {
        self.seconds.push(measured.seconds);
        self.peak_mib = self.peak_mib.max(measured.peak_mib);
        self.bytes = bytes;
    }
}

fn write_log(synthetic: &Synthetic, bytes: u64) -> u64 {
    let mut random = Random::new(42);
    let (mut first, mut total, mut time) = (0, 0, 1_760_000_000_000_000);
    while total < bytes {
        let mut records = Vec::new();
        let mut len = 0;
        while len < SEGMENT.min(bytes - total) {
            time += random.below(200) as i64;
            let record = record(time, &payload(&mut random, first + records.len() as u64));
            len += record.len() as u64 + 26;
            records.push(record);
        }
        synthetic.segment(1, first, &records);
        first += records.len() as u64;
        total += len;
    }
    total
}

/// A third random, a third words, a third numbers that count: rows compress about so.
fn payload(random: &mut Random, n: u64) -> Vec<u8> {
    const WORDS: [&str; 8] = ["entity", "updated", "relation", "created", "orbit", "station", "observed", "magnitude"];
    let mut text = format!("{{\"id\":{n},\"version\":{},\"at\":{}", n % 97, n * 3);
    while text.len() < PAYLOAD * 2 / 3 {
        let _ = write!(text, ",\"{}\":\"{}\"", WORDS[random.below(8) as usize], WORDS[random.below(8) as usize]);
    }
    let mut bytes = text.into_bytes();
    while bytes.len() < PAYLOAD {
        bytes.extend(random.draw().to_le_bytes());
    }
    bytes
}

fn same_log(original: &Path, restored: &Path) {
    let log = |data: &Path| harness::synthetic::log_of(data);
    let read = |dir: PathBuf| {
        let mut reader = inner_universe::datadir::log::LogReader::open_first(&dir).expect("open");
        let (mut hasher, mut buffer) = (blake3::Hasher::new(), Vec::new());
        while reader.next_batch(1 << 22, &mut buffer).expect("read").is_some() {
            hasher.update(&buffer);
        }
        hasher.finalize()
    };
    assert_eq!(read(log(original)), read(log(restored)), "what was restored differs");
}

fn size(path: &Path) -> u64 {
    let Ok(kind) = std::fs::symlink_metadata(path) else { return 0 };
    if !kind.is_dir() {
        return kind.len();
    }
    std::fs::read_dir(path).map_or(0, |entries| entries.flatten().map(|entry| size(&entry.path())).sum())
}

fn table(rows: &[Row], bytes: u64) -> String {
    let mut text = String::from("# Benchmarks\n\n");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let _ = writeln!(
        text,
        "Written by `cargo xtask bench`. A log of {:.2} GiB of transactions of about 560 bytes, {ROUNDS} rounds, ours and the \
         other in turn, {cores} cores. Ratios are of median times within this run: above 1, ours is faster. What is \
         restored is compared byte for byte. `{}`.\n",
        bytes as f64 / f64::from(1 << 30),
        tools::inner_universe().file_name().and_then(|name| name.to_str()).unwrap_or("?"),
    );
    text += "| work | against | ratio | spread | ours | theirs | our peak memory | our bytes / theirs |\n";
    text += "|---|---|---|---|---|---|---|---|\n";
    for row in rows {
        let ratios: Vec<f64> =
            row.ours.seconds.iter().zip(&row.theirs.seconds).map(|(ours, other)| other / ours).collect();
        let (low, high) = ratios.iter().fold((f64::MAX, 0.0f64), |(low, high), r| (low.min(*r), high.max(*r)));
        let size = if row.theirs.bytes == 0 {
            "-".to_owned()
        } else {
            format!("{:.3}", row.ours.bytes as f64 / row.theirs.bytes as f64)
        };
        let _ = writeln!(
            text,
            "| {} | {} | {:.2} | {low:.2} to {high:.2} | {:.2} s | {:.2} s | {:.0} MiB | {size} |",
            row.work,
            row.peer,
            median(&ratios),
            median(&row.ours.seconds),
            median(&row.theirs.seconds),
            row.ours.peak_mib,
        );
    }
    text
}
