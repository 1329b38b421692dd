use super::*;
use crate::datadir::commit::{Frame, SegmentHeader, encode, header_len};

struct Written {
    dir: tempfile::TempDir,
}

impl Written {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn segment(&self, version: u8, offsets: std::ops::Range<u64>, tail: &[u8]) -> PathBuf {
        let path = self.dir.path().join(segment_name(Offset(offsets.start)));
        let mut bytes = SegmentHeader { log_version: version, checksum_algorithm: 0 }.to_bytes().to_vec();
        for offset in offsets {
            bytes.extend(encode(version, Offset(offset), 0, 1, format!(" transaction {offset}").as_bytes()));
        }
        bytes.extend_from_slice(tail);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn compress(path: &Path) {
        let bytes = fs::read(path).unwrap();
        fs::write(path, zstd::encode_all(bytes.as_slice(), 0).unwrap()).unwrap();
    }

    fn read(&self, from: u64, max: usize) -> Result<Vec<Batch>, DataDirError> {
        let mut reader = LogReader::open(self.dir.path(), Offset(from))?;
        let (mut batches, mut buffer) = (Vec::new(), Vec::new());
        while let Some(batch) = reader.next_batch(max, &mut buffer)? {
            assert_eq!(parse_all(batch.log_version, &buffer), (batch.first.0..=batch.last.0).collect::<Vec<_>>());
            batches.push(batch);
        }
        Ok(batches)
    }

    fn offsets(&self, from: u64, max: usize) -> Vec<u64> {
        self.read(from, max).unwrap().iter().flat_map(|batch| batch.first.0..=batch.last.0).collect()
    }
}

fn parse_all(version: u8, mut bytes: &[u8]) -> Vec<u64> {
    let mut offsets = Vec::new();
    while !bytes.is_empty() {
        let Frame::Commit(commit) = Frame::parse(version, bytes) else { panic!("not a commit") };
        offsets.extend(commit.first.0..=commit.last().0);
        bytes = &bytes[commit.bytes.len()..];
    }
    offsets
}

#[test]
fn a_log_reads_the_same_from_any_offset_in_any_batch_size() {
    let log = Written::new();
    let first = log.segment(1, 0..40, &[]);
    log.segment(1, 40..41, &[0; 100]);
    log.segment(1, 41..90, &[]);
    for compressed in [false, true] {
        if compressed {
            Written::compress(&first);
        }
        for max in [1, 50, 333, 1 << 20] {
            for from in [0, 1, 39, 40, 41, 89] {
                assert_eq!(log.offsets(from, max), (from..90).collect::<Vec<_>>(), "from {from}, at most {max}");
            }
        }
        assert_eq!(log.offsets(90, 50), Vec::<u64>::new());
    }
}

#[test]
fn versions_never_share_a_batch() {
    let log = Written::new();
    log.segment(0, 0..5, &[]);
    log.segment(1, 5..9, &[]);
    let batches = log.read(0, 1 << 20).unwrap();
    assert_eq!(batches.iter().map(|batch| batch.log_version).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn an_unfinished_end_is_read_on_when_it_is_finished() {
    let log = Written::new();
    let next = encode(1, Offset(3), 0, 1, b" the fourth");
    let path = log.segment(1, 0..3, &next[..10]);
    let mut reader = LogReader::open_first(log.dir.path()).unwrap();
    let mut buffer = Vec::new();
    assert_eq!(reader.next_batch(1 << 20, &mut buffer).unwrap().unwrap().last, Offset(2));
    assert_eq!(reader.next_batch(1 << 20, &mut buffer).unwrap(), None);
    assert!(matches!(reader.tail(), Tail::Unfinished { .. }));

    let mut bytes = fs::read(&path).unwrap();
    bytes.truncate(bytes.len() - 10);
    bytes.extend(next);
    fs::write(&path, bytes).unwrap();
    assert_eq!(reader.next_batch(1 << 20, &mut buffer).unwrap().unwrap().first, Offset(3));

    log.segment(1, 4..6, &[]);
    assert_eq!(reader.next_batch(1 << 20, &mut buffer).unwrap().unwrap().last, Offset(5));
    assert_eq!(reader.next_batch(1 << 20, &mut buffer).unwrap(), None);
    assert_eq!(*reader.tail(), Tail::Clean);
}

#[test]
fn a_torn_end_before_the_segment_that_continues_is_passed_over() {
    let log = Written::new();
    log.segment(1, 0..3, b"half a commit and then a crash");
    log.segment(1, 3..5, &[]);
    assert_eq!(log.offsets(0, 1 << 20), (0..5).collect::<Vec<_>>());
}

#[test]
fn damage_in_the_middle_a_gap_and_an_overlap_are_errors() {
    let log = Written::new();
    let path = log.segment(1, 0..10, &[]);
    log.segment(1, 10..12, &[]);
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[200] ^= 1;
    fs::write(&path, bad).unwrap();
    assert!(matches!(log.read(0, 1 << 20), Err(DataDirError::Damaged { .. })));
    fs::write(&path, good).unwrap();

    log.segment(1, 13..14, &[]);
    assert!(matches!(log.read(0, 1 << 20), Err(DataDirError::Gap { expected: Offset(12), found: Offset(13), .. })));
    fs::remove_file(log.dir.path().join(segment_name(Offset(13)))).unwrap();
    log.segment(1, 9..14, &[]);
    let overlap = log.read(0, 1 << 20).unwrap_err();
    assert!(matches!(overlap, DataDirError::Overlap { .. }), "{overlap}");
    assert!(overlap.to_string().contains("copy the directory before anything is restored"), "{overlap}");
}

#[test]
fn a_commit_that_stands_twice_is_read_once() {
    let log = Written::new();
    let again = |offset: u64| encode(1, Offset(offset), 0, 1, format!(" transaction {offset}").as_bytes());
    // Within a segment, at its end, and at the start of the next one.
    let first = log.segment(1, 0..10, &[again(9), again(10)].concat());
    log.segment(1, 10..12, &[]);
    let third = log.segment(1, 11..14, &[]);
    for compressed in [false, true] {
        if compressed {
            Written::compress(&first);
            Written::compress(&third);
        }
        for max in [1, 50, 333, 1 << 20] {
            for from in [0, 8, 9, 10, 11, 12, 13] {
                assert_eq!(log.offsets(from, max), (from..14).collect::<Vec<_>>(), "from {from}, at most {max}");
            }
        }
        assert_eq!(end(log.dir.path()).unwrap(), Offset(14));
    }
    // What was read last is found again behind the repetition.
    let mut reader = LogReader::open(log.dir.path(), Offset(8)).unwrap();
    while reader.next_batch(1, &mut Vec::new()).unwrap().is_some() {
        assert!(reader.is_unchanged().unwrap(), "at {}", reader.position());
    }
}

#[test]
fn a_commit_that_stands_twice_with_other_content_is_an_error() {
    let other = encode(1, Offset(9), 0, 1, b" another transaction");
    let log = Written::new();
    log.segment(1, 0..10, &other);
    assert!(matches!(log.read(0, 1 << 20), Err(DataDirError::Overlap { expected: Offset(10), found: Offset(9), .. })));
    let log = Written::new();
    log.segment(1, 0..10, &[]);
    let path = log.segment(1, 9..9, &other);
    assert!(matches!(log.read(0, 1 << 20), Err(DataDirError::Overlap { .. })));
    // The same bytes, but not those that were read last.
    fs::remove_file(path).unwrap();
    log.segment(1, 8..12, &[]);
    assert!(matches!(log.read(0, 1 << 20), Err(DataDirError::Overlap { .. })));
}

#[test]
fn a_segment_without_its_first_commit_hides_nothing_of_the_one_before() {
    let commit = encode(1, Offset(11), 0, 1, b" transaction 11");
    let header = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes();
    for begun in [Vec::new(), header.to_vec(), [&header[..], &commit[..20]].concat()] {
        let log = Written::new();
        log.segment(1, 0..12, &[]);
        fs::write(log.dir.path().join(segment_name(Offset(11))), &begun).unwrap();
        for from in [0, 10, 11] {
            assert_eq!(log.offsets(from, 50), (from..12).collect::<Vec<_>>(), "{} bytes, from {from}", begun.len());
        }
        assert_eq!(LogReader::open(log.dir.path(), Offset(12)).unwrap().position(), Offset(12));
        assert_eq!(end(log.dir.path()).unwrap(), Offset(12));
        // Once it is written, the log continues in it.
        log.segment(1, 11..15, &[]);
        assert_eq!(log.offsets(12, 50), (12..15).collect::<Vec<_>>());
    }
}

#[test]
fn a_damaged_length_does_not_decide_how_much_is_read() {
    const CLAIMED: usize = 100 << 20;
    let log = Written::new();
    let path = log.segment(1, 0..3, &[]);
    let mut bytes = fs::read(&path).unwrap();
    let mut damaged = encode(1, Offset(3), 0, 1, b" transaction 3");
    damaged[18..22].copy_from_slice(&u32::try_from(CLAIMED).unwrap().to_le_bytes());
    bytes.extend(damaged);
    bytes.resize(bytes.len() + CLAIMED + (4 << 20), 7);
    fs::write(&path, bytes).unwrap();
    for compressed in [false, true] {
        if compressed {
            Written::compress(&path);
        }
        let mut reader = LogReader::open_first(log.dir.path()).unwrap();
        let mut buffer = Vec::new();
        assert_eq!(reader.next_batch(1 << 20, &mut buffer).unwrap().unwrap().last, Offset(2));
        assert_eq!(reader.next_batch(1 << 20, &mut buffer).unwrap(), None);
        let Tail::Unfinished { reason, .. } = reader.tail() else { panic!("{:?}", reader.tail()) };
        assert!(reason.contains("its length is damaged"), "{reason}");
        let held = buffer.capacity() + reader.open.as_ref().map_or(0, |segment| segment.carry.capacity());
        assert!(held < 16 << 20, "{held} bytes are held");
    }
}

#[test]
fn a_commit_of_many_mebibytes_is_read_whole() {
    let log = Written::new();
    let path = log.segment(1, 0..3, &[]);
    let large = encode(1, Offset(3), 0, 1, &vec![9; 40 << 20]);
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend(&large);
    bytes.extend(encode(1, Offset(4), 0, 1, b" transaction 4"));
    fs::write(&path, bytes).unwrap();
    for compressed in [false, true] {
        if compressed {
            Written::compress(&path);
        }
        assert_eq!(log.offsets(0, 1 << 20), (0..5).collect::<Vec<_>>());
        let mut buffer = Vec::new();
        LogReader::open(log.dir.path(), Offset(3)).unwrap().next_batch(1, &mut buffer).unwrap().unwrap();
        assert_eq!(buffer, large);
    }
}

#[test]
fn what_is_no_longer_in_the_log_and_unknown_versions_are_named() {
    let log = Written::new();
    log.segment(1, 5..9, &[]);
    assert!(matches!(log.read(2, 100), Err(DataDirError::Gone { wanted: Offset(2), first: Offset(5), .. })));
    log.segment(9, 5..9, &[]);
    assert!(matches!(log.read(5, 100), Err(DataDirError::UnknownVersion { version: 9, .. })));
    let empty = Written::new();
    assert_eq!(empty.offsets(0, 100), Vec::<u64>::new());
}

/// Writes an index that names what `entries` says.
fn write_index(segment: &Path, entries: &[(u64, u64)], room: usize) {
    let mut bytes: Vec<u8> =
        entries.iter().flat_map(|(key, at)| [key.to_le_bytes(), at.to_le_bytes()].concat()).collect();
    bytes.resize(bytes.len() + room, 0);
    fs::write(segment.with_extension("ofs"), bytes).unwrap();
}

/// Where each commit of a segment starts.
fn places(segment: &Path) -> Vec<(u64, u64)> {
    let bytes = fs::read(segment).unwrap();
    let (mut at, mut places) = (SegmentHeader::LEN, Vec::new());
    while let Frame::Commit(commit) = Frame::parse(1, &bytes[at..]) {
        places.push((commit.first.0, at as u64));
        at += commit.bytes.len();
    }
    places
}

#[test]
fn the_servers_index_leads_past_what_is_not_wanted() {
    let log = Written::new();
    let segment = log.segment(1, 0..200, &[]);
    let places = places(&segment);
    write_index(&segment, &places.iter().copied().skip(7).step_by(10).collect::<Vec<_>>(), 160);
    for from in [0, 6, 7, 8, 16, 17, 100, 199] {
        assert_eq!(log.offsets(from, 50), (from..200).collect::<Vec<_>>());
    }
    assert_eq!(end(log.dir.path()).unwrap(), Offset(200));
    // What lies before is not even looked at.
    let mut bytes = fs::read(&segment).unwrap();
    bytes[usize::try_from(places[3].1).unwrap() + 30] ^= 1;
    fs::write(&segment, bytes).unwrap();
    assert_eq!(log.offsets(150, 50), (150..200).collect::<Vec<_>>());
    assert_eq!(end(log.dir.path()).unwrap(), Offset(200));
    fs::remove_file(segment.with_extension("ofs")).unwrap();
    assert_eq!(end(log.dir.path()).unwrap(), Offset(3));
}

#[test]
fn an_index_that_lies_changes_nothing() {
    let log = Written::new();
    let segment = log.segment(1, 0..200, &[0; 64]);
    let places = places(&segment);
    let mut state = 7u64;
    let mut draw = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for round in 0..400 {
        let mut entries: Vec<(u64, u64)> = (0..draw(40)).map(|_| (draw(260), draw(9000))).collect();
        if round % 2 == 0 {
            entries.sort_unstable();
        }
        if round % 4 < 2 {
            // A commit does start there, but often another one.
            for (key, at) in &mut entries {
                *at = places[usize::try_from(*key + draw(2)).unwrap() % places.len()].1;
            }
        }
        write_index(&segment, &entries, round % 16);
        let from = draw(220);
        assert_eq!(log.offsets(from, 77), (from.min(200)..200).collect::<Vec<_>>(), "round {round}");
        assert_eq!(end(log.dir.path()).unwrap(), Offset(200), "round {round}");
    }
}

#[test]
fn what_was_written_behind_a_torn_header_is_read_until_the_server_drops_it() {
    let commit =
        |version, offset: u64| encode(version, Offset(offset), 0, 1, format!(" transaction {offset}").as_bytes());
    for version in [0, 1] {
        for torn in 1..header_len(version) {
            let log = Written::new();
            let mut tail = commit(version, 20)[..torn].to_vec();
            (20..40).for_each(|offset| tail.extend(commit(version, offset)));
            let segment = log.segment(version, 0..20, &tail);
            for from in [0, 19, 20, 33] {
                for max in [1, 99, 1 << 20] {
                    assert_eq!(log.offsets(from, max), (from..40).collect::<Vec<_>>(), "{torn} bytes, from {from}");
                }
            }
            let mut reader = LogReader::open_first(log.dir.path()).unwrap();
            while reader.next_batch(64, &mut Vec::new()).unwrap().is_some() {}
            let at = fs::metadata(&segment).unwrap().len() - tail.len() as u64;
            assert_eq!(reader.torn(), Some(TornHeader { at, len: torn, next: Offset(20) }));
            // What was read last is found again, on both sides of it.
            for from in [18, 19, 20] {
                let mut reader = LogReader::open(log.dir.path(), Offset(from)).unwrap();
                for _ in 0..4 {
                    assert!(reader.next_batch(1, &mut Vec::new()).unwrap().is_some());
                    assert!(reader.is_unchanged().unwrap(), "{torn} bytes, from {from}, at {}", reader.position());
                }
            }
            // The start of a write, or one that is cut off, is the end as it was.
            let whole = fs::read(&segment).unwrap();
            for len in usize::try_from(at).unwrap() + 1..usize::try_from(at).unwrap() + torn + commit(version, 20).len()
            {
                fs::write(&segment, &whole[..len]).unwrap();
                assert_eq!(log.offsets(0, 99), (0..20).collect::<Vec<_>>());
            }
            fs::write(&segment, &whole).unwrap();
            // Started again, the server goes on in a new segment, and what it had appended is no more.
            log.segment(version, 20..23, &[]);
            assert_eq!(log.offsets(0, 99), (0..23).collect::<Vec<_>>());
        }
    }
}
