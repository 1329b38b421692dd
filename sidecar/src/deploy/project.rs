//! `spacetime.json`, the project file of the `spacetime` CLI: databases, their modules and their server.
//!
//! Overlays and inheritance are those of the CLI: later files replace whole keys, children inherit what they do not say.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// The file's name without its ending.
const NAME: &str = "spacetime";
/// Where a module comes from. A child that names one of them inherits none.
const SOURCES: [&str; 3] = ["module-path", "bin-path", "js-path"];

/// One database of a project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Project {
    pub database: String,
    /// The address of its server, where the file names one.
    pub server: Option<String>,
    pub source: Option<Source>,
}

/// Where a module comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A directory to build it from.
    Directory(PathBuf),
    /// A compiled module.
    File(PathBuf),
}

impl Project {
    /// Reads the project in `dir`, with the overlays of `environment`. `database` is one of several; the first when left out.
    ///
    /// # Errors
    /// When there is none, a file is not as it should be, or the project has no such database.
    pub fn read(dir: &Path, environment: Option<&str>, database: Option<&str>) -> Result<Self, String> {
        let mut root =
            load(&dir.join(format!("{NAME}.json")))?.ok_or_else(|| format!("{} has no {NAME}.json", dir.display()))?;
        let mut overlays = vec![format!("{NAME}.local.json")];
        if let Some(environment) = environment {
            overlays.extend([format!("{NAME}.{environment}.json"), format!("{NAME}.{environment}.local.json")]);
        }
        for overlay in overlays {
            root.extend(load(&dir.join(overlay))?.unwrap_or_default());
        }
        let mut targets = Vec::new();
        flatten(&root, &Map::new(), &mut targets)?;
        let named = |target: &&Map<String, Value>| database.is_none_or(|name| text(target, "database") == Some(name));
        let Some(target) = targets.iter().find(named) else {
            let known: Vec<_> = targets.iter().filter_map(|target| text(target, "database")).collect();
            let database = database.unwrap_or_default();
            return Err(format!("{NAME}.json has no database `{database}`; it has {}", known.join(", ")));
        };
        let place = |name: &str| text(target, name).map(|path| dir.join(path));
        let compiled = place("bin-path").or_else(|| place("js-path")).map(Source::File);
        Ok(Self {
            database: text(target, "database").ok_or("it names no `database`")?.to_owned(),
            server: text(target, "server").map(address).transpose()?,
            source: compiled.or_else(|| place("module-path").map(Source::Directory)),
        })
    }
}

fn load(path: &Path) -> Result<Option<Map<String, Value>>, String> {
    let refuse = |reason: String| format!("{}: {reason}", path.display());
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| refuse(error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(refuse(error.to_string())),
    }
}

/// A target and its children, each with what it inherits.
fn flatten(
    target: &Map<String, Value>,
    above: &Map<String, Value>,
    into: &mut Vec<Map<String, Value>>,
) -> Result<(), String> {
    let has_source = SOURCES.iter().any(|name| target.contains_key(*name));
    let is_inherited =
        |name: &str| name != "database" && name != "children" && !(has_source && SOURCES.contains(&name));
    let mut whole: Map<String, Value> = above.clone().into_iter().filter(|(name, _)| is_inherited(name)).collect();
    whole.extend(target.clone());
    into.push(whole.clone());
    let Some(children) = target.get("children") else { return Ok(()) };
    let children = children.as_array().ok_or("`children` is not a list")?;
    children.iter().try_for_each(|child| flatten(child.as_object().ok_or("a child is not an object")?, &whole, into))
}

fn text<'a>(target: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    target.get(name)?.as_str()
}

/// The address of a server by the name that the CLI knows it by, its domain, or its URL.
fn address(server: &str) -> Result<String, String> {
    match server {
        "local" => Ok("http://127.0.0.1:3000".to_owned()),
        "maincloud" => {
            Err("the server `maincloud` is not one whose files can be reached; give --server URL".to_owned())
        }
        url if url.contains("://") => Ok(url.trim_end_matches('/').to_owned()),
        domain if domain.contains('.') || domain.contains(':') => Ok(format!("https://{domain}")),
        name => Err(format!("the server `{name}` is a name that the `spacetime` CLI knows alone; give --server URL")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn project(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).expect("write");
        }
        dir
    }

    #[test]
    fn later_files_replace_whole_keys() {
        let dir = project(&[
            ("spacetime.json", r#"{"database": "game", "module-path": "./server", "server": "maincloud", "dev": {}}"#),
            ("spacetime.local.json", r#"{"server": "https://stdb.example.com/"}"#),
            ("spacetime.dev.json", r#"{"server": "local", "database": "game-dev"}"#),
            ("spacetime.dev.local.json", r#"{"database": "game-dev-tyler"}"#),
        ]);
        let source = Some(Source::Directory(dir.path().join("./server")));
        let plain = Project::read(dir.path(), None, None).expect("a project");
        let server = Some("https://stdb.example.com".to_owned());
        assert_eq!(plain, Project { database: "game".into(), server, source: source.clone() });
        let dev = Project::read(dir.path(), Some("dev"), None).expect("a project");
        let server = Some("http://127.0.0.1:3000".to_owned());
        assert_eq!(dev, Project { database: "game-dev-tyler".into(), server, source });
    }

    #[test]
    fn children_inherit_what_they_do_not_say() {
        let dir = project(&[(
            "spacetime.json",
            r#"{"database": "a", "bin-path": "a.wasm", "server": "stdb.example.com",
                "children": [{"database": "b"}, {"database": "c", "js-path": "c.js"}, {"database": "d", "module-path": "d"}]}"#,
        )]);
        let of = |name: &str| Project::read(dir.path(), None, Some(name)).expect("a database");
        let file = |name: &str| Some(Source::File(dir.path().join(name)));
        assert_eq!([of("a").source, of("b").source, of("c").source], [file("a.wasm"), file("a.wasm"), file("c.js")]);
        assert_eq!(of("d").source, Some(Source::Directory(dir.path().join("d"))));
        assert!(["a", "b", "c", "d"].iter().all(|name| of(name).server.as_deref() == Some("https://stdb.example.com")));
        let unknown = Project::read(dir.path(), None, Some("x")).expect_err("none is called so");
        assert!(unknown.contains("a, b, c, d"), "{unknown}");
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let refused = |files: &[(&str, &str)]| Project::read(project(files).path(), None, None).expect_err("refused");
        assert!(refused(&[]).contains("has no spacetime.json"));
        assert!(refused(&[("spacetime.json", "{")]).contains("spacetime.json: "));
        assert!(refused(&[("spacetime.json", r#"{"server": "local"}"#)]).contains("`database`"));
        assert!(refused(&[("spacetime.json", r#"{"database": "a", "server": "prod"}"#)]).contains("--server URL"));
    }
}
