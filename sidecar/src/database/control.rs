//! What a database's owner asks of the server: to publish a module, to delete the database, who one is.

use std::time::Duration;

use backon::{ConstantBuilder, Retryable as _};
use base64::Engine as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::clock::{Clock as _, SystemClock};
use crate::ids::{ContentHash, Identity};
use crate::observe::server::{Database, SourceError};

/// A new identity, and the token that proves it.
#[derive(Deserialize)]
pub struct NewIdentity {
    pub identity: String,
    pub token: String,
}

/// What runs a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostType {
    /// WebAssembly: of Rust, C# and C++.
    #[default]
    Wasm,
    /// A bundle of JavaScript, or of TypeScript compiled to it. Servers before 1.6.0 run none.
    Js,
}

impl HostType {
    const WASM_MAGIC: &[u8] = b"\0asm";

    /// As the program's first bytes have it.
    pub fn of(program: &[u8]) -> Self {
        if program.starts_with(Self::WASM_MAGIC) { Self::Wasm } else { Self::Js }
    }

    /// How the name of a file of it ends.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Wasm => ".wasm",
            Self::Js => ".js",
        }
    }

    /// What a request says of it: nothing where every release takes the default.
    fn query(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Wasm => &[],
            Self::Js => &[("host_type", "Js")],
        }
    }
}

/// What the server says of a publish before it is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Preview {
    /// This release does not tell.
    NotServed,
    /// It would be done, in these steps. The token proves that they were seen.
    Migrates {
        steps: Vec<String>,
        breaks_clients: bool,
        token: String,
        /// From a module of the server's major release before this one.
        is_major_upgrade: bool,
    },
    Refused {
        reason: String,
    },
}

impl Preview {
    fn of(answer: &Value) -> Self {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let flag = |value: &Value| value.as_bool().unwrap_or(false);
        if let Some(automatic) = answer.get("AutoMigrate") {
            return Self::Migrates {
                steps: steps(&text(&automatic["migrate_plan"])),
                breaks_clients: flag(&automatic["break_clients"]),
                token: text(&automatic["token"]),
                is_major_upgrade: flag(&automatic["major_version_upgrade"]),
            };
        }
        match answer.get("ManualMigrate") {
            Some(manual) => Self::Refused { reason: steps(&text(&manual["reason"])).join("; ") },
            None => Self::NotServed,
        }
    }
}

/// The steps of a plan for people to read: each begins with an arrow and may go on in indented lines.
fn steps(plan: &str) -> Vec<String> {
    let mut steps: Vec<String> = Vec::new();
    for line in without_colours(plan).lines() {
        let text = line.trim();
        let is_frame = text.chars().all(|c| c == '\u{2501}');
        if is_frame || matches!(text, "Database Migration Plan" | "Errors occurred:") {
            continue;
        }
        let head = text.trim_start_matches(['\u{25b8}', ' ']);
        match steps.last_mut() {
            Some(step) if head.len() == text.len() && line.starts_with(' ') => {
                step.push(' ');
                step.push_str(text);
            }
            _ => steps.push(head.to_owned()),
        }
    }
    steps
}

/// Without the sequences by which terminals are told colours.
fn without_colours(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, escaped)) = rest.split_once("\u{1b}[") {
        plain.push_str(before);
        rest = escaped.split_once('m').map_or("", |(_, after)| after);
    }
    plain.push_str(rest);
    plain
}

/// How often, and after which pause, it is looked whether a publish was done that the server did not confirm in time.
const CONFIRMATION_LOOKS: usize = 120;
const CONFIRMATION_PAUSE: Duration = Duration::from_millis(500);

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
        let style = [("style", "NoColor")];
        let url = with_query(&url, style.iter().chain(HostType::of(&program).query()))?;
        let answer = self.send(self.client.post(url).body(program)).await?;
        let answer: Value = serde_json::from_slice(&answer).map_err(|error| SourceError::Answer(error.to_string()))?;
        Ok(Preview::of(&answer))
    }

    /// Publishes a program; returns the database's identity. `token` is that of a preview that breaks clients.
    ///
    /// # Errors
    /// When the server refuses it or cannot be asked.
    pub async fn publish(&self, program: Vec<u8>, token: Option<&str>) -> Result<Identity, SourceError> {
        let hash = ContentHash(spacetimedb_sats::hash::hash_bytes(&program).data);
        let policy = token.map(|token| [("policy", "BreakClients"), ("token", token)]);
        let query = HostType::of(&program).query().iter().chain(policy.iter().flatten());
        let url = with_query(&format!("{}/v1/database/{}", self.url, self.name), query)?;
        let bytes = match self.send(self.client.put(url).body(program)).await {
            Err(error @ SourceError::Refused { status: 504, .. }) => return self.published(&hash, error).await,
            bytes => bytes?,
        };
        let answer: Value = serde_json::from_slice(&bytes).map_err(|error| SourceError::Answer(error.to_string()))?;
        let identity = &answer["Success"]["database_identity"];
        let text = identity.as_str().or_else(|| identity["__identity__"].as_str()).unwrap_or_default();
        text.trim_start_matches("0x").parse().map_err(|_| SourceError::Answer(answer.to_string()))
    }

    /// Looks whether a publish was done that the server did not confirm in time.
    async fn published(&self, hash: &ContentHash, unconfirmed: SourceError) -> Result<Identity, SourceError> {
        let look = || async { self.program().await.ok().filter(|program| *program == Some(*hash)).ok_or(()) };
        let patience = ConstantBuilder::default().with_delay(CONFIRMATION_PAUSE).with_max_times(CONFIRMATION_LOOKS);
        match look.retry(patience).sleep(|pause| SystemClock.sleep(pause)).await {
            Ok(_) => self.identity().await,
            Err(()) => Err(unconfirmed),
        }
    }

    /// Deletes the database.
    ///
    /// # Errors
    /// When the server refuses or cannot be asked.
    pub async fn delete(&self) -> Result<(), SourceError> {
        self.send(self.client.delete(format!("{}/v1/database/{}", self.url, self.name))).await.map(drop)
    }
}

fn with_query<'a>(url: &str, query: impl Iterator<Item = &'a (&'a str, &'a str)>) -> Result<reqwest::Url, SourceError> {
    let mut query = query.peekable();
    let parsed = match query.peek() {
        Some(_) => reqwest::Url::parse_with_params(url, query),
        None => reqwest::Url::parse(url),
    };
    parsed.map_err(|error| SourceError::Unreachable { url: url.to_owned(), reason: error.to_string() })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_start_matches("0x");
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a 2.8.3 server answered, by what was asked.
    fn recorded(what: &str) -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/api-2.8.3/pre_publish.json");
        let all: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let exchanges = all["exchanges"].as_array().unwrap();
        let exchange = exchanges.iter().find(|exchange| exchange["what"] == what).unwrap();
        serde_json::from_str(exchange["response"]["body"].as_str().unwrap()).unwrap()
    }

    fn previewed(what: &str) -> (Vec<String>, bool, String) {
        match Preview::of(&recorded(what)) {
            Preview::Migrates { steps, breaks_clients, token, is_major_upgrade: false } => {
                (steps, breaks_clients, token)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_plan_is_read_without_its_frame_and_its_colours() {
        let token = "0x90161a15a25bdc0d45ac98669621fa9e87159ff9b932f80bc88cd8b1d56fd1e5";
        assert_eq!(previewed("unchanged (NoColor)"), (Vec::new(), false, token.to_owned()));
        let added = "Created user table: extra (public) Columns: \u{2022} id: U64 \u{2022} text: String Unique constraints: \
                     \u{2022} extra_id_key on [id] Indexes: \u{2022} extra_id_idx_btree on [id]";
        let (steps, breaks, _) = previewed("compatible (NoColor)");
        assert_eq!((steps[0].as_str(), breaks), (added, false));
        for what in ["style left out", "compatible (AnsiColor)", "breaking (AnsiColor)"] {
            let plain = what.replace("style left out", "unchanged (NoColor)").replace("AnsiColor", "NoColor");
            assert_eq!(previewed(what), previewed(&plain));
        }
        let (steps, breaks, _) = previewed("breaking (NoColor)");
        assert!(breaks && steps[0].starts_with("Removed anonymous view: group_one "), "{steps:?}");
    }

    #[test]
    fn a_refusal_gives_each_reason_once_in_one_line() {
        let what = "bundled module, next inner_universe_module_next (AnsiColor)";
        let reason = "Adding a column severity to table event_log requires a default value annotation".to_owned();
        assert_eq!(Preview::of(&recorded(what)), Preview::Refused { reason });
    }

    #[test]
    fn programs_are_told_apart_by_how_they_begin() {
        assert_eq!(HostType::of(b"\0asm\x01\0\0\0"), HostType::Wasm);
        assert_eq!(HostType::of(b"export const schema = 1;"), HostType::Js);
        assert_eq!(HostType::of(b""), HostType::Js);
    }
}
