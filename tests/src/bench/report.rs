//! Where figures go, and what is said of the machine beside them.

use std::path::PathBuf;

/// Prints a report and writes it into `docs`.
///
/// # Panics
/// When it cannot be written.
pub fn write(name: &str, text: &str) {
    println!("{text}");
    let docs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs");
    std::fs::write(docs.join(name), text).unwrap_or_else(|error| panic!("write docs/{name}: {error}"));
}

/// Cores, and the processor's name.
pub fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": ?");
    format!("{cores} cores of {}", model.trim_start_matches([' ', '\t', ':']))
}

/// The middle of some values with their spread.
pub struct Spread {
    pub middle: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.into_iter().collect();
        let extreme = |pick: fn(f64, f64) -> f64| values.iter().copied().reduce(pick).unwrap_or(f64::NAN);
        Self { middle: crate::measure::median(&values), least: extreme(f64::min), most: extreme(f64::max) }
    }
}
