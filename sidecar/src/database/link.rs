//! A connection to a database: SQL whose rows come in the server's own binary form, and reducer calls that take it.
//!
//! Invariants: what is waited for has a deadline; an answer that is larger than allowed is an error, not memory.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use spacetimedb_client_api_messages::websocket as protocol;
use spacetimedb_sats::bsatn;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::error::Error as SocketError;
use tokio_tungstenite::tungstenite::protocol::{Message, WebSocketConfig};
use tokio_tungstenite::{Connector, MaybeTlsStream, WebSocketStream};

use crate::config::{ServerConfig, SpacetimedbConfig};
use crate::database::schema::Schema;
use crate::observe::server::{Database, SourceError, caused};
use crate::outbound::root_cause;

/// The largest answer that is taken.
pub const LARGEST_ANSWER: usize = 24 << 20;

/// What can go wrong between us and the database.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error(transparent)]
    Server(#[from] SourceError),
    #[error("the server refused `{query}`: {said}")]
    Query { query: String, said: String },
    #[error("the answer is larger than {}", crate::config::value::ByteSize(LARGEST_ANSWER as u64))]
    TooLarge,
    #[error("the server gave no answer within {0:?}; check that it runs, and server_config.timeout_ms")]
    Timeout(Duration),
}

impl LinkError {
    /// Would another try be in vain?
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Server(SourceError::Unreachable { .. } | SourceError::Subscription(_)) | Self::Timeout(_) => false,
            Self::Server(_) | Self::Query { .. } | Self::TooLarge => true,
        }
    }
}

impl From<LinkError> for SourceError {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Server(error) => error,
            error => Self::Query(error.to_string()),
        }
    }
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;
type ServerMessage = protocol::ServerMessage<protocol::BsatnFormat>;

/// An open connection.
pub struct Link {
    database: Database,
    socket: Option<Socket>,
    timeout: Duration,
    /// How often a connection was opened.
    opened: u64,
    next: u32,
    /// Calls that were sent and not answered.
    pending: VecDeque<u32>,
    /// Answers to calls that came while something else was waited for.
    answered: VecDeque<(u32, Result<(), String>)>,
}

impl Link {
    /// # Errors
    /// When the token cannot be read.
    pub fn new(config: &SpacetimedbConfig, server: &ServerConfig, name: &str) -> Result<Self, LinkError> {
        let database = Database::new(config, server, name)?;
        let timeout = Duration::from_millis(server.timeout_ms);
        Ok(Self {
            database,
            socket: None,
            timeout,
            opened: 0,
            next: 0,
            pending: VecDeque::new(),
            answered: VecDeque::new(),
        })
    }

    /// How often a connection was opened.
    pub fn opened(&self) -> u64 {
        self.opened
    }

    /// What the server is asked without a connection.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// # Errors
    /// When the server cannot be asked, or its answer is not understood.
    pub async fn schema(&self) -> Result<Schema, LinkError> {
        Ok(self.database.description().await?.into())
    }

    /// The rows that a statement selects, each in binary form, in no order. Statements are of the form of subscriptions:
    /// whole rows, no LIMIT.
    ///
    /// # Errors
    /// When the server refuses the statement or cannot be asked.
    pub async fn query(&mut self, query: &str) -> Result<Vec<Bytes>, LinkError> {
        match self.ask(query).await {
            // The server closes a connection that was silent for a minute or two, as while files are uploaded.
            Err(LinkError::Server(SourceError::Unreachable { .. })) if self.pending.is_empty() => self.ask(query).await,
            answer => answer,
        }
    }

    async fn ask(&mut self, query: &str) -> Result<Vec<Bytes>, LinkError> {
        let id = self.number();
        let message = protocol::ClientMessage::OneOffQuery(protocol::OneOffQuery {
            message_id: id.to_le_bytes().into(),
            query_string: query.into(),
        });
        self.send(message).await?;
        loop {
            let answer = match self.receive().await? {
                ServerMessage::OneOffQueryResponse(answer) => answer,
                ServerMessage::TransactionUpdate(update) => {
                    self.answered.push_back(outcome(update));
                    continue;
                }
                _ => continue,
            };
            if *answer.message_id != id.to_le_bytes() {
                continue;
            }
            if let Some(said) = answer.error {
                return Err(LinkError::Query { query: query.to_owned(), said: said.into() });
            }
            return Ok(answer.tables.iter().flat_map(|table| &table.rows).collect());
        }
    }

    /// Sends a call without waiting for it; [`Self::confirm`] does. Calls are done in the order they were sent in.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub async fn call(&mut self, reducer: &str, arguments: Vec<u8>) -> Result<(), LinkError> {
        let request_id = self.number();
        let message = protocol::ClientMessage::CallReducer(protocol::CallReducer {
            reducer: reducer.into(),
            args: Bytes::from(arguments),
            request_id,
            flags: protocol::CallReducerFlags::FullUpdate,
        });
        self.send(message).await?;
        caused("call", 1);
        self.pending.push_back(request_id);
        Ok(())
    }

    /// Waits for the oldest call that was not confirmed. The inner result is the reducer's own.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn confirm(&mut self) -> Result<Result<(), String>, LinkError> {
        let Some(expected) = self.pending.front().copied() else {
            let reason = "the connection was lost before the answer to a call came".into();
            return Err(SourceError::Unreachable { url: self.database.url.clone(), reason }.into());
        };
        loop {
            let (id, outcome) = match self.answered.pop_front() {
                Some(answered) => answered,
                None => match self.receive().await? {
                    ServerMessage::TransactionUpdate(update) => outcome(update),
                    _ => continue,
                },
            };
            // A call that reached no reducer is answered without its number, in its turn.
            if id == expected || id == 0 {
                self.pending.pop_front();
                return Ok(outcome);
            }
        }
    }

    /// Answers the server's pings until the connection breaks; never returns where none is open. May be dropped at any time.
    pub async fn keep(&mut self) {
        let Some(socket) = &mut self.socket else { return std::future::pending().await };
        while let Some(Ok(message)) = socket.next().await {
            if message.is_close() {
                break;
            }
        }
        self.socket = None;
    }

    /// Says good-bye, so that the server need not find out.
    pub async fn close(mut self) {
        if let Some(mut socket) = self.socket.take() {
            let _ = tokio::time::timeout(Duration::from_secs(1), socket.close(None)).await;
        }
    }

    fn number(&mut self) -> u32 {
        self.next = self.next.wrapping_add(1).max(1);
        self.next
    }

    /// The connection, opened when it is not.
    async fn socket(&mut self) -> Result<&mut Socket, LinkError> {
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => self.open().await?,
        };
        Ok(self.socket.insert(socket))
    }

    /// Connects, if that was not done yet.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub async fn connect(&mut self) -> Result<(), LinkError> {
        self.socket().await.map(drop)
    }

    async fn open(&mut self) -> Result<Socket, LinkError> {
        self.pending.clear();
        self.answered.clear();
        let (url, name) = (&self.database.url, &self.database.name);
        let unreachable = |reason: String| SourceError::Unreachable { url: url.clone(), reason };
        let address = url.replacen("http", "ws", 1);
        let address = format!("{address}/v1/database/{name}/subscribe?compression=None");
        let mut request = address.into_client_request().map_err(|error| unreachable(error.to_string()))?;
        let headers = request.headers_mut();
        headers.insert("sec-websocket-protocol", http::HeaderValue::from_static(protocol::BIN_PROTOCOL));
        if let Some(token) = &self.database.token {
            let value = format!("Bearer {token}").parse();
            headers.insert("authorization", value.map_err(|_| unreachable("the token is none".into()))?);
        }
        let limits =
            WebSocketConfig::default().max_message_size(Some(LARGEST_ANSWER)).max_frame_size(Some(LARGEST_ANSWER));
        let connector = match &self.database.ca_file {
            Some(path) => Some(Connector::NativeTls(crate::database::tls::connector(path)?)),
            None => None,
        };
        let opening = tokio_tungstenite::connect_async_tls_with_config(request, Some(limits), true, connector);
        match tokio::time::timeout(self.timeout, opening).await {
            Ok(Ok((socket, _))) => {
                self.opened += 1;
                caused("connection", 2);
                Ok(socket)
            }
            Ok(Err(SocketError::Http(answer))) => {
                let said = answer.body().as_deref().map(String::from_utf8_lossy).unwrap_or_default().into_owned();
                Err(SourceError::Refused { status: answer.status().as_u16(), said }.into())
            }
            Ok(Err(error)) => Err(unreachable(root_cause(&error)).into()),
            Err(_) => Err(LinkError::Timeout(self.timeout)),
        }
    }

    async fn send(&mut self, message: protocol::ClientMessage<Bytes>) -> Result<(), LinkError> {
        let bytes = bsatn::to_vec(&message).map_err(|error| SourceError::Answer(error.to_string()))?;
        let timeout = self.timeout;
        let sending = async { self.socket().await.map(|socket| socket.send(Message::Binary(bytes.into()))) };
        let sent = match sending.await {
            Ok(sent) => tokio::time::timeout(timeout, sent).await,
            Err(error) => return Err(error),
        };
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.broken(&error)),
            Err(_) => Err(self.silent()),
        }
    }

    async fn receive(&mut self) -> Result<ServerMessage, LinkError> {
        loop {
            let timeout = self.timeout;
            let received = tokio::time::timeout(timeout, self.socket().await?.next()).await;
            match received {
                Ok(Some(Ok(Message::Binary(bytes)))) => return Ok(parse(&bytes)?),
                Ok(Some(Ok(Message::Close(frame)))) => {
                    self.socket = None;
                    let said = frame.map(|frame| frame.reason.to_string()).unwrap_or_default();
                    let reason = format!("it closed the connection {said}");
                    return Err(SourceError::Unreachable { url: self.database.url.clone(), reason }.into());
                }
                Ok(Some(Ok(_))) => {}
                Ok(Some(Err(error))) => return Err(self.broken(&error)),
                Ok(None) => return Err(self.broken(&SocketError::ConnectionClosed)),
                Err(_) => return Err(self.silent()),
            }
        }
    }

    fn broken(&mut self, error: &SocketError) -> LinkError {
        self.socket = None;
        match error {
            SocketError::Capacity(_) => LinkError::TooLarge,
            error => SourceError::Unreachable { url: self.database.url.clone(), reason: root_cause(error) }.into(),
        }
    }

    fn silent(&mut self) -> LinkError {
        self.socket = None;
        LinkError::Timeout(self.timeout)
    }
}

fn outcome(update: protocol::TransactionUpdate<protocol::BsatnFormat>) -> (u32, Result<(), String>) {
    let outcome = match update.status {
        protocol::UpdateStatus::Committed(_) => Ok(()),
        protocol::UpdateStatus::Failed(said) => Err(said.into()),
        protocol::UpdateStatus::OutOfEnergy => Err("the database is out of energy".into()),
    };
    (update.reducer_call.request_id, outcome)
}

fn parse(bytes: &[u8]) -> Result<ServerMessage, SourceError> {
    match bytes.split_first() {
        Some((&protocol::SERVER_MSG_COMPRESSION_TAG_NONE, bytes)) => {
            bsatn::from_slice(bytes).map_err(|error| SourceError::Answer(error.to_string()))
        }
        Some((tag, _)) => Err(SourceError::Answer(format!("it is compressed ({tag}), which was not asked for"))),
        None => Err(SourceError::Answer("it is empty".into())),
    }
}
