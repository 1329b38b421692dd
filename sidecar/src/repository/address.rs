//! Where a repository is: an address that is parsed once, and never put together from pieces of text.
//!
//! Invariants: a path is kept as a path; a part of a URL that means nothing to a store is refused by its name, never dropped;
//! user information never reaches an error.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use object_store::path::Path as Key;
use serde::{Deserialize, Deserializer};
use url::Url;

use crate::config::value::without_user;

/// The address of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    url: String,
    place: Place,
}

/// What an address leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A directory of this machine.
    Directory(PathBuf),
    /// This process alone.
    Memory,
    Bucket {
        provider: Provider,
        name: String,
        prefix: Key,
    },
}

/// Whose API a bucket has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    S3,
    Gcs,
    Azure,
}

impl Provider {
    /// What its addresses begin with.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gcs => "gs",
            Self::Azure => "az",
        }
    }
}

impl Address {
    /// Reads an absolute path, or a URL.
    ///
    /// # Errors
    /// What about it cannot be used, and what to write instead.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Self::directory(Path::new(text));
        }
        // The parser would drop them.
        if text.trim() != text || text.contains(char::is_control) {
            return Err(
                "it begins or ends with a space, or holds a control character; write them as %20 and so on".into()
            );
        }
        let shown = without_user(text);
        let parsed = Url::parse(text).map_err(|error| match error {
            url::ParseError::RelativeUrlWithoutBase => {
                format!(
                    "`{shown}` is neither an absolute path nor a URL; write /path, file:///path or s3://BUCKET/PREFIX"
                )
            }
            error => format!("`{shown}` is not a URL: {error}"),
        })?;
        refuse_parts(&parsed)?;
        let place = match parsed.scheme() {
            "file" => Place::Directory(file_path(text, &parsed)?),
            "memory" => Place::Memory,
            "s3" => bucket(Provider::S3, &parsed)?,
            "gs" => bucket(Provider::Gcs, &parsed)?,
            "az" => bucket(Provider::Azure, &parsed)?,
            scheme => return Err(format!("there is no store for `{scheme}:`; use file, s3, gs or az")),
        };
        Ok(Self { url: text.to_owned(), place })
    }

    /// The address of a directory, whatever characters or bytes its name has.
    ///
    /// # Errors
    /// When the current directory, which a relative path needs, is unknown.
    pub fn directory(path: &Path) -> Result<Self, String> {
        let path = std::path::absolute(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let url = Url::from_file_path(&path).map_err(|()| format!("{} is not an absolute path", path.display()))?;
        Ok(Self { url: url.into(), place: Place::Directory(path) })
    }

    /// Reads what a command line gives: there, a path may be relative, and need not be UTF-8.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn from_argument(argument: &OsStr) -> Result<Self, String> {
        let path = Path::new(argument);
        if path.is_absolute() || path.starts_with(".") || path.starts_with("..") {
            return Self::directory(path);
        }
        Self::parse(&argument.to_string_lossy())
    }

    /// As a URL: of a directory its path, percent-encoded.
    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn place(&self) -> &Place {
        &self.place
    }
}

fn refuse_parts(url: &Url) -> Result<(), String> {
    if !url.username().is_empty() || url.password().is_some() {
        return Err("give credentials in the configuration or the environment, not in the address".into());
    }
    let plain = if url.scheme() == "file" { ", or give the plain path" } else { "" };
    if url.fragment().is_some() {
        return Err(format!("`#` begins a fragment, which no repository has; write %23 for a `#` in a name{plain}"));
    }
    if url.query().is_some() {
        return Err(format!("`?` begins a query, which no repository has; write %3F for a `?` in a name{plain}"));
    }
    if url.port().is_some() {
        return Err("it has a port, and a bucket has none; give the store's own address as repository.endpoint".into());
    }
    Ok(())
}

fn file_path(text: &str, url: &Url) -> Result<PathBuf, String> {
    // The parser takes `file:a` for /a, and `\` for `/`.
    let is_absolute = text.split_once(':').is_some_and(|(_, rest)| rest.starts_with('/'));
    match url.to_file_path() {
        _ if text.contains('\\') => Err("write %5C for a `\\` in a name, or give the plain path".into()),
        Ok(path) if is_absolute => Ok(path),
        _ => Err(format!("`{text}` is not an absolute path on this machine; write file:///path")),
    }
}

fn bucket(provider: Provider, url: &Url) -> Result<Place, String> {
    let name = url.host_str().unwrap_or_default().to_owned();
    if name.is_empty() {
        return Err(format!("`{url}` names no bucket; write {}://BUCKET/PREFIX", url.scheme()));
    }
    let prefix = Key::from_url_path(url.path()).map_err(|error| error.to_string())?;
    Ok(Place::Bucket { provider, name, prefix })
}

/// Reads an address for the configuration, which holds it as a URL. What is wrong with it is reported by its check.
pub(crate) fn as_url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    Ok(text.map(|text| Address::parse(&text).map_or(text, |address| address.url)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    fn path_of(address: &Address) -> &Path {
        let Place::Directory(path) = address.place() else { panic!("{address:?}") };
        path
    }

    #[test]
    fn any_directory_name_survives_its_url() {
        for name in
            [&b"plain"[..], b"#1", b"a?b", b"100%", b"%41", b" two  spaces ", b"back\\slash", b"\xff\xfe", b"@:"]
        {
            let path = Path::new("/srv").join(OsStr::from_bytes(name)).join("repository");
            let address = Address::directory(&path).unwrap();
            assert_eq!(path_of(&address), path);
            assert_eq!(path_of(&Address::parse(address.url()).unwrap()), path, "{}", address.url());
            assert_eq!(path_of(&Address::from_argument(path.as_os_str()).unwrap()), path);
        }
        assert_eq!(path_of(&Address::parse("/srv #1/repo").unwrap()), Path::new("/srv #1/repo"));
        assert_eq!(path_of(&Address::parse("file:///srv%20%231/repo").unwrap()), Path::new("/srv #1/repo"));
        let relative = Address::from_argument(OsStr::new("./repo")).unwrap();
        assert_eq!(path_of(&relative), std::env::current_dir().unwrap().join("repo"));
    }

    #[test]
    fn parts_without_meaning_are_refused() {
        for (text, said) in [
            ("file:///srv #1/repo", "fragment"),
            ("file:///srv?1/repo", "query"),
            ("s3://bucket/prefix#1", "fragment"),
            ("s3://bucket/prefix?region=x", "query"),
            ("s3://bucket:1/prefix", "repository.endpoint"),
            ("s3://id:hush@bucket/prefix", "give credentials"),
            ("s3://id:hush@bucket:x/prefix", "is not a URL"),
            ("file:srv/repo", "not an absolute path"),
            ("file://host/srv", "not an absolute path"),
            ("file:///srv\\repo", "%5C"),
            ("file:///srv/repo ", "space"),
            ("file:///srv/re\npo", "control"),
            ("srv/repo", "neither an absolute path nor a URL"),
            ("s3:///prefix", "names no bucket"),
            ("ftp://host/x", "there is no store"),
        ] {
            let refusal = Address::parse(text).unwrap_err();
            assert!(refusal.contains(said), "{text}: {refusal}");
            assert!(!refusal.contains("hush"), "{refusal}");
        }
        let expected = Place::Bucket {
            provider: Provider::S3,
            name: "bucket".into(),
            prefix: Key::from_url_path("a%23b/c").unwrap(),
        };
        assert_eq!(*Address::parse("s3://bucket/a%23b/c").unwrap().place(), expected);
    }
}
