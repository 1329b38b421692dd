//! The status page in a real browser: at the width of a phone and of a desk, in light and dark, with a token and in trouble.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::browser::Browser;
use harness::client::http;
use harness::daemon::Daemon;
use harness::sidecar::{Sidecar, path};
use harness::synthetic::{Synthetic, record};
use serde_json::{Value, json};

const TOKEN: &str = "open sesame";
const PHONE: (u32, u32) = (390, 844);
const DESK: (u32, u32) = (1280, 900);

/// The text of the cells of one column.
async fn column(browser: &Browser, field: &str) -> Value {
    let all = "return [...document.querySelectorAll(`[data-field=${arguments[0]}]`)].map(cell => cell.textContent)";
    browser.script(all, json!([field])).await
}

/// What the page says is what the command line says.
async fn check_numbers(browser: &Browser, sidecar: &Sidecar, data_dir: &str) {
    let status = sidecar.run(["status", "--data-dir", data_dir]).ok();
    let databases = status["databases"].as_array().expect("databases");
    for field in ["log_offset", "archived_offset"] {
        let expected: Vec<_> = databases.iter().map(|database| database[field].to_string()).collect();
        assert_eq!(column(browser, field).await, json!(expected), "{field}");
    }
    let expected = browser
        .script(
            "return arguments[0].map(bytes)",
            json!([databases.iter().map(|database| &database["archived_bytes"]).collect::<Vec<_>>()]),
        )
        .await;
    assert_eq!(column(browser, "archived_bytes").await, expected);
    let text = browser.script("return document.body.innerText", json!([])).await;
    let text = text.as_str().expect("text");
    let lag: u64 = databases.iter().filter_map(|database| database["lag_transactions"].as_u64()).sum();
    assert!(text.contains(&format!("{lag} transactions")), "{text}");
    for problem in status["problems"].as_array().expect("problems") {
        assert!(text.contains(problem.as_str().expect("a problem")), "{problem} is not in {text}");
    }
    let points = sidecar.run(["backup", "list"]).ok();
    let points = points["restore_points"].as_array().expect("points");
    let rows = browser.script("return document.querySelectorAll('#points tr').length - 1", json!([])).await;
    assert_eq!(rows, json!(points.len()));
    for point in points {
        assert!(text.contains(point["id"].as_str().expect("an id")), "{point} is not in {text}");
    }
    // A dot on each timeline that a restore point is on, and a bar for each timeline.
    let dots = browser.script("return document.querySelectorAll('#window circle').length", json!([])).await;
    assert_eq!(dots, json!(points.len()));
    let bars = browser.script("return document.querySelectorAll('#window rect').length", json!([])).await;
    assert_eq!(bars, json!(2));
    for schedule in status["schedules"].as_array().expect("schedules") {
        assert!(text.contains(schedule["name"].as_str().expect("a name")), "{schedule} is not in {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_page_says_what_the_command_line_says_on_a_phone_and_on_a_desk() {
    let Some(browser) = Browser::start().await else { return };
    let synthetic = Synthetic::new();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_micros() as u64;
    let at = |n: u64| now - (1200 - n) * 18_000_000;
    let first: Vec<_> = (0..1000).map(|n| record(at(n) as i64, b"as it was")).collect();
    let segment = synthetic.segment(1, 0, &first);
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let settings = [
        ("ARCHIVE__FLUSH_INTERVAL", "50ms"),
        ("HTTP__TOKEN", TOKEN),
        ("SCHEDULE__VERIFY", "0 0 3 * * *"),
        ("SCHEDULE__RESTORE_POINT", "0 0 * * * *"),
    ];
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &settings, &[]);
    daemon.wait_archived(999);
    daemon.wait("the first restore point", |status| status.last_restore_point.is_some());
    let url = daemon.wait_http();
    let mark = async |label: &str| {
        let body = json!({"label": label}).to_string();
        let made = http().post(format!("{url}/v1/restore-points")).bearer_auth(TOKEN).body(body).send().await;
        assert!(made.expect("an answer").status().is_success());
    };
    mark("before the upgrade").await;
    // A fork, as a restore makes one.
    let mut other = first[..800].to_vec();
    other.extend((800..1190).map(|n| record(at(n) as i64, b"otherwise")));
    synthetic.segment(1, 0, &other);
    daemon.wait("the fork", |status| status.databases[0].timeline.is_some_and(|timeline| timeline.0 == 2));
    daemon.wait_archived(1189);
    mark("after the restore").await;
    let surveyed = async || {
        let history = http().get(format!("{url}/v1/history")).bearer_auth(TOKEN).send().await.expect("an answer");
        let history: Value = history.json().await.expect("JSON");
        history["timelines"].as_array().is_some_and(|timelines| {
            timelines.len() == 2 && timelines.iter().any(|timeline| timeline["last_offset"] == 1189)
        })
    };
    for _ in 0..300 {
        if surveyed().await {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(surveyed().await, "{}", daemon.log());

    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");
    for (screen, phone, dark, picture) in [
        (DESK, false, false, "status-page.png"),
        (PHONE, true, true, "status-page-phone.png"),
        (PHONE, true, false, ""),
        (DESK, false, true, ""),
    ] {
        browser.screen(screen, phone, dark).await;
        browser.open(&url).await;
        browser.until("return !document.getElementById('login').hidden").await;
        let give = "document.getElementById('token').value = arguments[0]; \
                    document.querySelector('#login button').click()";
        browser.script(give, json!([TOKEN])).await;
        browser.until("return document.querySelectorAll('#databases tr').length === 2").await;
        check_numbers(&browser, &sidecar, path(&synthetic.path())).await;
        let wide = browser.script("return document.documentElement.scrollWidth - window.innerWidth", json!([])).await;
        assert!(wide.as_i64().is_some_and(|wide| wide <= 0), "the page is {wide} too wide at {screen:?}");
        let ground = browser.script("return getComputedStyle(document.body).backgroundColor", json!([])).await;
        let is_dark = ground.as_str().expect("a colour").contains("rgb(20, 22, 26)");
        assert_eq!(is_dark, dark, "{ground}");
        assert_eq!(browser.console().await, Vec::<String>::new(), "at {screen:?}");
        if std::env::var_os("UPDATE_DOCS").is_some() && !picture.is_empty() {
            std::fs::write(format!("{docs}/{picture}"), browser.screenshot().await).expect("write");
        }
    }

    // In trouble it says so, and why, even though the repository cannot be read for the rest.
    let repository = synthetic.dir.path().join("repository");
    let away = synthetic.dir.path().join("away");
    std::fs::rename(&repository, &away).expect("move away");
    std::fs::write(&repository, "in the way").expect("write");
    let mut log = std::fs::read(&segment).expect("the segment");
    log.extend(inner_universe::datadir::commit::encode(1, inner_universe::ids::Offset(1190), 0, 1, &first[0]));
    std::fs::write(&segment, log).expect("append");
    daemon.wait("the error", |status| status.databases[0].error.is_some());
    let ready = async || http().get(format!("{url}/v1/health")).send().await.expect("an answer").json::<Value>().await;
    for _ in 0..300 {
        if ready().await.expect("JSON")["ready"] == json!(false) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    browser.script("refresh()", json!([])).await;
    browser.until("return document.getElementById('verdict').classList.contains('bad')").await;
    let problems = browser.script("return document.getElementById('problems').innerText", json!([])).await;
    assert!(problems.as_str().is_some_and(|text| text.contains("not being archived")), "{problems}");
    std::fs::remove_file(&repository).expect("remove");
    std::fs::rename(&away, &repository).expect("move back");
    daemon.wait_archived(1190);
    browser.until("refresh(); return document.getElementById('verdict').classList.contains('good')").await;
    assert_eq!(daemon.stop(), 0);
}
