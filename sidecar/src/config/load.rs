//! Loads a configuration: defaults, the file, the environment. Every problem is found, each with its place.
//!
//! Each key is read on its own into an otherwise default configuration, so one wrong value hides no other.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::config::tree::{self, Content, Format, Node};
use crate::config::value::REDACTED;

/// What variables of the environment start with; `__` goes down a level: `INNER_UNIVERSE__REPOSITORY__URL`.
pub const ENV_PREFIX: &str = "INNER_UNIVERSE__";

/// Keys that variables of the tools of AWS stand for, in the order in which they count.
const VARIABLES_OF_AWS: [(&str, &[&str]); 2] = [
    ("repository.endpoint", &["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]),
    ("repository.region", &["AWS_REGION", "AWS_DEFAULT_REGION"]),
];

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    Default,
    File { path: PathBuf, line: usize },
    Environment { variable: String },
    Flag { flag: String },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment { variable } => f.write_str(variable),
            Self::Flag { flag } => f.write_str(flag),
        }
    }
}

/// One thing wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file and line, the variable, or the flag.
    pub place: String,
    /// `section.key`; empty where the whole file is meant.
    pub key: String,
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.place.is_empty(), self.key.is_empty()) {
            (true, true) => write!(f, "{}", self.message),
            (false, true) => write!(f, "{}: {}", self.place, self.message),
            (true, false) => write!(f, "{}: {}", self.key, self.message),
            (false, false) => write!(f, "{}: {}: {}", self.place, self.key, self.message),
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError(pub Vec<Problem>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> = self.0.iter().map(Problem::to_string).collect();
        f.write_str(&lines.join("; "))
    }
}

/// A configuration with the source of every value that is not a default.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    pub config: Config,
    sources: BTreeMap<String, Source>,
}

/// One key of the effective configuration.
#[derive(Debug, Clone, Serialize)]
pub struct Effective {
    pub key: String,
    pub value: Value,
    pub source: Source,
}

impl Loaded {
    /// Every key with its value and source, in the order of the schema's sections. Secrets are redacted.
    pub fn effective(&self) -> Vec<Effective> {
        let mut found = Vec::new();
        let Value::Object(sections) = to_value(&self.config) else { return found };
        for (section, keys) in sections {
            let Value::Object(keys) = keys else { continue };
            for (key, value) in keys {
                let key = format!("{section}.{key}");
                let source = self.sources.get(&key).cloned().unwrap_or(Source::Default);
                found.push(Effective { key, value, source });
            }
        }
        found
    }
}

/// Loads `file`, if any, then `environment`, then what flags set, given as `(section.key, value, flag)`.
///
/// # Errors
/// [`ConfigError`] with every problem there is.
pub fn load(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
    flags: &[(&str, Value, &str)],
) -> Result<Loaded, ConfigError> {
    let mut merge = Merge::new();
    if let Some(path) = file {
        merge.file(path);
    }
    let mut variables: Vec<_> = environment.into_iter().collect();
    variables.sort();
    for (name, text) in variables.iter().filter(|(name, _)| name.starts_with(ENV_PREFIX)) {
        merge.variable(name, text);
    }
    for (key, value, flag) in flags {
        merge.value(key, vec![value.clone()], &Source::Flag { flag: (*flag).to_owned() });
    }
    merge.variables_of_aws(&variables);
    merge.finish()
}

struct Merge {
    defaults: Value,
    merged: Map<String, Value>,
    sources: BTreeMap<String, Source>,
    problems: Vec<Problem>,
}

impl Merge {
    fn new() -> Self {
        Self {
            defaults: to_value(&Config::default()),
            merged: Map::new(),
            sources: BTreeMap::new(),
            problems: Vec::new(),
        }
    }

    fn problem(&mut self, place: impl ToString, key: &str, message: impl ToString) {
        let (place, key, message) = (place.to_string(), key.to_owned(), message.to_string());
        self.problems.push(Problem { place, key, message });
    }

    fn file(&mut self, path: &Path) {
        let Some(format) = Format::of(path) else {
            return self.problem(path.display(), "", "a configuration's name ends in .toml, .json, .yaml or .yml");
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => return self.problem(path.display(), "", format!("read the configuration: {error}")),
        };
        let root = match tree::parse(format, &text) {
            Ok(root) => root,
            Err(error) => return self.problem(format!("{}:{}", path.display(), error.line), "", error.message),
        };
        let Content::Table(sections) = root.content else { return };
        for (section, node) in sections {
            let source = Source::File { path: path.to_owned(), line: node.line };
            let Some(known) = self.defaults.get(&section).and_then(Value::as_object).cloned() else {
                let message = unknown("section", &section, sections_of(&self.defaults));
                self.problem(&source, &section, message);
                continue;
            };
            let Content::Table(keys) = node.content else {
                self.problem(&source, &section, "this is a section; its keys are expected here");
                continue;
            };
            for (key, Node { line, content }) in keys {
                let source = Source::File { path: path.to_owned(), line };
                let name = format!("{section}.{key}");
                match content {
                    _ if !known.contains_key(&key) => {
                        let message = unknown("key", &key, known.keys());
                        self.problem(&source, &name, message);
                    }
                    Content::Table(_) => self.problem(&source, &name, "a value is expected here, not a table"),
                    Content::Value(value) => self.value(&name, vec![value], &source),
                }
            }
        }
    }

    fn variable(&mut self, name: &str, text: &str) {
        let source = Source::Environment { variable: name.to_owned() };
        let rest = name.trim_start_matches(ENV_PREFIX).to_ascii_lowercase();
        let Some((section, key)) = rest.split_once("__") else {
            return self.problem(&source, "", "the name is to be INNER_UNIVERSE__SECTION__KEY");
        };
        let Some(known) = self.defaults.get(section).and_then(Value::as_object).cloned() else {
            let message = unknown("section", section, sections_of(&self.defaults));
            return self.problem(&source, section, message);
        };
        let name = format!("{section}.{key}");
        if !known.contains_key(key) {
            let message = unknown("key", key, known.keys());
            return self.problem(&source, &name, message);
        }
        // As compose files have it: an empty variable is one that is not set.
        if text.trim().is_empty() {
            return;
        }
        // A variable is text; what the key wants decides whether it is a number, a truth value or a list.
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(Value::from);
        let readings = match known.get(key) {
            Some(Value::Array(_)) => vec![Value::Array(items.collect())],
            _ => std::iter::once(Value::String(text.to_owned())).chain(serde_json::from_str(text).ok()).collect(),
        };
        self.value(&name, readings, &source);
    }

    /// What the tools of AWS read from the environment stands for keys that are not configured.
    fn variables_of_aws(&mut self, variables: &[(String, String)]) {
        let url = self.merged.get("repository").and_then(|keys| keys.get("url")).and_then(Value::as_str);
        if !url.is_some_and(|url| url.starts_with("s3:")) {
            return;
        }
        let find = |wanted: &str| {
            let found = variables.iter().find(|(name, text)| name == wanted && !text.trim().is_empty());
            found.map(|(_, text)| text.trim().to_owned())
        };
        for (key, names) in VARIABLES_OF_AWS {
            let found = names.iter().find_map(|name| Some((name, find(name)?)));
            if let Some((name, text)) = found.filter(|_| !self.sources.contains_key(key)) {
                self.value(key, vec![text.into()], &Source::Environment { variable: (*name).to_owned() });
            }
        }
    }

    /// Takes the first reading that the key can be.
    fn value(&mut self, name: &str, readings: Vec<Value>, source: &Source) {
        let Some((section, key)) = name.split_once('.') else { return };
        let mut refusal = String::new();
        for value in readings {
            // The last reading's refusal is told: it is the most specific.
            match serde_json::from_value::<Config>(json!({ section: { key: &value } })) {
                Ok(_) => {
                    let keys = self.merged.entry(section).or_insert_with(|| Value::Object(Map::new()));
                    if let Value::Object(keys) = keys {
                        keys.insert(key.to_owned(), value);
                    }
                    self.sources.insert(name.to_owned(), source.clone());
                    return;
                }
                // Of texts the messages say what they are.
                Err(error) if value.is_number() && !holds_secret(section, key) => {
                    refusal = format!("{value} cannot be used: {error}");
                }
                Err(error) => refusal = error.to_string(),
            }
        }
        self.problem(source, name, refusal);
    }

    fn finish(mut self) -> Result<Loaded, ConfigError> {
        let config = match serde_json::from_value::<Config>(Value::Object(self.merged)) {
            Ok(config) => config,
            Err(error) => {
                self.problems.push(Problem { place: String::new(), key: String::new(), message: error.to_string() });
                return Err(ConfigError(self.problems));
            }
        };
        for (key, message) in config.validate() {
            let place = self.sources.get(key).map(Source::to_string).unwrap_or_default();
            self.problems.push(Problem { place, key: key.to_owned(), message });
        }
        if self.problems.is_empty() {
            Ok(Loaded { config, sources: self.sources })
        } else {
            Err(ConfigError(self.problems))
        }
    }
}

fn to_value(config: &Config) -> Value {
    serde_json::to_value(config).unwrap_or_default()
}

/// Returns true if the value of a key is a secret, or several.
fn holds_secret(section: &str, key: &str) -> bool {
    let shows_redacted = |probe: Value| {
        let config = serde_json::from_value::<Config>(json!({ section: { key: probe } })).ok()?;
        Some(to_value(&config).get(section)?.get(key)?.to_string().contains(REDACTED))
    };
    [json!("probe"), json!(["probe"])].into_iter().any(|probe| shows_redacted(probe) == Some(true))
}

fn sections_of(defaults: &Value) -> impl Iterator<Item = &String> {
    defaults.as_object().into_iter().flat_map(Map::keys)
}

fn unknown<'a>(what: &str, name: &str, known: impl Iterator<Item = &'a String>) -> String {
    let known: Vec<&String> = known.collect();
    let likeness = |candidate: &&String| strsim::jaro_winkler(candidate, name);
    let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest {
        Some(nearest) if likeness(nearest) > 0.8 => {
            format!("there is no such {what}; did you mean `{nearest}`?")
        }
        _ => {
            let names: Vec<_> = known.iter().map(|name| name.as_str()).collect();
            format!("there is no such {what}; there are {}", names.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "SWORDFISH";

    /// Every key whose value is a secret.
    fn secret_keys() -> Vec<String> {
        let defaults = to_value(&Config::default());
        let sections = defaults.as_object().into_iter().flatten();
        let keys = sections.flat_map(|(section, keys)| {
            keys.as_object().into_iter().flat_map(Map::keys).map(move |key| (section.clone(), key.clone()))
        });
        keys.filter(|(section, key)| holds_secret(section, key))
            .map(|(section, key)| format!("{section}.{key}"))
            .collect()
    }

    #[test]
    fn no_error_holds_a_secret() {
        let mut keys = secret_keys();
        keys.sort();
        let expected = [
            "http.token",
            "repository.access_key_id",
            "repository.secret_access_key",
            "repository.session_token",
            "telemetry.heartbeat_url",
            "telemetry.otlp_headers",
        ];
        assert_eq!(keys, expected);
        let wrong = [
            json!(SECRET),
            json!([SECRET, 4711]),
            json!([{ SECRET: SECRET }]),
            json!({ SECRET: SECRET }),
            json!(4711),
            json!(-4711),
            json!(4711.5),
            json!([4711]),
            json!([[SECRET]]),
        ];
        for key in keys {
            for value in &wrong {
                let Err(refused) = load(None, [], &[(key.as_str(), value.clone(), "--flag")]) else { continue };
                let text = refused.to_string();
                assert!(!text.contains(SECRET) && !text.contains("4711"), "{key} = {value}: {text}");
            }
        }
    }

    #[test]
    fn a_text_in_the_place_of_a_list_is_said_so() {
        let flags = [("telemetry.otlp_headers", json!("Authorization=Bearer SWORDFISH"), "--flag")];
        let refused = load(None, [], &flags).unwrap_err();
        assert!(refused.to_string().contains("a list of texts is expected"), "{refused}");
    }

    #[test]
    fn passwords_in_addresses_are_refused_and_not_shown() {
        for (key, hint) in [
            ("telemetry.otlp_endpoint", "telemetry.otlp_headers"),
            ("spacetimedb_config.url", "spacetimedb_config.token_file"),
            ("repository.endpoint", "secret_access_key"),
            ("repository.url", "credentials"),
        ] {
            for address in ["https://me:SWORDFISH@host/x", "ftp://me:SWORDFISH@host", "https://me:SWORD FISH@ho st:x"] {
                let refused = load(None, [], &[(key, json!(address), "--flag")]).unwrap_err().to_string();
                assert!(refused.contains(key) && !refused.contains("FISH"), "{key}: {refused}");
                assert!(!address.starts_with("https://me:SWORDFISH") || refused.contains(hint), "{key}: {refused}");
            }
        }
    }

    fn shown(environment: &[(&str, &str)], key: &str) -> (Value, Source) {
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let loaded = load(None, environment, &[]).expect("a configuration");
        let found = loaded.effective().into_iter().find(|effective| effective.key == key).expect("the key");
        (found.value, found.source)
    }

    const URL: (&str, &str) = ("INNER_UNIVERSE__REPOSITORY__URL", "s3://backups/p");
    const OURS: (&str, &str) = ("INNER_UNIVERSE__REPOSITORY__ENDPOINT", "https://ours");
    const SPECIFIC: (&str, &str) = ("AWS_ENDPOINT_URL_S3", "https://specific");
    const GENERAL: (&str, &str) = ("AWS_ENDPOINT_URL", "http://general");

    #[test]
    fn endpoints_of_aws_variables_show_their_source() {
        let variable = |name: &str| Source::Environment { variable: name.to_owned() };
        for (environment, value, source) in [
            (vec![URL, GENERAL], json!("http://general"), variable(GENERAL.0)),
            (vec![URL, GENERAL, SPECIFIC], json!("https://specific"), variable(SPECIFIC.0)),
            (vec![URL, GENERAL, SPECIFIC, OURS], json!("https://ours"), variable(OURS.0)),
            (vec![URL, (GENERAL.0, " ")], Value::Null, Source::Default),
            // Of S3 alone.
            (vec![(URL.0, "file:///backups"), GENERAL], Value::Null, Source::Default),
        ] {
            assert_eq!(shown(&environment, "repository.endpoint"), (value, source), "{environment:?}");
        }
        let region = [URL, ("AWS_DEFAULT_REGION", "here"), ("AWS_REGION", "there")];
        assert_eq!(shown(&region, "repository.region"), (json!("there"), variable("AWS_REGION")));
    }
}
