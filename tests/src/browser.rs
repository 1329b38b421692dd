//! Headless Chromium through ChromeDriver: pages as a person would see them.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde_json::{Value, json};

use crate::server::free_port;

/// A browser window.
pub struct Browser {
    driver: Child,
    session: String,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// `None`, said aloud, where there is no browser.
    pub async fn start() -> Option<Self> {
        let Some(root) = std::env::var_os("INNER_UNIVERSE_CHROMIUM").map(PathBuf::from) else {
            println!("skipped: Chromium is not there; `cargo xtask test --all` unpacks it");
            return None;
        };
        let port = free_port();
        let profile = tempfile::tempdir().expect("a directory");
        let mut command = Command::new(root.join("usr/bin/chromedriver"));
        command.arg(format!("--port={port}")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if root != Path::new("/") {
            let libraries = ["usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio", "usr/lib/chromium"];
            let libraries: Vec<_> = libraries.iter().map(|dir| root.join(dir).display().to_string()).collect();
            command.env("LD_LIBRARY_PATH", libraries.join(":"));
        }
        let driver = command.spawn().expect("start chromedriver");
        let url = format!("http://127.0.0.1:{port}");
        let deadline = Instant::now() + Duration::from_secs(30);
        while crate::client::http().get(format!("{url}/status")).send().await.is_err() {
            assert!(Instant::now() < deadline, "chromedriver does not answer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let mut browser = Self { driver, session: format!("{url}/session"), _profile: profile };
        let profile = browser._profile.path().display();
        let arguments = json!([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            format!("--user-data-dir={profile}"),
        ]);
        let options = json!({"binary": root.join("usr/lib/chromium/chromium"), "args": arguments});
        let wanted = json!({"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}});
        let made = browser.ask("", json!({"capabilities": {"alwaysMatch": wanted}})).await;
        browser.session += &format!("/{}", made["sessionId"].as_str().expect("a session"));
        Some(browser)
    }

    async fn ask(&self, path: &str, body: Value) -> Value {
        let request = crate::client::http().post(format!("{}{path}", self.session)).json(&body);
        let answer = request.send().await.expect("chromedriver").json::<Value>().await.expect("JSON");
        let error = &answer["value"]["error"];
        assert!(!error.is_string(), "{path}: {answer}");
        answer["value"].clone()
    }

    async fn protocol(&self, command: &str, parameters: Value) -> Value {
        self.ask("/goog/cdp/execute", json!({"cmd": command, "params": parameters})).await
    }

    /// Makes the window a screen of this size, a phone's or not, in light or dark.
    pub async fn screen(&self, (width, height): (u32, u32), phone: bool, dark: bool) {
        let scale = if phone { 2 } else { 1 };
        let screen = json!({"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone});
        self.protocol("Emulation.setDeviceMetricsOverride", screen).await;
        let scheme = json!({"name": "prefers-color-scheme", "value": if dark { "dark" } else { "light" }});
        self.protocol("Emulation.setEmulatedMedia", json!({"features": [scheme]})).await;
    }

    pub async fn open(&self, url: &str) {
        self.ask("/url", json!({"url": url})).await;
    }

    /// Runs the body of a function in the page.
    pub async fn script(&self, body: &str, arguments: Value) -> Value {
        self.ask("/execute/sync", json!({"script": body, "args": arguments})).await
    }

    /// Waits until the body of a function returns something true.
    pub async fn until(&self, body: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.script(body, json!([])).await.as_bool().unwrap_or(false) {
            assert!(Instant::now() < deadline, "{body} never holds: {:?}", self.console().await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What the console says since this was asked last.
    pub async fn console(&self) -> Vec<String> {
        let entries = self.ask("/se/log", json!({"type": "browser"})).await;
        entries.as_array().into_iter().flatten().map(Value::to_string).collect()
    }

    /// The whole page as PNG.
    pub async fn screenshot(&self) -> Vec<u8> {
        let shot = json!({"format": "png", "captureBeyondViewport": true});
        let shot = self.protocol("Page.captureScreenshot", shot).await;
        let data = shot["data"].as_str().expect("a picture");
        base64::engine::general_purpose::STANDARD.decode(data).expect("base64")
    }
}

impl Browser {
    /// Without a runtime: the test may be unwinding.
    fn end_session(&self) -> std::io::Result<()> {
        let (host, path) = self.session.trim_start_matches("http://").split_once('/').unwrap_or_default();
        let mut driver = TcpStream::connect(host)?;
        driver.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(driver, "DELETE /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
        // It answers once the browser is gone.
        driver.read(&mut [0; 512]).map(|_| ())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver ends the browser when its session ends; told or killed to end itself, it may leave it behind.
        let _ = self.end_session();
        let asked = Command::new("kill").arg("-TERM").arg(self.driver.id().to_string()).status();
        let deadline = Instant::now() + Duration::from_secs(5);
        while asked.as_ref().is_ok_and(|status| status.success()) && Instant::now() < deadline {
            if self.driver.try_wait().is_ok_and(|ended| ended.is_some()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
