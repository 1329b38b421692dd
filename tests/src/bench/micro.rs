//! What criterion measured of the hot paths, as a table: each path beside its bound.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use crate::bench::report::machine;

/// One function of a group.
struct Figure {
    name: String,
    bytes: f64,
    /// Nanoseconds: the middle, and the bounds of its confidence interval.
    middle: f64,
    least: f64,
    most: f64,
}

/// Reads what lies below `criterion`, where it leaves its figures.
///
/// # Panics
/// When there are none.
pub fn report(criterion: &Path) -> String {
    let mut groups: Vec<(String, Vec<Figure>)> = Vec::new();
    let mut found = Vec::new();
    collect(criterion, &mut found);
    found.sort_by(|a, b| (&a.0, &a.1.name).cmp(&(&b.0, &b.1.name)));
    for (group, figure) in found {
        match groups.last_mut().filter(|(name, _)| *name == group) {
            Some((_, figures)) => figures.push(figure),
            None => groups.push((group, vec![figure])),
        }
    }
    assert!(!groups.is_empty(), "{} holds no figures", criterion.display());
    let mut text = format!(
        "# The hot paths beside their bounds\n\nWritten by `cargo xtask bench micro`: criterion, on one core, {}, 4 MiB of commits of about 560 bytes. A bound does \
         only what cannot be left out, on the same bytes. The ratio is the bound's time over ours: 1 would be the bound itself. In brackets the interval in which \
         the middle lies at 95 %.\n\n| path | GB/s | bound | GB/s | ratio |\n|---|---|---|---|---|\n",
        machine()
    );
    for (group, figures) in &groups {
        let Some(ours) = figures.iter().find(|figure| figure.name == "ours") else { continue };
        for bound in figures.iter().filter(|figure| figure.name != "ours") {
            let name = bound.name.trim_start_matches("bound: ");
            let _ = writeln!(
                text,
                "| {group} | {} | {name} | {} | {:.2} |",
                speed(ours),
                speed(bound),
                bound.middle / ours.middle
            );
        }
    }
    text
}

fn speed(figure: &Figure) -> String {
    let of = |nanoseconds: f64| figure.bytes / nanoseconds;
    format!("{:.2} ({:.2} to {:.2})", of(figure.middle), of(figure.most), of(figure.least))
}

fn collect(dir: &Path, found: &mut Vec<(String, Figure)>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if !path.is_dir() {
            continue;
        }
        if entry.file_name() == "new" {
            found.extend(figure(&path));
        } else {
            collect(&path, found);
        }
    }
}

fn figure(dir: &Path) -> Option<(String, Figure)> {
    let read = |name: &str| serde_json::from_slice::<Value>(&std::fs::read(dir.join(name)).ok()?).ok();
    let (about, estimates) = (read("benchmark.json")?, read("estimates.json")?);
    let interval = &estimates["median"]["confidence_interval"];
    let figure = Figure {
        name: about["function_id"].as_str()?.to_owned(),
        bytes: about["throughput"]["Bytes"].as_f64()?,
        middle: estimates["median"]["point_estimate"].as_f64()?,
        least: interval["lower_bound"].as_f64()?,
        most: interval["upper_bound"].as_f64()?,
    };
    Some((about["group_id"].as_str()?.to_owned(), figure))
}
