//! The server's binary and its command line, which differs between releases.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::config::Config;
use crate::datadir::DataDir;
use crate::release::Release;
use crate::standalone::StandaloneError;

/// The name of the server's binary.
const NAME: &str = "spacetimedb-standalone";

/// A server that can be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binary {
    pub path: PathBuf,
    /// As it tells itself, such as `1.2.0`; `None` when it does not.
    pub version: Option<String>,
}

impl Binary {
    /// The one that the configuration names, or else the one on the PATH, or where the `spacetime` installer puts it.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(config: &Config) -> Result<Self, StandaloneError> {
        let path = match &config.spacetimedb_config.server_bin {
            Some(path) if path.is_file() => path.clone(),
            Some(path) => return Err(StandaloneError::NotFound(Some(path.clone()))),
            None => usual_places().find(|path| path.is_file()).ok_or(StandaloneError::NotFound(None))?,
        };
        let version = version_of(&path);
        Ok(Self { path, version })
    }

    /// The command that serves `data_dir` at `address`, everything as the configuration says.
    pub fn serve(&self, config: &Config, data_dir: &Path, address: &str) -> Vec<OsString> {
        let mut command: Vec<OsString> = vec![self.path.clone().into(), "start".into()];
        let mut option = |name: &str, value: OsString| command.extend([name.into(), value]);
        option("--data-dir", data_dir.into());
        option("--listen-addr", address.into());
        // By name, since what config.toml names comes before a directory that is given.
        let keys = config.spacetimedb_config.keys_of(data_dir);
        option("--jwt-priv-key-path", keys.private.into());
        option("--jwt-pub-key-path", keys.public.into());
        if self.release().bounds_page_pool() {
            option("--page_pool_max_size", page_pool_bytes(config).to_string().into());
        }
        if self.release().asks_questions() {
            command.push("--non-interactive".into());
        }
        command
    }

    /// Refuses a data directory that a newer server used last, and warns of one that an older server did.
    ///
    /// # Errors
    /// [`StandaloneError::Older`] when this server would not open it.
    pub fn check(&self, data_dir: &Path) -> Result<(), StandaloneError> {
        // What is wrong with the directory itself is found when it is used.
        let written = DataDir::open(data_dir).ok().and_then(|data| data.metadata().ok().flatten());
        let (Some(written), Some(server)) = (written.map(|metadata| metadata.version), &self.version) else {
            return Ok(());
        };
        let (release, before) = (self.release(), Release::of(Some(&written)));
        if !release.opens(before) {
            let (binary, data_dir, server) = (self.path.clone(), data_dir.to_owned(), server.clone());
            return Err(StandaloneError::Older { binary, server, data_dir, written });
        }
        if !before.opens(release) {
            let data_dir = data_dir.display();
            tracing::warn!(%data_dir, written, server, "an older server used the data last, and cannot open it after this one");
        }
        Ok(())
    }

    pub fn release(&self) -> Release {
        Release::of(self.version.as_deref())
    }
}

/// The server's page pool; nothing is kept in it while caching is off.
pub fn page_pool_bytes(config: &Config) -> u64 {
    match config.feature_flags.enable_caching {
        true => config.server_config.cache_size_mb << 20,
        false => 0,
    }
}

/// Where the configuration has the server listen.
pub fn listen_address(config: &Config) -> String {
    let (address, port) = (&config.spacetimedb_config.address, config.spacetimedb_config.port);
    match address.parse::<std::net::IpAddr>() {
        Ok(ip) => std::net::SocketAddr::new(ip, port).to_string(),
        Err(_) => format!("127.0.0.1:{port}"),
    }
}

fn usual_places() -> impl Iterator<Item = PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path: Vec<_> = std::env::split_paths(&path).map(|dir| dir.join(NAME)).collect();
    // Of the installer, of the official guide to hosting it oneself, and of the official image.
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share/spacetime/bin/current"));
    let roots = home.into_iter().chain(["/stdb/bin/current", "/opt/spacetime"].map(PathBuf::from));
    on_path.into_iter().chain(roots.map(|dir| dir.join(NAME)))
}

fn version_of(path: &Path) -> Option<String> {
    let output = Command::new(path).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let word = |word: &str| word.trim_start_matches('v').trim_end_matches([';', ',']).to_owned();
    text.split_whitespace().map(word).find(|word| Release::of(Some(word)).is_known())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_that_of_the_release() {
        let mut config = Config::default();
        config.server_config.cache_size_mb = 3;
        let binary = |version: &str| Binary { path: "/bin/server".into(), version: Some(version.into()) };
        let line = |binary: &Binary, config: &Config| {
            let words = binary.serve(config, Path::new("/srv/data"), "127.0.0.1:3000");
            words.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        let old = "/bin/server start --data-dir /srv/data --listen-addr 127.0.0.1:3000 \
                   --jwt-priv-key-path /srv/data.keys/id_ecdsa --jwt-pub-key-path /srv/data.keys/id_ecdsa.pub";
        assert_eq!(line(&binary("1.2.0"), &config), old);
        assert_eq!(line(&binary("1.12.0"), &config), format!("{old} --page_pool_max_size 3145728"));
        config.feature_flags.enable_caching = false;
        assert_eq!(line(&binary("2.8.3"), &config), format!("{old} --page_pool_max_size 0 --non-interactive"));
    }

    #[test]
    fn data_that_a_newer_server_used_last_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("control-db")).unwrap();
        let binary = |version: &str| Binary { path: "/bin/server".into(), version: Some(version.into()) };
        let check = |version| binary(version).check(dir.path());
        assert!(check("1.2.0").is_ok(), "it is new");
        std::fs::write(dir.path().join("metadata.toml"), "edition = \"standalone\"\nversion = \"2.8.3\"\n").unwrap();
        let message = check("1.2.0").unwrap_err().to_string();
        assert!(message.contains("is SpacetimeDB 1.2.0") && message.contains("which 2.8.3 used last"), "{message}");
        assert!(check("2.8.0").is_ok() && check("2.14.0").is_ok());
        assert!(Binary { path: "/bin/server".into(), version: None }.check(dir.path()).is_ok());
    }

    #[test]
    fn an_address_of_either_family_has_its_port() {
        let mut config = Config::default();
        for (address, expected) in [("0.0.0.0", "0.0.0.0:7"), ("::1", "[::1]:7"), ("localhost", "127.0.0.1:7")] {
            (config.spacetimedb_config.address, config.spacetimedb_config.port) = (address.into(), 7);
            assert_eq!(listen_address(&config), expected);
        }
    }
}
