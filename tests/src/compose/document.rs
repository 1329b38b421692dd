//! The file: YAML with its merges and variables, as Compose reads it.

use std::collections::BTreeMap;
use std::path::Path;

use saphyr::{LoadableYamlNode, Scalar, Yaml};
use serde_json::{Map, Value};

pub struct Document {
    root: Value,
    profiles: Vec<String>,
}

type Result<T> = std::result::Result<T, String>;

impl Document {
    /// Reads compose.yaml and .env of `dir`; variables of the environment win.
    ///
    /// # Errors
    /// When there is none, it is no YAML, or a variable that must be set is not.
    pub fn load(dir: &Path, profiles: &[String], strict: bool) -> Result<Self> {
        let file = dir.join("compose.yaml");
        let text = std::fs::read_to_string(&file).map_err(|error| format!("read {}: {error}", file.display()))?;
        let variables = variables(&std::fs::read_to_string(dir.join(".env")).unwrap_or_default());
        let mut root = parse(&text)?;
        interpolate(&mut root, &variables, strict)?;
        let mut profiles = profiles.to_vec();
        let named = variables.get("COMPOSE_PROFILES").map(String::as_str).unwrap_or_default();
        profiles.extend(named.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()));
        Ok(Self { root, profiles })
    }

    pub fn root(&self) -> &Value {
        &self.root
    }

    /// # Errors
    /// When there is none of that name.
    pub fn service(&self, name: &str) -> Result<&Value> {
        self.root["services"].get(name).ok_or_else(|| format!("no such service: {name}"))
    }

    pub fn names(&self) -> Vec<String> {
        self.root["services"].as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect()
    }

    /// The services that a bare `up` starts.
    pub fn active(&self) -> Vec<String> {
        let active = |name: &String| match self.root["services"][name]["profiles"].as_array() {
            Some(profiles) => profiles.iter().any(|profile| self.profiles.iter().any(|active| profile == active)),
            None => true,
        };
        self.names().into_iter().filter(active).collect()
    }

    /// The file of a secret.
    ///
    /// # Errors
    /// When it is not declared.
    pub fn secret(&self, name: &str) -> Result<&str> {
        self.root["secrets"][name]["file"].as_str().ok_or_else(|| format!("secret {name} is not declared"))
    }
}

/// # Errors
/// When it is no YAML, or empty.
pub fn parse(text: &str) -> Result<Value> {
    let documents = Yaml::load_from_str(text).map_err(|error| error.to_string())?;
    Ok(convert(documents.first().ok_or("an empty file")?))
}

/// What stands between `${` and `}`.
fn inner(text: &str) -> impl Iterator<Item = &str> {
    text.split("${").skip(1).filter_map(|rest| rest.split_once('}').map(|(inner, _)| inner))
}

/// The variables that a file asks for.
pub fn variables_of(text: &str) -> Vec<String> {
    let name =
        |inner: &str| inner.chars().take_while(|letter| letter.is_ascii_alphanumeric() || *letter == '_').collect();
    inner(text).map(name).collect()
}

/// The variables with a default, and that.
pub fn defaults_of(text: &str) -> Vec<(String, String)> {
    let pair = |inner: &str| {
        inner
            .split_once(":-")
            .or_else(|| inner.split_once('-'))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
    };
    inner(text).filter_map(pair).collect()
}

fn variables(env: &str) -> BTreeMap<String, String> {
    let lines = env.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let pairs = lines.filter_map(|line| line.split_once('='));
    pairs.map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned())).chain(std::env::vars()).collect()
}

fn convert(yaml: &Yaml<'_>) -> Value {
    match yaml {
        Yaml::Value(Scalar::Boolean(value)) => Value::Bool(*value),
        Yaml::Value(Scalar::Integer(value)) => Value::from(*value),
        Yaml::Value(Scalar::FloatingPoint(value)) => Value::from(value.0),
        Yaml::Value(Scalar::String(text)) => Value::String(text.to_string()),
        Yaml::Sequence(items) => items.iter().map(convert).collect(),
        Yaml::Mapping(entries) => {
            let mut map = Map::new();
            for (name, value) in entries {
                let value = convert(value);
                match (name.as_str(), value) {
                    // A merge gives what the mapping itself does not say.
                    (Some("<<"), Value::Object(merged)) => {
                        for (name, value) in merged {
                            map.entry(name).or_insert(value);
                        }
                    }
                    (Some(name), value) => drop(map.insert(name.to_owned(), value)),
                    (None, _) => {}
                }
            }
            Value::Object(map)
        }
        _ => Value::Null,
    }
}

fn interpolate(value: &mut Value, variables: &BTreeMap<String, String>, strict: bool) -> Result<()> {
    match value {
        Value::String(text) => *text = expand(text, variables, strict)?,
        Value::Array(items) => items.iter_mut().try_for_each(|item| interpolate(item, variables, strict))?,
        Value::Object(map) => map.values_mut().try_for_each(|value| interpolate(value, variables, strict))?,
        _ => {}
    }
    Ok(())
}

/// `${NAME}`, `${NAME:-default}`, `${NAME-default}`, `${NAME:?message}`, and `$$` for a dollar.
fn expand(text: &str, variables: &BTreeMap<String, String>, strict: bool) -> Result<String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some(inner) = rest.strip_prefix('{') {
            let end = inner.find('}').ok_or_else(|| format!("no end of a variable: {text}"))?;
            out.push_str(&variable(&inner[..end], variables, strict)?);
            rest = &inner[end + 1..];
        } else {
            return Err(format!("a variable without braces: {text}"));
        }
    }
    Ok(out + rest)
}

fn variable(inner: &str, variables: &BTreeMap<String, String>, strict: bool) -> Result<String> {
    let end = inner.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').unwrap_or(inner.len());
    let (name, rule) = inner.split_at(end);
    let set = variables.get(name);
    let filled = set.filter(|value| !value.is_empty());
    match (rule.get(..2), rule.get(..1)) {
        (Some(":-"), _) => Ok(filled.cloned().unwrap_or_else(|| rule[2..].to_owned())),
        (Some(":?"), _) if !strict => Ok(filled.cloned().unwrap_or_default()),
        (Some(":?"), _) => {
            filled.cloned().ok_or_else(|| format!("required variable {name} is missing a value: {}", &rule[2..]))
        }
        (_, Some("-")) => Ok(set.cloned().unwrap_or_else(|| rule[1..].to_owned())),
        (_, None) => Ok(set.cloned().unwrap_or_default()),
        _ => Err(format!("a variable that is not understood: {inner}")),
    }
}
