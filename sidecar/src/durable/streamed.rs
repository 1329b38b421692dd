//! Large files that come to the disk while they are written, and are read right behind their writer. The system alone would begin
//! with the disk when memory is full or somebody syncs, and what checks a file would wait for all of it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

use crate::durable::{FileError, OnPath};

/// Bytes that are read at a time.
const BLOCK: usize = 1 << 20;

/// Bytes that are written before they are brought to the disk.
const SYNC_EVERY: u64 = 64 << 20;

/// Writes a new file from its start to its end.
pub struct Writer {
    file: File,
    path: PathBuf,
    /// Bytes written so far.
    written: u64,
    /// Before the sync: a follower comes to its end once this is gone.
    follower: mpsc::Sender<Written>,
    /// Bytes that are on the disk, or will be soon.
    asked_for: u64,
    syncing: Syncing,
}

/// One more block is written.
struct Written;

/// What a [`Reader`] needs to follow a [`Writer`].
pub struct Follow(mpsc::Receiver<Written>);

impl Writer {
    /// # Errors
    /// When the file exists or cannot be created.
    pub fn create(path: &Path) -> Result<(Self, Follow), FileError> {
        let file = File::create_new(path).on("create", path)?;
        let syncing = Syncing::start(file.try_clone().on("open", path)?, path)?;
        let (follower, written) = mpsc::channel();
        let writer = Self { file, path: path.to_owned(), written: 0, follower, asked_for: 0, syncing };
        Ok((writer, Follow(written)))
    }

    /// # Errors
    /// When the disk fails or is full.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.file.write_all(bytes).on("write", &self.path)?;
        let blocks = self.written / BLOCK as u64;
        self.written += bytes.len() as u64;
        for _ in blocks..self.written / BLOCK as u64 {
            // Nobody may follow.
            let _ = self.follower.send(Written);
        }
        if self.written - self.asked_for >= SYNC_EVERY {
            self.asked_for = self.written;
            self.syncing.ask()?;
        }
        Ok(())
    }

    /// All is written. Followers come to its end; it is on the disk once what is returned was waited for.
    pub fn finish(self) -> Syncing {
        self.syncing
    }
}

/// A file on its way to the disk. One that is dropped is waited for too: nothing may be at work on a file that is cleared away.
pub struct Syncing {
    path: PathBuf,
    due: Option<mpsc::SyncSender<()>>,
    worker: Option<JoinHandle<io::Result<()>>>,
}

impl Syncing {
    fn start(file: File, path: &Path) -> Result<Self, FileError> {
        let (due, asked) = mpsc::sync_channel(1);
        let sync = move || {
            while asked.recv().is_ok() {
                file.sync_data()?;
            }
            file.sync_all()
        };
        let worker = std::thread::Builder::new().name("sync".into()).spawn(sync).on("sync", path)?;
        Ok(Self { path: path.to_owned(), due: Some(due), worker: Some(worker) })
    }

    /// Brings what was written so far to the disk, beside whatever the caller does next. Waits where the disk has fallen behind:
    /// nobody should have to wait for gigabytes at the end.
    fn ask(&mut self) -> Result<(), FileError> {
        match self.due.as_ref().map(|due| due.send(())) {
            // It ends early only when the disk failed.
            Some(Err(mpsc::SendError(()))) => self.end(),
            _ => Ok(()),
        }
    }

    /// Waits until all of it is on the disk.
    ///
    /// # Errors
    /// When the disk failed or is full.
    pub fn wait(mut self) -> Result<(), FileError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), FileError> {
        self.due = None;
        let Some(worker) = self.worker.take() else { return Ok(()) };
        worker.join().unwrap_or_else(|_| Err(io::Error::other("its thread panicked"))).on("sync", &self.path)
    }
}

impl Drop for Syncing {
    fn drop(&mut self) {
        // Whoever drops it has given up on the file.
        let _ = self.end();
    }
}

/// Reads a file from its start to its end.
pub struct Reader {
    file: File,
    path: PathBuf,
    writer: mpsc::Receiver<Written>,
}

impl Reader {
    /// Reads what a writer writes, block by block, and what is left once the writer is gone.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn follow(path: &Path, writer: Follow) -> Result<Self, FileError> {
        Ok(Self { file: File::open(path).on("open", path)?, path: path.to_owned(), writer: writer.0 })
    }

    /// Reads a file that nobody writes.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        Self::follow(path, Follow(mpsc::channel().1))
    }

    /// Appends the next block to `buffer`, as soon as it is written. `false` at the end.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn read(&mut self, buffer: &mut Vec<u8>) -> Result<bool, FileError> {
        // An error says that the writer is done: then all is there.
        let _ = self.writer.recv();
        buffer.reserve(BLOCK);
        let read = (&mut self.file).take(BLOCK as u64).read_to_end(buffer).on("read", &self.path)?;
        Ok(read > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(mut reader: Reader) -> Vec<u8> {
        let mut bytes = Vec::new();
        while reader.read(&mut bytes).unwrap() {}
        bytes
    }

    #[test]
    fn files_of_any_length_come_back_as_they_were_written_and_are_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let lens = [0, 1, 4095, 4096, 4097, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5000, 8 * BLOCK];
        for (index, len) in lens.into_iter().enumerate() {
            for step in [777, 1 << 16, BLOCK + 3] {
                let path = dir.path().join(format!("{index}-{step}"));
                let bytes: Vec<u8> = (0..len).map(|at| (at * 31 + at / 4096 * 7) as u8).collect();
                let (mut writer, follow) = Writer::create(&path).unwrap();
                let follower = std::thread::spawn({
                    let path = path.clone();
                    move || whole(Reader::follow(&path, follow).unwrap())
                });
                bytes.chunks(step).for_each(|chunk| writer.write(chunk).unwrap());
                writer.finish().wait().unwrap();
                assert!(Writer::create(&path).is_err());
                assert!(std::fs::read(&path).unwrap() == bytes, "{len} bytes, {step} at a time");
                assert!(whole(Reader::open(&path).unwrap()) == bytes, "{len} bytes read back");
                assert!(follower.join().unwrap() == bytes, "{len} bytes read meanwhile");
            }
        }
        // Nobody waits for a reader that is gone, and what is given up is left in peace.
        let (mut writer, follow) = Writer::create(&dir.path().join("alone")).unwrap();
        drop(follow);
        for _ in 0..2 {
            writer.write(&vec![7; SYNC_EVERY as usize]).unwrap();
        }
        drop(writer);
    }
}
