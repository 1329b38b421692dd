//! Bounds on the connections of the HTTP interface: their number, and how long one may be silent. So clients cannot use up the
//! file descriptors that archiving needs.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// More than browsers, probes and scrapers hold.
const MOST: usize = 64;
/// A connection that sends nothing for this long is closed. Scrape intervals are shorter.
const SILENCE: Duration = Duration::from_secs(120);

pub struct Connections {
    listener: TcpListener,
    permits: Arc<Semaphore>,
    silence: Duration,
}

impl Connections {
    pub fn of(listener: TcpListener) -> Self {
        Self::bounded(listener, MOST, SILENCE)
    }

    fn bounded(listener: TcpListener, most: usize, silence: Duration) -> Self {
        Self { listener, permits: Arc::new(Semaphore::new(most)), silence }
    }
}

impl Listener for Connections {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        // Nobody closes it; without a permit more would be accepted, not fewer.
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok();
        // The listener's own waits out what keeps it from accepting, such as too many open files.
        let (stream, address) = Listener::accept(&mut self.listener).await;
        let ends = Box::pin(tokio::time::sleep_until(Instant::now() + self.silence));
        (Connection { stream, silence: self.silence, ends, _permit: permit }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

pub struct Connection {
    stream: TcpStream,
    silence: Duration,
    /// When it is cut off, unless something comes.
    ends: Pin<Box<Sleep>>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.stream).poll_read(context, buffer) {
            Poll::Pending => {
                ready!(self.ends.as_mut().poll(context));
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            read => {
                let ends = Instant::now() + self.silence;
                self.ends.as_mut().reset(ends);
                read
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn so_many_are_open_at_once_and_whoever_says_nothing_is_cut_off() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut connections = Connections::bounded(listener, 2, Duration::from_millis(50));
        let _silent = [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
        let (mut first, _) = connections.accept().await;
        let _second = connections.accept().await;
        let mut third = TcpStream::connect(address).await.unwrap();
        third.write_all(b"?").await.unwrap();
        assert_eq!(connections.permits.available_permits(), 0, "it waits until another one ends");
        let ended = first.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::TimedOut);
        drop(first);
        let (mut next, _) = connections.accept().await;
        assert_eq!(next.read_u8().await.unwrap(), b'?');
    }
}
