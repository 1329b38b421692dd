//! The HTTP client of a store's client: proxies as for all requests, and answers looked at before they are believed.

use std::time::Duration;

use async_trait::async_trait;
use object_store::ClientOptions;
use object_store::client::{
    ClientConfigKey, HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService,
};

use crate::config::value::Period;
use crate::outbound;
use crate::repository::store::listing::Expected;

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

#[derive(Debug)]
struct Checked(reqwest::Client);

#[async_trait]
impl HttpService for Checked {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let expected = Expected::of(&request);
        let uri = request.uri().clone();
        let answer = HttpService::call(&self.0, request).await.map_err(|error| match outbound::proxy_for(&uri) {
            Some(proxy) => HttpError::new(error.kind(), outbound::ThroughProxy::new(proxy, error)),
            None => error,
        })?;
        expected.check(answer).await
    }
}
