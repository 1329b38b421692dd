//! Requests that leave this process: which of them take a proxy, and how an error names it.
//!
//! Invariants: loopback and the metadata services of instances are reached directly, whatever the environment says; a
//! proxy's user and password never show.

use std::fmt;
use std::sync::LazyLock;

use hyper_util::client::proxy::matcher::Matcher;
use url::Url;

/// What no proxy can reach for us: this machine, and the services that answer an instance alone.
const DIRECT: &str = "localhost,127.0.0.0/8,::1,169.254.169.254,fd00:ec2::254,169.254.170.2,169.254.170.23,\
                      fd00:ec2::23,metadata.google.internal";

/// A proxy that the environment names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Proxy {
    /// With its user and password.
    url: Url,
    variable: &'static str,
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bare = self.url.clone();
        let _ = bare.set_username("");
        let _ = bare.set_password(None);
        write!(f, "{} ({})", bare.as_str().trim_end_matches('/'), self.variable)
    }
}

/// The proxies of the environment.
struct Proxies {
    matcher: Matcher,
    http: Option<Proxy>,
    https: Option<Proxy>,
}

static PROXIES: LazyLock<Proxies> = LazyLock::new(|| Proxies::of(|name| std::env::var(name).ok()));

impl Proxies {
    fn of(variable: impl Fn(&str) -> Option<String>) -> Self {
        // A web server hands a request's header `Proxy` to its programs under this name.
        let is_cgi = variable("REQUEST_METHOD").is_some();
        let first = |names: [&'static str; 2]| {
            names.into_iter().filter(|_| !is_cgi).find_map(|name| Some((name, variable(name)?)))
        };
        let read = |found: Option<(&'static str, String)>| {
            let (variable, text) = found?;
            let text = if text.contains("://") { text } else { format!("http://{text}") };
            Some(Proxy { url: Url::parse(&text).ok().filter(Url::has_host)?, variable })
        };
        let all = read(first(["ALL_PROXY", "all_proxy"]));
        let http = read(first(["HTTP_PROXY", "http_proxy"])).or_else(|| all.clone());
        let https = read(first(["HTTPS_PROXY", "https_proxy"])).or(all);
        let excluded = first(["NO_PROXY", "no_proxy"]).map(|(_, text)| text).unwrap_or_default();
        let address = |proxy: &Option<Proxy>| proxy.as_ref().map(|proxy| proxy.url.to_string()).unwrap_or_default();
        let matcher = Matcher::builder().http(address(&http)).https(address(&https));
        Self { matcher: matcher.no(format!("{DIRECT},{excluded}")).build(), http, https }
    }

    fn for_uri(&self, uri: &http::Uri) -> Option<&Proxy> {
        self.matcher.intercept(uri)?;
        if uri.scheme_str() == Some("https") { self.https.as_ref() } else { self.http.as_ref() }
    }
}

/// The proxy through which `uri` is reached.
pub(crate) fn proxy_for(uri: &http::Uri) -> Option<&'static Proxy> {
    PROXIES.for_uri(uri)
}

/// A client that takes the proxies of the environment, where they make sense.
pub(crate) fn with_proxies(client: reqwest::ClientBuilder) -> reqwest::ClientBuilder {
    if PROXIES.http.is_none() && PROXIES.https.is_none() {
        return client.no_proxy();
    }
    client.proxy(reqwest::Proxy::custom(|url| {
        let uri = url.as_str().parse().ok()?;
        proxy_for(&uri).map(|proxy| proxy.url.clone())
    }))
}

/// The proxy through which a request went that failed.
pub(crate) fn proxy_of(error: &reqwest::Error) -> Option<&'static Proxy> {
    proxy_for(&error.url()?.as_str().parse().ok()?)
}

/// Why a request failed, in the words of its innermost cause, and through which proxy.
pub(crate) fn reason(error: &reqwest::Error) -> String {
    let cause = root_cause(error);
    match proxy_of(error) {
        Some(proxy) => format!("{cause}, through the proxy {proxy}"),
        None => cause,
    }
}

pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// An error of a request that went through a proxy.
#[derive(Debug, thiserror::Error)]
#[error("{source}, through the proxy {proxy}")]
pub(crate) struct ThroughProxy<E: std::error::Error + 'static> {
    proxy: Proxy,
    source: E,
}

impl<E: std::error::Error + 'static> ThroughProxy<E> {
    pub(crate) fn new(proxy: &Proxy, source: E) -> Self {
        Self { proxy: proxy.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Proxies {
        let find =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        Proxies::of(find)
    }

    fn shown(proxies: &Proxies, uri: &str) -> Option<String> {
        proxies.for_uri(&uri.parse().expect("a URI")).map(ToString::to_string)
    }

    #[test]
    fn loopback_and_instance_metadata_go_directly() {
        let proxies = proxies(&[("ALL_PROXY", "http://proxy:3128"), ("NO_PROXY", "example.org")]);
        for direct in [
            "http://127.0.0.1:3000/v1/ping",
            "http://127.9.9.9/",
            "http://localhost:4318/v1/traces",
            "http://[::1]:9000/backups",
            "http://169.254.169.254/latest/api/token",
            "http://[fd00:ec2::254]/latest/api/token",
            "http://169.254.170.2/v2/credentials/abc",
            "http://metadata.google.internal/computeMetadata/v1/",
            "https://s3.example.org/backups",
        ] {
            assert_eq!(shown(&proxies, direct), None, "{direct}");
        }
        for other in ["http://10.0.0.1:3000/v1/ping", "https://s3.eu-central-1.amazonaws.com/backups"] {
            assert_eq!(shown(&proxies, other).as_deref(), Some("http://proxy:3128 (ALL_PROXY)"), "{other}");
        }
    }

    #[test]
    fn proxies_go_by_scheme_and_hide_passwords() {
        let proxies = proxies(&[("HTTP_PROXY", "plain:80"), ("https_proxy", "http://me:secret@tls:8080")]);
        assert_eq!(shown(&proxies, "http://example.org/").as_deref(), Some("http://plain (HTTP_PROXY)"));
        assert_eq!(shown(&proxies, "https://example.org/").as_deref(), Some("http://tls:8080 (https_proxy)"));
    }

    #[test]
    fn no_variable_means_no_proxy() {
        assert_eq!(shown(&proxies(&[]), "http://example.org/"), None);
        let cgi = [("REQUEST_METHOD", "GET"), ("HTTP_PROXY", "http://attacker:80")];
        assert_eq!(shown(&proxies(&cgi), "http://example.org/"), None);
        assert_eq!(shown(&proxies(&[("HTTP_PROXY", "http://p:1"), ("NO_PROXY", "*")]), "http://example.org/"), None);
    }
}
