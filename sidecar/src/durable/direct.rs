//! Large files that are written past the page cache, where the file system can, and read back from the disk into it: copying
//! them in to write and out to check costs more than the disk does, and who needs them next finds them in memory. Where it
//! cannot, the files are written as any.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use crate::durable::{FileError, OnPath};

/// Every disk is content with addresses, places and lengths that this divides.
const ALIGNMENT: usize = 4096;

/// Bytes that are written or read at a time.
const BLOCK: usize = 1 << 20;

/// Blocks on their way from the disk.
const AHEAD: usize = 1;

/// Bytes that a file grows by at a time: a write that makes its file longer keeps readers of that file waiting.
const GROWTH: u64 = 64 << 20;

/// Room for one block, where the disk wants it in memory.
struct Block {
    room: Vec<u8>,
    start: usize,
    len: usize,
}

impl Block {
    fn new() -> Self {
        let room = vec![0; BLOCK + ALIGNMENT];
        let start = room.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { room, start, len: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.room[self.start..self.start + self.len]
    }

    fn whole(&mut self) -> &mut [u8] {
        &mut self.room[self.start..self.start + BLOCK]
    }

    /// Takes what fits of `bytes`, and returns how much that is.
    fn fill(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(BLOCK - self.len);
        let at = self.start + self.len;
        self.room[at..at + taken].copy_from_slice(&bytes[..taken]);
        self.len += taken;
        taken
    }
}

/// Writes a new file from its start to its end.
pub struct Writer {
    file: File,
    path: PathBuf,
    is_direct: bool,
    block: Block,
    /// Bytes written so far.
    written: u64,
    /// Bytes that the file system has made room for; `None` where it does not.
    allocated: Option<u64>,
    follower: mpsc::Sender<Written>,
}

/// A block is on the disk.
struct Written;

/// What a [`Reader`] needs to follow a [`Writer`].
pub struct Follow(mpsc::Receiver<Written>);

impl Writer {
    /// # Errors
    /// When the file exists or cannot be created.
    pub fn create(path: &Path) -> Result<(Self, Follow), FileError> {
        let file = File::create_new(path).on("create", path)?;
        let is_direct = set_direct(&file, true).is_ok();
        let (follower, written) = mpsc::channel();
        let path = path.to_owned();
        let allocated = is_direct.then_some(0);
        let writer = Self { file, path, is_direct, block: Block::new(), written: 0, allocated, follower };
        Ok((writer, Follow(written)))
    }

    /// # Errors
    /// When the disk fails or is full.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), FileError> {
        while !bytes.is_empty() {
            bytes = &bytes[self.block.fill(bytes)..];
            if self.block.len == BLOCK {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Writes what is left; not durable before the file system is synced.
    ///
    /// # Errors
    /// When the disk fails or is full.
    pub fn finish(mut self) -> Result<(), FileError> {
        if !self.block.len.is_multiple_of(ALIGNMENT) {
            self.leave_direct()?;
        }
        self.flush()?;
        self.file.set_len(self.written).on("cut", &self.path)
    }

    fn flush(&mut self) -> Result<(), FileError> {
        if let Some(allocated) = self.allocated
            && self.written + self.block.len as u64 > allocated
        {
            // Whether the disk is full is for the write to find out: this would take more than is needed.
            self.allocated = allocate(&self.file, allocated, GROWTH).ok().map(|()| allocated + GROWTH);
        }
        let mut written = 0;
        while written < self.block.len {
            match self.file.write(&self.block.bytes()[written..]) {
                Ok(0) => return Err(io::Error::from(ErrorKind::WriteZero)).on("write", &self.path),
                Ok(more) => written += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The disk wants other lengths, or part of a block was written.
                Err(error) if error.kind() == ErrorKind::InvalidInput && self.is_direct => self.leave_direct()?,
                Err(error) => return Err(error).on("write", &self.path),
            }
        }
        self.written += self.block.len as u64;
        if std::mem::take(&mut self.block.len) == BLOCK {
            // Nobody may follow.
            let _ = self.follower.send(Written);
        }
        Ok(())
    }

    fn leave_direct(&mut self) -> Result<(), FileError> {
        if std::mem::take(&mut self.is_direct) {
            set_direct(&self.file, false).on("write", &self.path)?;
        }
        Ok(())
    }
}

/// Reads a file from its start to its end, some blocks ahead of the caller.
pub struct Reader {
    blocks: mpsc::Receiver<io::Result<Block>>,
    spent: mpsc::Sender<Block>,
    path: PathBuf,
}

impl Reader {
    /// Reads what a writer writes, block by block as it comes to the disk, and what is left once the writer is gone.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn follow(path: &Path, writer: Follow) -> Result<Self, FileError> {
        let file = File::open(path).on("open", path)?;
        // Each read is a large one already; what lies behind it may not be written yet.
        expect_no_more(&file);
        let (sender, blocks) = mpsc::sync_channel(AHEAD);
        let (spent, empty) = mpsc::channel();
        // It ends by itself when the reader is gone, or the writer and all is read; nobody may wait for it: it waits for both.
        std::thread::Builder::new()
            .name("read ahead".into())
            .spawn(move || read_ahead(file, &writer.0, &sender, &empty))
            .on("read", path)?;
        Ok(Self { blocks, spent, path: path.to_owned() })
    }

    /// Reads a file that nobody writes.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        Self::follow(path, Follow(mpsc::channel().1))
    }

    /// Appends the next block to `buffer`. `false` at the end.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn read(&mut self, buffer: &mut Vec<u8>) -> Result<bool, FileError> {
        let Ok(block) = self.blocks.recv() else { return Ok(false) };
        let block = block.on("read", &self.path)?;
        buffer.extend_from_slice(block.bytes());
        // Nobody to take it: the file is read to its end.
        let _ = self.spent.send(block);
        Ok(true)
    }
}

fn read_ahead(
    mut file: File,
    writer: &mpsc::Receiver<Written>,
    sender: &mpsc::SyncSender<io::Result<Block>>,
    empty: &mpsc::Receiver<Block>,
) {
    loop {
        // An error says that the writer is done: then all is there.
        let _ = writer.recv();
        let mut block = empty.try_recv().unwrap_or_else(|_| Block::new());
        // Whole blocks: the writer tells of no less, and behind what it has written there is room that holds zeros.
        let read = fill(&mut file, block.whole());
        let is_last = !matches!(read, Ok(BLOCK));
        let sent = sender.send(read.map(|len| {
            block.len = len;
            block
        }));
        if is_last || sent.is_err() {
            break;
        }
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(target_os = "linux")]
fn expect_no_more(file: &File) {
    // A hint, that need not be taken.
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Random);
}

#[cfg(not(target_os = "linux"))]
fn expect_no_more(_: &File) {}

#[cfg(target_os = "linux")]
fn allocate(file: &File, at: u64, len: u64) -> io::Result<()> {
    Ok(rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), at, len)?)
}

#[cfg(not(target_os = "linux"))]
fn allocate(_: &File, _: u64, _: u64) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// Turns the page cache off for a file, or on again.
#[cfg(target_os = "linux")]
fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    use rustix::fs::OFlags;
    let mut flags = rustix::fs::fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, direct);
    Ok(rustix::fs::fcntl_setfl(file, flags)?)
}

#[cfg(not(target_os = "linux"))]
fn set_direct(_: &File, direct: bool) -> io::Result<()> {
    if direct { Err(ErrorKind::Unsupported.into()) } else { Ok(()) }
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
                writer.finish().unwrap();
                assert!(Writer::create(&path).is_err());
                assert!(std::fs::read(&path).unwrap() == bytes, "{len} bytes, {step} at a time");
                assert!(whole(Reader::open(&path).unwrap()) == bytes, "{len} bytes read back");
                assert!(follower.join().unwrap() == bytes, "{len} bytes read meanwhile");
            }
        }
        // One that is not read to its end leaves nobody waiting.
        let mut reader = Reader::open(&dir.path().join("9-777")).unwrap();
        assert!(reader.read(&mut Vec::new()).unwrap());
    }
}
