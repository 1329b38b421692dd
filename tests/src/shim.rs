//! A process with faults of its file system and a clock that jumps: a library that is loaded before all others.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is changed while the process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Fault {
    /// Of a thousand writes, so many end in ENOSPC.
    Full = 0,
    /// Of a thousand syncs, so many end in EIO.
    Sync = 1,
    /// Of a thousand reads, so many are short.
    ShortRead = 2,
    /// Seconds that the wall clock is ahead.
    Clock = 3,
}

/// The library, and the numbers that it goes by.
pub struct Shim {
    library: PathBuf,
    control: PathBuf,
    file: File,
}

impl Shim {
    /// Builds the library in `dir`. `None` where there is no C compiler.
    pub fn new(dir: &Path, seed: u64) -> Option<Self> {
        let (library, control) = (dir.join("faulty.so"), dir.join("faulty.control"));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/shim/faulty.c");
        let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", source, "-ldl", "-o"]).arg(&library).status();
        if !built.is_ok_and(|status| status.success()) {
            return None;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&control);
        let file = file.expect("the control file");
        file.set_len(24).expect("its length");
        let shim = Self { library, control, file };
        shim.write(4, (seed & 0x7fff_ffff) as i32 | 1);
        Some(shim)
    }

    /// The variables of a process whose files below `root` are touched.
    pub fn environment(&self, root: &Path) -> Vec<(String, String)> {
        let text = |path: &Path| path.display().to_string();
        vec![
            ("LD_PRELOAD".into(), text(&self.library)),
            ("FAULTY_CONTROL".into(), text(&self.control)),
            ("FAULTY_ROOT".into(), text(root)),
        ]
    }

    pub fn set(&self, fault: Fault, value: i32) {
        self.write(fault as u64, value);
    }

    /// No more faults; the clock stays where it is.
    pub fn calm(&self) {
        [Fault::Full, Fault::Sync, Fault::ShortRead].into_iter().for_each(|fault| self.set(fault, 0));
    }

    /// How many faults there were.
    pub fn faults(&self) -> u32 {
        let mut bytes = [0; 4];
        self.file.read_exact_at(&mut bytes, 20).expect("the control file");
        u32::from_ne_bytes(bytes)
    }

    fn write(&self, place: u64, value: i32) {
        self.file.write_all_at(&value.to_ne_bytes(), place * 4).expect("the control file");
    }
}
