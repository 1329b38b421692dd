//! Ours and what users would pick instead, in turn, in one run.

use std::fmt::Write as _;

use crate::bench::log::size;
use crate::bench::peers::Peer;
use crate::bench::place::{Place, assert_same};
use crate::bench::remote::Remote;
use crate::bench::report::{Spread, machine};
use crate::bench::series::Table;
use crate::measure::{Measured, measure, measure_onto_disk};
use crate::s3::{BUCKET, S3};
use crate::sidecar::Sidecar;

const HOW: &str = "Ratios are of times within one round, their middle and their spread over the rounds: above 1, ours is faster. CPU seconds and \
                   memory are ours / theirs (memory of the largest process), bytes ours divided by theirs. Before each turn the disk finishes what was written before. Ours has \
                   brought to the disk what it wrote when it ends; «on the disk» is the ratio where the others' time too is until then (`sync -f` right after them).";

/// What one round measured of ours.
struct Ours {
    first: Measured,
    stored: u64,
    restored: Measured,
    restored_bytes: u64,
    verified: Measured,
}

/// On this disk. `command` is how this was asked for.
///
/// # Panics
/// When something that was restored differs from what was backed up.
pub fn on_disk(mut place: Place, rounds: usize, command: &str) -> String {
    let described = place.describe();
    let peers = Peer::all();
    let sidecar = place.sidecar();
    let mut table = Table::default();
    let (mut added, mut times) = (Vec::new(), Vec::new());
    let mut serving = Vec::new();
    for round in 1..=rounds {
        println!("round {round} of {rounds}");
        let first = place.back_up(&sidecar);
        let stored = size(&place.dir("repository"));
        let restored = place.restore(&sidecar);
        place.assert_restored();
        let ours = Ours {
            first,
            stored,
            restored,
            restored_bytes: size(&place.dir("restored")),
            verified: place.verify(&sidecar),
        };
        let row = table.row("backup of nothing new", "our first backup", None);
        row.ours.add(place.back_up(&sidecar), 0);
        row.theirs.add(ours.first, 0);
        for peer in &peers {
            println!("  {}", peer.name);
            against(&place, peer, &ours, &mut table);
        }
        serving.extend(place.serves(&place.dir("restored")));
        place.clear(&["restored"]);
        let compressed = place.grow();
        let small = place.back_up(&sidecar);
        let more = size(&place.dir("repository")) - ours.stored;
        added.push(more as f64 / compressed as f64);
        times.push(ours.first.seconds / small.seconds);
        for peer in peers.iter().filter(|peer| peer.is_incremental()) {
            let repository = place.dir(&peer.file_name());
            let before = size(&repository);
            let theirs = measure(&mut peer.backup(&place.data(), &repository, 2));
            let row = table.row("backup after 1% more log", peer.name, None);
            row.ours.add(small, more);
            row.theirs.add(theirs, size(&repository) - before);
            place.clear(&[&peer.file_name()]);
        }
        place.clear(&["repository"]);
        place.renew();
    }
    let mut text = format!(
        "Written by `{command}`: {described}. {rounds} rounds, ours and the others in turn within each, {}. {HOW} What is restored is compared byte for \
         byte. Ours makes durable what it writes and reads and checks a restored log before it counts; of the others restic syncs what it stores, and none what it \
         restores. Ours stores and restores the newest snapshot and the log, and restores only the log after the snapshot; the others store and restore \
         every file.\n\n",
        machine()
    );
    for peer in &peers {
        let _ = writeln!(text, "- {}: {}", peer.name, peer.version);
    }
    let _ = write!(text, "\n{}", table.text());
    let (added, times) = (Spread::of(added), Spread::of(times));
    let _ = writeln!(
        text,
        "\nAfter 1% more log, ours adds {:.3} times the bytes that `zstd -3` makes of the new log alone (at most, of {rounds} rounds; must be at most 1.05) \
         and is {:.1} times as fast as the first backup (at least; {:.1} in the middle; must be 20).",
        added.most, times.least, times.middle,
    );
    if !serving.is_empty() {
        let serving = Spread::of(serving);
        let _ = writeln!(
            text,
            "\nThe real server served what ours had restored, with the rows it had before, {:.1} s after its start ({:.1} to {:.1}).",
            serving.middle, serving.least, serving.most
        );
    }
    text
}

/// One other's turn.
fn against(place: &Place, peer: &Peer, ours: &Ours, table: &mut Table) {
    let (data, repository, unpacked) = (place.data(), place.dir("theirs"), place.dir("unpacked"));
    std::fs::create_dir(&unpacked).expect("a directory");
    peer.init(&repository);
    let backed_up = measure_onto_disk(&mut peer.backup(&data, &repository, 1), &data);
    let row = table.row("first backup", peer.name, peer.wanted("backup"));
    row.ours.add(ours.first, ours.stored);
    row.theirs.add(backed_up, size(&repository));
    let back = measure_onto_disk(&mut peer.restore(&repository, &unpacked, 1), &unpacked);
    let row = table.row("restore", peer.name, peer.wanted("restore"));
    row.ours.add(ours.restored, ours.restored_bytes);
    row.theirs.add(back, size(&unpacked));
    // They copy files as they are.
    assert_same(&data, &unpacked);
    if let Some(mut check) = peer.check(&repository) {
        let row = table.row("verify, every byte", peer.name, None);
        row.ours.add(ours.verified, 0);
        row.theirs.add(measure(&mut check), 0);
    }
    place.clear(&["unpacked"]);
    if peer.is_incremental() {
        std::fs::rename(&repository, place.dir(&peer.file_name())).expect("keep it");
    } else {
        place.clear(&["theirs"]);
    }
}

/// Over a real S3 server on this machine, which takes its share of the cores.
///
/// # Panics
/// When something that was restored differs from what was backed up.
pub fn over_s3(place: &Place, rounds: usize, command: &str) -> String {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let remotes = Remote::all();
    let mut table = Table::default();
    for round in 1..=rounds {
        println!("round {round} of {rounds}");
        let server = runtime.block_on(S3::s3s()).expect("s3s-fs");
        let sidecar = Sidecar::with(&format!("s3://{BUCKET}/ours")).configured(server.settings());
        let first = place.back_up(&sidecar);
        let restored = place.restore(&sidecar);
        place.assert_restored();
        place.clear(&["restored"]);
        for remote in &remotes {
            println!("  {}", remote.name);
            remote.init(&server);
            let row = table.row("first backup", remote.name, None);
            row.ours.add(first, 0);
            row.theirs.add(measure(&mut remote.backup(&place.data(), &server)), 0);
            let unpacked = place.dir("unpacked");
            std::fs::create_dir(&unpacked).expect("a directory");
            let row = table.row("restore", remote.name, None);
            row.ours.add(restored, 0);
            row.theirs.add(measure_onto_disk(&mut remote.restore(&server, &unpacked), &unpacked), 0);
            place.assert_log(&unpacked);
            place.clear(&["unpacked"]);
        }
    }
    let mut text = format!(
        "Written by `{command}`: {}. {rounds} rounds, to and from s3s-fs on the same machine, {}. rclone and s5cmd move the files as they are; ours and restic \
         compress. {HOW} The server's own CPU and memory are not in it.\n\n",
        place.describe(),
        machine()
    );
    for remote in &remotes {
        let _ = writeln!(text, "- {}: {}", remote.name, remote.version);
    }
    let _ = write!(text, "\n{}", table.text());
    text
}
