//! What the long tests observe with: a real Prometheus and an OTLP store that others wrote.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Result, announce, cache, on_path, run};
use crate::{debian, stores};

const GRAFANA_SCHEMA: &str = "13.2.3";
const TYPESCRIPT: &str = "7.0.2";
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

/// Where `usr/lib/chromium/chromium` and `usr/bin/chromedriver` are: this machine's, or Debian's unpacked.
pub fn chromium() -> Result<Option<PathBuf>> {
    let in_place =
        |root: &Path| root.join("usr/lib/chromium/chromium").is_file() && root.join("usr/bin/chromedriver").is_file();
    let system = cache()?.join("tools/chromium");
    if let Some(found) = [PathBuf::from("/"), system.join("root")].into_iter().find(|root| in_place(root)) {
        return Ok(Some(found));
    }
    if on_path("apt-get").is_none() || on_path("dpkg").is_none() {
        eprintln!("xtask: no Chromium with ChromeDriver, and no Debian here; what needs them is skipped");
        return Ok(None);
    }
    announce("unpacking Debian's Chromium", "once, half a minute", || {
        debian::unpack_whole(&["chromium", "chromium-driver", "fonts-dejavu-core"], &system)
    })?;
    Ok(Some(system.join("root")))
}

/// The types that Grafana publishes of its dashboards, and the compiler that checks them: a `node_modules` directory.
pub fn grafana_types() -> Result<Option<PathBuf>> {
    let dir = cache()?.join(format!("tools/grafana-schema-{GRAFANA_SCHEMA}"));
    let modules = dir.join("node_modules");
    if dir.join("ready").is_file() {
        return Ok(Some(modules));
    }
    if on_path("npm").is_none() {
        eprintln!("xtask: no npm here; dashboards are not held against Grafana's types");
        return Ok(None);
    }
    announce("installing Grafana's types", "once, seconds", || {
        std::fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
        let mut npm = Command::new("npm");
        npm.args(["install", "--silent", "--no-audit", "--no-fund", "--prefix"]).arg(&dir);
        run(npm.args([format!("@grafana/schema@{GRAFANA_SCHEMA}"), format!("typescript@{TYPESCRIPT}")]))?;
        std::fs::write(dir.join("ready"), "").map_err(|error| error.to_string())
    })?;
    Ok(Some(modules))
}

/// An OTLP store with a query API.
pub fn otelite() -> Result<PathBuf> {
    stores::installed("otelite", OTELITE, &["otelite", "--version", OTELITE], "once, five minutes")
}
