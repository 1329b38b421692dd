//! TLS to a server whose certificate is of a private authority, for what does not take one by itself.

use std::path::Path;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_native_tls::TlsConnector;

use crate::observe::server::SourceError;

/// What trusts the authorities in `ca_file` besides the machine's own.
///
/// # Errors
/// When the file cannot be read or holds no certificate.
pub fn connector(ca_file: &Path) -> Result<native_tls::TlsConnector, SourceError> {
    let refuse = |reason: String| SourceError::Certificate { path: ca_file.display().to_string(), reason };
    let pem = std::fs::read(ca_file).map_err(|error| refuse(error.to_string()))?;
    let certificates = native_tls::Certificate::stack_from_pem(&pem).map_err(|error| refuse(error.to_string()))?;
    if certificates.is_empty() {
        return Err(refuse("it holds no certificate".into()));
    }
    let mut builder = native_tls::TlsConnector::builder();
    for certificate in certificates {
        builder.add_root_certificate(certificate);
    }
    builder.build().map_err(|error| refuse(error.to_string()))
}

/// A port of the loopback interface that leads to the server under TLS: the SDK takes no certificate authority. It is there
/// as long as this value; what passes needs a token as ever.
pub struct Relay {
    /// Where to connect to, without TLS.
    pub url: String,
    task: tokio::task::JoinHandle<()>,
}

impl Relay {
    /// Before the server at `url`, which is an `https://` address.
    ///
    /// # Errors
    /// When no port is to be had, or the address cannot be used.
    pub async fn start(url: &str, ca_file: &Path) -> Result<Self, SourceError> {
        let unusable = |reason: String| SourceError::Unreachable { url: url.to_owned(), reason };
        let parsed = url::Url::parse(url).map_err(|error| unusable(error.to_string()))?;
        let host = parsed.host_str().ok_or_else(|| unusable("it names no host".into()))?.to_owned();
        let port = parsed.port_or_known_default().unwrap_or(443);
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|error| unusable(error.to_string()))?;
        let address = listener.local_addr().map_err(|error| unusable(error.to_string()))?;
        let (tls, to) = (TlsConnector::from(connector(ca_file)?), Arc::new((host, port)));
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (tls, to) = (tls.clone(), Arc::clone(&to));
                tokio::spawn(async move {
                    if let Err(error) = pass(client, &tls, &to).await {
                        tracing::debug!(%error, "a connection to the server under TLS ended");
                    }
                });
            }
        });
        Ok(Self { url: format!("http://{address}"), task })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(mut client: TcpStream, tls: &TlsConnector, to: &(String, u16)) -> std::io::Result<()> {
    let (host, port) = to;
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        // A head that does not end is none.
        if head.len() > 64 << 10 || client.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let server = TcpStream::connect((host.as_str(), *port)).await?;
    server.set_nodelay(true)?;
    let mut server = tls.connect(host, server).await.map_err(std::io::Error::other)?;
    // A proxy before the server goes by the name that is asked for.
    server.write_all(&with_host(&head, &format!("{host}:{port}"))).await?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await.map(drop)
}

fn with_host(head: &[u8], host: &str) -> Vec<u8> {
    let text = String::from_utf8_lossy(head);
    let line = |line: &str| match line.to_ascii_lowercase().starts_with("host:") {
        true => format!("Host: {host}"),
        false => line.to_owned(),
    };
    text.split("\r\n").map(line).collect::<Vec<_>>().join("\r\n").into_bytes()
}
