//! A client of the server's HTTP interface.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::server::logs_begun;

/// Every row of every table, as sorted JSON texts.
pub type Rows = BTreeMap<String, Vec<String>>;

/// A client of HTTP whose TLS, which no test needs, has its provider.
pub fn http() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::new()
}

#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    pub identity: String,
    pub token: String,
    /// Where the server keeps what it writes, if it is one of ours.
    data_dir: Option<PathBuf>,
}

impl Client {
    /// Takes a new identity from the server.
    pub async fn new(url: &str) -> Self {
        let http = http();
        let answer = http.post(format!("{url}/v1/identity")).send().await.expect("ask for an identity");
        let answer: Value = answer.json().await.expect("an identity");
        let text = |name: &str| answer[name].as_str().expect("a text").to_owned();
        Self { http, url: url.to_owned(), identity: text("identity"), token: text("token"), data_dir: None }
    }

    /// The same client, which knows where its server writes.
    pub fn on(self, data_dir: &Path) -> Self {
        Self { data_dir: Some(data_dir.to_owned()), ..self }
    }

    /// The identity that a token is of.
    pub fn with_token(&self, token: &str) -> Self {
        Self { token: token.trim().to_owned(), identity: String::new(), ..self.clone() }
    }

    /// The same identity at another server.
    pub fn at(&self, url: &str) -> Self {
        Self { url: url.to_owned(), http: http(), data_dir: None, ..self.clone() }
    }

    /// Publishes a module; returns the database's identity. The server answers a moment before it writes its log.
    pub async fn publish(&self, name: &str, wasm: Vec<u8>) -> String {
        let identity = self.try_publish(name, wasm).await.unwrap_or_else(|error| panic!("publish {name}: {error}"));
        while self.data_dir.as_ref().is_some_and(|dir| !logs_begun(dir)) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        identity
    }

    pub async fn try_publish(&self, name: &str, wasm: Vec<u8>) -> Result<String, String> {
        let request = self.http.put(format!("{}/v1/database/{name}", self.url)).bearer_auth(&self.token).body(wasm);
        let answer = request.send().await.map_err(|error| error.to_string())?;
        let (status, text) = (answer.status(), answer.text().await.map_err(|error| error.to_string())?);
        if !status.is_success() {
            return Err(format!("{status}: {text}"));
        }
        let answer: Value = serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
        let identity = &answer["Success"]["database_identity"];
        let identity = identity.as_str().or_else(|| identity["__identity__"].as_str());
        identity.map(|identity| identity.trim_start_matches("0x").to_owned()).ok_or(text)
    }

    /// Deletes a database.
    pub async fn delete(&self, name: &str) {
        let request = self.http.delete(format!("{}/v1/database/{name}", self.url)).bearer_auth(&self.token);
        let answer = request.send().await.expect("an answer");
        assert!(answer.status().is_success(), "delete {name}: {}", answer.status());
    }

    /// Calls a reducer; the error is the server's answer.
    pub async fn call(&self, database: &str, reducer: &str, arguments: Value) -> Result<(), String> {
        let url = format!("{}/v1/database/{database}/call/{reducer}", self.url);
        let request = self.http.post(url).bearer_auth(&self.token).json(&arguments);
        let answer = request.send().await.map_err(|error| error.to_string())?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        Err(format!("{status}: {}", answer.text().await.unwrap_or_default()))
    }

    /// Runs one SQL statement and returns its rows.
    pub async fn sql(&self, database: &str, statement: &str) -> Vec<Value> {
        self.try_sql(database, statement).await.unwrap_or_else(|error| panic!("{statement}: {error}"))
    }

    pub async fn try_sql(&self, database: &str, statement: &str) -> Result<Vec<Value>, String> {
        let url = format!("{}/v1/database/{database}/sql", self.url);
        let request = self.http.post(url).bearer_auth(&self.token).body(statement.to_owned());
        let answer = request.send().await.map_err(|error| error.to_string())?;
        let (status, text) = (answer.status(), answer.text().await.map_err(|error| error.to_string())?);
        if !status.is_success() {
            return Err(format!("{status}: {text}"));
        }
        let mut answer: Value = serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
        match answer[0]["rows"].take() {
            Value::Array(rows) => Ok(rows),
            _ => Err(text),
        }
    }

    /// What the module has logged, oldest first.
    pub async fn logs(&self, database: &str) -> Vec<String> {
        let url = format!("{}/v1/database/{database}/logs?num_lines=10000", self.url);
        let answer = self.http.get(url).bearer_auth(&self.token).send().await.expect("the logs");
        let text = answer.text().await.expect("a text");
        let message = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            line["message"].as_str().expect("a message").to_owned()
        };
        text.lines().map(message).collect()
    }

    /// Every row of the given tables; a table that is not there has the entry "no such table".
    pub async fn rows(&self, database: &str, tables: &[&str]) -> Rows {
        let mut all = Rows::new();
        for table in tables {
            let rows = match self.try_sql(database, &format!("select * from {table}")).await {
                Ok(rows) => {
                    let mut rows: Vec<String> = rows.iter().map(Value::to_string).collect();
                    rows.sort();
                    rows
                }
                Err(error) if error.contains("no such table") || error.contains("is not a valid table") => {
                    vec!["no such table".to_owned()]
                }
                Err(error) => panic!("select * from {table}: {error}"),
            };
            all.insert((*table).to_owned(), rows);
        }
        all
    }

    pub async fn schema(&self, database: &str) -> Value {
        let url = format!("{}/v1/database/{database}/schema?version=9", self.url);
        let answer = self.http.get(url).bearer_auth(&self.token).send().await.expect("ask for the schema");
        answer.json().await.expect("a schema")
    }

    pub fn url(&self) -> &str {
        &self.url
    }
}

/// A SATS option in JSON.
pub fn some(value: impl Into<Value>) -> Value {
    json!({"some": value.into()})
}

/// The empty option.
pub fn none() -> Value {
    json!({"none": []})
}
