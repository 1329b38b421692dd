//! What the long tests observe with: a real Prometheus and an OTLP store that others wrote.

use std::path::PathBuf;

use crate::run::{Result, announce, cache, on_path};
use crate::{debian, stores};

const OTELITE: &str = "0.1.156";

/// The directory of `prometheus` and `promtool`: those on the PATH, or Debian's.
pub fn prometheus() -> Result<Option<PathBuf>> {
    if let (Some(found), Some(_)) = (on_path("prometheus"), on_path("promtool")) {
        return Ok(found.parent().map(PathBuf::from));
    }
    let system = cache()?.join("tools/prometheus");
    let dir = system.join("root/usr/bin");
    if dir.join("promtool").is_file() {
        return Ok(Some(dir));
    }
    if on_path("apt-get").is_none() || on_path("dpkg").is_none() {
        eprintln!("xtask: no prometheus and promtool on the PATH, and no Debian here; what needs them is skipped");
        return Ok(None);
    }
    announce("unpacking Debian's Prometheus", "once, seconds", || debian::unpack(&["prometheus"], &system))?;
    Ok(Some(dir))
}

/// An OTLP store with a query API.
pub fn otelite() -> Result<PathBuf> {
    stores::installed("otelite", OTELITE, &["otelite", "--version", OTELITE], "once, five minutes")
}
