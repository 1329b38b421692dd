//! A configuration file as a tree whose keys and values know their lines, whatever the format.

use std::path::Path;

use saphyr::{LoadableYamlNode, MarkedYaml, Scalar, YamlData};
use serde_json::Value;
use toml::de::{DeTable, DeValue};

/// The formats, told apart by the file's extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Toml,
    Json,
    Yaml,
}

impl Format {
    /// `None` for an extension that is none of ours.
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "toml" => Some(Self::Toml),
            "json" => Some(Self::Json),
            "yaml" | "yml" => Some(Self::Yaml),
            _ => None,
        }
    }
}

/// A value with the line it stands on, counted from 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub line: usize,
    pub content: Content,
}

/// Tables are walked key by key; all else is one value.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    Table(Vec<(String, Node)>),
    Value(Value),
}

/// Text that is not of its format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyntaxError {
    pub line: usize,
    pub message: String,
}

const NO_TABLE: &str = "a table of sections is expected";

/// Reads `text` as a table.
///
/// # Errors
/// When the text is not of the format, or holds no table.
pub fn parse(format: Format, text: &str) -> Result<Node, SyntaxError> {
    match format {
        Format::Toml => parse_toml(text),
        Format::Json => {
            let value = serde_json::from_str::<Value>(text)
                .map_err(|error| SyntaxError { line: error.line(), message: error.to_string() })?;
            if !value.is_object() {
                return Err(SyntaxError { line: 1, message: NO_TABLE.into() });
            }
            // JSON is nearly a part of YAML, whose reader keeps lines: it gives these, and nothing else.
            let lines = parse_yaml(&text.replace('\t', " ")).ok();
            Ok(json_node(value, lines.as_ref()))
        }
        Format::Yaml => parse_yaml(text),
    }
}

fn json_node(value: Value, lines: Option<&Node>) -> Node {
    let line = lines.map_or(1, |node| node.line);
    let Value::Object(entries) = value else { return Node { line, content: Content::Value(value) } };
    let line_of = |name: &str| match lines.map(|node| &node.content) {
        // Of a key that is given twice the last one counts.
        Some(Content::Table(known)) => known.iter().rev().find(|(key, _)| key == name).map(|(_, node)| node),
        _ => None,
    };
    let mut table: Vec<_> = entries
        .into_iter()
        .map(|(name, value)| {
            let node = json_node(value, line_of(&name));
            (name, node)
        })
        .collect();
    table.sort_by_key(|(_, node)| node.line);
    Node { line, content: Content::Table(table) }
}

fn parse_toml(text: &str) -> Result<Node, SyntaxError> {
    let table = DeTable::parse(text).map_err(|error| SyntaxError {
        line: line_at(text, error.span().map_or(0, |span| span.start)),
        message: error.message().to_owned(),
    })?;
    Ok(Node { line: 1, content: toml_table(text, table.get_ref()) })
}

fn toml_table(text: &str, table: &DeTable<'_>) -> Content {
    let entry = |(key, value): (&toml::Spanned<std::borrow::Cow<'_, str>>, &toml::Spanned<DeValue<'_>>)| {
        let line = line_at(text, key.span().start);
        let content = match value.get_ref() {
            DeValue::Table(table) => toml_table(text, table),
            value => Content::Value(toml_value(value)),
        };
        (key.get_ref().to_string(), Node { line, content })
    };
    let mut entries: Vec<_> = table.iter().map(entry).collect();
    entries.sort_by_key(|(_, node)| node.line);
    Content::Table(entries)
}

fn toml_value(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(number) => {
            let parsed = i64::from_str_radix(number.as_str(), number.radix());
            parsed.map_or_else(|_| Value::String(number.as_str().to_owned()), Value::from)
        }
        DeValue::Float(number) => {
            let parsed = number.as_str().parse::<f64>();
            parsed.map_or_else(|_| Value::String(number.as_str().to_owned()), Value::from)
        }
        DeValue::Boolean(truth) => Value::Bool(*truth),
        DeValue::Datetime(time) => Value::String(time.to_string()),
        DeValue::Array(items) => Value::Array(items.iter().map(|item| toml_value(item.get_ref())).collect()),
        DeValue::Table(table) => {
            let entries = table.iter().map(|(key, value)| (key.get_ref().to_string(), toml_value(value.get_ref())));
            Value::Object(entries.collect())
        }
    }
}

fn line_at(text: &str, byte: usize) -> usize {
    text.as_bytes().iter().take(byte).filter(|byte| **byte == b'\n').count() + 1
}

fn parse_yaml(text: &str) -> Result<Node, SyntaxError> {
    let documents = MarkedYaml::load_from_str(text)
        .map_err(|error| SyntaxError { line: error.marker().line(), message: error.info().to_owned() })?;
    match documents.as_slice() {
        [] => Ok(Node { line: 1, content: Content::Table(Vec::new()) }),
        [document] => match yaml_node(document)? {
            Node { content: Content::Value(Value::Null), .. } => {
                Ok(Node { line: 1, content: Content::Table(Vec::new()) })
            }
            node @ Node { content: Content::Table(_), .. } => Ok(node),
            Node { line, .. } => Err(SyntaxError { line, message: NO_TABLE.into() }),
        },
        [_, second, ..] => Err(SyntaxError {
            line: second.span.start.line(),
            message: "one document is expected, and here begins a second".into(),
        }),
    }
}

fn yaml_node(yaml: &MarkedYaml<'_>) -> Result<Node, SyntaxError> {
    let line = yaml.span.start.line();
    let refuse = |message: &str| Err(SyntaxError { line, message: message.to_owned() });
    let content = match &yaml.data {
        YamlData::Mapping(entries) => {
            let mut table = Vec::new();
            for (key, value) in entries {
                let YamlData::Value(Scalar::String(name)) = &key.data else {
                    return refuse("keys are texts");
                };
                let node = yaml_node(value)?;
                table.push((name.to_string(), Node { line: key.span.start.line(), ..node }));
            }
            Content::Table(table)
        }
        YamlData::Sequence(items) => {
            let mut list = Vec::new();
            for item in items {
                match yaml_node(item)?.content {
                    Content::Value(value) => list.push(value),
                    Content::Table(_) => return refuse("a list of plain values is expected"),
                }
            }
            Content::Value(Value::Array(list))
        }
        YamlData::Value(scalar) => Content::Value(match scalar {
            Scalar::Null => Value::Null,
            Scalar::Boolean(truth) => Value::Bool(*truth),
            Scalar::Integer(number) => Value::from(*number),
            Scalar::FloatingPoint(number) => Value::from(number.into_inner()),
            Scalar::String(text) => Value::String(text.to_string()),
        }),
        _ => return refuse("aliases and tags are not supported here"),
    };
    Ok(Node { line, content })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_formats_give_the_same_tree_and_the_lines_of_keys() {
        let texts = [
            (Format::Toml, "# a comment\n[archive]\n\nflush_interval = \"2s\"\ncompaction = true\n", 4),
            (
                Format::Json,
                "{\n\t\"archive\": {\n\t\t\"flush_interval\": \"2s\",\n\t\t\"compaction\": true\n\t}\n}\n",
                3,
            ),
            (Format::Yaml, "archive:\n  # why\n  flush_interval: 2s\n  compaction: true\n", 3),
        ];
        for (format, text, line) in texts {
            let tree = parse(format, text).unwrap_or_else(|error| panic!("{format:?}: {error:?}"));
            let Content::Table(sections) = &tree.content else { panic!("{format:?}: {tree:?}") };
            let (name, Node { content: Content::Table(keys), .. }) = &sections[0] else { panic!("{format:?}") };
            assert_eq!(name, "archive");
            assert_eq!(keys[0], ("flush_interval".into(), Node { line, content: Content::Value("2s".into()) }));
            assert_eq!(keys[1].1.content, Content::Value(true.into()));
        }
    }

    #[test]
    fn wrong_syntax_names_its_line() {
        for (format, text, line) in [
            (Format::Toml, "a = 1\nb = = 2\n", 2),
            (Format::Json, "{\"a\": 1,\n\"b\" 2}", 2),
            (Format::Json, "a: 1\n", 1),
            (Format::Yaml, "a: 1\nb: [1, 2\nc: 3\n", 3),
            (Format::Yaml, "- 1\n", 1),
        ] {
            let error = parse(format, text).expect_err(text);
            assert_eq!(error.line, line, "{text}: {error:?}");
        }
    }
}
