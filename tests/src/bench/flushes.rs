//! A log that was flushed once a second for weeks, made without the weeks: every flush stays an entry of the chain for ever.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use inner_universe::datadir::commit::encode;
use inner_universe::datadir::log::{Batch, Times};
use inner_universe::ids::{Identity, Offset, TimelineId};
use inner_universe::repository::crypto::Keyring;
use inner_universe::repository::hashing::Hashing;
use inner_universe::repository::log_object::{ChainTip, Link, LogContent, LogHeader};

use crate::daemon::Daemon;
use crate::measure::{Measured, measure, peak_mib};
use crate::sidecar::{Sidecar, path};
use crate::synthetic::{Synthetic, record};

const FLUSHES: [u64; 3] = [100_000, 1_000_000, 3_000_000];
/// As many as compaction puts into one object.
const LINKS: u64 = 16 << 10;
/// The newest are not merged yet.
const UNMERGED: u64 = 20_000;
const DATABASE: Identity = Identity([5; 32]);
const TIMELINE: TimelineId = TimelineId(1);

/// How memory grows with the flushes that an archive consists of.
pub fn with_flushes() -> String {
    let mut text = format!(
        "\n## With the flushes\n\nA log that was flushed once a second, a transaction in each flush: merged objects of {LINKS} flushes, and {UNMERGED} flushes in \
         objects of their own, which a daemon merges. `prune` is the plan with its proofs; the restore is to the last transaction.\n\n\
         | flushes | verify s | MiB | prune s | MiB | restore s | MiB | daemon that merges, MiB |\n|---|---|---|---|---|---|---|---|\n"
    );
    for count in FLUSHES {
        text += &row(count);
    }
    text
}

fn row(count: u64) -> String {
    println!("{count} flushes");
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &[record(at(0), b"a note")]);
    let repository = synthetic.dir.path().join("repository");
    let sidecar = Sidecar::at(&repository).and("RETENTION__WINDOW", "30d");
    sidecar.backup(&synthetic.path());
    flushes(&repository, count);
    let run = |words: &[&str]| measure(sidecar.command().arg("--quiet").args(words));
    let cells = |measured: &Measured| format!("{:.2} | {:.0}", measured.seconds, measured.peak_mib);
    let verified = run(&["verify"]);
    let pruned = run(&["prune"]);
    let to = synthetic.dir.path().join("restored");
    let restored = run(&["restore", "--data-dir", path(&to), "--to", &format!("offset:{}", count - 1)]);
    let merging = merging(&sidecar, &synthetic, &repository);
    format!("| {count} | {} | {} | {} | {merging:.0} |\n", cells(&verified), cells(&pruned), cells(&restored))
}

/// The most memory that a daemon took until it had merged what was not merged.
fn merging(sidecar: &Sidecar, synthetic: &Synthetic, repository: &Path) -> f64 {
    let settings = [("ARCHIVE__COMPACTION_INTERVAL", "1s"), ("ARCHIVE__COMPACTION_GRACE", "1h")];
    let daemon = Daemon::start(sidecar, &synthetic.path(), &settings, &[]);
    let merged = level(repository, 1);
    let deadline = Instant::now() + Duration::from_secs(900);
    // The last flushes of all are in the last of them.
    while !std::fs::read_dir(&merged).is_ok_and(|objects| objects.count() as u64 > UNMERGED / 4096) {
        assert!(Instant::now() < deadline, "nothing was merged: {}", daemon.log());
        std::thread::sleep(Duration::from_millis(200));
    }
    let memory = peak_mib(daemon.pid());
    assert_eq!(daemon.stop(), 0);
    memory
}

/// A second apart.
fn at(n: u64) -> i64 {
    1_790_000_000_000_000 + n as i64 * 1_000_000
}

fn level(repository: &Path, level: u8) -> PathBuf {
    repository.join(format!("databases/{DATABASE}/timelines/{TIMELINE}/log/L{level}"))
}

/// Continues an archive of one transaction up to `count` of them.
fn flushes(repository: &Path, count: u64) {
    let object = |n: u8, first: u64, last: u64| level(repository, n).join(format!("{first:020}-{last:020}.iulog"));
    let first = std::fs::read(object(0, 0, 0)).expect("the first object");
    let mut tip = LogHeader::parse(&first).expect("its header").tip();
    let merged = count.saturating_sub(UNMERGED);
    for n in 0..=2 {
        std::fs::create_dir_all(level(repository, n)).expect("a folder");
    }
    while tip.next.0 < count {
        let (n, last) = match tip.next.0 < merged {
            true => (2, (tip.next.0 + LINKS).min(merged) - 1),
            false => (0, tip.next.0),
        };
        let name = object(n, tip.next.0, last);
        let bytes = one(&mut tip, n, last);
        std::fs::write(name, bytes).expect("an object");
    }
}

/// The object of the next transactions, up to `last`, a link for each.
fn one(tip: &mut ChainTip, level: u8, last: u64) -> Vec<u8> {
    let before = *tip;
    let (mut commits, mut links, mut whole) = (Vec::new(), Vec::new(), None::<Batch>);
    for n in before.next.0..=last {
        let commit = encode(1, Offset(n), 0, 1, &record(at(n), b"a note"));
        let times = Times { first: Some(at(n)), last: Some(at(n)), max: Some(at(n)) };
        let batch =
            Batch { log_version: 1, first: Offset(n), last: Offset(n), commits: 1, times, last_len: commit.len() };
        *tip = tip.extend(&batch, &commit, Hashing::Plain);
        links.push(Link {
            last: Offset(n),
            raw_len: commit.len() as u64,
            chain: tip.chain,
            last_commit: tip.last_commit.expect("a commit"),
            max_time: tip.max_time,
            history: Some(tip.history),
        });
        commits.extend_from_slice(&commit);
        match &mut whole {
            Some(whole) => whole.merge(&batch),
            None => whole = Some(batch),
        }
    }
    let content = LogContent {
        database: DATABASE,
        timeline: TIMELINE,
        batch: whole.expect("transactions"),
        before,
        after: *tip,
        archived_at: at(last),
        commits: &commits,
    };
    let bytes = content.encode(1, &Keyring::default()).expect("an object");
    let mut header = LogHeader::parse(&bytes).expect("its header");
    let body = &bytes[header.len..];
    header.level = level;
    header.parts[0].links = u32::try_from(links.len()).expect("few links");
    header.links = links;
    let mut object = header.to_bytes();
    object.extend_from_slice(body);
    object
}
