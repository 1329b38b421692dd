//! What the server is asked over HTTP: SQL, reducer calls, descriptions of modules, its health and its counts of rows.
//!
//! What differs between releases is in `crate::release`; see ARCHITECTURE.md on server versions. Since 2.2 each SQL statement
//! here writes two transactions: what looks again and again uses `database::reader`.

use std::collections::HashMap;
use std::time::Duration;

use opentelemetry::KeyValue;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::config::{ServerConfig, SpacetimedbConfig};
use crate::database::description::Description;
use crate::observe::metrics;
use crate::outbound;

/// What can go wrong with the server.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("read the token in {path}: {reason}; correct spacetimedb_config.token_file")]
    Token { path: String, reason: String },
    #[error("spacetimedb_config.ca_file: {path}: {reason}")]
    Certificate { path: String, reason: String },
    #[error("ask the server at {url}: {reason}; check that it runs, and spacetimedb_config.url")]
    Unreachable { url: String, reason: String },
    #[error(
        "the server refused what was asked of the database ({status}): {said}; check spacetimedb_config.database and \
         token_file"
    )]
    Refused { status: u16, said: String },
    #[error("the server refused: {0}")]
    Locked(String),
    #[error("the server's answer is not understood: {0}")]
    Answer(String),
    #[error("{0}")]
    Query(String),
    #[error("the subscription to the event log ended: {0}")]
    Subscription(String),
}

/// One database on the server.
#[derive(Clone)]
pub struct Database {
    pub(crate) client: reqwest::Client,
    pub(crate) url: String,
    pub(crate) name: String,
    pub(crate) token: Option<String>,
    /// Further certificate authorities of an `https://` server.
    pub(crate) ca_file: Option<std::path::PathBuf>,
}

#[derive(Deserialize)]
struct Answer<T> {
    rows: Vec<T>,
}

impl Database {
    /// # Errors
    /// When the token cannot be read.
    pub fn new(config: &SpacetimedbConfig, server: &ServerConfig, name: &str) -> Result<Self, SourceError> {
        let token = token(config)?;
        let url = config.server_url();
        let timeout = Duration::from_millis(server.timeout_ms);
        let client = crate::observe::otlp::client(timeout, config.ca_file.as_deref())
            .map_err(|error| SourceError::Unreachable { url: url.clone(), reason: error.to_string() })?;
        let ca_file = config.ca_file.clone().filter(|_| url.starts_with("https://"));
        Ok(Self { client, url, name: name.to_owned(), token, ca_file })
    }

    /// The lowest number in a column that is at least `from`. The server knows no order, so the place is halved.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn first_number(&self, table: &str, key: &str, from: u64) -> Result<Option<u64>, SourceError> {
        let select = format!("SELECT {key} FROM {table} WHERE {key} >=");
        let Some(mut found) = self.number(format!("{select} {from} LIMIT 1")).await? else { return Ok(None) };
        let mut low = from;
        while found > low {
            let middle = low + (found - low) / 2;
            match self.number(format!("{select} {low} AND {key} <= {middle} LIMIT 1")).await? {
                Some(number) => found = number,
                None => low = middle + 1,
            }
        }
        Ok(Some(found))
    }

    /// How many rows a table has.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn count(&self, table: &str) -> Result<u64, SourceError> {
        Ok(self.number(format!("SELECT COUNT(*) AS n FROM {table}")).await?.unwrap_or(0))
    }

    /// How large the database's tables are, by name, as the server's metrics told some seconds ago.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn table_sizes(&self, identity: &str) -> Result<HashMap<String, TableSize>, SourceError> {
        let bytes = self.send(self.client.get(format!("{}/v1/metrics", self.url))).await?;
        Ok(table_sizes(&String::from_utf8_lossy(&bytes), identity))
    }

    /// The values of a statement that selects one column of text.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn texts(&self, statement: String) -> Result<Vec<Box<str>>, SourceError> {
        let bytes = self.sql(statement).await?;
        let parsed = tokio::task::spawn_blocking(move || {
            let rows: Vec<(Box<str>,)> = parse(&bytes)?;
            Ok(rows.into_iter().map(|(text,)| text).collect())
        });
        parsed.await.map_err(|error| SourceError::Answer(error.to_string()))?
    }

    async fn number(&self, statement: String) -> Result<Option<u64>, SourceError> {
        let rows: Vec<(u64,)> = parse(&self.sql(statement).await?)?;
        Ok(rows.first().map(|(number,)| *number))
    }

    /// Every row of a small table.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn all<T: DeserializeOwned>(&self, table: &str) -> Result<Vec<T>, SourceError> {
        self.rows(format!("SELECT * FROM {table}")).await
    }

    /// The database's identity.
    ///
    /// # Errors
    /// When the server cannot be asked, or knows no such database.
    pub async fn identity(&self) -> Result<crate::ids::Identity, SourceError> {
        let text = self.get("identity").await?;
        let text = String::from_utf8_lossy(&text);
        text.trim().parse().map_err(|_| SourceError::Answer(format!("`{}` is no identity", text.trim())))
    }

    /// The database's identity; `None` when the server knows no such database.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn find(&self) -> Result<Option<crate::ids::Identity>, SourceError> {
        #[derive(Deserialize)]
        struct Info {
            database_identity: Tagged,
        }
        #[derive(Deserialize)]
        struct Tagged {
            __identity__: String,
        }
        // A name can outlive its database, so the name alone tells nothing.
        let url = format!("{}/v1/database/{}", self.url, self.name);
        match self.send(self.client.get(url)).await {
            Ok(bytes) => {
                let info: Info =
                    serde_json::from_slice(&bytes).map_err(|error| SourceError::Answer(error.to_string()))?;
                let text = info.database_identity.__identity__;
                let identity = text.trim_start_matches("0x").parse();
                identity.map(Some).map_err(|_| SourceError::Answer(format!("`{text}` is no identity")))
            }
            Err(SourceError::Refused { status: 404, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Does the database answer a query?
    ///
    /// # Errors
    /// When it does not.
    pub async fn answers(&self) -> Result<(), SourceError> {
        // The module is asked, and no release writes for it.
        self.get("schema?version=9").await.map(drop)
    }

    /// The server's release, where it tells.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn server_version(&self) -> Result<Option<String>, SourceError> {
        #[derive(Deserialize)]
        struct Health {
            version: Option<String>,
        }
        match self.send(self.client.get(format!("{}/v1/health", self.url))).await {
            Ok(bytes) => Ok(serde_json::from_slice::<Health>(&bytes).ok().and_then(|health| health.version)),
            Err(SourceError::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What the module declares.
    ///
    /// # Errors
    /// When the server cannot be asked, knows no such database, or describes it in a form that is not known here.
    pub async fn description(&self) -> Result<Description, SourceError> {
        let json = match self.get("schema?version=10").await {
            // Servers before 2.0.4 know version 9 only.
            Err(SourceError::Refused { status: 400, .. }) => self.get("schema?version=9").await?,
            described => described?,
        };
        Description::parse(&json).map_err(SourceError::Answer)
    }

    /// Calls a reducer that takes no arguments.
    ///
    /// # Errors
    /// When the server cannot be asked, or the reducer refuses.
    pub async fn call(&self, reducer: &str) -> Result<(), SourceError> {
        self.call_with(reducer, &serde_json::json!([])).await
    }

    /// Calls a reducer with arguments in the server's JSON.
    ///
    /// # Errors
    /// When the server cannot be asked, or the reducer refuses.
    pub async fn call_with(&self, reducer: &str, arguments: &serde_json::Value) -> Result<(), SourceError> {
        self.post(&format!("call/{reducer}"), arguments.to_string()).await.map(drop)
    }

    /// The rows of a statement, in the server's JSON.
    ///
    /// # Errors
    /// When the server refuses the statement or cannot be asked.
    pub async fn rows<T: DeserializeOwned>(&self, statement: String) -> Result<Vec<T>, SourceError> {
        parse(&self.sql(statement).await?)
    }

    /// Every row of a table as a JSON text; `None` when that is more than `limit` bytes.
    ///
    /// # Errors
    /// When the server refuses or cannot be asked.
    pub async fn row_texts(&self, table: &str, limit: usize) -> Result<Option<Vec<String>>, SourceError> {
        caused("sql", 2);
        let mut request = self.client.post(self.path("sql")).body(format!("SELECT * FROM {table}"));
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let unreachable = |error: reqwest::Error| SourceError::Unreachable {
            url: self.url.clone(),
            reason: outbound::reason(&error),
        };
        let mut answer = request.send().await.map_err(unreachable)?;
        let status = answer.status();
        let mut bytes = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(unreachable)? {
            if bytes.len() + chunk.len() > limit {
                return Ok(None);
            }
            bytes.extend_from_slice(&chunk);
        }
        if !status.is_success() {
            return Err(refused(status, &bytes));
        }
        let rows: Vec<serde_json::Value> = parse(&bytes)?;
        Ok(Some(rows.iter().map(ToString::to_string).collect()))
    }

    async fn sql(&self, statement: String) -> Result<bytes::Bytes, SourceError> {
        self.post("sql", statement).await
    }

    async fn get(&self, path: &str) -> Result<bytes::Bytes, SourceError> {
        self.send(self.client.get(self.path(path))).await
    }

    async fn post(&self, path: &str, body: String) -> Result<bytes::Bytes, SourceError> {
        let mut request = self.client.post(self.path(path)).body(body);
        if path == "sql" {
            caused("sql", 2);
        } else {
            caused("call", 3);
            request = request.header(http::header::CONTENT_TYPE, "application/json");
        }
        self.send(request).await
    }

    fn path(&self, path: &str) -> String {
        format!("{}/v1/database/{}/{path}", self.url, self.name)
    }

    pub(crate) async fn send(&self, mut request: reqwest::RequestBuilder) -> Result<bytes::Bytes, SourceError> {
        let unreachable = |error: reqwest::Error| SourceError::Unreachable {
            url: self.url.clone(),
            reason: outbound::reason(&error),
        };
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await.map_err(unreachable)?;
        let status = answer.status();
        let bytes = answer.bytes().await.map_err(unreachable)?;
        if !status.is_success() {
            return Err(refused(status, &bytes));
        }
        Ok(bytes)
    }
}

/// Counts transactions that we have caused in a database.
pub(crate) fn caused(kind: &'static str, at_most: u64) {
    metrics::OWN_TRANSACTIONS.add(at_most, &[KeyValue::new("kind", kind)]);
}

/// How large a table is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TableSize {
    pub rows: u64,
    /// Of its rows, without what large values keep elsewhere.
    pub bytes: u64,
}

fn table_sizes(metrics: &str, identity: &str) -> HashMap<String, TableSize> {
    let mut sizes: HashMap<String, TableSize> = HashMap::new();
    let database = format!("db=\"{identity}\"");
    for line in metrics.lines() {
        let Some((name, rest)) = line.split_once('{') else { continue };
        let Some((labels, value)) = rest.rsplit_once("} ") else { continue };
        let (true, Ok(value)) = (labels.contains(&database), value.trim().parse::<f64>()) else { continue };
        let table = labels.split_once("table_name=\"").and_then(|(_, table)| table.split_once('"'));
        let Some((table, _)) = table else { continue };
        match name {
            "spacetime_data_size_table_num_rows" => sizes.entry(table.to_owned()).or_default().rows = value as u64,
            "spacetime_data_size_bytes_used_by_rows" => sizes.entry(table.to_owned()).or_default().bytes = value as u64,
            _ => {}
        }
    }
    sizes
}

fn refused(status: http::StatusCode, body: &[u8]) -> SourceError {
    let said: String = String::from_utf8_lossy(body).trim().chars().take(300).collect();
    match status {
        // Its words name the command that unlocks.
        http::StatusCode::FORBIDDEN if said.starts_with("Database is locked") => SourceError::Locked(said),
        status => SourceError::Refused { status: status.as_u16(), said },
    }
}

/// The token that the configuration names.
fn token(config: &SpacetimedbConfig) -> Result<Option<String>, SourceError> {
    let Some(path) = &config.token_file else { return Ok(None) };
    let refuse = |reason: String| SourceError::Token { path: path.display().to_string(), reason };
    let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
    let token = match path.extension().is_some_and(|extension| extension == "toml") {
        true => token_of_cli(&text).map_err(&refuse)?,
        false => text.trim().to_owned(),
    };
    if token.is_empty() || token.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(refuse("it holds no token on a line of its own".into()));
    }
    Ok(Some(token))
}

/// The token of the `spacetime` CLI, from its `cli.toml`.
fn token_of_cli(text: &str) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Cli {
        spacetimedb_token: Option<String>,
    }
    let cli: Cli = toml::from_str(text).map_err(|error| error.message().to_owned())?;
    cli.spacetimedb_token.ok_or_else(|| "it has no `spacetimedb_token`; run `spacetime login`".into())
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<Vec<T>, SourceError> {
    let mut answers: Vec<Answer<T>> =
        serde_json::from_slice(bytes).map_err(|error| SourceError::Answer(error.to_string()))?;
    // One answer for each statement, and there is one.
    Ok(answers.pop().map(|answer| answer.rows).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_a_line_of_its_own_or_that_of_the_cli() {
        let dir = tempfile::tempdir().expect("a directory");
        let read = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).expect("write");
            token(&SpacetimedbConfig { token_file: Some(path), ..SpacetimedbConfig::default() })
        };
        assert_eq!(read("token", " ey.J.x\n").expect("a token").as_deref(), Some("ey.J.x"));
        let cli = "default_server = \"local\"\nspacetimedb_token = \"ey.J.y\"\n[[server_configs]]\nhost = \"h\"\n";
        assert_eq!(read("cli.toml", cli).expect("a token").as_deref(), Some("ey.J.y"));
        let refused = |name, text| read(name, text).expect_err("no token").to_string();
        assert!(refused("cli.toml", "default_server = \"local\"").contains("spacetime login"));
        assert!(refused("token", "two words").contains("token_file"));
    }

    #[test]
    fn sizes_of_tables_are_those_of_the_database_alone() {
        let metrics = "# HELP spacetime_data_size_table_num_rows rows\n\
            spacetime_data_size_table_num_rows{db=\"c2aa\",table_name=\"note\"} 12\n\
            spacetime_data_size_table_num_rows{db=\"c2bb\",table_name=\"note\"} 99\n\
            spacetime_data_size_bytes_used_by_rows{db=\"c2aa\",table_name=\"note\"} 3400\n\
            spacetime_other{db=\"c2aa\",table_name=\"note\"} 5\n";
        let sizes = table_sizes(metrics, "c2aa");
        assert_eq!(sizes, HashMap::from([("note".to_owned(), TableSize { rows: 12, bytes: 3400 })]));
    }
}
