//! Every runbook is executed: on the services of compose.yaml, with what it is for really provoked before, and its proof checked after.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use harness::host::Host;
use harness::page::Page;
use serde_json::{Value, json};

/// A deployment that `set-up-from-nothing` has made.
struct Deployment {
    host: Host,
}

impl Deployment {
    /// `None` where its processes cannot be.
    fn new() -> Option<Self> {
        let deployment = Self::bare()?;
        deployment.follow_sections("set-up-from-nothing", &["Act"]);
        Some(deployment)
    }

    /// A machine with a checkout.
    fn bare() -> Option<Self> {
        Some(Self { host: Host::new(Path::new(env!("CARGO_BIN_EXE_docker")))? })
    }

    /// Does what a page says, from its first command to its last.
    fn follow(&self, page: &str, values: &[(&str, &str)]) -> String {
        self.host.ok(&runbook(page).script(None, values))
    }

    /// Does what sections of a page say.
    fn follow_sections(&self, page: &str, sections: &[&str]) {
        for section in sections {
            self.host.ok(&runbook(page).script(Some(section), &[]));
        }
    }

    fn sidecar(&self, command: &str) -> Value {
        let out = self.host.ok(&format!("docker compose exec sidecar inner-universe --json {command}"));
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{command}: {error}: {out}"))
    }

    /// Waits until everything is archived: the sidecar's own connection to the module writes at any moment.
    fn caught_up(&self) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let status = self.sidecar("status");
            if status["databases"][0]["lag_transactions"] == 0 {
                return;
            }
            assert!(Instant::now() < end, "{status}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Ids and labels.
    fn restore_points(&self) -> Vec<(String, String)> {
        let list = self.sidecar("backup list");
        let text = |point: &Value, field: &str| point[field].as_str().unwrap_or_default().to_owned();
        let points = list["restore_points"].as_array().expect("restore points").iter();
        points.map(|point| (text(point, "id"), text(point, "label"))).collect()
    }

    fn volume(&self, name: &str) -> PathBuf {
        self.host.dir.join(".volumes").join(name)
    }

    fn ask(&self, path: &str, body: &str) -> String {
        self.host.ok(&format!(
            "curl --fail --silent --show-error --header \"Authorization: Bearer $(cat .volumes/state/owner-token)\" \
             --header 'Content-Type: application/json' --data '{body}' \
             http://127.0.0.1:3000/v1/database/inner-universe/{path}"
        ))
    }

    fn create(&self, names: &[&str]) {
        for name in names {
            self.ask("call/create_entity", &json!([name, "thing", "{}"]).to_string());
        }
    }

    /// The names of all entities.
    fn entities(&self) -> BTreeSet<String> {
        let answer: Value = serde_json::from_str(&self.ask("sql", "select entity_id from entity")).expect("an answer");
        let rows = answer[0]["rows"].as_array().expect("rows");
        rows.iter().map(|row| row[0].as_str().expect("a name").to_owned()).collect()
    }

    /// Waits until all that was written is archived.
    fn archived(&self) {
        self.sidecar("backup create");
    }

    /// The objects of the first repository whose names have `part` in them, oldest name first.
    fn objects(&self, part: &str) -> Vec<PathBuf> {
        let out =
            self.host.ok(&format!("find .volumes/bucket/inner-universe/production -type f -path '*{part}*' | sort"));
        out.lines().map(|line| self.host.dir.join(line)).collect()
    }
}

fn runbook(page: &str) -> Page {
    Page::read(&format!("runbooks/{page}.md"))
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_deployment_is_set_up_from_nothing_keeps_its_secrets_and_outlives_a_kill_of_each_service() {
    let Some(deployment) = Deployment::bare() else { return };
    deployment.follow("set-up-from-nothing", &[]);
    let status = deployment.sidecar("status");
    assert_eq!(status["problems"], json!([]), "{status}");
    deployment.create(&["a"]);
    for service in ["spacetimedb", "sidecar", "s3"] {
        deployment.host.ok(&format!("docker compose kill {service}"));
        assert!(deployment.host.ok("docker compose ps").contains("exited"), "{service}");
        if service != "spacetimedb" {
            deployment.create(&[service]);
        }
        deployment.host.ok("docker compose up --detach --wait");
        deployment.archived();
    }
    assert_eq!(deployment.entities(), names(&["a", "sidecar", "s3"]));
    // The sidecar sees the server's files and cannot touch them, and nobody can write beside the volumes.
    // (The real image has no programs to try that with.)
    if !Host::is_docker() {
        let refused = deployment.host.shell("docker compose exec sidecar /usr/bin/touch /var/lib/spacetimedb/data/x");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("Read-only file system"), "{refused:?}");
        let refused = deployment.host.shell("docker compose exec sidecar /usr/bin/touch /usr/local/bin/x");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("Read-only file system"), "{refused:?}");
        assert_eq!(deployment.host.ok("docker compose exec sidecar /usr/bin/id -u").trim(), "1000");
    }

    let mut told = deployment.host.ok("docker compose config");
    for service in ["volumes", "spacetimedb", "sidecar", "s3"] {
        told += &deployment.host.ok(&format!("docker compose logs {service}"));
    }
    told += &deployment.host.ok("docker compose exec sidecar inner-universe config show");
    for secret in ["s3_access_key", "s3_secret_key", "http_token", "grafana_password", "age_identity"] {
        let text = std::fs::read_to_string(deployment.host.dir.join("secrets").join(secret)).expect("a secret");
        let text = text.lines().last().expect("a line");
        assert!(text.len() >= 32 && !told.contains(text), "{secret} is told");
    }
}

#[test]
fn the_commands_of_readme_lead_to_the_first_drill() {
    let Some(deployment) = Deployment::bare() else { return };
    deployment.host.ok(&Page::read("README.md").script(Some("Operate with docker compose"), &[]));
    let status = deployment.sidecar("status");
    assert_eq!(status["last_drill"]["passed"], true, "{status}");
}

#[test]
fn the_newest_state_is_restored_after_the_servers_files_are_gone() {
    let Some(deployment) = Deployment::new() else { return };
    deployment.create(&["a", "b"]);
    deployment.archived();
    let token = deployment.host.ok("cat .volumes/state/owner-token");
    for gone in ["data/replicas .volumes/server/data/control-db", "data .volumes/server/keys"] {
        deployment.host.ok(&format!("docker compose kill spacetimedb; rm -r .volumes/server/{gone}"));
        deployment.follow("restore-latest", &[]);
        // Tokens that were given out stay good, though the keys that they are signed with were gone too.
        assert_eq!(deployment.host.ok("cat .volumes/state/owner-token"), token);
        assert_eq!(deployment.entities(), names(&["a", "b"]));
    }
    assert_eq!(deployment.entities(), names(&["a", "b"]));
    deployment.create(&["c"]);
    assert_eq!(deployment.entities(), names(&["a", "b", "c"]));
}

#[test]
fn the_state_of_a_time_is_restored_and_what_came_after_it_is_not_lost() {
    let Some(deployment) = Deployment::new() else { return };
    deployment.create(&["a", "b"]);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let at = deployment.host.ok("date -u +%Y-%m-%dT%H:%M:%S.%NZ");
    std::thread::sleep(std::time::Duration::from_millis(1100));
    deployment.ask("call/delete_entity", "[\"a\"]");
    deployment.create(&["wrong"]);
    deployment.follow("restore-to-a-time", &[("AT", at.trim())]);
    assert_eq!(deployment.entities(), names(&["a", "b"]));
    let look = deployment.host.ok(
        "docker compose run --rm restore --data-dir /var/lib/inner-universe-scratch/look --to label:before-the-restore",
    );
    assert!(look.contains("inner-universe"), "{look}");
}

/// Deploys a module that is in the working directory.
fn deploy(deployment: &Deployment, wasm: &[u8]) {
    std::fs::write(deployment.host.dir.join("next.wasm"), wasm).expect("a module");
    deployment.host.ok("docker compose run --rm --volume ./next.wasm:/next.wasm:ro deploy --module-path /next.wasm");
}

#[test]
fn a_bad_deployment_is_undone_and_rows_stay() {
    let Some(deployment) = Deployment::new() else { return };
    let program = || {
        let answer: Value =
            serde_json::from_str(&deployment.ask("sql", "select program_hash from st_module")).expect("an answer");
        answer[0]["rows"].clone()
    };
    let before = program();
    // The same module with a note in it is another program.
    let note = [0, 5, 4, b'n', b'o', b't', b'e'];
    deploy(&deployment, &[harness::tools::wasm("inner_universe_module"), note.into()].concat());
    assert_ne!(program(), before);
    deployment.create(&["a"]);
    deployment.follow_sections("undo-a-bad-deploy", &["First check", "Act", "Prove"]);
    assert_eq!((program(), deployment.entities()), (before, names(&["a"])));
}

#[test]
fn a_bad_deployment_that_brought_tables_is_undone_with_its_rows() {
    let Some(deployment) = Deployment::new() else { return };
    let has_more = || deployment.ask("sql", "select table_name from st_table").contains("annotation");
    deployment.create(&["a"]);
    deploy(&deployment, &harness::tools::wasm("inner_universe_module_more"));
    deployment.create(&["b"]);
    assert!(has_more());
    deployment
        .follow_sections("undo-a-bad-deploy", &["First check", "If its tables changed, or rows were spoiled", "Prove"]);
    assert!(!has_more());
    assert_eq!(deployment.entities(), names(&["a"]));
}

#[test]
fn databases_move_to_another_machine_with_their_tokens() {
    if Host::is_docker() {
        println!("skipped: one Docker engine is not two machines");
        return;
    }
    let (Some(old), Some(new)) = (Deployment::new(), Deployment::bare()) else { return };
    old.create(&["a", "b"]);
    old.follow_sections("move-to-another-machine", &["On the old machine"]);
    let blocks = runbook("set-up-from-nothing").blocks(Some("Act"));
    // Images, secrets and .env; the page goes on in place of the start.
    new.host.ok(&blocks[..2].concat());
    for (from, to) in [("move-2.stb", "move-2.stb"), ("secrets/age_identity", "move_identity")] {
        std::fs::copy(old.host.dir.join(from), new.host.dir.join(to)).expect("carried over");
    }
    new.follow_sections("move-to-another-machine", &["On the new machine", "Prove"]);
    let token = old.host.ok("cat .volumes/state/owner-token");
    let rows = new.host.ok(&format!(
        "curl --fail --silent --show-error --header 'Authorization: Bearer {}' --data 'select entity_id from entity' \
         http://127.0.0.1:3000/v1/database/inner-universe/sql",
        token.trim()
    ));
    assert!(rows.contains("\"a\"") && rows.contains("\"b\""), "{rows}");
}

#[test]
fn an_archive_that_lags_since_its_sidecar_is_gone_catches_up() {
    let Some(deployment) = Deployment::new() else { return };
    deployment.host.ok("docker compose kill sidecar");
    deployment.create(&["a"]);
    deployment.follow("archive-lag", &[]);
    deployment.caught_up();
}

#[test]
fn an_outage_of_the_store_is_found_by_its_page_and_mended() {
    let Some(deployment) = Deployment::new() else { return };
    deployment.host.ok("docker compose kill s3");
    deployment.create(&["a", "b"]);
    deployment.follow("store-outage", &[]);
    deployment.caught_up();
}

#[test]
fn an_emptied_bucket_is_refused_until_a_new_repository_is_wanted() {
    let Some(deployment) = Deployment::new() else { return };
    deployment.create(&["a"]);
    deployment.archived();
    deployment.host.ok("docker compose stop sidecar");
    for object in deployment.objects("") {
        std::fs::remove_file(object).expect("an object");
    }
    let refused = deployment.host.shell("docker compose up --detach --wait sidecar");
    assert!(!refused.status.success(), "{refused:?}");
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("is not at s3://"), "{text}");
    assert_eq!(deployment.objects(""), Vec::<PathBuf>::new(), "nothing is made without being asked for");
    deployment.follow("repository-missing", &[]);
    deployment.caught_up();
}

#[test]
fn the_page_for_a_disk_that_fills_frees_nothing_that_is_needed() {
    // Segments that can go need a million transactions: `prune_local` has them, with --all.
    let Some(deployment) = Deployment::new() else { return };
    deployment.create(&["a"]);
    deployment.follow("disk-filling", &[]);
    deployment.host.ok("docker compose restart spacetimedb");
    assert_eq!(deployment.entities(), names(&["a"]));
}

#[test]
fn a_failed_drill_is_followed_to_a_restore_point_that_passes() {
    let Some(deployment) = Deployment::new() else { return };
    deployment.create(&["a"]);
    deployment.archived();
    let point = deployment.objects("/restore-points/").pop().expect("a restore point");
    let mut bytes = std::fs::read(&point).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&point, bytes).expect("write");
    let drill = deployment.host.shell("docker compose run --rm drill");
    assert!(!drill.status.success(), "{drill:?}");
    deployment.follow("drill-failed", &[]);
}

#[test]
fn a_repository_that_lost_objects_is_told_and_a_new_one_is_whole() {
    let Some(deployment) = Deployment::new() else { return };
    deployment.create(&["a"]);
    deployment.archived();
    std::fs::remove_file(&deployment.objects("/log/")[0]).expect("an object");
    let verified = deployment.host.shell("docker compose exec sidecar inner-universe verify");
    assert_eq!(verified.status.code(), Some(3), "{verified:?}");
    deployment.follow("repository-damaged", &[]);
    let verified = deployment.sidecar("verify");
    assert_eq!(verified["findings"], json!([]), "{verified}");
}

#[test]
fn without_its_key_an_archive_cannot_be_read_and_a_new_one_begins() {
    let Some(deployment) = Deployment::new() else { return };
    deployment.create(&["a"]);
    deployment.archived();
    let before = deployment.restore_points();
    // Somebody has put another key in its place.
    let other = "docker run --rm --user \"$(id -u):$(id -g)\" --volume \"$PWD/secrets:/secrets\" inner-universe:0.1.0 \
                 key generate --output /secrets/other && mv -f secrets/other secrets/age_identity && chmod 444 secrets/age_identity";
    deployment.host.ok(other);
    let drill = deployment.host.shell("docker compose run --rm drill");
    assert!(!drill.status.success(), "{drill:?}");
    deployment.follow("lost-encryption-key", &[]);
    let points = deployment.restore_points();
    assert!(points.iter().any(|(_, label)| label == "under-a-new-key"), "{points:?}");
    assert!(points.iter().all(|point| !before.contains(point)), "it begins anew: {points:?}");
}

#[test]
fn a_fork_is_told_and_the_history_before_it_is_restored_beside_the_server() {
    let Some(deployment) = Deployment::new() else { return };
    deployment.create(&["a", "b"]);
    let log = deployment.host.ok("ls .volumes/server/data/replicas/*/clog/*.log");
    let log = deployment.host.dir.join(log.trim());
    let before = std::fs::metadata(&log).expect("the log").len();
    deployment.create(&["c"]);
    deployment.archived();
    // A power cut loses what was not synced; then other things happen. The cut is behind the header of a commit that is
    // archived, unlike what the sidecar's own connection may have written last.
    deployment.host.ok("docker compose kill spacetimedb");
    let file = std::fs::File::options().write(true).open(&log).expect("the log");
    file.set_len(before + 30).expect("cut");
    drop(file);
    deployment.host.ok("docker compose up --detach --wait");
    deployment.create(&["d", "e", "f"]);
    deployment.host.until("docker compose exec sidecar inner-universe --json status | grep -q 'no longer continues'");
    deployment.follow("fork-or-gap", &[]);
    let status = deployment.sidecar("status");
    assert_eq!(status["databases"][0]["timeline"], 2, "{status}");
}

#[test]
fn the_server_is_upgraded_after_a_rehearsal() {
    let Some(deployment) = Deployment::new() else { return };
    deployment.create(&["a"]);
    // Of the same binary here: another release stands in with SPACETIMEDB_STANDALONE only.
    deployment.follow("server-upgrade", &[("NEXT", "v2.9.0")]);
    assert!(
        std::fs::read_to_string(deployment.host.dir.join(".env")).expect(".env").contains("SPACETIMEDB_VERSION=v2.9.0")
    );
    assert_eq!(deployment.entities(), names(&["a"]));
}

#[test]
fn credentials_and_keys_are_rotated() {
    let Some(deployment) = Deployment::new() else { return };
    deployment.create(&["a"]);
    let secret =
        |name: &str| std::fs::read_to_string(deployment.host.dir.join("secrets").join(name)).expect("a secret");
    let all = || ["s3_access_key", "s3_secret_key", "http_token", "age_identity"].map(secret);
    let before = all();
    // Twice, for what was kept of the first time must outlive the second.
    for _ in 0..2 {
        deployment.follow("rotate-credentials-and-keys", &[]);
    }
    for (before, after) in before.iter().zip(all()) {
        assert_ne!(before, &after);
    }
    let old =
        deployment.host.ok("docker compose run --rm --volume \"./$(ls -d secrets/age_identity.before-* | head -1):/before:ro\" --entrypoint \
         /usr/local/bin/inner-universe restore --repository s3://inner-universe/production --identity /before verify");
    assert!(!old.is_empty());
}

#[test]
fn a_deployment_is_decommissioned_and_its_last_copy_opens() {
    let Some(deployment) = Deployment::new() else { return };
    deployment.create(&["a"]);
    deployment.follow("decommission", &[]);
    assert!(!deployment.host.dir.join("secrets").exists());
    assert!(!deployment.volume("server").exists());
}

#[test]
fn every_page_has_its_parts_and_every_link_and_alert_leads_somewhere() {
    let pages = Page::runbooks();
    assert!(pages.len() >= 16, "{}", pages.len());
    for page in &pages {
        let name = Path::new(&page.name).file_stem().and_then(|name| name.to_str()).expect("a name");
        if !["README", "alerts"].contains(&name) {
            let sections = page.sections();
            for wanted in ["Symptom", "First check", "Prove", "Afterwards"] {
                assert!(sections.contains(&wanted), "{}: no {wanted}", page.name);
            }
            assert!(page.blocks(None).len() >= 3, "{}", page.name);
            // Each is executed by a test here, and listed in the index.
            let tests = include_str!("runbooks.rs");
            assert!(
                tests.contains(&format!("follow(\"{name}\"")) || tests.contains(&format!("follow_sections(\"{name}\"")),
                "{name}"
            );
            assert!(runbook("README").text.contains(&format!("({name}.md)")), "{name} is not in the index");
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let documents = [
        "README.md",
        "ARCHITECTURE.md",
        "FORMAT.md",
        "CHANGELOG.md",
        "docs/without-containers.md",
        "docs/official-guide.md",
    ];
    for page in pages.into_iter().chain(documents.map(Page::read)) {
        for (target, anchor) in links(&page.text) {
            let file = match target.is_empty() {
                true => root.join(&page.name),
                false => root.join(Path::new(&page.name).parent().expect("a folder")).join(&target),
            };
            assert!(file.exists(), "{}: there is no {target}", page.name);
            if let Some(anchor) = anchor {
                let text = std::fs::read_to_string(&file).expect("a page");
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                let of = |line: &str| {
                    line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-").replace(['`', '.', ','], "")
                };
                assert!(headings.any(|line| of(line) == anchor), "{}: {target}#{anchor}", page.name);
            }
        }
    }
    let index = runbook("README").text;
    let alerts = std::fs::read_to_string(root.join("dashboards/prometheus/alerts.yaml")).expect("the alerts");
    for alert in alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        assert!(index.contains(&format!("| `{alert}` |")), "{alert} is not in the index");
    }
}

/// Links to files of ours: `](path#anchor)`.
fn links(text: &str) -> Vec<(String, Option<String>)> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(target, _)| target));
    let ours = targets.filter(|target| !target.contains("://"));
    ours.map(|target| match target.split_once('#') {
        Some((file, anchor)) => (file.to_owned(), Some(anchor.to_owned())),
        None => (target.to_owned(), None),
    })
    .collect()
}
