//! Deployments that are killed, at each of their steps: the next run finishes them or takes them back.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use harness::client::Rows;
use harness::stage::{NAME, Stage, call, fill};
use harness::tools;
use inner_universe::datadir::DataDir;
use inner_universe::deploy::cut::{self, Cut};
use inner_universe::ids::{Offset, RestorePointId};
use serde_json::{Value, json};

/// How far the deployment that was broken off is.
fn step(stage: &Stage) -> Option<String> {
    let state = std::fs::read_dir(stage.sidecar.state_dir()).ok()?.flatten();
    let journal = state.filter_map(|dir| std::fs::read(dir.path().join("deploy.json")).ok()).next()?;
    let journal: Value = serde_json::from_slice(&journal).expect("a whole journal");
    Some(journal["step"].as_str().expect("a step").to_owned())
}

/// Deploys `module`, kills it `after` the moment that `wanted` began, and tells how far it was.
fn deploy_and_kill(stage: &Stage, module: &str, wanted: &str, after: Duration) -> Option<String> {
    let mut command = stage.sidecar.command();
    command.args(["deploy", "--force", "--module-path", &stage.module(module)]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a deployment");
    let deadline = Instant::now() + Duration::from_secs(60);
    while child.try_wait().expect("its state").is_none() && step(stage).as_deref() != Some(wanted) {
        assert!(Instant::now() < deadline, "the deployment neither ends nor begins to {wanted}");
        std::thread::sleep(Duration::from_micros(200));
    }
    std::thread::sleep(after);
    let _ = child.kill();
    let _ = child.wait();
    step(stage)
}

/// Does the server run that the stage has in the background?
fn running(stage: &Stage) -> bool {
    stage.sidecar.run(["server", "status"]).json["running"] == true
}

fn entities(rows: &Rows) -> Vec<String> {
    rows["entity"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_that_is_killed_at_any_step_is_finished_or_taken_back_by_the_next_run() {
    let stage = Stage::new();
    stage.deploy("");
    stage.server("start");
    fill(&stage.owner().await, 10).await;
    stage.server("stop");
    let before = entities(&stage.rows().await);
    let rounds = if tools::all() { 6 } else { 1 };
    let mut killed: BTreeMap<String, u32> = BTreeMap::new();
    let steps = [
        ("more", "prepare"),
        ("more", "publish"),
        ("more", "initialise"),
        ("more", "verify"),
        ("more", "record"),
        ("broken", "roll_back"),
    ];
    for round in 0..rounds {
        for (module, wanted) in steps {
            // Later and later within the step, from its first moment on.
            let after = Duration::from_millis(round * 17);
            // Every other time the next run deploys what was there before, and so has to take it back first.
            for which in ["more", ""] {
                let hit = kill_and_mend(&stage, module, wanted, after, which, &before).await;
                *killed.entry(hit).or_default() += 1;
            }
        }
    }
    // A step that takes a moment only can be missed.
    for (module, wanted) in steps {
        for _ in 0..10 {
            if killed.contains_key(wanted) {
                break;
            }
            let hit = kill_and_mend(&stage, module, wanted, Duration::ZERO, "more", &before).await;
            *killed.entry(hit).or_default() += 1;
        }
    }
    println!("killed at {killed:?}");
    for (_, wanted) in steps {
        assert!(killed.contains_key(wanted), "none was killed at {wanted}: {killed:?}");
    }
}

/// Kills a deployment of `module`, deploys `which`, and leaves the bundled module as it was. Returns the step that was hit.
async fn kill_and_mend(
    stage: &Stage,
    module: &str,
    wanted: &str,
    after: Duration,
    which: &str,
    before: &[String],
) -> String {
    let case = format!("{module} {after:?} into {wanted}, then `{which}`");
    let hit = deploy_and_kill(stage, module, wanted, after);
    let run = stage.sidecar.run(["deploy", "--force", "--module-path", &stage.module(which)]);
    // Where it had been finished, taking its table away is refused: only a rollback goes back.
    let had_finished = which.is_empty() && run.code == 6;
    assert!(had_finished || run.code == 0, "{case}: {}", run.stderr);
    if hit.as_deref() == Some("record") {
        assert_eq!(stage.history().last().map(String::as_str), Some("deployed"), "{case}");
    }
    let running = if had_finished { "more" } else { which };
    let rows = stage.rows().await;
    assert_eq!(entities(&rows), before, "{case}");
    assert_eq!(rows["annotation"].is_empty(), running == "more", "{case}: {rows:?}");
    if running == "more" {
        stage.sidecar.run(["deploy", "rollback", "--data", "--module-path", &stage.module("more")]).ok();
        assert_eq!(stage.rows().await["annotation"], ["no such table"], "{case}");
    }
    hit.unwrap_or_else(|| "none".into())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_that_is_killed_while_the_server_is_stopped_for_it_leaves_the_server_running() {
    let stage = Stage::new();
    stage.deploy("");
    stage.server("start");
    fill(&stage.owner().await, 10).await;
    let before = entities(&stage.owner().await.rows(NAME, &["entity"]).await);
    let mut stopped = 0;
    for after in [0, 20, 60, 120, 250, 400, 40, 90, 180, 320, 600, 900] {
        if stopped > 1 {
            break;
        }
        let hit = deploy_and_kill(&stage, "broken", "roll_back", Duration::from_millis(after));
        stopped += u32::from(hit.is_some() && !running(&stage));
        // It warns of what it takes back.
        let run = stage.sidecar.run(["deploy", "--force", "--module-path", &stage.module("")]);
        assert_eq!(run.code, 0, "killed after {after} ms at {hit:?}: {}", run.stderr);
        assert!(running(&stage), "killed after {after} ms at {hit:?}");
        assert_eq!(entities(&stage.owner().await.rows(NAME, &["entity"]).await), before, "killed after {after} ms");
    }
    println!("{stopped} times the server was stopped when the rollback was killed");
    assert!(stopped > 0);
    call(&stage.owner().await, "create_entity", json!(["after", "thing", "{}"])).await;
    stage.server("stop");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_between_the_two_renames_of_a_cut_is_ended_by_the_next_run() {
    let stage = Stage::new();
    stage.deploy("");
    stage.server("start");
    let owner = stage.owner().await;
    fill(&owner, 4).await;
    let before = entities(&owner.rows(NAME, &["entity"]).await);
    stage.server("stop");
    let data = DataDir::open(&stage.data).expect("a data directory");
    let replica = data.replicas().expect("replicas").pop().expect("a replica");
    let last = Offset(cut::end_of_log(&replica).expect("the end of the log").0 - 1);
    stage.server("start");
    fill_more(&stage).await;
    stage.server("stop");
    let cut = Cut { data: &data, replica: &replica, deployment: RestorePointId(ulid::Ulid::nil()), stamp: "test" };
    let aside = cut.apply(last).expect("a cut");
    assert!(aside.is_dir());
    // As it is between the two: the old one is aside, and the new one not yet in its place.
    let staging = stage.data.with_file_name(format!("data.cutting-{}", replica.id));
    std::fs::rename(replica.root(), &staging).expect("back beside it");
    assert!(cut.finish().expect("the second rename"));
    assert!(replica.root().is_dir() && !staging.exists());
    // With nothing to end it does nothing.
    assert!(!cut.finish().expect("nothing to do"));
    assert_eq!(entities(&stage.rows().await), before);
}

async fn fill_more(stage: &Stage) {
    call(&stage.owner().await, "create_entity", json!(["more", "thing", "{}"])).await;
}

/// The journal's path, and the journal.
fn journal(stage: &Stage) -> (std::path::PathBuf, Value) {
    let state = std::fs::read_dir(stage.sidecar.state_dir()).expect("list").flatten();
    let path = state.map(|dir| dir.path().join("deploy.json")).find(|path| path.is_file()).expect("a journal");
    let journal = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("a whole journal");
    (path, journal)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_deployment_whose_database_was_used_since_is_not_rolled_back() {
    let stage = Stage::new();
    stage.deploy("");
    stage.server("start");
    let more = stage.module("more");
    let mut hit = None;
    for _ in 0..20 {
        hit = deploy_and_kill(&stage, "more", "verify", Duration::ZERO);
        if hit.as_deref() == Some("verify") {
            break;
        }
        stage.sidecar.run(["deploy", "--force", "--module-path", &more]).ok();
        stage.sidecar.run(["deploy", "rollback", "--data", "--module-path", &more]).ok();
    }
    assert_eq!(hit.as_deref(), Some("verify"), "it was not hit in twenty tries");
    // An hour passes, in which the database is used.
    let (path, mut journal) = journal(&stage);
    let started: jiff::Timestamp = journal["started_at"].as_str().expect("a time").parse().expect("a time");
    journal["started_at"] = json!((started - jiff::SignedDuration::from_hours(1)).to_string());
    std::fs::write(&path, serde_json::to_vec(&journal).expect("JSON")).expect("write");
    fill(&stage.owner().await, 7).await;
    let used = entities(&stage.rows().await);
    assert!(!used.is_empty());

    // The next one fails, and rolls back only itself.
    let broken = stage.sidecar.run(["deploy", "--force", "--module-path", &stage.module("broken")]);
    assert_ne!(broken.code, 0);
    assert_eq!(entities(&stage.rows().await), used, "{}", broken.stderr);
    let history = stage.history();
    assert_eq!(history.iter().rev().nth(1).map(String::as_str), Some("deployed"), "{history:?}");
    assert_eq!(stage.sidecar.run(["deploy", "--module-path", &more]).ok()["outcome"], "unchanged");
    stage.server("stop");
}
