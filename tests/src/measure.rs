//! What benchmarks measure with.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a command took, with all the processes that it started and waited for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Measured {
    pub seconds: f64,
    /// Of all cores together.
    pub cpu_seconds: f64,
    /// Of the largest of its processes.
    pub peak_mib: f64,
    /// Until what it wrote was on the disk, where that was waited for.
    pub synced_seconds: Option<f64>,
}

/// Runs a command to its end, on a disk that has nothing left to do for those before.
///
/// # Panics
/// When it fails.
pub fn measure(command: &mut Command) -> Measured {
    let synced = Command::new("sync").status();
    assert!(synced.is_ok_and(|status| status.success()), "sync failed");
    let (started, cpu) = (Instant::now(), cpu_of_children());
    let mut child = command.stdout(Stdio::null()).spawn().expect("start");
    let mut peak = 0.0f64;
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait") {
            break status;
        }
        peak = peak.max(largest(child.id()));
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success(), "{command:?} ended with {status}");
    let seconds = started.elapsed().as_secs_f64();
    Measured { seconds, cpu_seconds: cpu_of_children() - cpu, peak_mib: peak, synced_seconds: None }
}

/// As [`measure`], and how long it took until what it wrote to the file system of `written` was on the disk.
///
/// # Panics
/// When it fails.
pub fn measure_onto_disk(command: &mut Command, written: &Path) -> Measured {
    let measured = measure(command);
    let started = Instant::now();
    let synced = Command::new("sync").arg("--file-system").arg(written).status();
    assert!(synced.is_ok_and(|status| status.success()), "sync {}", written.display());
    Measured { synced_seconds: Some(measured.seconds + started.elapsed().as_secs_f64()), ..measured }
}

/// The numbers of `/proc/PID/stat` after the process's name.
fn stat(pid: &str) -> Option<Vec<u64>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    Some(rest.split_whitespace().skip(1).map(|word| word.parse().unwrap_or(0)).collect())
}

/// Seconds of processor time of all children that have ended.
fn cpu_of_children() -> f64 {
    // Clock ticks, of which Linux tells a hundred a second on every machine.
    let fields = stat("self").unwrap_or_default();
    fields.get(12..14).map_or(0.0, |ticks| ticks.iter().sum::<u64>() as f64 / 100.0)
}

/// MiB that the largest of a process and its descendants has had resident.
fn largest(pid: u32) -> f64 {
    let mut children = BTreeMap::<u64, Vec<u64>>::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        if let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok())
            && let Some(parent) = stat(&pid.to_string()).and_then(|fields: Vec<u64>| fields.first().copied())
        {
            children.entry(parent).or_default().push(pid);
        }
    }
    let (mut open, mut peak) = (vec![u64::from(pid)], 0.0f64);
    while let Some(pid) = open.pop() {
        open.extend(children.remove(&pid).unwrap_or_default());
        peak = peak.max(peak_mib(pid));
    }
    peak
}

/// MiB that a process has had resident at the most.
pub fn peak_mib(pid: impl std::fmt::Display) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

/// The middle of some values.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
