//! The page for those who followed the official guide, on a server that is laid out as that guide has it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use harness::server::{Server, free_port};
use harness::tools;
use harness::workload::{self, Random};

const PAGE: &str = include_str!("../../../docs/official-guide.md");

/// The blocks of the page that are in a language.
fn blocks(language: &str) -> Vec<&'static str> {
    let begins = |part: &&str| part.starts_with(&format!("{language}\n"));
    PAGE.split("```").filter(begins).map(|block| block.trim_start_matches(language)).collect()
}

/// The page's commands of the sidecar, without the shell around them.
fn commands() -> Vec<Vec<&'static str>> {
    let lines = blocks("sh").into_iter().flat_map(str::lines);
    let own = lines.filter_map(|line| line.split_once(" inner-universe ").map(|(_, rest)| rest));
    own.map(|rest| rest.split_whitespace().collect()).collect()
}

/// This machine's places instead of the page's.
struct Machine {
    root: tempfile::TempDir,
    config: PathBuf,
}

impl Machine {
    fn place(&self, text: &str) -> String {
        let root = self.root.path().to_str().expect("a path");
        let places = ["/stdb/", "/etc/inner-universe/", "/var/lib/inner-universe"];
        places.iter().fold(text.to_owned(), |text, place| text.replace(place, &format!("{root}{place}")))
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let arguments: Vec<_> = arguments.iter().map(|argument| self.place(argument)).collect();
        let mut command = Command::new(tools::inner_universe());
        command.env_remove("RUST_LOG").args(&arguments);
        // The page names it once it is there.
        if self.config.exists() {
            command.env("INNER_UNIVERSE_CONFIG", &self.config);
        }
        command.output().expect("start the sidecar")
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}{}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stdout).expect("text")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_leads_from_the_official_guide_to_a_drill_and_a_restore() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let machine = Machine { config: root.path().join("etc/inner-universe/config.toml"), root };
    let place = |text: &str| PathBuf::from(machine.place(text));
    for dir in ["/stdb/", "/etc/inner-universe/", "/var/lib/inner-universe"] {
        std::fs::create_dir_all(place(dir)).expect("create");
    }
    let (data, keys) = (place("/stdb/data"), place("/stdb/config"));
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    let mut random = Random::from_env();
    workload::run(&client, "ledger", &mut random, 20).await;
    server.written().await;

    let commands = commands();
    let verbs: Vec<_> = commands.iter().map(|command| command[0]).collect();
    assert_eq!(verbs, ["key", "doctor", "repository", "backup", "verify", "drill", "status", "restore"]);
    let printed = machine.ok(&commands[0]);
    let recipient = printed.split_whitespace().find(|word| word.starts_with("age1")).expect("a recipient");
    configure(&machine, recipient, &server);
    // Nothing is backed up yet: it says so, and that it found the server's files.
    let doctor = machine.run(&commands[1]);
    let said = String::from_utf8_lossy(&doctor.stdout);
    assert!(said.contains("written by"), "{said}");
    for command in &commands[2..6] {
        machine.ok(command);
    }
    assert!(!machine.run(&commands[7]).status.success(), "the server runs");
    server.kill();
    let private = std::fs::read(keys.join("id_ecdsa")).expect("the key");
    std::fs::remove_file(keys.join("id_ecdsa")).expect("lose");
    machine.ok(&commands[7]);
    assert_eq!(
        std::fs::read(keys.join("id_ecdsa")).expect("the key"),
        private,
        "the keys are where the guide has them"
    );
    let server = Server::start(&data, &keys).await;
    let client = client.at(&server.url);
    client.call("ledger", "put_note", serde_json::json!([1, "after"])).await.expect("the old token counts");
}

/// The page's configuration, with a bucket and a server of this machine.
fn configure(machine: &Machine, recipient: &str, server: &Server) {
    let text = blocks("toml").concat();
    let text = text.replace("\"age1...\"", &format!("\"{recipient}\""));
    let bucket = machine.root.path().join("bucket");
    let text = text.replace("s3://backups/production", bucket.to_str().expect("a path"));
    let is_of_s3 =
        |line: &&str| ["region", "access_key_id", "secret_access_key"].iter().any(|key| line.starts_with(key));
    let text: String = text.lines().filter(|line| !is_of_s3(line)).map(|line| format!("{line}\n")).collect();
    let port = server.url.rsplit(':').next().expect("a port");
    let own = format!("port = {port}\nserver_bin = {:?}\n", tools::server());
    let text = text.replace("[spacetimedb_config]\n", &format!("[spacetimedb_config]\n{own}"));
    let text = format!("{text}\n[http]\nlisten = \"127.0.0.1:{}\"\n", free_port());
    write(&machine.config, &machine.place(&text));
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).expect("write");
}
