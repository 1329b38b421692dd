//! Clients of stores that are reached over HTTP: S3 and what speaks like it, Google, Azure.
//!
//! Invariants: what is configured wins over the environment; configured keys are never joined with a token from elsewhere;
//! nothing is sent to another bucket than the address names.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum, S3ConditionalPut};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

use crate::config::RepositoryConfig;
use crate::repository::RepositoryError;
use crate::repository::store::credentials::KeyFiles;
use crate::repository::store::http::Connector;
use crate::repository::store::ordered::Ordered;

/// Connects to `bucket` of the store that the scheme of an address names.
pub(super) fn connect(
    scheme: &str,
    bucket: &str,
    config: &RepositoryConfig,
) -> Result<Arc<dyn ObjectStore>, RepositoryError> {
    let refuse = |reason: String| RepositoryError::BadUrl { url: format!("{scheme}://{bucket}"), reason };
    // `ring` is compiled in for all TLS; a second start in one process keeps the first one's.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let connector = Connector { certificates: certificates(config)? };
    let insecure = |endpoint: Option<String>| client_options(config, endpoint.is_some_and(|url| is_http(&url)));
    let store: Arc<dyn ObjectStore> = match scheme {
        "s3" => {
            let builder = s3(bucket, config, environment()).map_err(refuse)?.with_http_connector(connector);
            Arc::new(builder.build().map_err(|error| refuse(error.to_string()))?)
        }
        "gs" => {
            let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket).with_retry(retries(config));
            let client = insecure(builder.get_config_value(&GoogleConfigKey::BaseUrl));
            let builder = builder.with_client_options(client).with_http_connector(connector);
            Arc::new(builder.build().map_err(|error| refuse(error.to_string()))?)
        }
        _ => {
            let builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket).with_retry(retries(config));
            let client = insecure(builder.get_config_value(&AzureConfigKey::Endpoint));
            let builder = builder.with_client_options(client).with_http_connector(connector);
            Arc::new(builder.build().map_err(|error| refuse(error.to_string()))?)
        }
    };
    // Directory buckets list in no order, and Azure promises none where names are folders.
    let orders = scheme == "gs" || (scheme == "s3" && !bucket.ends_with("--x-s3"));
    Ok(if orders { Arc::new(Ordered(store)) } else { store })
}

fn certificates(config: &RepositoryConfig) -> Result<Vec<reqwest::Certificate>, RepositoryError> {
    let Some(path) = &config.ca_file else { return Ok(Vec::new()) };
    let refuse = |reason: String| RepositoryError::BadUrl { url: path.display().to_string(), reason };
    let pem = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
    reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| refuse(error.to_string()))
}

fn client_options(config: &RepositoryConfig, allow_http: bool) -> ClientOptions {
    // The deadline of a whole request grows with its size; see `Store::within`.
    ClientOptions::new()
        .with_timeout_disabled()
        .with_connect_timeout(Duration::from_secs(5).min(config.request_timeout.0))
        .with_allow_http(allow_http)
}

fn retries(config: &RepositoryConfig) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(5),
            base: 2.0,
        },
        max_retries: config.request_retries as usize,
        retry_timeout: config.request_timeout.0,
    }
}

fn is_http(url: &str) -> bool {
    url.starts_with("http://")
}

fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// Returns true if the variable counts that the tools of AWS know under this name, beside what is configured. The endpoint
/// and the region are keys of the configuration, which takes them from the environment itself; see `config::load`.
fn counts(key: AmazonS3ConfigKey, config: &RepositoryConfig) -> bool {
    use AmazonS3ConfigKey as Known;
    match key {
        Known::AccessKeyId
        | Known::SecretAccessKey
        | Known::Token
        | Known::ImdsV1Fallback
        | Known::MetadataEndpoint
        | Known::ContainerCredentialsRelativeUri
        | Known::ContainerCredentialsFullUri
        | Known::ContainerAuthorizationTokenFile
        | Known::WebIdentityTokenFile
        | Known::RoleArn
        | Known::RoleSessionName
        | Known::StsEndpoint
        | Known::SkipSignature => config.access_key_id.is_none(),
        Known::Encryption(_) if key.as_ref() != "aws_sse_bucket_key_enabled" => config.server_side_encryption.is_none(),
        Known::Encryption(_)
        | Known::S3Express
        | Known::RequestPayer
        | Known::UnsignedPayload
        | Known::DisableBulkDelete => true,
        _ => false,
    }
}

fn s3(
    bucket: &str,
    config: &RepositoryConfig,
    environment: impl Iterator<Item = (String, String)>,
) -> Result<AmazonS3Builder, String> {
    let mut builder = AmazonS3Builder::new();
    for (name, value) in environment {
        let key = name.starts_with("AWS_").then(|| name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>().ok());
        match key.flatten() {
            // As compose files have it: an empty variable is one that is not set.
            Some(key) if counts(key, config) && !value.trim().is_empty() => builder = builder.with_config(key, value),
            _ => {}
        }
    }
    builder = builder
        .with_bucket_name(bucket)
        .with_virtual_hosted_style_request(!config.path_style)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_client_options(client_options(config, config.endpoint.as_deref().is_some_and(is_http)))
        .with_retry(retries(config));
    match &config.endpoint {
        Some(endpoint) if config.path_style => builder = builder.with_endpoint(endpoint.trim_end_matches('/')),
        Some(endpoint) => builder = builder.with_endpoint(virtual_endpoint(endpoint, bucket)?),
        None => {}
    }
    if let Some(region) = &config.region {
        builder = builder.with_region(region);
    }
    if let Some(keys) = KeyFiles::of(config) {
        builder = builder.with_credentials(Arc::new(keys));
    } else if let (Some(id), Some(secret)) = (&config.access_key_id, &config.secret_access_key) {
        builder = builder.with_access_key_id(id.reveal()).with_secret_access_key(secret.reveal());
        if let Some(token) = &config.session_token {
            builder = builder.with_token(token.reveal());
        }
    }
    let settings = [
        ("aws_server_side_encryption", &config.server_side_encryption),
        ("aws_sse_kms_key_id", &config.sse_kms_key_id),
    ];
    for (name, value) in settings {
        if let Some(value) = value {
            let key = name.parse::<AmazonS3ConfigKey>().map_err(|error| error.to_string())?;
            builder = builder.with_config(key, value);
        }
    }
    if config.checksum {
        builder = builder.with_checksum_algorithm(Checksum::SHA256);
    }
    Ok(builder)
}

/// The endpoint with the bucket in its host name: `https://bucket.s3.example.org`.
///
/// # Errors
/// When the endpoint has no host name, or names the bucket already.
pub(crate) fn virtual_endpoint(endpoint: &str, bucket: &str) -> Result<String, String> {
    let mut url = url::Url::parse(endpoint).map_err(|error| format!("`{endpoint}` is not an address: {error}"))?;
    let host = match url.host() {
        Some(url::Host::Domain(host)) => host.to_owned(),
        _ => {
            return Err(format!(
                "path_style = false puts the bucket before a host name, and `{endpoint}` has none; set path_style = true, \
                 or give the endpoint by name"
            ));
        }
    };
    if let Some(rest) = host.strip_prefix(bucket).and_then(|rest| rest.strip_prefix('.')) {
        return Err(format!(
            "path_style = false puts the bucket before the host name, and `{endpoint}` begins with `{bucket}` already; \
             give the endpoint without it ({rest}), or set path_style = true"
        ));
    }
    let host = format!("{bucket}.{host}");
    // Capital letters would change.
    if url.set_host(Some(&host)).is_err() || url.host_str() != Some(&host) {
        return Err(format!("`{bucket}` cannot be part of a host name; set path_style = true"));
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::value::Secret;

    fn secret(text: &str) -> Option<Secret> {
        Some(Secret::try_from(text.to_owned()).expect("a secret"))
    }

    fn built(config: &RepositoryConfig, environment: &[(&str, &str)]) -> AmazonS3Builder {
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        s3("backups", config, environment).expect("a builder")
    }

    fn value(builder: &AmazonS3Builder, name: &str) -> Option<String> {
        builder.get_config_value(&name.parse().expect("a key"))
    }

    const FOREIGN: &[(&str, &str)] = &[
        ("AWS_ACCESS_KEY_ID", "foreign"),
        ("AWS_SECRET_ACCESS_KEY", "foreign"),
        ("AWS_SESSION_TOKEN", "foreign"),
        ("AWS_ENDPOINT", "http://foreign"),
        ("AWS_ENDPOINT_URL", "http://foreign"),
        ("AWS_ENDPOINT_URL_S3", "http://foreign"),
        ("AWS_REGION", "foreign"),
        ("AWS_DEFAULT_REGION", "foreign"),
        ("AWS_BUCKET", "foreign"),
        ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true"),
        ("AWS_SKIP_SIGNATURE", "true"),
        ("AWS_CONDITIONAL_PUT", "disabled"),
        ("AWS_CHECKSUM_ALGORITHM", "crc64nvme"),
        ("AWS_SERVER_SIDE_ENCRYPTION", "aws:kms"),
        ("AWS_SSE_KMS_KEY_ID", "foreign"),
    ];

    #[test]
    fn configured_values_win_over_aws_variables() {
        let config = RepositoryConfig {
            endpoint: Some("https://s3.example.org".into()),
            region: Some("eu-central-1".into()),
            access_key_id: secret("ours"),
            secret_access_key: secret("ours"),
            server_side_encryption: Some("AES256".into()),
            ..RepositoryConfig::default()
        };
        let builder = built(&config, FOREIGN);
        for (name, expected) in [
            ("aws_access_key_id", Some("ours")),
            ("aws_secret_access_key", Some("ours")),
            ("aws_session_token", None),
            ("aws_endpoint", Some("https://s3.example.org")),
            ("aws_endpoint_url_s3", None),
            ("aws_region", Some("eu-central-1")),
            ("aws_bucket", Some("backups")),
            ("aws_virtual_hosted_style_request", Some("false")),
            ("aws_skip_signature", Some("false")),
            ("aws_conditional_put", Some("etag")),
            ("aws_checksum_algorithm", None),
            ("aws_server_side_encryption", Some("AES256")),
            ("aws_sse_kms_key_id", None),
        ] {
            assert_eq!(value(&builder, name).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn credentials_of_the_environment_count_alone() {
        let variables = [
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_SESSION_TOKEN", "token"),
            ("AWS_ROLE_ARN", "arn"),
            ("AWS_WEB_IDENTITY_TOKEN_FILE", "/token"),
            ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2"),
            ("AWS_METADATA_ENDPOINT", ""),
        ];
        let builder = built(&RepositoryConfig::default(), &variables);
        for (name, text) in variables {
            let expected = Some(text).filter(|text| !text.is_empty());
            assert_eq!(value(&builder, &name.to_ascii_lowercase()).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn virtual_hosts_carry_the_bucket() {
        let host = |endpoint: &str| virtual_endpoint(endpoint, "backups");
        assert_eq!(host("https://s3.example.org").as_deref(), Ok("https://backups.s3.example.org"));
        assert_eq!(host("http://minio:9000/").as_deref(), Ok("http://backups.minio:9000"));
        assert_eq!(host("https://gate.example.org/s3/").as_deref(), Ok("https://backups.gate.example.org/s3"));
        assert!(host("http://127.0.0.1:9000").is_err_and(|reason| reason.contains("path_style = true")));
        assert!(host("http://[::1]:9000").is_err_and(|reason| reason.contains("path_style = true")));
        assert!(host("https://backups.s3.example.org").is_err_and(|reason| reason.contains("(s3.example.org)")));
        assert!(virtual_endpoint("https://s3.example.org", "Backups").is_err(), "host names know no capitals");
    }

    #[test]
    fn only_stores_that_promise_order_are_held_to_it() {
        let config = RepositoryConfig {
            endpoint: Some("http://127.0.0.1:9".into()),
            access_key_id: secret("id"),
            secret_access_key: secret("secret"),
            ..RepositoryConfig::default()
        };
        let debug = |bucket| format!("{:?}", connect("s3", bucket, &config).expect("a store"));
        assert!(debug("backups").starts_with("Ordered"));
        assert!(!debug("backups--use1-az4--x-s3").starts_with("Ordered"));
    }
}
