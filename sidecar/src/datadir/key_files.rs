//! Where the keys are that a server signs and checks tokens with.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Their names where a directory is given.
pub const PRIVATE: &str = "id_ecdsa";
pub const PUBLIC: &str = "id_ecdsa.pub";

/// The two files, wherever they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFiles {
    pub private: PathBuf,
    pub public: PathBuf,
}

impl KeyFiles {
    /// As a server has them that is given `--jwt-key-dir`.
    pub fn in_dir(dir: &Path) -> Self {
        Self { private: dir.join(PRIVATE), public: dir.join(PUBLIC) }
    }

    /// Those that the `config.toml` of a data directory names. A server takes them before its `--jwt-key-dir`.
    pub fn in_settings(data_dir: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(data_dir.join("config.toml")).ok()?;
        // A server refuses to start with an invalid file, and reports it itself.
        let settings: Settings = toml::from_str(&text).ok()?;
        let named = settings.certificate_authority?;
        Some(Self { private: named.jwt_priv_key_path, public: named.jwt_pub_key_path })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Settings {
    certificate_authority: Option<CertificateAuthority>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct CertificateAuthority {
    jwt_priv_key_path: PathBuf,
    jwt_pub_key_path: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_in_a_directory_or_where_the_servers_settings_name_them() {
        let dir = tempfile::tempdir().unwrap();
        let found = || KeyFiles::in_settings(dir.path());
        assert_eq!(found(), None);
        for (text, expected) in [
            ("", false),
            ("[logs]\nlevel = \"info\"\n", false),
            ("[certificate-authority]\njwt-priv-key-path = \"/etc/key\"\n", false),
            ("[certificate-authority]\njwt-priv-key-path = \"/etc/a\"\njwt-pub-key-path = \"/etc/b\"\n", true),
            ("[certificate-authority", false),
        ] {
            std::fs::write(dir.path().join("config.toml"), text).unwrap();
            let named = KeyFiles { private: "/etc/a".into(), public: "/etc/b".into() };
            assert_eq!(found(), expected.then_some(named), "{text}");
        }
        assert_eq!(KeyFiles::in_dir(Path::new("/k")).public, Path::new("/k/id_ecdsa.pub"));
    }
}
