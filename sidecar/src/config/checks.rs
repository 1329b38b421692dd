//! What no single key shows: keys that need or exclude each other, and ranges.

use std::path::Path;

use crate::config::value::{ByteSize, Period, without_user};
use crate::config::{Config, RepositoryConfig};
use crate::repository::store::virtual_endpoint;

impl Config {
    /// What no single key shows: keys that need or exclude each other, and ranges.
    pub(crate) fn validate(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let mut refuse = |key, message: String| problems.push((key, message));
        let repository = &self.repository;
        if !(1..=19).contains(&repository.compression_level) {
            refuse("repository.compression_level", format!("{} is not from 1 to 19", repository.compression_level));
        }
        if let Some(url) = &repository.url
            && let Err(reason) = crate::repository::store::check_url(url)
        {
            refuse("repository.url", reason);
        }
        let addresses = [
            ("repository.endpoint", &repository.endpoint, "access_key_id and secret_access_key"),
            ("telemetry.otlp_endpoint", &self.telemetry.otlp_endpoint, "a header in telemetry.otlp_headers"),
            ("spacetimedb_config.url", &self.spacetimedb_config.url, "a token in spacetimedb_config.token_file"),
        ];
        for (key, address, credentials) in addresses {
            if let Some(Err(problem)) = address.as_deref().map(|address| check_web_address(address, credentials)) {
                refuse(key, problem);
            }
        }
        if let Some(endpoint) = &repository.endpoint
            && url::Url::parse(endpoint).is_ok_and(|url| url.query().is_some() || url.fragment().is_some())
        {
            refuse("repository.endpoint", "an endpoint takes neither `?` nor `#`".into());
        }
        problems.extend(store_checks(repository));
        let mut refuse = |key, message: String| problems.push((key, message));
        if repository.access_key_id.is_some() != repository.secret_access_key.is_some() {
            refuse("repository.access_key_id", "access_key_id and secret_access_key go together; give both".into());
        }
        if let Some(sse) = &repository.server_side_encryption
            && !matches!(sse.as_str(), "AES256" | "aws:kms")
        {
            refuse("repository.server_side_encryption", format!("`{sse}` is neither `AES256` nor `aws:kms`"));
        }
        if repository.sse_kms_key_id.is_some() && repository.server_side_encryption.as_deref() != Some("aws:kms") {
            refuse("repository.sse_kms_key_id", "it needs server_side_encryption = \"aws:kms\"".into());
        }
        let server = &self.spacetimedb_config;
        if server.private_key_file.is_some() != server.public_key_file.is_some() {
            let message = "private_key_file and public_key_file go together; give both";
            refuse("spacetimedb_config.private_key_file", message.into());
        }
        if server.private_key_file.is_some() && server.key_dir.is_some() {
            let message = "name the keys by their files or by their directory (key_dir), not both";
            refuse("spacetimedb_config.private_key_file", message.into());
        }
        let telemetry = &self.telemetry;
        if let Some(address) = &telemetry.heartbeat_url
            && !is_web_address(address.reveal())
        {
            refuse("telemetry.heartbeat_url", "it is no http:// or https:// address".into());
        }
        if telemetry.trace_ratio.is_some_and(|ratio| !(0.0..=1.0).contains(&ratio)) {
            refuse("telemetry.trace_ratio", "it is not from 0.0 to 1.0".into());
        }
        if let Some(database) = &self.spacetimedb_config.database
            && (database.is_empty() || !database.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)))
        {
            refuse(
                "spacetimedb_config.database",
                format!("`{database}` is neither a database's name nor its identity"),
            );
        }
        if telemetry.otlp_headers.iter().any(|header| !header.reveal().contains('=')) {
            refuse("telemetry.otlp_headers", "one of them has no `=`; write each as NAME=VALUE".into());
        }
        match self.http.listen.parse::<std::net::SocketAddr>() {
            Ok(address) if address.ip().is_loopback() || self.http.token.is_some() || !self.http.enabled => {}
            Ok(address) => refuse(
                "http.listen",
                format!("{address} is reached from other machines; set http.token, or listen on 127.0.0.1"),
            ),
            Err(_) => {
                refuse(
                    "http.listen",
                    format!("`{}` is no address with a port; write 127.0.0.1:9464", self.http.listen),
                );
            }
        }
        for (key, file) in [
            ("repository.ca_file", &repository.ca_file),
            ("telemetry.otlp_ca_file", &telemetry.otlp_ca_file),
            ("spacetimedb_config.token_file", &self.spacetimedb_config.token_file),
            ("spacetimedb_config.ca_file", &self.spacetimedb_config.ca_file),
        ] {
            // The first deployment leaves a token where one is named and not there yet.
            let comes = |path: &Path| key == "spacetimedb_config.token_file" && path.parent().is_some_and(Path::is_dir);
            if let Some(path) = file
                && let Err(error) = std::fs::File::open(path)
                && !(error.kind() == std::io::ErrorKind::NotFound && comes(path))
            {
                refuse(key, format!("open {}: {error}", path.display()));
            }
        }
        for (key, identities) in [("deploy.admins", &self.deploy.admins), ("deploy.members", &self.deploy.members)] {
            if let Some(wrong) = identities.iter().find(|text| text.parse::<crate::ids::Identity>().is_err()) {
                refuse(key, format!("`{wrong}` is no identity: 64 hexadecimal digits"));
            }
        }
        for recipient in &repository.recipients {
            if let Err(error) = crate::repository::crypto::Keyring::new(std::slice::from_ref(recipient), &[]) {
                refuse("repository.recipients", error.to_string());
            }
        }
        let at_least = |key, period: Period, least: Period| {
            (period.0 < least.0).then(|| (key, format!("{period} is less than {least}")))
        };
        problems.extend(
            [
                at_least("repository.request_timeout", repository.request_timeout, Period::seconds(1)),
                at_least("repository.lease_duration", repository.lease_duration, Period::seconds(3)),
                at_least("archive.flush_interval", self.archive.flush_interval, Period::millis(10)),
                telemetry.otlp_timeout.and_then(|it| at_least("telemetry.otlp_timeout", it, Period::millis(100))),
                telemetry
                    .metrics_interval
                    .and_then(|it| at_least("telemetry.metrics_interval", it, Period::millis(100))),
                at_least("telemetry.heartbeat_interval", telemetry.heartbeat_interval, Period::seconds(1)),
                at_least("archive.compaction_interval", self.archive.compaction_interval, Period::seconds(1)),
            ]
            .into_iter()
            .flatten(),
        );
        let bytes = self.archive.flush_bytes.0;
        if !(1..=crate::backup::OBJECT_SIZE as u64).contains(&bytes) {
            let most = ByteSize(crate::backup::OBJECT_SIZE as u64);
            problems.push(("archive.flush_bytes", format!("{} is not from 1 B to {most}", self.archive.flush_bytes)));
        }
        if self.export.rows_per_file == 0 {
            problems.push(("export.rows_per_file", "0 rows would never fill a file; give at least 1".into()));
        }
        if self.export.formats.is_empty() {
            problems.push(("export.formats", "none is named; give `ndjson`, `parquet` or both".into()));
        }
        if self.schedule.export.is_some() && self.spacetimedb_config.database.is_none() {
            problems.push(("schedule.export", "it needs spacetimedb_config.database, the database to export".into()));
        }
        if self.schedule.prune.is_some() && self.retention.keeps_nothing() {
            problems
                .push(("schedule.prune", "retention says nothing; give retention.window or a retention.keep_*".into()));
        }
        if self.retention.grace.0 < Period::seconds(60).0 {
            problems.push(("retention.grace", format!("{} is less than 1m", self.retention.grace)));
        }
        if self.server_config.timeout_ms == 0 {
            problems.push(("server_config.timeout_ms", "0 would end every call at once; give milliseconds".into()));
        }
        if self.spacetimedb_config.address.parse::<std::net::IpAddr>().is_err()
            && self.spacetimedb_config.address != "localhost"
        {
            let address = &self.spacetimedb_config.address;
            problems.push(("spacetimedb_config.address", format!("`{address}` is no IP address (nor `localhost`)")));
        }
        problems
    }
}

/// What is wrong with an address that is shown, and so must not hold `credentials`.
fn check_web_address(text: &str, credentials: &str) -> Result<(), String> {
    if !is_web_address(text) {
        return Err(format!("`{}` is no http:// or https:// address", without_user(text)));
    }
    match url::Url::parse(text) {
        Ok(url) if !url.username().is_empty() || url.password().is_some() => {
            Err(format!("give credentials as {credentials}, not in the address"))
        }
        _ => Ok(()),
    }
}

/// What holds of some stores only.
fn store_checks(repository: &RepositoryConfig) -> Vec<(&'static str, String)> {
    let mut problems = Vec::new();
    let url = repository.url.as_deref().and_then(|url| url::Url::parse(url).ok());
    let scheme = url.as_ref().map_or("", |url| url.scheme());
    if let (Some(endpoint), Some(bucket)) = (&repository.endpoint, url.as_ref().and_then(|url| url.host_str()))
        && scheme == "s3"
        && !repository.path_style
        && let Err(reason) = virtual_endpoint(endpoint, bucket)
    {
        problems.push(("repository.path_style", reason));
    }
    if repository.session_token.is_some() && repository.access_key_id.is_none() {
        let message = "session_token belongs to access_key_id and secret_access_key; give all three";
        problems.push(("repository.session_token", message.into()));
    }
    if let Some(class) = &repository.storage_class {
        let upper = class.to_ascii_uppercase();
        let archives = match upper.as_str() {
            "GLACIER" | "DEEP_ARCHIVE" | "COLD_ARCHIVE" | "DEEP_COLD_ARCHIVE" => true,
            // Google's is read like any other.
            "ARCHIVE" => scheme != "gs",
            _ => false,
        };
        if archives {
            let message = format!(
                "`{class}` is an archive tier: objects there are not read before somebody restores them; take a class that is read at once, such as STANDARD_IA or GLACIER_IR"
            );
            problems.push(("repository.storage_class", message));
        }
    }
    problems
}

fn is_web_address(text: &str) -> bool {
    url::Url::parse(text).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
}
