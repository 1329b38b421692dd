//! Where the parts are that `cargo xtask` prepares.

use std::path::PathBuf;
use std::sync::OnceLock;

use inner_universe::config::Config;
use inner_universe::release::Release;
use inner_universe::standalone::command::Binary;

/// The server binary under test.
pub fn server() -> PathBuf {
    from_env("SPACETIMEDB_STANDALONE")
        .unwrap_or_else(|| cache().join("tools/spacetimedb-1.2.0/bin/spacetimedb-standalone"))
}

/// The release of the server under test, by which a few expectations differ.
pub fn release() -> Release {
    static RELEASE: OnceLock<Release> = OnceLock::new();
    *RELEASE.get_or_init(|| {
        let mut config = Config::default();
        config.spacetimedb_config.server_bin = Some(server());
        Binary::find(&config).expect("the server").release()
    })
}

/// A module's wasm: `inner_universe_module`, `workload_module`, `workload_module_v2`.
pub fn wasm(name: &str) -> Vec<u8> {
    let path = wasm_path(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}; run `cargo xtask test`", path.display()))
}

pub fn wasm_path(name: &str) -> PathBuf {
    from_env("INNER_UNIVERSE_WASM_DIR").unwrap_or_else(built_wasm).join(format!("{name}.wasm"))
}

/// The S3 server s3s-fs.
pub fn s3s() -> Option<PathBuf> {
    from_env("INNER_UNIVERSE_S3S")
}

/// The engine of a newer server, as a program.
pub fn engine_oracle() -> PathBuf {
    from_env("INNER_UNIVERSE_ENGINE_ORACLE").expect("`cargo xtask test` builds the engine")
}

/// How modules are built for wasm32 here.
pub struct WasmBuild {
    pub target: PathBuf,
    pub environment: Vec<(String, String)>,
}

/// What `cargo xtask` builds modules with.
pub fn wasm_build() -> WasmBuild {
    let text = std::env::var("INNER_UNIVERSE_WASM_ENVIRONMENT").unwrap_or_default();
    let pair = |line: &str| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    WasmBuild { target: cache().join("wasm-target"), environment: text.lines().filter_map(pair).collect() }
}

/// The `inner-universe` binary under test.
pub fn inner_universe() -> PathBuf {
    from_env("INNER_UNIVERSE_BIN").unwrap_or_else(|| {
        let mut path = std::env::current_exe().expect("the test's own path");
        path.pop();
        if path.ends_with("deps") {
            path.pop();
        }
        path.join("inner-universe")
    })
}

/// The binary as users run it, which `cargo xtask test --all` builds; else the one under test.
pub fn optimised() -> PathBuf {
    from_env("INNER_UNIVERSE_OPTIMISED").unwrap_or_else(inner_universe)
}

/// A file of `tests/fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Does this run include the long tests?
pub fn all() -> bool {
    std::env::var_os("INNER_UNIVERSE_TEST_ALL").is_some()
}

/// What is kept for every checkout of this user.
pub fn cache() -> PathBuf {
    let base = from_env("XDG_CACHE_HOME").or_else(|| from_env("HOME").map(|home| home.join(".cache")));
    base.expect("HOME or XDG_CACHE_HOME is set").join("inner-universe")
}

fn from_env(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Where `cargo xtask` puts the modules.
fn built_wasm() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/wasm")
}
