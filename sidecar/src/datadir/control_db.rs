//! The control database: which databases there are, whose they are, what they are called, where their replicas lie.
//!
//! It is a live sled database, which repairs and locks what it opens; so it is copied first and only the copy is opened.
//! A copy taken in the middle of a write may not open or may lack a tree; then another copy is taken.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, mpsc};
use std::time::Duration;

use crate::datadir::bytes::{Cursor, Malformed};
use crate::datadir::{DataDir, DataDirError};
use crate::durable::{FileError, OnPath};
use crate::ids::{ContentHash, Identity};
use crate::scratch::Scratch;

const ATTEMPTS: u32 = 8;

/// One database of the instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Database {
    pub id: u64,
    pub identity: Identity,
    pub owner: Identity,
    /// The program of the first publish; later ones are in the log.
    pub initial_program: ContentHash,
    /// Every name, the oldest first.
    pub names: Vec<String>,
    /// The replica whose files hold it.
    pub replica: Option<u64>,
}

impl Database {
    /// Its first name, or its identity when it has none.
    pub fn display_name(&self) -> String {
        self.names.first().cloned().unwrap_or_else(|| self.identity.to_string())
    }

    /// Does `text` name this database, by a name or by identity?
    pub fn is_called(&self, text: &str) -> bool {
        self.names.iter().any(|name| name == text) || self.identity.to_string() == text.to_ascii_lowercase()
    }
}

/// All of a control database, tree by tree: enough to tell whether two are the same.
pub type Trees = BTreeMap<Vec<u8>, BTreeMap<Vec<u8>, Vec<u8>>>;

/// A copy of the control database in a directory of its own.
pub struct ControlDbCopy {
    dir: Scratch,
    pub databases: Vec<Database>,
    pub trees: Trees,
}

impl ControlDbCopy {
    /// Copies and reads the control database of a server that may be running.
    ///
    /// # Errors
    /// When no copy of several could be opened and read.
    pub fn take(data: &DataDir) -> Result<Self, DataDirError> {
        Self::take_in(data, &std::env::temp_dir())
    }

    /// As [`Self::take`], in a directory in `temporary`, or where that cannot be made or filled in `data`'s own.
    fn take_in(data: &DataDir, temporary: &Path) -> Result<Self, DataDirError> {
        let source = data.control_db_path();
        let mut reason = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(50 << attempt.min(5)));
            }
            let mut unusable = None;
            for place in std::iter::once(temporary).chain(data.scratch.as_deref()) {
                let dir = match make_dir_in(place) {
                    Ok(dir) => dir,
                    Err(error) => {
                        // The first one's error says what to mend.
                        unusable.get_or_insert(error);
                        continue;
                    }
                };
                let copied = copy_tree(&source, &dir.path().join("control-db")).map_err(|error| error.to_string());
                match copied.and_then(|()| read(&dir.path().join("control-db"))) {
                    Ok((databases, trees)) => return Ok(Self { dir, databases, trees }),
                    // Torn by a write, or the disk is full: then the other place may do.
                    Err(error) => reason = error,
                }
            }
            if let Some(error) = unusable.filter(|_| reason.is_empty()) {
                return Err(error.into());
            }
        }
        Err(DataDirError::ControlDb { path: source, attempts: ATTEMPTS, reason })
    }

    /// Where the copy lies, closed.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("control-db")
    }
}

fn make_dir_in(place: &Path) -> Result<Scratch, FileError> {
    Scratch::create_in(place, "inner-universe-control-").on("create a temporary directory in", place)
}

/// Removes every database but those in `keep` from the control database at `path`, which no server may have open.
///
/// # Errors
/// When it cannot be opened, understood or written.
pub fn keep_only(path: &Path, keep: &[Identity]) -> Result<(), String> {
    let (databases, _) = read(path)?;
    let db = open(path)?;
    let tree = |name: &str| db.open_tree(name).map_err(|error| error.to_string());
    let failed = |error: sled::Error| error.to_string();
    for database in databases.iter().filter(|database| !keep.contains(&database.identity)) {
        tree("database")?.remove(database.id.to_be_bytes()).map_err(failed)?;
        tree("database_by_identity")?.remove(database.identity.0).map_err(failed)?;
        let mut little_endian = database.identity.0;
        little_endian.reverse();
        tree("reverse_dns")?.remove(little_endian).map_err(failed)?;
        for name in &database.names {
            tree("dns")?.remove(name.to_lowercase()).map_err(failed)?;
        }
        let replicas = tree("replica")?;
        for entry in replicas.iter() {
            let (key, value) = entry.map_err(failed)?;
            if replica(&value).is_ok_and(|(_, database_id)| database_id == database.id) {
                replicas.remove(key).map_err(failed)?;
            }
        }
    }
    db.flush().map_err(failed)?;
    Ok(())
}

/// Gives a database the one name `name` in the control database at `path`, which no server may have open.
///
/// # Errors
/// When it cannot be opened, understood or written.
pub fn rename(path: &Path, identity: &Identity, name: &str) -> Result<(), String> {
    let (databases, _) = read(path)?;
    let database = databases.iter().find(|database| database.identity == *identity);
    let database = database.ok_or_else(|| format!("database {identity} is not in it"))?;
    let db = open(path)?;
    let tree = |name: &str| db.open_tree(name).map_err(|error| error.to_string());
    let failed = |error: sled::Error| error.to_string();
    let mut little_endian = identity.0;
    little_endian.reverse();
    let (dns, domains) = (tree("dns")?, tree("top_level_domains")?);
    let (mut value, mut owner) = (little_endian.to_vec(), None);
    for old in &database.names {
        let old = old.to_lowercase();
        value = dns.remove(&old).map_err(failed)?.map_or(value, |found| found.to_vec());
        owner = domains.remove(&old).map_err(failed)?.or(owner);
    }
    dns.insert(name.to_lowercase(), value).map_err(failed)?;
    if let Some(owner) = owner {
        domains.insert(name.to_lowercase(), owner).map_err(failed)?;
    }
    let names = serde_json::to_vec(&[name]).map_err(|error| error.to_string())?;
    tree("reverse_dns")?.insert(little_endian, names).map_err(failed)?;
    db.flush().map_err(failed)?;
    Ok(())
}

/// How often, and after which pause, it is looked whether a lock was released.
const RELEASE_LOOKS: u32 = 100;
const RELEASE_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

fn open(path: &Path) -> Result<sled::Db, String> {
    // A small cache: the whole database is some kilobytes.
    let config = sled::Config::default().path(path).cache_capacity(1 << 20).flush_every_ms(None);
    for _ in 0..RELEASE_LOOKS {
        match config.open() {
            // Who had it open before has closed it, but a thread of sled's still holds the lock for a moment.
            Err(sled::Error::Io(error)) if error.to_string().contains("could not acquire lock") => {
                std::thread::sleep(RELEASE_PAUSE);
            }
            opened => return opened.map_err(|error| error.to_string()),
        }
    }
    config.open().map_err(|error| error.to_string())
}

type Contents = Result<(Vec<Database>, Trees), String>;

/// Reads on one thread for the whole process: sled leaves some 20 MiB of buffers to each thread that closed a database, until
/// that same thread opens the next one.
fn read(path: &Path) -> Contents {
    static READER: LazyLock<mpsc::Sender<(PathBuf, mpsc::Sender<Contents>)>> = LazyLock::new(|| {
        let (sender, receiver) = mpsc::channel::<(PathBuf, mpsc::Sender<Contents>)>();
        std::thread::spawn(move || {
            for (path, answer) in receiver {
                let contents = std::panic::catch_unwind(|| read_here(&path));
                // Who asked may have given up.
                let _ = answer.send(contents.unwrap_or_else(|_| Err("its library gave up on it".into())));
            }
        });
        sender
    });
    let (answer, contents) = mpsc::channel();
    READER.send((path.to_owned(), answer)).map_err(|error| error.to_string())?;
    contents.recv().map_err(|error| error.to_string())?
}

fn read_here(path: &Path) -> Contents {
    let db = open(path)?;
    let mut trees = Trees::new();
    for name in db.tree_names() {
        let tree = db.open_tree(&name).map_err(|error| error.to_string())?;
        let entries = tree.iter().map(|entry| entry.map(|(key, value)| (key.to_vec(), value.to_vec())));
        trees.insert(name.to_vec(), entries.collect::<Result<_, _>>().map_err(|error| error.to_string())?);
    }
    db.flush().map_err(|error| error.to_string())?;
    drop(db);
    let databases = interpret(&trees).map_err(|malformed| malformed.to_string())?;
    Ok((databases, trees))
}

/// Reads databases, names and replicas out of the raw trees.
///
/// # Errors
/// When an entry is not in the form that servers from 1.2.0 to 2.8.3 write.
pub fn interpret(trees: &Trees) -> Result<Vec<Database>, Malformed> {
    let empty = BTreeMap::new();
    let tree = |name: &str| trees.get(name.as_bytes()).unwrap_or(&empty);
    if !trees.contains_key(b"database".as_slice()) && !tree("replica").is_empty() {
        return Err(Malformed { at: 0, reason: "replicas are listed and databases are not".into() });
    }
    let mut databases = Vec::new();
    for value in tree("database").values() {
        let mut cursor = Cursor::new(value);
        let id = cursor.u64("the database id")?;
        let identity_le: [u8; 32] = cursor.array("the identity")?;
        let owner = Identity::from_le(cursor.array("the owner")?);
        cursor.u8("the host type")?;
        let initial_program = ContentHash(cursor.array("the program hash")?);
        let names = match tree("reverse_dns").get(identity_le.as_slice()) {
            Some(json) => serde_json::from_slice(json)
                .map_err(|error| Malformed { at: 0, reason: format!("the names of database {id}: {error}") })?,
            None => Vec::new(),
        };
        databases.push(Database {
            id,
            identity: Identity::from_le(identity_le),
            owner,
            initial_program,
            names,
            replica: None,
        });
    }
    for value in tree("replica").values() {
        let (id, database_id) = replica(value)?;
        if let Some(database) = databases.iter_mut().find(|database| database.id == database_id) {
            database.replica = Some(id);
        }
    }
    Ok(databases)
}

/// A replica's id and its database's.
fn replica(value: &[u8]) -> Result<(u64, u64), Malformed> {
    let mut cursor = Cursor::new(value);
    Ok((cursor.u64("the replica id")?, cursor.u64("the replica's database id")?))
}

/// Copies a directory of plain files, as deep as it goes.
///
/// # Errors
/// When a file cannot be read or written.
pub fn copy_tree(from: &Path, to: &Path) -> Result<(), FileError> {
    fs::create_dir_all(to).on("create", to)?;
    for entry in fs::read_dir(from).on("list", from)? {
        let entry = entry.on("list", from)?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().on("inspect", &source)?.is_dir() {
            copy_tree(&source, &target)?;
        } else {
            fs::copy(&source, &target).on("copy", &source)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data_dir() -> (tempfile::TempDir, DataDir) {
        let dir = tempfile::tempdir().expect("a directory");
        let db = open(&dir.path().join("control-db")).expect("a control database");
        db.open_tree("database").expect("a tree");
        db.flush().expect("flush");
        drop(db);
        let data = DataDir::open(dir.path()).expect("a data directory");
        (dir, data)
    }

    #[test]
    fn a_copy_needs_no_usable_tmpdir() {
        let (dir, data) = data_dir();
        let (missing, scratch) = (dir.path().join("missing"), dir.path().join("state"));
        let refused = ControlDbCopy::take_in(&data, &missing).err().expect("neither place does").to_string();
        assert!(refused.contains("create a temporary directory in") && refused.contains("missing"), "{refused}");
        std::fs::create_dir(&scratch).expect("create");
        let data = data.with_scratch(scratch.clone());
        let copy = ControlDbCopy::take_in(&data, &missing).expect("the other place does");
        assert!(copy.path().starts_with(&scratch), "{:?}", copy.path());
        drop(copy);
        assert_eq!(std::fs::read_dir(&scratch).expect("list").count(), 0, "and nothing stays");
        let copy = ControlDbCopy::take_in(&data, dir.path()).expect("where both do");
        assert!(!copy.path().starts_with(&scratch), "the usual place comes first");
    }
}
