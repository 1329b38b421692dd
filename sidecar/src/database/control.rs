//! What a database's owner asks of the server: to publish a module, to delete the database, who one is.

use base64::Engine as _;
use serde::Deserialize;
use serde_json::Value;

use crate::ids::{ContentHash, Identity};
use crate::observe::server::{Database, SourceError};

/// A new identity, and the token that proves it.
#[derive(Deserialize)]
pub struct NewIdentity {
    pub identity: String,
    pub token: String,
}

/// What the server says of a publish before it is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Preview {
    /// This release does not tell.
    NotServed,
    /// It would be done, in these steps. The token proves that they were seen.
    Migrates {
        plan: String,
        breaks_clients: bool,
        token: String,
    },
    Refused {
        reason: String,
    },
}

impl Database {
    /// The same server and rights, for another database.
    pub fn called(&self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self.clone() }
    }

    /// The same, with another token.
    pub fn with_token(&self, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..self.clone() }
    }

    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Whose token it is, as the token says.
    pub fn token_identity(&self) -> Option<Identity> {
        #[derive(Deserialize)]
        struct Claims {
            hex_identity: String,
        }
        let payload = self.token.as_deref()?.split('.').nth(1)?;
        let json = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).ok()?;
        serde_json::from_slice::<Claims>(&json).ok()?.hex_identity.parse().ok()
    }

    /// Asks the server for an identity.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub async fn new_identity(&self) -> Result<NewIdentity, SourceError> {
        let bytes = self.send(self.client.post(format!("{}/v1/identity", self.url))).await?;
        serde_json::from_slice(&bytes).map_err(|error| SourceError::Answer(error.to_string()))
    }

    /// The hash of the program that runs. Only the database's owner may ask.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn program(&self) -> Result<Option<ContentHash>, SourceError> {
        let rows: Vec<(String,)> = self.rows("SELECT program_hash FROM st_module".into()).await?;
        let Some((text,)) = rows.into_iter().next() else { return Ok(None) };
        let wrong = || SourceError::Answer(format!("`{text}` is no hash"));
        // A number, so its first byte comes last.
        let number: ContentHash = format!("{:0>64}", text.trim_start_matches("0x")).parse().map_err(|_| wrong())?;
        let mut bytes = number.0;
        bytes.reverse();
        Ok(Some(ContentHash(bytes)))
    }

    /// The program that runs. Only the database's owner may ask.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn program_bytes(&self) -> Result<Option<Vec<u8>>, SourceError> {
        let rows: Vec<(Value,)> = self.rows("SELECT program_bytes FROM st_module".into()).await?;
        let Some((value,)) = rows.into_iter().next() else { return Ok(None) };
        let wrong = || SourceError::Answer("the program is in a form that is not known here".into());
        match value {
            Value::String(hex) => unhex(&hex).map(Some).ok_or_else(wrong),
            Value::Array(bytes) => {
                let byte = |value: &Value| value.as_u64().and_then(|byte| u8::try_from(byte).ok());
                bytes.iter().map(byte).collect::<Option<Vec<u8>>>().map(Some).ok_or_else(wrong)
            }
            _ => Err(wrong()),
        }
    }

    /// What a publish would do.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn preview(&self, program: Vec<u8>) -> Result<Preview, SourceError> {
        let url = format!("{}/v1/database/{}/pre_publish", self.url, self.name);
        // A server that does not know this path closes the connection in the middle of a long body, so an empty one goes first.
        if let Err(SourceError::Refused { status: 404 | 405, .. }) = self.send(self.client.post(&url)).await {
            return Ok(Preview::NotServed);
        }
        let answer = self.send(self.client.post(url).body(program)).await?;
        let answer: Value = serde_json::from_slice(&answer).map_err(|error| SourceError::Answer(error.to_string()))?;
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        if let Some(automatic) = answer.get("AutoMigrate") {
            return Ok(Preview::Migrates {
                plan: text(&automatic["migrate_plan"]),
                breaks_clients: automatic["break_clients"].as_bool().unwrap_or(false),
                token: text(&automatic["token"]),
            });
        }
        match answer.get("ManualMigrate") {
            Some(manual) => Ok(Preview::Refused { reason: text(&manual["reason"]) }),
            None => Ok(Preview::NotServed),
        }
    }

    /// Publishes a program; returns the database's identity. `token` is that of a preview that breaks clients.
    ///
    /// # Errors
    /// When the server refuses it or cannot be asked.
    pub async fn publish(&self, program: Vec<u8>, token: Option<&str>) -> Result<Identity, SourceError> {
        let mut url = format!("{}/v1/database/{}", self.url, self.name);
        if let Some(token) = token {
            url += &format!("?policy=BreakClients&token={token}");
        }
        let bytes = self.send(self.client.put(url).body(program)).await?;
        let answer: Value = serde_json::from_slice(&bytes).map_err(|error| SourceError::Answer(error.to_string()))?;
        let identity = &answer["Success"]["database_identity"];
        let text = identity.as_str().or_else(|| identity["__identity__"].as_str()).unwrap_or_default();
        text.trim_start_matches("0x").parse().map_err(|_| SourceError::Answer(answer.to_string()))
    }

    /// Deletes the database.
    ///
    /// # Errors
    /// When the server refuses or cannot be asked.
    pub async fn delete(&self) -> Result<(), SourceError> {
        self.send(self.client.delete(format!("{}/v1/database/{}", self.url, self.name))).await.map(drop)
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_start_matches("0x");
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}
