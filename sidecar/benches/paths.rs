//! The hot paths, each beside its bound: `cargo xtask bench micro`. The bound does only what cannot be left out, on the same bytes.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark")]

use std::hint::black_box;
use std::io::Write as _;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use inner_universe::datadir::commit::{Frame, SegmentHeader, encode};
use inner_universe::datadir::log::{Batch, LogReader, segment_name};
use inner_universe::datadir::snapshot::ObjectKind;
use inner_universe::ids::{ContentHash, Identity, Offset, TimelineId};
use inner_universe::repository::crypto::Keyring;
use inner_universe::repository::hashing::Hashing;
use inner_universe::repository::log_object::{self, ChainTip, LogContent};
use inner_universe::repository::pack::{EntryKind, PackBuilder};

const OBJECT: usize = 4 << 20;
const LEVEL: i32 = 1;
const DATABASE: Identity = Identity([7; 32]);

/// Commits of about 560 bytes, as the server writes them: words, numbers and some noise.
fn commits() -> (tempfile::TempDir, Batch, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let mut file = std::fs::File::create(dir.path().join(segment_name(Offset(0)))).unwrap();
    file.write_all(&SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes()).unwrap();
    let (mut written, mut next, mut noise) = (0, 0u64, 88_172_645_463_325_252u64);
    while written < OBJECT {
        let mut record = vec![0u8; 16];
        while record.len() < 360 {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            let words = ["entity", "updated", "relation", "created", "orbit", "station", "observed", "magnitude"];
            record.extend(words[(noise % 8) as usize].as_bytes());
            record.extend(next.to_string().as_bytes());
        }
        while record.len() < 540 {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            record.extend(noise.to_le_bytes());
        }
        let commit = encode(1, Offset(next), 0, 1, &record);
        file.write_all(&commit).unwrap();
        written += commit.len();
        next += 1;
    }
    let mut buffer = Vec::new();
    let batch = LogReader::open_first(dir.path()).unwrap().next_batch(OBJECT, &mut buffer).unwrap().unwrap();
    (dir, batch, buffer)
}

fn group<'a>(c: &'a mut Criterion, name: &str, bytes: usize) -> BenchmarkGroup<'a, criterion::measurement::WallTime> {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(bytes as u64)).sample_size(20);
    group
}

fn paths(c: &mut Criterion) {
    let (_dir, batch, bytes) = commits();
    let keys = Keyring::default();
    let mut copy = vec![0; bytes.len()];

    let mut parser = group(c, "commit parser", bytes.len());
    parser.bench_function("ours", |b| {
        b.iter(|| {
            let mut rest = bytes.as_slice();
            while let Frame::Commit(commit) = Frame::parse(1, rest) {
                rest = &rest[commit.bytes.len()..];
            }
            black_box(rest.len())
        });
    });
    parser.bench_function("bound: crc32c", |b| b.iter(|| crc32c::crc32c(black_box(&bytes))));
    parser.bench_function("bound: memcpy", |b| b.iter(|| copy.copy_from_slice(black_box(&bytes))));
    parser.finish();

    let mut chain = group(c, "chain hash", bytes.len());
    let origin = ChainTip::origin(&DATABASE, Offset(0));
    chain.bench_function("ours", |b| b.iter(|| log_object::link(&origin.chain, black_box(&bytes), Hashing::Plain)));
    chain.bench_function("bound: blake3", |b| b.iter(|| blake3::hash(black_box(&bytes))));
    chain.finish();

    let after = origin.extend(&batch, &bytes, Hashing::Plain);
    let content = LogContent {
        database: DATABASE,
        timeline: TimelineId::FIRST,
        batch,
        before: origin,
        after,
        archived_at: 1_760_000_000_000_000,
        commits: &bytes,
    };
    let mut writer = group(c, "log object writer", bytes.len());
    writer.bench_function("ours", |b| b.iter(|| content.encode(LEVEL, &keys).unwrap()));
    writer.bench_function("bound: zstd -1", |b| b.iter(|| zstd::bulk::compress(black_box(&bytes), LEVEL).unwrap()));
    writer.finish();

    let (key, object) = (content.key(), content.encode(LEVEL, &keys).unwrap());
    let compressed = zstd::bulk::compress(&bytes, LEVEL).unwrap();
    let target = tempfile::NamedTempFile::new().unwrap();
    let mut restore = group(c, "restore writer", bytes.len());
    let write = |bytes: &[u8]| std::fs::write(target.path(), bytes).unwrap();
    restore.bench_function("ours", |b| {
        b.iter(|| write(&log_object::decode(&key, black_box(&object), &keys).unwrap().1));
    });
    restore.bench_function("bound: unzstd and write", |b| {
        b.iter(|| write(&zstd::bulk::decompress(black_box(&compressed), bytes.len()).unwrap()));
    });
    restore.finish();

    let mut pack = group(c, "pack writer", bytes.len());
    pack.bench_function("ours", |b| {
        b.iter(|| {
            let mut builder = PackBuilder::default();
            for page in bytes.chunks(64 << 10) {
                builder.add(ContentHash::of(page), EntryKind::Object(ObjectKind::Page), page);
            }
            builder.finish(LEVEL, &keys).unwrap()
        });
    });
    pack.bench_function("bound: blake3 and zstd -1", |b| {
        b.iter(|| (blake3::hash(black_box(&bytes)), zstd::bulk::compress(black_box(&bytes), LEVEL).unwrap()));
    });
    pack.finish();
}

criterion_group!(benches, paths);
criterion_main!(benches);
