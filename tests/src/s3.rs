//! Real S3 servers on free loopback ports, and a proxy before them that misbehaves on demand.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::server::free_port;

pub const BUCKET: &str = "backups";
pub const ACCESS_KEY: &str = "AKIAINNERUNIVERSE";
pub const SECRET_KEY: &str = "inner-universe-secret";

/// An S3 server with an empty bucket.
pub struct S3 {
    child: Child,
    pub endpoint: String,
    _dir: tempfile::TempDir,
}

impl S3 {
    /// Moto: conditional writes as AWS has them. `None` where it could not be installed.
    pub async fn moto() -> Option<Self> {
        let binary = part("INNER_UNIVERSE_MOTO", "moto")?;
        let port = free_port();
        let mut command = Command::new(binary);
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        let server = Self::start(command, port, tempfile::tempdir().expect("a directory")).await;
        let made = crate::client::http().put(format!("{}/{BUCKET}", server.endpoint)).send().await;
        assert!(made.expect("an answer").status().is_success(), "the bucket is not made");
        Some(server)
    }

    /// s3s-fs: signatures and checksums are checked.
    pub async fn s3s() -> Option<Self> {
        let binary = part("INNER_UNIVERSE_S3S", "s3s-fs")?;
        let (port, dir) = (free_port(), tempfile::tempdir().expect("a directory"));
        std::fs::create_dir(dir.path().join(BUCKET)).expect("the bucket");
        let mut command = Command::new(binary);
        command.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
        command.args(["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY]).arg(dir.path());
        Some(Self::start(command, port, dir).await)
    }

    /// Garage: ignores conditions of writes without a word. Only in the long tests.
    pub async fn garage() -> Option<Self> {
        let binary = part("INNER_UNIVERSE_GARAGE", "garage")?;
        let (port, rpc, dir) = (free_port(), free_port(), tempfile::tempdir().expect("a directory"));
        let root = dir.path().display();
        let config = format!(
            "metadata_dir = \"{root}/meta\"\ndata_dir = \"{root}/data\"\ndb_engine = \"sqlite\"\nreplication_factor = 1\n\
             rpc_bind_addr = \"127.0.0.1:{rpc}\"\nrpc_public_addr = \"127.0.0.1:{rpc}\"\nrpc_secret = \"{}\"\n\
             [s3_api]\ns3_region = \"us-east-1\"\napi_bind_addr = \"127.0.0.1:{port}\"\nroot_domain = \".s3.local\"\n",
            "ab".repeat(32)
        );
        let path = dir.path().join("garage.toml");
        std::fs::write(&path, config).expect("the configuration");
        let mut command = Command::new(binary);
        command.arg("-c").arg(&path).args(["server", "--single-node", "--default-bucket"]);
        // Garage wants keys of its own form.
        command.env("GARAGE_DEFAULT_ACCESS_KEY", GARAGE_KEY).env("GARAGE_DEFAULT_SECRET_KEY", garage_secret());
        command.env("GARAGE_DEFAULT_BUCKET", BUCKET);
        Some(Self::start(command, port, dir).await)
    }

    async fn start(mut command: Command, port: u16, dir: tempfile::TempDir) -> Self {
        let log = std::fs::File::create(dir.path().join("server.log")).expect("a log");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut server = Self { child, endpoint: format!("http://127.0.0.1:{port}"), _dir: dir };
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            assert!(server.child.try_wait().expect("its state").is_none(), "{command:?} ended");
            assert!(Instant::now() < deadline, "{command:?} does not listen");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        server
    }

    /// The settings that reach it, as variables without their prefix.
    pub fn settings(&self) -> Vec<(String, String)> {
        settings(&self.endpoint, ACCESS_KEY, SECRET_KEY)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub const GARAGE_KEY: &str = "GK0123456789abcdef01234567";

pub fn garage_secret() -> String {
    "0f".repeat(32)
}

/// Settings for a server at `endpoint`.
pub fn settings(endpoint: &str, key: &str, secret: &str) -> Vec<(String, String)> {
    let pairs = [
        ("REPOSITORY__ENDPOINT", endpoint),
        ("REPOSITORY__REGION", "us-east-1"),
        ("REPOSITORY__ACCESS_KEY_ID", key),
        ("REPOSITORY__SECRET_ACCESS_KEY", secret),
    ];
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
}

fn part(variable: &str, name: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from);
    if found.is_none() {
        assert!(std::env::var_os("CI").is_none() || !must_run(variable), "{name} is not there; run `cargo xtask test`");
        eprintln!("skipped: {name} is not installed; `cargo xtask test --all` installs it");
    }
    found
}

/// What CI may not leave out.
fn must_run(variable: &str) -> bool {
    variable != "INNER_UNIVERSE_GARAGE" || crate::tools::all()
}

/// How the proxy treats connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Fault {
    None = 0,
    /// No connection is accepted for long.
    Down = 1,
    /// Nothing is answered.
    Hang = 2,
    /// 100 kB a second each way.
    Slow = 3,
    /// One request in five ends in 500, 503 or a reset.
    Flaky = 4,
    /// Every write ends in 507.
    Full = 5,
    /// One write in three gets no answer, and takes effect seconds later.
    Late = 6,
    /// One write in three takes effect at once, and again seconds later.
    Twice = 7,
    /// Answers to listings end in the middle.
    Truncated = 8,
    /// Listings are answered as they were when they were first asked for while this lasts.
    Stale = 9,
    /// Every object, and the bucket, is said not to be there.
    Gone = 10,
}

/// What a write waits that takes effect late.
const LATE: Duration = Duration::from_secs(4);

/// Answers to listings, by the heads of their requests.
type Listings = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// Paths that were written through a proxy, with the times at which the server had said so.
type Written = Arc<Mutex<Vec<(String, SystemTime)>>>;

/// Requests by what they ask for, as a bill tells them apart: `GET`, `PUT`, `LIST` and so on.
type Kinds = Arc<Mutex<BTreeMap<String, u64>>>;

/// An answer in place of the server's, to the requests whose head it is for.
#[derive(Clone)]
struct Canned {
    answer: String,
    to: fn(&str) -> bool,
}

impl Canned {
    fn new(status: &str, kind: &str, body: &str, to: fn(&str) -> bool) -> Self {
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}");
        Self { answer: format!("{head}\r\nConnection: close\r\n\r\n{body}"), to }
    }

    fn error(status: &str, code: &str, to: fn(&str) -> bool) -> Self {
        let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>No.</Message></Error>");
        Self::new(status, "application/xml", &body, to)
    }
}

fn is_listing(head: &str) -> bool {
    head.starts_with("GET ") && head.contains("list-type=2")
}

fn is_conditional(head: &str) -> bool {
    let head = head.to_ascii_lowercase();
    head.starts_with("put ") && (head.contains("\nif-none-match:") || head.contains("\nif-match:"))
}

/// A proxy of HTTP/1.1 whose connections serve one request each, so that each can fail on its own.
pub struct Proxy {
    pub endpoint: String,
    fault: Arc<AtomicU8>,
    canned: Arc<Mutex<Option<Canned>>>,
    requests: Arc<AtomicU64>,
    kinds: Kinds,
    written: Written,
    listings: Listings,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub async fn before(server: &S3) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let target = server.endpoint.trim_start_matches("http://").to_owned();
        let (fault, requests) = (Arc::new(AtomicU8::new(0)), Arc::new(AtomicU64::new(0)));
        let canned: Arc<Mutex<Option<Canned>>> = Arc::default();
        let (mode, count, say) = (Arc::clone(&fault), Arc::clone(&requests), Arc::clone(&canned));
        let (written, kinds) = (Written::default(), Kinds::default());
        let listings = Listings::default();
        let notes = (Arc::clone(&written), Arc::clone(&kinds), Arc::clone(&listings));
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let n = count.fetch_add(1, Ordering::Relaxed);
                let (mode, target, notes) = (Arc::clone(&mode), target.clone(), notes.clone());
                let say = say.lock().expect("the answer").clone();
                tokio::spawn(async move {
                    // A client that goes away is its own business.
                    let _ = pass(client, &target, &mode, n, say, &notes).await;
                });
            }
        });
        Self { endpoint, fault, canned, requests, kinds, written, listings, task }
    }

    pub fn set(&self, fault: Fault) {
        self.listings.lock().expect("the listings").clear();
        self.fault.store(fault as u8, Ordering::Relaxed);
    }

    /// Answers everything with this status and S3 error code; `None` to pass requests on again.
    pub fn answer(&self, error: Option<(&str, &str)>) {
        *self.canned.lock().expect("the answer") = error.map(|(status, code)| Canned::error(status, code, |_| true));
    }

    /// Answers listings, and nothing else, with this page.
    pub fn answer_listings(&self, page: Option<(&str, &str)>) {
        let canned = page.map(|(kind, body)| Canned::new("200 OK", kind, body, is_listing));
        *self.canned.lock().expect("the answer") = canned;
    }

    /// Answers conditional writes, and nothing else, with this status and S3 error code.
    pub fn refuse_conditions(&self, status: &str, code: &str) {
        *self.canned.lock().expect("the answer") = Some(Canned::error(status, code, is_conditional));
    }

    /// What was written so far, with the times at which the server had said so.
    pub fn written(&self) -> Vec<(String, SystemTime)> {
        self.written.lock().expect("the list").clone()
    }

    /// Requests so far by what they ask for, failed ones included.
    pub fn kinds(&self) -> BTreeMap<String, u64> {
        self.kinds.lock().expect("the counts").clone()
    }

    /// Requests so far, failed ones included.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(
    mut client: TcpStream,
    target: &str,
    mode: &AtomicU8,
    n: u64,
    canned: Option<Canned>,
    (written, kinds, listings): &(Written, Kinds, Listings),
) -> std::io::Result<()> {
    let is = |fault: Fault| mode.load(Ordering::Relaxed) == fault as u8;
    if is(Fault::Down) {
        return Ok(());
    }
    let mut head = Vec::new();
    let mut byte = [0; 4096];
    let end = loop {
        let read = client.read(&mut byte).await?;
        if read == 0 {
            return Ok(());
        }
        head.extend_from_slice(&byte[..read]);
        if let Some(at) = head.windows(4).position(|window| window == b"\r\n\r\n") {
            break at;
        }
    };
    let text = String::from_utf8_lossy(&head[..end]).into_owned();
    let (method, _) = text.split_once(' ').unwrap_or_default();
    let kind = if is_listing(&text) { "LIST" } else { method };
    *kinds.lock().expect("the counts").entry(kind.to_owned()).or_default() += 1;
    let length: usize = text
        .lines()
        .find_map(|line| {
            line.to_ascii_lowercase().strip_prefix("content-length:").map(|n| n.trim().parse().unwrap_or(0))
        })
        .unwrap_or(0);
    if is(Fault::Hang) {
        tokio::time::sleep(Duration::from_secs(600)).await;
        return Ok(());
    }
    let full = is(Fault::Full) && (text.starts_with("PUT") || text.starts_with("POST"));
    let flaky = is(Fault::Flaky) && n.is_multiple_of(5);
    let mut body = head[end + 4..].to_vec();
    let slow = is(Fault::Slow);
    while body.len() < length {
        let read = client.read(&mut byte).await?;
        if read == 0 {
            return Ok(());
        }
        body.extend_from_slice(&byte[..read]);
        if slow {
            tokio::time::sleep(Duration::from_micros(read as u64 * 10)).await;
        }
    }
    if let Some(canned) = canned.filter(|canned| (canned.to)(&text)) {
        return client.write_all(canned.answer.as_bytes()).await;
    }
    if full || flaky {
        let answer = match n / 5 % 3 {
            _ if full => "HTTP/1.1 507 Insufficient Storage",
            0 => "HTTP/1.1 500 Internal Server Error",
            1 => "HTTP/1.1 503 Slow Down",
            // The connection ends without an answer.
            _ => return Ok(()),
        };
        let answer = format!("{answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        return client.write_all(answer.as_bytes()).await;
    }
    if is(Fault::Gone) {
        let code = if is_listing(&text) { "NoSuchBucket" } else { "NoSuchKey" };
        return client.write_all(Canned::error("404 Not Found", code, |_| true).answer.as_bytes()).await;
    }
    let is_third = text.starts_with("PUT ") && n.is_multiple_of(3);
    if is_third && (is(Fault::Late) || is(Fault::Twice)) {
        let (target, text, body) = (target.to_owned(), text.clone(), body.clone());
        tokio::spawn(async move {
            tokio::time::sleep(LATE).await;
            let _ = forward(&target, &text, &body).await;
        });
        if is(Fault::Late) {
            return Ok(());
        }
    }
    let first = text.lines().next().unwrap_or_default().to_owned();
    let stale = is(Fault::Stale) && is_listing(&text);
    let before = listings.lock().expect("the listings").get(&first).filter(|_| stale).cloned();
    let mut answer = match before {
        Some(before) => before,
        None => forward(target, &text, &body).await?,
    };
    if stale {
        listings.lock().expect("the listings").insert(first, answer.clone());
    }
    if is(Fault::Truncated) && is_listing(&text) {
        answer.truncate(answer.len() * 2 / 3);
    }
    if let Some(path) = text.strip_prefix("PUT ").and_then(|rest| rest.split_whitespace().next())
        && answer.starts_with(b"HTTP/1.1 200")
    {
        written.lock().expect("the list").push((path.to_owned(), SystemTime::now()));
    }
    if slow {
        tokio::time::sleep(Duration::from_micros(answer.len() as u64 * 10)).await;
    }
    client.write_all(&answer).await?;
    client.shutdown().await
}

/// What the server answers to a request.
async fn forward(target: &str, head: &str, body: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(target).await?;
    // Each connection carries one request: the server is asked to close it.
    let lines = head.lines().filter(|line| !line.to_ascii_lowercase().starts_with("connection:"));
    let mut request: String = lines.flat_map(|line| [line, "\r\n"]).collect();
    request += "Connection: close\r\n\r\n";
    server.write_all(request.as_bytes()).await?;
    server.write_all(body).await?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).await?;
    Ok(answer)
}
