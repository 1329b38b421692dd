//! A real SpacetimeDB server on a free loopback port, ended by its own process id.

use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::client::Client;
use crate::tools;

pub struct Server {
    child: Child,
    pub url: String,
    pub data_dir: PathBuf,
    pub key_dir: PathBuf,
}

impl Server {
    /// Starts a server on `data_dir` and waits until it answers.
    pub async fn start(data_dir: &Path, key_dir: &Path) -> Self {
        // Between choosing a port and the server's bind another process can take it.
        Self::try_ports(data_dir, key_dir, (0..5).map(|_| free_port())).await
    }

    /// Starts a server on a port that was its own before.
    pub async fn start_at(data_dir: &Path, key_dir: &Path, port: u16) -> Self {
        Self::try_ports(data_dir, key_dir, std::iter::repeat_n(port, 5)).await
    }

    async fn try_ports(data_dir: &Path, key_dir: &Path, ports: impl Iterator<Item = u16>) -> Self {
        let mut last = String::new();
        for port in ports {
            let url = format!("http://127.0.0.1:{port}");
            let log = data_dir.with_extension("server.log");
            let output = std::fs::File::create(&log).expect("the server's log file");
            let child = Command::new(tools::server())
                .arg("start")
                .arg("--data-dir")
                .arg(data_dir)
                .arg("--jwt-key-dir")
                .arg(key_dir)
                .arg("--listen-addr")
                .arg(format!("127.0.0.1:{port}"))
                .stdin(Stdio::null())
                .stdout(output.try_clone().expect("a second handle"))
                .stderr(output)
                .spawn()
                .unwrap_or_else(|error| panic!("start {}: {error}", tools::server().display()));
            let mut server = Self { child, url, data_dir: data_dir.into(), key_dir: key_dir.into() };
            if server.wait_ready().await {
                return server;
            }
            last = std::fs::read_to_string(&log).unwrap_or_default();
        }
        panic!("the server does not start: {last}");
    }

    async fn wait_ready(&mut self) -> bool {
        let http = crate::client::http();
        let deadline = Instant::now() + Duration::from_secs(120);
        while Instant::now() < deadline {
            if self.child.try_wait().expect("the server's state").is_some() {
                return false;
            }
            if http.get(format!("{}/v1/ping", self.url)).send().await.is_ok_and(|answer| answer.status().is_success()) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the server at {} does not answer", self.url);
    }

    /// A client with a fresh identity.
    pub async fn client(&self) -> Client {
        Client::new(&self.url).await.on(&self.data_dir)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until what the server has acknowledged has reached its log: it answers a moment before it writes.
    pub async fn written(&self) {
        let mut last = Vec::new();
        loop {
            let sizes = log_sizes(&self.data_dir);
            if !sizes.is_empty() && !sizes.contains(&0) && sizes == last {
                return;
            }
            last = sizes;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// How much each replica's segments hold beyond their headers.
    pub fn log_sizes(&self) -> Vec<u64> {
        log_sizes(&self.data_dir)
    }

    /// `kill -9`, as a crash would.
    pub fn kill(mut self) {
        self.end();
    }

    /// Asks the server to stop and waits until it has.
    pub fn stop(mut self) {
        let pid = self.child.id().to_string();
        let asked = Command::new("kill").arg("-INT").arg(pid).status();
        let deadline = Instant::now() + Duration::from_secs(10);
        while asked.as_ref().is_ok_and(|status| status.success()) && Instant::now() < deadline {
            if self.child.try_wait().expect("the server's state").is_some() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.end();
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// How much each replica's segments hold beyond their headers.
pub(crate) fn log_sizes(data_dir: &Path) -> Vec<u64> {
    let replicas = std::fs::read_dir(data_dir.join("replicas")).into_iter().flatten().flatten();
    let logs = replicas.map(|replica| std::fs::read_dir(replica.path().join("clog")).into_iter().flatten().flatten());
    let size = |file: &std::fs::DirEntry| match file.path().extension().is_some_and(|extension| extension == "log") {
        true => file.metadata().map_or(0, |data| data.len().saturating_sub(10)),
        false => 0,
    };
    logs.map(|files| files.map(|file| size(&file)).sum()).collect()
}

/// Whether every replica's log begins with a whole commit: the first holds a module, which takes several writes.
pub(crate) fn logs_begun(data_dir: &Path) -> bool {
    let replicas = std::fs::read_dir(data_dir.join("replicas")).into_iter().flatten().flatten();
    let begun: Vec<_> = replicas.map(|replica| begins(&replica.path().join("clog")).unwrap_or(false)).collect();
    !begun.is_empty() && begun.iter().all(|begun| *begun)
}

fn begins(log: &Path) -> std::io::Result<bool> {
    const HEADERS: usize = 10 + 22;
    let files = std::fs::read_dir(log)?.flatten().map(|file| file.path());
    let segments = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    let Some(first) = segments.min() else { return Ok(false) };
    if !first.ends_with(format!("{:020}.stdb.log", 0)) {
        return Ok(true);
    }
    let mut segment = std::fs::File::open(first)?;
    let mut headers = [0; HEADERS];
    segment.read_exact(&mut headers)?;
    if !headers.starts_with(b"(ds)^2") {
        return Ok(true);
    }
    let length = headers.last_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    Ok(length > 0 && segment.metadata()?.len() >= (HEADERS + 4) as u64 + u64::from(length))
}

/// Waits until the server at `url` answers, whoever started it.
pub async fn wait_for(url: &str) {
    let http = crate::client::http();
    let deadline = Instant::now() + Duration::from_secs(120);
    while !http.get(format!("{url}/v1/ping")).send().await.is_ok_and(|answer| answer.status().is_success()) {
        assert!(Instant::now() < deadline, "the server at {url} does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A port of the loopback interface that nobody listens on.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free loopback port").port()
}
