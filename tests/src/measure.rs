//! What benchmarks measure with.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a command took.
#[derive(Clone, Copy)]
pub struct Measured {
    pub seconds: f64,
    pub peak_mib: f64,
}

/// Runs a command to its end; its peak memory is read from the kernel's high-water mark while it runs.
pub fn measure(command: &mut Command) -> Measured {
    let started = Instant::now();
    let mut child = command.stdout(Stdio::null()).spawn().expect("start");
    let status_file = format!("/proc/{}/status", child.id());
    let mut peak = 0.0;
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait") {
            break status;
        }
        if let Ok(text) = std::fs::read_to_string(&status_file)
            && let Some(line) = text.lines().find(|line| line.starts_with("VmHWM:"))
        {
            let kib: f64 = line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0.0);
            peak = kib / 1024.0;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success(), "{command:?} ended with {status}");
    Measured { seconds: started.elapsed().as_secs_f64(), peak_mib: peak }
}

/// The middle of some values.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
