//! Data directories made by hand, for what no server can be made to write on demand.

use std::path::{Path, PathBuf};

use inner_universe::datadir::commit::{SegmentHeader, encode};
use inner_universe::datadir::log::segment_name;
use inner_universe::ids::Offset;

pub const REPLICA: u64 = 7;

/// A data directory with one database, `synthetic`, and a log of the caller's making.
pub struct Synthetic {
    pub dir: tempfile::TempDir,
}

impl Synthetic {
    #[expect(clippy::new_without_default, reason = "it makes files")]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let synthetic = Self { dir };
        let root = synthetic.path();
        std::fs::create_dir_all(synthetic.log()).expect("create the log's directory");
        std::fs::write(root.join("metadata.toml"), "edition = \"standalone\"\nversion = \"1.2.0\"\n")
            .expect("metadata");
        let db = sled::Config::default().path(root.join("control-db")).cache_capacity(1 << 20).open().expect("sled");
        let identity = [5u8; 32];
        let mut database = 3u64.to_le_bytes().to_vec();
        database.extend(identity);
        database.extend([6; 32]);
        database.push(0);
        database.extend([8; 32]);
        let mut replica = REPLICA.to_le_bytes().to_vec();
        replica.extend(3u64.to_le_bytes());
        replica.extend(0u64.to_le_bytes());
        replica.push(1);
        let insert = |tree: &str, key: &[u8], value: &[u8]| {
            db.open_tree(tree).and_then(|tree| tree.insert(key, value)).expect("insert");
        };
        insert("database", &3u64.to_be_bytes(), &database);
        insert("database_by_identity", &identity, &database);
        insert("reverse_dns", &identity, br#"["synthetic"]"#);
        insert("dns", b"synthetic", &identity);
        insert("replica", &REPLICA.to_be_bytes(), &replica);
        db.flush().expect("flush");
        synthetic
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn log(&self) -> PathBuf {
        log_of(&self.path())
    }

    /// Writes a segment of one-transaction commits.
    pub fn segment(&self, version: u8, first: u64, records: &[Vec<u8>]) -> PathBuf {
        let path = self.log().join(segment_name(Offset(first)));
        let mut bytes = SegmentHeader { log_version: version, checksum_algorithm: 0 }.to_bytes().to_vec();
        for (offset, records) in (first..).zip(records) {
            bytes.extend(encode(version, Offset(offset), 0, 1, records));
        }
        std::fs::write(&path, bytes).expect("write a segment");
        path
    }
}

pub fn log_of(data: &Path) -> PathBuf {
    data.join("replicas").join(REPLICA.to_string()).join("clog")
}

/// A record whose inputs carry `micros`.
pub fn record(micros: i64, payload: &[u8]) -> Vec<u8> {
    let mut inputs = vec![4];
    inputs.extend(b"work");
    inputs.extend([5; 32]);
    inputs.extend([0; 16]);
    inputs.extend(micros.to_le_bytes());
    let mut record = vec![0xa0];
    record.extend((inputs.len() as u32).to_le_bytes());
    record.extend(inputs);
    record.extend(payload);
    record
}
