//! Bundles: one restore point and all it needs in a single file, to carry databases to another machine. FORMAT.md describes
//! the bytes.
//!
//! Invariants: a bundle is written and read from front to back; every record carries its hash, and the end carries that of
//! all of them; names from outside are those of a repository's objects or refused; nothing is used before the end was read.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use object_store::path::Path as Key;

use crate::durable::{self, FileError, OnPath};
use crate::ids::ContentHash;
use crate::repository::{Repository, RepositoryError};

const MAGIC: [u8; 8] = *b"IUSTB\r\n\x1a";
const VERSION: u16 = 1;
/// No object's name is longer.
const LONGEST_NAME: usize = 300;
/// No object of a bundle is larger: they are made for it, and never merged.
const LARGEST: u64 = 256 << 20;

/// What can be wrong with a bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(
        "{name} has {len} bytes, and a bundle takes {LARGEST} at the most; use a repository that both machines reach"
    )]
    TooLarge { name: String, len: u64 },
    #[error("{} is there already; name another file", .0.display())]
    Exists(PathBuf),
    #[error("{} is no bundle: {reason}", path.display())]
    NoBundle { path: PathBuf, reason: &'static str },
    #[error("{} is a bundle of version {found}, and this release knows up to {VERSION}; upgrade inner-universe", path.display())]
    Newer { path: PathBuf, found: u16 },
    #[error("the bundle {} is damaged at byte {at}: {reason}; copy it anew from where it was made", path.display())]
    Damaged { path: PathBuf, at: u64, reason: String },
}

/// Writes every object of `repository` into a bundle at `path`, which must not be there.
///
/// # Errors
/// When the repository or the file fails; no file is left then.
pub async fn write(repository: &Repository, path: &Path) -> Result<u64, BundleError> {
    if path.exists() {
        return Err(BundleError::Exists(path.to_owned()));
    }
    let partial = Partial(durable::beside(path, ".partial"));
    let bytes = fill(repository, &partial.0).await?;
    durable::rename(&partial.0, path)?;
    Ok(bytes)
}

/// A file that is being written: gone, unless it was renamed, however the writing ends.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

async fn fill(repository: &Repository, path: &Path) -> Result<u64, BundleError> {
    // Of a run that was killed.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).on("remove", path).map_err(Into::into);
        }
        _ => {}
    }
    // It may hold token keys, whatever the umask.
    let file = File::options().write(true).create_new(true).mode(0o600).open(path).on("create", path)?;
    let mut writer = Writer { file: BufWriter::new(file), path, bytes: 0, records: 0, all: blake3::Hasher::new() };
    writer.put(&MAGIC)?;
    writer.put(&VERSION.to_le_bytes())?;
    writer.put(&[0; 6])?;
    for (key, _) in repository.list(&Key::default()).await? {
        if is_carried(key.as_ref()) {
            writer.record(key.as_ref(), &repository.get(&key).await?)?;
        }
    }
    writer.end()
}

struct Writer<'a> {
    file: BufWriter<File>,
    path: &'a Path,
    bytes: u64,
    records: u64,
    all: blake3::Hasher,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), BundleError> {
        self.bytes += bytes.len() as u64;
        Ok(self.file.write_all(bytes).on("write", self.path)?)
    }

    fn record(&mut self, name: &str, content: &[u8]) -> Result<(), BundleError> {
        // What would be refused on the other machine is refused here.
        if content.len() as u64 > LARGEST || name.len() > LONGEST_NAME {
            return Err(BundleError::TooLarge { name: name.to_owned(), len: content.len() as u64 });
        }
        let mut head = u32::try_from(name.len()).unwrap_or(u32::MAX).to_le_bytes().to_vec();
        head.extend_from_slice(&(content.len() as u64).to_le_bytes());
        head.extend_from_slice(name.as_bytes());
        let hash = *blake3::Hasher::new().update(&head).update(content).finalize().as_bytes();
        self.all.update(&hash);
        self.records += 1;
        self.put(&head)?;
        self.put(content)?;
        self.put(&hash)
    }

    fn end(mut self) -> Result<u64, BundleError> {
        let records = self.records.to_le_bytes();
        let mut tail = [0; 4].to_vec();
        tail.extend_from_slice(&records);
        tail.extend_from_slice(self.all.clone().update(&records).finalize().as_bytes());
        self.put(&tail)?;
        self.file.flush().on("write", self.path)?;
        self.file.get_ref().sync_all().on("sync", self.path)?;
        Ok(self.bytes)
    }
}

/// Unpacks a bundle into `dir` as a repository. `-` is the standard input.
///
/// # Errors
/// When it is no bundle, damaged or cut off, or names what no bundle holds; `dir` may hold a part of it then.
pub fn unpack(path: &Path, dir: &Path) -> Result<(), BundleError> {
    let input: Box<dyn Read> = match path.as_os_str() == "-" {
        true => Box::new(io::stdin().lock()),
        false => Box::new(File::open(path).on("open", path)?),
    };
    Reader { input: BufReader::new(input), path, at: 0, all: blake3::Hasher::new() }.unpack(dir)
}

struct Reader<'a> {
    input: BufReader<Box<dyn Read>>,
    path: &'a Path,
    at: u64,
    all: blake3::Hasher,
}

impl Reader<'_> {
    fn unpack(mut self, dir: &Path) -> Result<(), BundleError> {
        let no_bundle = |reason| BundleError::NoBundle { path: self.path.to_owned(), reason };
        let mut start = [0; 16];
        if self.input.read_exact(&mut start).is_err() || start[..8] != MAGIC {
            return Err(no_bundle("it does not start as one does"));
        }
        let version = u16::from_le_bytes([start[8], start[9]]);
        if version != VERSION {
            return Err(BundleError::Newer { path: self.path.to_owned(), found: version });
        }
        if start[10..] != [0; 6] {
            return Err(no_bundle("its first bytes are not those of this version"));
        }
        self.at = 16;
        let mut records = 0_u64;
        while self.record(dir)? {
            records += 1;
        }
        let told: [u8; 8] = self.array("the number of records")?;
        let hash: [u8; 32] = self.array("the hash of the whole")?;
        let expected = *self.all.clone().update(&told).finalize().as_bytes();
        if u64::from_le_bytes(told) != records || hash != expected {
            return Err(self.damaged("records are missing, or are not in their order"));
        }
        if self.input.read(&mut [0]).on("read", self.path)? != 0 {
            return Err(self.damaged("something follows its end"));
        }
        Ok(())
    }

    /// Unpacks the next record; `false` at the end.
    fn record(&mut self, dir: &Path) -> Result<bool, BundleError> {
        let name_len: [u8; 4] = self.array("the length of a name")?;
        let len = u32::from_le_bytes(name_len) as usize;
        if len == 0 {
            return Ok(false);
        }
        let content_len: [u8; 8] = self.array("the length of an object")?;
        let size = u64::from_le_bytes(content_len);
        if len > LONGEST_NAME || size > LARGEST {
            return Err(self.damaged("a record is longer than any is"));
        }
        let name = self.bytes(len as u64, "a name")?;
        let content = self.bytes(size, "an object")?;
        let hash: [u8; 32] = self.array("the hash of an object")?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&name_len).update(&content_len).update(&name).update(&content);
        if *hasher.finalize().as_bytes() != hash {
            return Err(self.damaged("an object does not hash to what is written behind it"));
        }
        self.all.update(&hash);
        let name = String::from_utf8(name).ok().filter(|name| is_carried(name));
        let Some(name) = name else { return Err(self.damaged("it names what is no object of a repository")) };
        let path = dir.join(&name);
        let parent = durable::parent(&path);
        fs::create_dir_all(&parent).on("create", &parent)?;
        match durable::create(&path, &content) {
            Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists => {
                Err(self.damaged(&format!("{name} is in it twice")))
            }
            written => Ok(written.map(|()| true)?),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], BundleError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.bytes(N as u64, what)?);
        Ok(bytes)
    }

    /// Reads without trusting a length: what is not there is not allocated.
    fn bytes(&mut self, len: u64, what: &str) -> Result<Vec<u8>, BundleError> {
        let mut bytes = Vec::new();
        (&mut self.input).take(len).read_to_end(&mut bytes).on("read", self.path)?;
        if bytes.len() as u64 != len {
            return Err(self.damaged(&format!("it ends within {what}")));
        }
        self.at += len;
        Ok(bytes)
    }

    fn damaged(&self, reason: &str) -> BundleError {
        BundleError::Damaged { path: self.path.to_owned(), at: self.at, reason: reason.to_owned() }
    }
}

/// Is this the name of an object that a bundle holds? None of them leads out of a directory.
fn is_carried(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    let is_plain = |part: &&str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
    };
    let is_known = match parts.as_slice() {
        ["repository.json"] => true,
        ["restore-points" | "instance", _] => true,
        ["databases", identity, "timelines" | "snapshots" | "packs", ..] => identity.parse::<ContentHash>().is_ok(),
        _ => false,
    };
    is_known && parts.len() <= 8 && parts.iter().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_objects_are_carried() {
        let identity = "5".repeat(64);
        for name in [
            "repository.json".to_owned(),
            "restore-points/01M86.json".to_owned(),
            format!("databases/{identity}/packs/ab.pack"),
            format!("databases/{identity}/timelines/00000001/log/L0/1-2.iulog"),
        ] {
            assert!(is_carried(&name), "{name}");
        }
        for name in [
            "lease.json",
            "../repository.json",
            "/etc/passwd",
            "restore-points/../../x",
            "restore-points/.hidden",
            "restore-points/a b",
            "instance/",
            "databases/x/packs/a.pack",
            "restore-points\\..\\x",
        ] {
            assert!(!is_carried(name), "{name}");
        }
    }
}
