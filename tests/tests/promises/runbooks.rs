//! Every runbook is executed: on the services of compose.yaml, with what it is for really provoked before, and its proof checked after.

use std::path::Path;

use harness::host::Host;
use harness::page::Page;
use serde_json::Value;

/// A deployment that `set-up-from-nothing` has made; `None` where its processes cannot be.
struct Deployment {
    host: Host,
}

impl Deployment {
    fn new() -> Option<Self> {
        let host = Host::new(Path::new(env!("CARGO_BIN_EXE_docker")))?;
        let deployment = Self { host };
        deployment.follow("set-up-from-nothing", &[]);
        Some(deployment)
    }

    /// Does what a page says, from its first command to its last.
    fn follow(&self, page: &str, values: &[(&str, &str)]) -> String {
        self.host.ok(&Page::read(&format!("runbooks/{page}.md")).script(None, values))
    }

    fn sidecar(&self, command: &str) -> Value {
        let out = self.host.ok(&format!("docker compose exec sidecar inner-universe --json {command}"));
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{command}: {error}: {out}"))
    }
}

#[test]
fn a_deployment_is_set_up_from_nothing() {
    let Some(deployment) = Deployment::new() else { return };
    let status = deployment.sidecar("status");
    assert_eq!(status["problems"], serde_json::json!([]), "{status}");
}
