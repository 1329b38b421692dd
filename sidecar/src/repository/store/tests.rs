//! A store against small servers that misbehave in one way each.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::PutMode;
use object_store::path::Path as Key;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::config::RepositoryConfig;
use crate::config::value::{Period, Secret};
use crate::repository::store::{Conditional, Operation, Race, Store};
use crate::repository::{RepositoryError, paths};

/// A request as it came.
#[derive(Debug, Clone)]
struct Request {
    method: String,
    path: String,
    query: String,
    head: String,
    body: Bytes,
}

impl Request {
    fn is_listing(&self) -> bool {
        self.method == "GET" && self.query.contains("list-type=2")
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    fn parameter(&self, name: &str) -> Option<String> {
        let mut pairs = url::form_urlencoded::parse(self.query.as_bytes());
        pairs.find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
    }
}

type Answer = (u16, &'static str, String);
type Answers = dyn Fn(&Request) -> Option<Answer> + Send + Sync;

/// S3 on a port of the loopback interface, as far as these tests need it.
struct Server {
    endpoint: String,
    requests: Arc<Mutex<Vec<Request>>>,
    task: tokio::task::JoinHandle<()>,
}

/// What the server holds, by path.
type Objects = Arc<Mutex<BTreeMap<String, Bytes>>>;

impl Server {
    /// Answers as `answers` says, and as S3 does where that says nothing. A server that is `careless` looks at conditions,
    /// and writes later.
    async fn start(careless: bool, answers: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let (requests, objects) = (Arc::<Mutex<Vec<Request>>>::default(), Objects::default());
        let (seen, answers): (_, Arc<Answers>) = (Arc::clone(&requests), Arc::new(answers));
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (seen, objects, answers) = (Arc::clone(&seen), Arc::clone(&objects), Arc::clone(&answers));
                tokio::spawn(async move { serve(client, careless, &seen, &objects, answers.as_ref()).await });
            }
        });
        Self { endpoint, requests, task }
    }

    async fn saying(answers: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) -> Self {
        Self::start(false, answers).await
    }

    fn config(&self) -> RepositoryConfig {
        RepositoryConfig {
            endpoint: Some(self.endpoint.clone()),
            access_key_id: Some(secret("id")),
            secret_access_key: Some(secret("secret")),
            request_timeout: Period::seconds(5),
            request_retries: 1,
            ..RepositoryConfig::default()
        }
    }

    fn store(&self) -> Store {
        Store::connect("s3://backups/p", &self.config(), false).expect("a store")
    }

    fn count(&self, wanted: impl Fn(&Request) -> bool) -> usize {
        self.requests.lock().iter().filter(|request| wanted(request)).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn secret(text: &str) -> Secret {
    Secret::try_from(text.to_owned()).expect("a secret")
}

async fn serve(
    mut client: TcpStream,
    careless: bool,
    seen: &Mutex<Vec<Request>>,
    objects: &Objects,
    answers: &Answers,
) -> Option<()> {
    let mut bytes = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            if client.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        };
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let mut words = head.split(' ');
        let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let (path, query) = (path.to_owned(), query.to_owned());
        let mut request = Request { method, path, query, head, body: Bytes::new() };
        let length: usize = request.header("content-length").map_or(0, |length| length.parse().unwrap_or(0));
        while bytes.len() < end + length {
            if client.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        }
        request.body = Bytes::copy_from_slice(&bytes[end..end + length]);
        bytes.drain(..end + length);
        seen.lock().push(request.clone());
        let (status, kind, body) = match answers(&request) {
            Some(answer) => answer,
            None => as_s3(&request, careless, objects).await,
        };
        let tag = blake3::hash(if request.method == "PUT" { &request.body } else { body.as_bytes() }).to_hex();
        let answer = format!(
            "HTTP/1.1 {status} .\r\nContent-Length: {}\r\nContent-Type: {kind}\r\nETag: \"{tag}\"\r\n\
             Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n",
            body.len()
        );
        let body = if request.method == "HEAD" { "" } else { &body };
        client.write_all((answer + body).as_bytes()).await.ok()?;
    }
}

const XML: &str = "application/xml";

fn error(status: u16, code: &str) -> Answer {
    (status, XML, format!("<Error><Code>{code}</Code><Message>No.</Message></Error>"))
}

async fn as_s3(request: &Request, careless: bool, objects: &Objects) -> Answer {
    let held = objects.lock().get(&request.path).cloned();
    let tag = |bytes: &Bytes| format!("\"{}\"", blake3::hash(bytes).to_hex());
    let done = (200, "binary/octet-stream", String::new());
    match request.method.as_str() {
        "PUT" => {
            let holds = |held: Option<&Bytes>| match (request.header("if-none-match"), request.header("if-match")) {
                (Some(_), _) => held.is_none(),
                (_, Some(wanted)) => held.map(tag).as_deref() == Some(wanted),
                _ => true,
            };
            if !holds(held.as_ref()) {
                return error(412, "PreconditionFailed");
            }
            if careless {
                crate::clock::Clock::sleep(&crate::clock::SystemClock, std::time::Duration::from_millis(50)).await;
            }
            let mut objects = objects.lock();
            // One that takes care looks and writes at once.
            if !careless && !holds(objects.get(&request.path)) {
                return error(412, "PreconditionFailed");
            }
            objects.insert(request.path.clone(), request.body.clone());
            done
        }
        "GET" | "HEAD" => match held {
            Some(bytes) => (200, "binary/octet-stream", String::from_utf8_lossy(&bytes).into_owned()),
            None => error(404, "NoSuchKey"),
        },
        _ => {
            let body = String::from_utf8_lossy(&request.body);
            let key = body.split("<Key>").nth(1).and_then(|rest| rest.split("</Key>").next()).unwrap_or_default();
            objects.lock().remove(&format!("/backups/{key}"));
            (200, XML, format!("<DeleteResult><Deleted><Key>{key}</Key></Deleted></DeleteResult>"))
        }
    }
}

/// A page with these names, which continues at `next`.
fn page(names: &[&str], next: Option<&str>) -> Answer {
    let names: String = names
        .iter()
        .map(|name| {
            format!(
                "<Contents><Key>{name}</Key><Size>1</Size><ETag>\"e\"</ETag>\
                 <LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            )
        })
        .collect();
    let token = next.map(|token| format!("<NextContinuationToken>{token}</NextContinuationToken>")).unwrap_or_default();
    let truncated = next.is_some();
    (200, XML, format!("<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{names}{token}</ListBucketResult>"))
}

async fn list(store: &Store) -> Result<Vec<String>, RepositoryError> {
    let prefix = Key::from("log");
    let listed = store.objects().list(Some(&prefix)).map_ok(|object| object.location.to_string()).try_collect();
    store.within(Operation::List, &prefix, 0, listed).await
}

/// An outage: not final, and nothing is said of what is stored.
fn is_outage(error: &RepositoryError) -> bool {
    !error.is_permanent() && !error.is_damage() && error.to_string().contains("cannot be trusted")
}

#[tokio::test]
async fn whole_listings_are_read_page_by_page() {
    let server = Server::saying(|request| match request.parameter("continuation-token") {
        None => Some(page(&["p/log/1", "p/log/2"], Some("t&amp;2"))),
        Some(token) if token == "t&2" => Some(page(&["p/log/3"], None)),
        Some(_) => Some(error(400, "InvalidToken")),
    })
    .await;
    assert_eq!(list(&server.store()).await.expect("a listing"), ["log/1", "log/2", "log/3"]);
}

#[tokio::test]
async fn broken_listings_are_outages() {
    let truncated = "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>";
    let buckets = "<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>";
    let answers: [(&str, Answer); 6] = [
        ("truncated without a token", (200, XML, truncated.into())),
        ("the same token again", page(&["p/log/1"], Some("again"))),
        ("a web page", (200, "text/html", "<!DOCTYPE html><html>Maintenance</html>".into())),
        ("the list of buckets", (200, XML, buckets.into())),
        ("nothing", (200, XML, String::new())),
        ("names of another prefix", page(&["q/log/1"], None)),
    ];
    for (what, answer) in answers {
        let server = Server::saying(move |request| request.is_listing().then(|| answer.clone())).await;
        let error = list(&server.store()).await.expect_err(what);
        assert!(is_outage(&error), "{what}: {error}");
        let folders = server.store().objects().list_with_delimiter(Some(&Key::from("log"))).await;
        assert!(folders.is_err(), "{what}");
    }
}

#[tokio::test]
async fn listings_that_repeat_or_step_back_end() {
    let cases: [(&str, [&[&str]; 2]); 3] = [
        ("tokens in turn", [&["p/log/1"], &["p/log/1"]]),
        ("pages that overlap", [&["p/log/1", "p/log/3"], &["p/log/2"]]),
        ("a page in disorder", [&["p/log/2", "p/log/1"], &[]]),
    ];
    for (what, pages) in cases {
        let server = Server::saying(move |request| match request.parameter("continuation-token").as_deref() {
            Some("a") => Some(page(pages[1], Some("b"))),
            _ => Some(page(pages[0], Some("a"))),
        })
        .await;
        let error = list(&server.store()).await.expect_err(what);
        assert!(is_outage(&error), "{what}: {error}");
        assert!(server.requests.lock().len() < 5, "{what}");
    }
}

#[tokio::test]
async fn a_listing_that_breaks_once_is_asked_for_again() {
    let broken = Mutex::new(true);
    let server = Server::saying(move |_| match std::mem::take(&mut *broken.lock()) {
        true => Some((200, "text/html", "<html>Maintenance</html>".into())),
        false => Some(page(&["p/log/1"], None)),
    })
    .await;
    assert_eq!(list(&server.store()).await.expect("a listing"), ["log/1"]);
}

#[tokio::test]
async fn web_pages_are_neither_objects_nor_missing_ones() {
    for status in [200, 404] {
        let html = "\n<!doctype HTML><html>Maintenance</html>";
        let server = Server::saying(move |_| Some((status, "text/html; charset=utf-8", html.into()))).await;
        let error = server.store().get(&paths::repository()).await.expect_err("a web page");
        assert!(is_outage(&error), "{status}: {error}");
    }
    let server = Server::saying(|_| None).await;
    let missing = server.store().get(&paths::repository()).await;
    assert!(matches!(missing, Err(RepositoryError::Missing { .. })), "{missing:?}");
}

#[tokio::test]
async fn refused_conditions_count_as_ignored_ones() {
    for (status, code) in [(501, "NotImplemented"), (400, "InvalidArgument"), (400, "NotImplemented")] {
        let is_conditional =
            |request: &Request| request.header("if-none-match").or(request.header("if-match")).is_some();
        let server = Server::saying(move |request| is_conditional(request).then(|| error(status, code))).await;
        let (store, key) = (server.store(), paths::repository());
        store.put(&key, Bytes::from_static(b"first"), PutMode::Create).await.expect("written");
        let again = store.put(&key, Bytes::from_static(b"second"), PutMode::Create).await;
        assert!(matches!(again, Err(RepositoryError::Conflict { .. })), "{status} {code}: {again:?}");
        assert_eq!(store.get(&key).await.expect("the object").0, Bytes::from_static(b"first"));
        assert_eq!(server.count(is_conditional), 1, "{status} {code}: it is not tried again");
        assert_eq!(store.probe(&key).await.expect("an answer"), Conditional { create: false, update: false });
        let race = store.race().await.expect("a race");
        assert!(!race.is_decided() && race.created == 0, "{race:?}");
        let update = PutMode::Update(store.get(&key).await.expect("the object").1);
        let refused = store.put(&key, Bytes::from_static(b"third"), update).await.expect_err("a refusal").to_string();
        assert!(refused.contains("conditional writes") && refused.contains(code), "{refused}");
    }
}

#[tokio::test]
async fn other_refusals_stay_what_they_are() {
    let server = Server::saying(|request| (request.method == "PUT").then(|| error(400, "ExpiredToken"))).await;
    let denied = server.store().put(&paths::lease(), Bytes::from_static(b"x"), PutMode::Create).await;
    assert!(matches!(&denied, Err(RepositoryError::Denied { .. })), "{denied:?}");
    // What refuses the content, too, is no matter of conditions.
    let server = Server::saying(|request| (request.method == "PUT").then(|| error(400, "InvalidRequest"))).await;
    let store = server.store();
    let refused = store.put(&paths::lease(), Bytes::from_static(b"x"), PutMode::Create).await.expect_err("a refusal");
    assert!(!refused.to_string().contains("conditional writes"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn races_are_decided_where_conditions_hold() {
    let server = Server::start(false, |_| None).await;
    let race = server.store().race().await.expect("a race");
    assert!(race.is_decided(), "{race:?}");
    let memory = Store::around(Arc::new(object_store::memory::InMemory::new()));
    assert!(memory.race().await.expect("a race").is_decided());
    let left: Vec<_> = memory.objects().list(None).try_collect().await.expect("a listing");
    assert!(left.is_empty(), "{left:?}");
    let dir = tempfile::tempdir().expect("a directory");
    let url = url::Url::from_file_path(dir.path()).expect("an address");
    let local = Store::connect(url.as_str(), &RepositoryConfig::default(), false).expect("a store");
    assert!(local.race().await.expect("a race").is_decided());
    assert_eq!(std::fs::read_dir(dir.path()).expect("the directory").count(), 0, "nothing is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn races_that_several_win_are_seen() {
    // A look at the condition, and a write later: asked once, it honours every condition.
    let server = Server::start(true, |_| None).await;
    let store = server.store();
    let key = paths::repository();
    store.put(&key, Bytes::from_static(b"first"), PutMode::Create).await.expect("written");
    assert_eq!(store.probe(&key).await.expect("an answer"), Conditional { create: true, update: true });
    let race = store.race().await.expect("a race");
    assert!(!race.is_decided() && race.created > 1 && race.updated > 1, "{race:?}");
    assert!(server.count(|request| request.method == "POST" && request.query == "delete") > 0, "it clears up");
}

#[tokio::test]
async fn only_bulk_objects_take_the_storage_class() {
    let server = Server::saying(|_| None).await;
    let config = RepositoryConfig { storage_class: Some("STANDARD_IA".into()), ..server.config() };
    let store = Store::connect("s3://backups/p", &config, false).expect("a store");
    let bulk = ["databases/d/timelines/1/log/L0/0-1.iulog", "instance/x.tar.zst", "databases/d/packs/x.pack"];
    let small = ["lease.json", "repository.json", "restore-points/x.json", "databases/d/snapshots/1/5.json", "probe/x"];
    for key in bulk.iter().chain(&small) {
        store.put(&Key::from(*key), Bytes::from_static(b"x"), PutMode::Create).await.expect("written");
        let last = server.requests.lock().last().cloned().expect("a request");
        let expected = bulk.contains(key).then_some("STANDARD_IA");
        assert_eq!(last.header("x-amz-storage-class"), expected, "{key}");
    }
    let dir = tempfile::tempdir().expect("a directory");
    let url = url::Url::from_file_path(dir.path()).expect("an address");
    let local = Store::connect(url.as_str(), &config, false).expect("a store");
    local.put(&Key::from(bulk[0]), Bytes::from_static(b"x"), PutMode::Create).await.expect("a class is ignored");
    local.begin_large(&Key::from(bulk[1])).await.expect("a class is ignored");
}

#[tokio::test]
async fn rotated_keys_sign_the_next_request() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("id");
    std::fs::write(&path, "OLD").expect("a key");
    let server = Server::saying(|_| None).await;
    let config =
        RepositoryConfig { access_key_id: Some(secret(&format!("file:{}", path.display()))), ..server.config() };
    let store = Store::connect("s3://backups/p", &config, false).expect("a store");
    let signed_by = async |name: &str| {
        let _ = store.get(&paths::lease()).await;
        let last = server.requests.lock().last().cloned().expect("a request");
        last.header("authorization").expect("a signature").contains(&format!("Credential={name}/"))
    };
    assert!(signed_by("OLD").await);
    let next = dir.path().join("next");
    std::fs::write(&next, "NEW").expect("a key");
    std::fs::rename(&next, &path).expect("renamed");
    assert!(signed_by("NEW").await);
}

#[test]
fn virtual_hosts_are_used_with_endpoints() {
    let config = RepositoryConfig {
        endpoint: Some("http://minio.example:9000".into()),
        path_style: false,
        access_key_id: Some(secret("id")),
        secret_access_key: Some(secret("secret")),
        ..RepositoryConfig::default()
    };
    let store = Store::connect("s3://backups/p", &config, false).expect("a store");
    let shown = format!("{:?}", store.objects());
    assert!(shown.contains("\"http://backups.minio.example:9000\""), "{shown}");
    let by_number = RepositoryConfig { endpoint: Some("http://127.0.0.1:9000".into()), ..config };
    let refused = Store::connect("s3://backups/p", &by_number, false).map(drop).expect_err("no host name");
    assert!(refused.to_string().contains("path_style"), "{refused}");
}

#[test]
fn a_race_is_decided_by_one_winner() {
    let decided = Race { writers: 8, created: 1, updated: 1, mixed: false };
    assert!(decided.is_decided());
    for race in [Race { created: 2, ..decided }, Race { updated: 0, ..decided }, Race { mixed: true, ..decided }] {
        assert!(!race.is_decided(), "{race:?}");
    }
}
