//! Room on the disk against how fast the log grows.

use std::path::Path;

use crate::config::value::approximate as bytes_of;
use crate::datadir::DataDir;
use crate::datadir::log::{LogReader, segments};
use crate::doctor::{Doctor, Verdict};

/// Less than this is no room for a server's own work.
const LEAST: u64 = 1 << 30;
const DAY: f64 = 86_400.0;

pub fn examine(doctor: &mut Doctor<'_>) {
    let Some(dir) = doctor.data_dir else { return };
    let place = if dir.exists() { dir.to_owned() } else { crate::durable::parent(dir) };
    let Ok(stat) = rustix::fs::statvfs(&place) else { return };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let growth = growth(dir);
    let days = growth.filter(|rate| *rate > 0.0).map(|rate| free as f64 / rate / DAY);
    let grows = match (growth, days) {
        (Some(rate), Some(days)) => {
            format!("; the log grows by {} a day, which fills it in {days:.0} days", bytes_of((rate * DAY) as u64))
        }
        _ => String::new(),
    };
    let message = format!("{} are free at {}{grows}", bytes_of(free), place.display());
    let fix = "free space, or give the server a larger disk; log that is archived and older than the server's snapshots can go";
    match days {
        _ if free < LEAST => doctor.add("disk", Verdict::Fail, message, fix),
        Some(days) if days < 1.0 => doctor.add("disk", Verdict::Fail, message, fix),
        Some(days) if days < 7.0 => doctor.add("disk", Verdict::Warn, message, fix),
        _ => doctor.pass("disk", message),
    }
}

/// Bytes a second, by the newest segment of each log; `None` where too little is there to tell.
fn growth(dir: &Path) -> Option<f64> {
    let data = DataDir::open(dir).ok()?;
    let mut sum = None;
    for replica in data.replicas().ok()? {
        let Some(newest) = segments(&replica.log_path()).ok()?.pop() else { continue };
        let mut reader = LogReader::open(&replica.log_path(), newest.first).ok()?;
        let (mut buffer, mut bytes) = (Vec::new(), 0u64);
        let (mut first, mut last) = (None, None);
        while let Ok(Some(batch)) = reader.next_batch(1 << 20, &mut buffer) {
            bytes += buffer.len() as u64;
            first = first.or(batch.times.first);
            last = batch.times.max.max(last);
        }
        let seconds = (last? - first?) as f64 / 1e6;
        // An hour of log at the least: a burst is no rate.
        if seconds >= 3600.0 {
            *sum.get_or_insert(0.0) += bytes as f64 / seconds;
        }
    }
    sum
}
