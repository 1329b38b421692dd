//! The HTTP client of a store's client: proxies as for all requests, and answers looked at before they are believed.

use std::time::Duration;

use async_trait::async_trait;
use http::header::{IF_MATCH, IF_NONE_MATCH};
use http::{Method, StatusCode};
use object_store::ClientOptions;
use object_store::client::{
    ClientConfigKey, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};

use crate::config::value::Period;
use crate::outbound;
use crate::repository::store::listing::{self, Expected};
use crate::repository::store::refusal;

/// The longest refusal that is read.
const REFUSAL_BYTES_MAX: usize = 1 << 20;

/// Makes clients that trust `certificates` besides the machine's own authorities.
#[derive(Debug)]
pub(super) struct Connector {
    pub(super) certificates: Vec<reqwest::Certificate>,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let value = |key| options.get_config_value(&key);
        let connect = value(ClientConfigKey::ConnectTimeout).and_then(|text| Period::try_from(text).ok());
        let client = reqwest::Client::builder()
            .user_agent(concat!("inner-universe/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(connect.map_or(Duration::from_secs(5), |period| period.0))
            .https_only(value(ClientConfigKey::AllowHttp).as_deref() != Some("true"))
            .tls_certs_merge(self.certificates.clone())
            .http1_only();
        let client = outbound::with_proxies(client).build();
        let client =
            client.map_err(|error| object_store::Error::Generic { store: "HTTP client", source: Box::new(error) })?;
        Ok(HttpClient::new(Checked(client)))
    }
}

/// The store cannot do what a condition asks for.
#[derive(Debug, thiserror::Error)]
#[error("the store does not take conditional writes: it answered {status} {said}")]
pub(super) struct NoConditions {
    status: u16,
    said: String,
}

#[derive(Debug)]
struct Checked(reqwest::Client);

#[async_trait]
impl HttpService for Checked {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let expected = Expected::of(&request);
        let headers = request.headers();
        let conditional =
            *request.method() == Method::PUT && (headers.contains_key(IF_MATCH) || headers.contains_key(IF_NONE_MATCH));
        let uri = request.uri().clone();
        let answer = HttpService::call(&self.0, request).await.map_err(|error| match outbound::proxy_for(&uri) {
            Some(proxy) => HttpError::new(error.kind(), outbound::ThroughProxy::new(proxy, error)),
            None => error,
        })?;
        if conditional && matches!(answer.status(), StatusCode::NOT_IMPLEMENTED | StatusCode::BAD_REQUEST) {
            return refuse_condition(answer).await;
        }
        expected.check(answer).await
    }
}

/// Turns an answer that refuses the condition, and not what is written, into an error that is not tried again.
async fn refuse_condition(answer: HttpResponse) -> Result<HttpResponse, HttpError> {
    let status = answer.status();
    let (answer, body) = listing::read(answer, REFUSAL_BYTES_MAX).await?;
    let code = refusal::code(&String::from_utf8_lossy(&body)).map(str::to_owned);
    if status == StatusCode::NOT_IMPLEMENTED || code.as_deref().is_none_or(refusal::is_of_condition) {
        let said = code.unwrap_or_else(|| status.canonical_reason().unwrap_or_default().into());
        return Err(HttpError::new(HttpErrorKind::Unknown, NoConditions { status: status.as_u16(), said }));
    }
    Ok(answer)
}
