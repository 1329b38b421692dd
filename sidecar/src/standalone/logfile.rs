//! The server's output in a file that does not grow without end.

use std::io::{BufRead, BufReader, PipeReader, Write};
use std::path::{Path, PathBuf};

use file_rotate::compression::Compression;
use file_rotate::suffix::AppendCount;
use file_rotate::{ContentLimit, FileRotate};

/// A file ends when it is larger.
pub const FILE_BYTES: usize = 16 << 20;
/// Files that are kept beside the newest.
pub const KEPT: usize = 5;
/// What is quoted of the end of a log.
const TAIL: u64 = 2_000;

/// Writes everything that comes out of `pipe` to `path`, a thread of its own.
pub fn follow(pipe: PipeReader, path: &Path) -> std::io::Result<()> {
    let limit = ContentLimit::BytesSurpassed(FILE_BYTES);
    let mut file = FileRotate::new(path, AppendCount::new(KEPT), limit, Compression::None, None);
    let writing = move || {
        let mut reader = BufReader::new(pipe);
        let mut line = Vec::new();
        // Line by line, so that none is cut in two.
        while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            // A full disk must not stop the server: what it says is lost then, and it goes on.
            let _ = file.write_all(&line);
            line.clear();
        }
    };
    std::thread::Builder::new().name("server-log".into()).spawn(writing).map(drop)
}

/// The end of a log, for people.
pub fn tail(path: &Path) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || {
        let mut file = std::fs::File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    // The server's banner says nothing.
    let lines = text.lines().filter(|line| line.is_ascii() && !line.trim().is_empty());
    let lines: Vec<_> = lines.collect();
    lines[lines.len().saturating_sub(6)..].join(" / ")
}

/// Where the output of the server on a data directory goes.
pub fn path_in(state_dir: &Path) -> PathBuf {
    state_dir.join("server.log")
}
