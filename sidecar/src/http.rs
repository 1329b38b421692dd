//! The sidecar's own HTTP interface: health, metrics, status page, API.
//!
//! Invariants: one table of endpoints makes the routes and the OpenAPI document; every request passes the [`guard`]; bodies
//! are bounded; a port that is taken keeps nobody from archiving.

mod answer;
mod connections;
mod guard;
mod openapi;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body as RequestBody;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodFilter;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use opentelemetry::KeyValue;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::backup::BackupReport;
use crate::clock::{Clock, Stopwatch};
use crate::config::Config;
use crate::daemon::conditions::{ConditionKind, Subject};
use crate::daemon::health::{Readiness, readiness};
use crate::daemon::history::HistoryReport;
use crate::daemon::state::State;
use crate::daemon::{Daemon, Interface};
use crate::http::answer::Refusal;
use crate::http::connections::Connections;
use crate::http::guard::{Access, Guard};
use crate::http::openapi::{Body, json_of, text_of};
use crate::ids::RestorePointId;
use crate::observe::metrics::HTTP_REQUESTS;
use crate::observe::provider::{Telemetry, TextFormat};
use crate::repository::RepositoryError;
use crate::repository::manifest::{RestorePoint, RestorePointList};
use crate::status::StatusReport;
use crate::verify::VerifyReport;

/// No request's body is longer.
const MAX_BODY: usize = 16 << 10;
/// No label is longer.
const MAX_LABEL: usize = 200;
/// No control characters, and something besides white space.
const LABEL_PATTERN: &str =
    r"^[^\u0000-\u001f\u007f-\u009f]*[^\s\u0000-\u001f\u007f-\u009f][^\u0000-\u001f\u007f-\u009f]*$";
/// As conditions name it.
const PART: &str = "HTTP interface";
/// A port that is taken is tried again so often.
const BIND_INTERVAL: Duration = Duration::from_secs(10);
/// A status this old is good enough: it reads the repository.
const STATUS_AGE: f64 = 1.0;

const PAGE: &str = include_str!("http/page.html");

/// What the page may do: nothing but itself.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The server and what it serves.
pub struct Server {
    config: Config,
    clock: Arc<dyn Clock>,
    state: Arc<State>,
    telemetry: Arc<Telemetry>,
    /// Set while the daemon archives.
    daemon: parking_lot::RwLock<Option<Arc<Daemon>>>,
    guard: Guard,
    status: tokio::sync::Mutex<Option<(Stopwatch, StatusReport)>>,
}

/// The body of a request for a restore point.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct NewRestorePoint {
    /// A name to find the restore point by.
    #[schemars(length(min = 1, max = 200), extend("pattern" = LABEL_PATTERN))]
    label: Option<String>,
}

/// The answer of `/v1/health`.
#[derive(Debug, Serialize, JsonSchema)]
struct Health {
    /// Is everything being archived?
    ready: bool,
    /// Why not.
    reasons: Vec<String>,
    /// Has archiving begun, so that there is something to tell?
    archiving: bool,
    /// Must who reads more than this give the token?
    token_required: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Get,
    Post,
}

/// One row of the table that routes and document are made of.
struct Endpoint {
    name: &'static str,
    method: Method,
    path: &'static str,
    access: Access,
    summary: &'static str,
    body: Option<Body>,
    answers: Vec<(u16, &'static str, Body)>,
    refusals: &'static [(u16, &'static str)],
    handler: Handler,
}

type Handler = fn(Arc<Server>, Asked) -> BoxFuture<'static, Result<Response, Refusal>>;

/// What of a request a handler needs.
struct Asked {
    headers: HeaderMap,
    /// The last part of the path, where the path has an id.
    id: String,
    body: Bytes,
}

fn endpoints() -> Vec<Endpoint> {
    const BAD_BODY: &[(u16, &str)] =
        &[(400, "The body is not what is described."), (413, "The body is longer than 16 KiB.")];
    let get = |name, path, access, summary, answers, refusals, handler| Endpoint {
        name,
        method: Method::Get,
        path,
        access,
        summary,
        body: None,
        answers,
        refusals,
        handler,
    };
    vec![
        get("page", "/", Access::Open, "The status page", vec![(200, "HTML", text_of("text/html"))], &[], page),
        get(
            "healthz",
            "/healthz",
            Access::Open,
            "Does the process work?",
            vec![(200, "It does.", text_of("text/plain"))],
            &[],
            |_, _| async { Ok("ok\n".into_response()) }.boxed(),
        ),
        get(
            "readyz",
            "/readyz",
            Access::Open,
            "Is everything being archived? The reasons why not are for who may read",
            vec![
                (200, "Everything is being archived.", json_of::<Readiness>()),
                (503, "It is not, for the reasons given.", json_of::<Readiness>()),
            ],
            &[],
            ready,
        ),
        get(
            "health",
            "/v1/health",
            Access::Open,
            "What /readyz says, with status 200 either way, for pages and scripts",
            vec![(200, "Ready or not, and why.", json_of::<Health>())],
            &[],
            |server, asked| async move { Ok(axum::Json(health(&server, &asked.headers)).into_response()) }.boxed(),
        ),
        get(
            "metrics",
            "/metrics",
            Access::Open,
            "Metrics for Prometheus, or as OpenMetrics if `Accept` asks for it; docs/metrics.md lists them",
            vec![(200, "Text.", text_of("text/plain"))],
            &[(500, "A metric could not be written.")],
            metrics,
        ),
        get(
            "openapi",
            "/v1/openapi.json",
            Access::Open,
            "This document",
            vec![(200, "OpenAPI 3.1.", ("application/json", |_| serde_json::json!({"type": "object"})))],
            &[],
            |_, _| async { Ok(axum::Json(openapi::document(&endpoints())).into_response()) }.boxed(),
        ),
        get(
            "status",
            "/v1/status",
            Access::Read,
            "The same as `inner-universe status --json`, at most a second old",
            vec![(200, "The status.", json_of::<StatusReport>())],
            &[],
            status,
        ),
        get(
            "history",
            "/v1/history",
            Access::Read,
            "The archive lag of the last six hours, and the timelines of every database",
            vec![(200, "The history.", json_of::<HistoryReport>())],
            &[],
            |server, _| async move { Ok(axum::Json(server.state.history(server.clock.now())).into_response()) }.boxed(),
        ),
        get(
            "listRestorePoints",
            "/v1/restore-points",
            Access::Read,
            "Every restore point, oldest first",
            vec![(200, "Restore points.", json_of::<RestorePointList>())],
            &[],
            restore_points,
        ),
        get(
            "showRestorePoint",
            "/v1/restore-points/{id}",
            Access::Read,
            "One restore point",
            vec![(200, "The restore point.", json_of::<RestorePoint>())],
            &[(400, "The id is none."), (404, "There is no such restore point.")],
            restore_point,
        ),
        Endpoint {
            name: "createRestorePoint",
            method: Method::Post,
            path: "/v1/restore-points",
            access: Access::Trigger,
            summary: "Make a restore point now; answers when it is made",
            body: Some(json_of::<NewRestorePoint>()),
            answers: vec![(201, "It is made.", json_of::<BackupReport>())],
            refusals: BAD_BODY,
            handler: create,
        },
        Endpoint {
            name: "verify",
            method: Method::Post,
            path: "/v1/verify",
            access: Access::Trigger,
            summary: "Read back and check everything that restore points name; answers when it is done",
            body: None,
            answers: vec![(200, "What was found.", json_of::<VerifyReport>())],
            refusals: &[(409, "A verification is running."), (413, "The body is longer than 16 KiB.")],
            handler: verify,
        },
    ]
}

impl Server {
    /// As [`crate::daemon::MakeInterface`] wants it.
    pub fn interface(
        config: Config,
        clock: Arc<dyn Clock>,
        state: Arc<State>,
        telemetry: Arc<Telemetry>,
    ) -> Arc<dyn Interface> {
        let guard = Guard::new(&config.http);
        Arc::new(Self {
            config,
            clock,
            state,
            telemetry,
            daemon: parking_lot::RwLock::default(),
            guard,
            status: tokio::sync::Mutex::default(),
        })
    }

    async fn serve(self: Arc<Self>, stop: CancellationToken) {
        if !self.config.http.enabled {
            return;
        }
        let Some(listener) = self.listen(&stop).await else { return };
        let router = router(&self);
        let stopped = stop.clone();
        let serving = axum::serve(Connections::of(listener), router)
            .with_graceful_shutdown(async move { stopped.cancelled().await });
        tokio::select! {
            served = serving => if let Err(error) = served {
                tracing::error!(%error, "the HTTP interface ended");
            },
            // Who holds a connection open does not hold up the end.
            () = async { stop.cancelled().await; self.clock.sleep(Duration::from_secs(1)).await } => {}
        }
    }

    async fn listen(&self, stop: &CancellationToken) -> Option<TcpListener> {
        let address = &self.config.http.listen;
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    let bound: Option<SocketAddr> = listener.local_addr().ok();
                    tracing::info!(address = ?bound, "serving health, metrics and the status page over HTTP");
                    self.state.listening(bound.map(|address| format!("http://{address}")));
                    self.state.clear(ConditionKind::PartFailing, &Subject::Part(PART));
                    return Some(listener);
                }
                Err(error) => {
                    tracing::warn!(
                        %error,
                        address,
                        "the HTTP interface cannot listen and tries again; archiving continues: set http.listen, or http.enabled = false"
                    );
                    // What asks there may be answered by somebody else.
                    let message = format!("it cannot listen on {address}: {error}");
                    self.state.raise(ConditionKind::PartFailing, Subject::Part(PART), message);
                }
            }
            tokio::select! {
                () = self.clock.sleep(BIND_INTERVAL) => {}
                () = stop.cancelled() => return None,
            }
        }
    }

    fn daemon(&self) -> Result<Arc<Daemon>, Refusal> {
        self.daemon.read().clone().ok_or_else(Refusal::starting)
    }
}

impl Interface for Server {
    fn serves(&self, daemon: Option<Arc<Daemon>>) {
        *self.daemon.write() = daemon;
    }

    fn run(self: Arc<Self>, stop: CancellationToken) -> BoxFuture<'static, ()> {
        self.serve(stop).boxed()
    }
}

fn router(server: &Arc<Server>) -> Router {
    let mut router = Router::new();
    for endpoint in endpoints() {
        let server = Arc::clone(server);
        let (handler, access, path) = (endpoint.handler, endpoint.access, endpoint.path);
        let method = match endpoint.method {
            Method::Get => MethodFilter::GET,
            Method::Post => MethodFilter::POST,
        };
        let serve = move |request: Request| {
            let server = Arc::clone(&server);
            async move {
                let answer = match asked(&server, access, request).await {
                    Ok(asked) => handler(Arc::clone(&server), asked).await,
                    Err(refusal) => Err(refusal),
                };
                finish(path, answer.unwrap_or_else(IntoResponse::into_response))
            }
        };
        router = router.route(path, axum::routing::on(method, serve));
    }
    let missing = Refusal::new(StatusCode::NOT_FOUND, "there is nothing here; /v1/openapi.json says what there is");
    let wrong = Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "this method is not known here; see /v1/openapi.json");
    router
        .fallback(move || async move { finish("other", missing.into_response()) })
        .method_not_allowed_fallback(move || async move { finish("other", wrong.into_response()) })
}

/// Checks a request and takes it apart.
async fn asked(server: &Server, access: Access, request: Request) -> Result<Asked, Refusal> {
    let (parts, body): (_, RequestBody) = request.into_parts();
    server.guard.check(access, &parts.headers)?;
    let body = axum::body::to_bytes(body, MAX_BODY)
        .await
        .map_err(|_| Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "the body is longer than 16 KiB or was cut off"))?;
    let id = parts.uri.path().rsplit('/').next().unwrap_or_default().to_owned();
    Ok(Asked { headers: parts.headers, id, body })
}

fn finish(route: &'static str, mut response: Response) -> Response {
    let status = i64::from(response.status().as_u16());
    HTTP_REQUESTS.add(1, &[KeyValue::new("route", route), KeyValue::new("status", status)]);
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

fn page(_: Arc<Server>, _: Asked) -> BoxFuture<'static, Result<Response, Refusal>> {
    async { Ok(([(header::CONTENT_TYPE, "text/html; charset=utf-8")], PAGE).into_response()) }.boxed()
}

fn ready(server: Arc<Server>, asked: Asked) -> BoxFuture<'static, Result<Response, Refusal>> {
    async move {
        let Health { ready, reasons, .. } = health(&server, &asked.headers);
        let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        Ok((status, axum::Json(Readiness { ready, reasons })).into_response())
    }
    .boxed()
}

fn health(server: &Server, headers: &HeaderMap) -> Health {
    let Readiness { ready, mut reasons } = readiness(&server.state.status());
    // Reasons name databases and stores.
    if !server.guard.may_read(headers) {
        reasons.truncate(1);
        reasons.iter_mut().for_each(|reason| *reason = "give the token to see the reasons".into());
    }
    let archiving = server.daemon.read().is_some();
    Health { ready, reasons, archiving, token_required: server.config.http.token.is_some() }
}

fn metrics(server: Arc<Server>, asked: Asked) -> BoxFuture<'static, Result<Response, Refusal>> {
    async move {
        let accept = asked.headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let format = TextFormat::wanted(accept);
        server.state.publish();
        let text = server.telemetry.scrape(format).map_err(Refusal::failed)?;
        Ok(([(header::CONTENT_TYPE, format.content_type())], text).into_response())
    }
    .boxed()
}

fn status(server: Arc<Server>, _: Asked) -> BoxFuture<'static, Result<Response, Refusal>> {
    async move {
        let daemon = server.daemon()?;
        // One look serves all who ask meanwhile.
        let mut known = server.status.lock().await;
        let report = match known.as_ref().filter(|(since, _)| since.elapsed_seconds() < STATUS_AGE) {
            Some((_, report)) => report.clone(),
            None => {
                let report = daemon.status_report().await.map_err(Refusal::failed)?;
                *known = Some((Stopwatch::start(), report.clone()));
                report
            }
        };
        Ok(axum::Json(report).into_response())
    }
    .boxed()
}

fn restore_points(server: Arc<Server>, _: Asked) -> BoxFuture<'static, Result<Response, Refusal>> {
    async move { Ok(axum::Json(server.daemon()?.restore_points().await.map_err(Refusal::failed)?).into_response()) }
        .boxed()
}

fn restore_point(server: Arc<Server>, asked: Asked) -> BoxFuture<'static, Result<Response, Refusal>> {
    async move {
        let id: RestorePointId =
            asked.id.parse().map_err(|_| Refusal::new(StatusCode::BAD_REQUEST, "this is no restore point's id"))?;
        match server.daemon()?.find_restore_point(id).await {
            Ok(point) => Ok(axum::Json(point).into_response()),
            Err(RepositoryError::Missing { .. }) => {
                let message = format!("there is no restore point {id}; see /v1/restore-points");
                Err(Refusal::new(StatusCode::NOT_FOUND, message))
            }
            Err(error) => Err(Refusal::failed(error)),
        }
    }
    .boxed()
}

fn create(server: Arc<Server>, asked: Asked) -> BoxFuture<'static, Result<Response, Refusal>> {
    async move {
        let refuse = |message: String| Refusal::new(StatusCode::BAD_REQUEST, message);
        let wanted: NewRestorePoint = if asked.body.is_empty() {
            NewRestorePoint::default()
        } else {
            serde_json::from_slice(&asked.body).map_err(|error| refuse(format!("the body cannot be used: {error}")))?
        };
        if let Some(label) = &wanted.label
            && (label.trim().is_empty() || label.chars().count() > MAX_LABEL || label.chars().any(char::is_control))
        {
            return Err(refuse(format!("a label has 1 to {MAX_LABEL} characters, none of them control characters")));
        }
        let daemon = server.daemon()?;
        server.guard.pull()?;
        // It is finished even if who asked goes away.
        let made = tokio::spawn(async move { daemon.restore_point(wanted.label).await });
        let report = made.await.map_err(Refusal::failed)?.map_err(Refusal::failed)?;
        Ok((StatusCode::CREATED, axum::Json(report)).into_response())
    }
    .boxed()
}

fn verify(server: Arc<Server>, _: Asked) -> BoxFuture<'static, Result<Response, Refusal>> {
    async move {
        let daemon = server.daemon()?;
        server.guard.pull()?;
        let done = tokio::spawn(async move { daemon.verify().await });
        match done.await.map_err(Refusal::failed)?.map_err(Refusal::failed)? {
            Some(report) => Ok(axum::Json(report).into_response()),
            None => Err(Refusal::new(StatusCode::CONFLICT, "a verification is running; ask again when it is done")),
        }
    }
    .boxed()
}
