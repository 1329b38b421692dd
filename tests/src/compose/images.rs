//! What stands in for each image of compose.yaml.

use std::path::{Path, PathBuf};

use crate::tools;

#[derive(Default)]
pub struct Substitute {
    pub entrypoint: Vec<String>,
    /// Files of this machine, and where the container has them.
    pub programs: Vec<(PathBuf, String)>,
    /// What the image adds to PATH.
    pub path: Option<String>,
}

/// # Errors
/// When nothing stands in for the image.
pub fn substitute(image: &str) -> Result<Substitute, String> {
    let name = image.split(':').next().unwrap_or_default();
    let script = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("src/compose/images").join(name);
    let bin = |file: PathBuf, name: &str| (file, format!("/usr/local/bin/{name}"));
    // As the image has it: only the command line tool is on its PATH.
    let server = || (tools::server(), "/opt/spacetime/spacetimedb-standalone".to_owned());
    let ours = || {
        let module = (
            tools::wasm_path("inner_universe_module"),
            "/usr/local/share/inner-universe/inner_universe_module.wasm".into(),
        );
        vec![bin(tools::inner_universe(), "inner-universe"), module]
    };
    let entrypoint = vec!["/usr/local/bin/inner-universe".to_owned()];
    match name {
        "busybox" => Ok(Substitute::default()),
        "clockworklabs/spacetime" => Ok(Substitute {
            entrypoint: vec!["spacetime".into()],
            programs: vec![server(), bin(script("spacetime.sh"), "spacetime")],
            path: None,
        }),
        "inner-universe" => Ok(Substitute { entrypoint, programs: ours(), path: None }),
        "inner-universe-operator" => {
            let programs = [ours(), vec![server()]].concat();
            Ok(Substitute { entrypoint, programs, path: added_path("operator") })
        }
        "minio/minio" => {
            let s3 = tools::s3s().ok_or("no S3 server is prepared; run `cargo xtask test`")?;
            let programs = vec![bin(s3, "s3s-fs"), bin(script("minio.sh"), "minio")];
            Ok(Substitute { entrypoint: Vec::new(), programs, path: None })
        }
        _ => Err(format!("nothing on this machine stands in for the image {image}")),
    }
}

/// What a stage of our Dockerfile puts before PATH.
fn added_path(stage: &str) -> Option<String> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Dockerfile")).ok()?;
    let (_, stage) = text.split_once(&format!(" AS {stage}\n"))?;
    let stage = stage.split("\nFROM ").next()?;
    let (_, path) = stage.split_once("ENV PATH=\"")?;
    path.split_once(":${PATH}\"").map(|(added, _)| added.to_owned())
}

/// The check of a service's health, where what stands in has no path for it.
pub fn health(service: &str, test: Vec<String>) -> Vec<String> {
    match service {
        "s3" => ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/9000"].map(str::to_owned).into(),
        _ => test,
    }
}
