//! Proxies before a SpacetimeDB server: one stops connections until it is told, or cuts them all; one speaks TLS.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use crate::collector::{Certified, TlsListener};

pub struct Gate {
    pub url: String,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

struct Shared {
    target: String,
    /// Connections whose request has this in its first line wait.
    held_path: String,
    reached: Notify,
    opened: tokio::sync::Semaphore,
    /// Bytes that may still go to the server.
    left: AtomicU64,
}

impl Gate {
    /// Before the server at `url`; holds connections that ask for a path with `held_path`.
    pub async fn before(url: &str, held_path: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            target: url.trim_start_matches("http://").to_owned(),
            held_path: held_path.to_owned(),
            reached: Notify::new(),
            opened: tokio::sync::Semaphore::new(0),
            left: AtomicU64::new(u64::MAX),
        });
        let sharing = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let shared = Arc::clone(&sharing);
                // A connection that is cut is what it is for.
                tokio::spawn(async move { drop(pass(client, &shared).await) });
            }
        });
        Self { url: format!("http://{address}"), shared, task }
    }

    /// Waits until a connection is held.
    pub async fn reached(&self) {
        self.shared.reached.notified().await;
    }

    /// Lets held connections go on, and all that come.
    pub fn open(&self) {
        self.shared.opened.add_permits(tokio::sync::Semaphore::MAX_PERMITS / 2);
    }

    /// Cuts connections once so many more bytes have gone to the server.
    pub fn cut_after(&self, bytes: u64) {
        self.shared.left.store(bytes, Ordering::SeqCst);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(mut client: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut bytes = vec![0; 64 << 10];
    let read = client.read(&mut bytes).await?;
    let line = String::from_utf8_lossy(&bytes[..read]);
    if !shared.held_path.is_empty() && line.lines().next().is_some_and(|line| line.contains(&shared.held_path)) {
        shared.reached.notify_one();
        let _permit = shared.opened.acquire().await;
    }
    let mut server = TcpStream::connect(&shared.target).await?;
    server.write_all(&bytes[..read]).await?;
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let up = async {
        loop {
            let read = from_client.read(&mut bytes).await?;
            let spend = |left: u64| left.checked_sub(read as u64);
            if read == 0 || shared.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend).is_err() {
                return Ok(());
            }
            to_server.write_all(&bytes[..read]).await?;
        }
    };
    tokio::select! {
        ended = up => ended,
        ended = tokio::io::copy(&mut from_server, &mut to_client) => ended.map(drop),
    }
}

/// TLS before a server that speaks none.
pub struct TlsFront {
    pub url: String,
    task: tokio::task::JoinHandle<()>,
}

impl TlsFront {
    pub async fn before(url: &str, certified: &Certified) -> Self {
        use axum::serve::Listener as _;
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let mut listener = TlsListener::new(tcp, certified);
        let address = listener.local_addr().expect("an address");
        let target = url.trim_start_matches("http://").to_owned();
        let task = tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await;
                let target = target.clone();
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(&target).await else { return };
                    // A client that goes away is its own business.
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        Self { url: format!("https://{address}"), task }
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        self.task.abort();
    }
}
