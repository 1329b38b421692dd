//! Data directories made by hand, for what no server can be made to write on demand.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use inner_universe::datadir::commit::{SegmentHeader, encode};
use inner_universe::datadir::log::segment_name;
use inner_universe::ids::{Identity, Offset};
use spacetimedb_lib::db::auth::{StAccess, StTableType};
use spacetimedb_paths::FromPathUnchecked as _;
use spacetimedb_paths::server::SnapshotsPath;
use spacetimedb_primitives::TableId;
use spacetimedb_sats::{AlgebraicType, product};
use spacetimedb_schema::schema::{ColumnSchema, TableSchema};
use spacetimedb_snapshot::SnapshotRepository;
use spacetimedb_table::blob_store::HashMapBlobStore;
use spacetimedb_table::indexes::SquashedOffset;
use spacetimedb_table::page_pool::PagePool;
use spacetimedb_table::table::Table;

pub const REPLICA: u64 = 7;

/// A data directory with one database, `synthetic`, and a log of the caller's making.
pub struct Synthetic {
    pub dir: tempfile::TempDir,
}

impl Synthetic {
    #[expect(clippy::new_without_default, reason = "it makes files")]
    pub fn new() -> Self {
        let synthetic = Self::around("1.2.0", REPLICA, Identity([5; 32]), Identity([6; 32]));
        std::fs::create_dir_all(synthetic.log()).expect("create the log's directory");
        synthetic
    }

    /// A data directory of the server `version` with one database, whose replica the caller puts there.
    pub fn around(version: &str, replica: u64, identity: Identity, owner: Identity) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let synthetic = Self { dir };
        let root = synthetic.path();
        std::fs::create_dir_all(root.join("replicas")).expect("create the replicas' directory");
        std::fs::write(root.join("metadata.toml"), format!("edition = \"standalone\"\nversion = \"{version}\"\n"))
            .expect("metadata");
        let db = sled::Config::default().path(root.join("control-db")).cache_capacity(1 << 20).open().expect("sled");
        let little_endian = |identity: Identity| {
            let mut bytes = identity.0;
            bytes.reverse();
            bytes
        };
        let mut database = 3u64.to_le_bytes().to_vec();
        database.extend(little_endian(identity));
        database.extend(little_endian(owner));
        database.push(0);
        database.extend([8; 32]);
        let mut row = replica.to_le_bytes().to_vec();
        row.extend(3u64.to_le_bytes());
        row.extend(0u64.to_le_bytes());
        row.push(1);
        let insert = |tree: &str, key: &[u8], value: &[u8]| {
            db.open_tree(tree).and_then(|tree| tree.insert(key, value)).expect("insert");
        };
        insert("database", &3u64.to_be_bytes(), &database);
        insert("database_by_identity", &identity.0, &database);
        insert("reverse_dns", &little_endian(identity), br#"["synthetic"]"#);
        insert("dns", b"synthetic", &little_endian(identity));
        insert("replica", &replica.to_be_bytes(), &row);
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

    /// A segment with the index that the server keeps beside it: an entry for every 4096 bytes, in a file of full size.
    pub fn indexed_segment(&self, version: u8, first: u64, records: &[Vec<u8>]) -> PathBuf {
        let path = self.segment(version, first, records);
        let (mut entries, mut at, mut since, mut candidate) = (Vec::new(), SegmentHeader::LEN as u64, 0, (0, 0));
        for (offset, records) in (first..).zip(records) {
            if candidate.0 == 0 {
                candidate = (offset, at);
            }
            let len = encode(version, Offset(offset), 0, 1, records).len() as u64;
            (at, since) = (at + len, since + len);
            if since >= 4096 && candidate.0 != 0 {
                entries.extend([candidate.0.to_le_bytes(), candidate.1.to_le_bytes()].concat());
                (since, candidate) = (0, (0, 0));
            }
        }
        let file = std::fs::File::create(path.with_extension("ofs")).expect("create an index");
        std::io::Write::write_all(&mut &file, &entries).expect("write an index");
        file.set_len((1 << 30) / 4096 * 16).expect("set its length");
        path
    }

    /// A snapshot of a table with so many rows, as the official crate writes it.
    pub fn snapshot(&self, offset: u64, rows: u64) {
        let dir = self.path().join("replicas").join(REPLICA.to_string()).join("snapshots");
        std::fs::create_dir_all(&dir).expect("create the snapshots' directory");
        let (pool, mut blobs) = (PagePool::new_for_test(), HashMapBlobStore::default());
        let identity = spacetimedb_lib::Identity::from_byte_array([5; 32]);
        let path = SnapshotsPath::from_path_unchecked(&dir);
        let repository = SnapshotRepository::open(path, identity, REPLICA).expect("open the snapshots");
        let mut first = table(&pool, &mut blobs, 0..rows);
        repository.create_snapshot(std::iter::once(&mut first), &blobs, offset).expect("a snapshot");
    }
}

/// A table with fixed columns, strings inside pages, and strings large enough to become blobs.
pub fn table(pool: &PagePool, blobs: &mut HashMapBlobStore, rows: std::ops::Range<u64>) -> Table {
    let column = |position: u16, name: &str, kind| ColumnSchema::for_test(position, name, kind);
    let columns = vec![column(0, "id", AlgebraicType::U64), column(1, "text", AlgebraicType::String)];
    let (kind, access) = (StTableType::User, StAccess::Public);
    let (id, name) = (TableId(4096), "official".into());
    let schema = TableSchema::new(id, name, columns, vec![], vec![], vec![], kind, access, None, None);
    let mut table = Table::new(Arc::new(schema), SquashedOffset::COMMITTED_STATE);
    for id in rows {
        let len = if id % 97 == 0 { 20_000 } else { id as usize % 300 };
        let text = format!("{id}:").repeat(len / 2 + 1);
        table.insert(pool, blobs, &product![id, text.as_str()]).expect("insert");
    }
    table
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
