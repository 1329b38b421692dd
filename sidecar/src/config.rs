//! The configuration: a file in TOML, JSON or YAML, then the environment, then flags.
//!
//! Invariants: every key has a default; unknown keys are errors; all problems of a configuration are found in one go, each
//! with its place; secrets never appear in what is printed.

mod checks;
pub mod keeping;
pub mod load;
pub mod tree;
pub mod value;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::config::keeping::{DrillConfig, RetentionConfig};
use crate::config::value::{ByteSize, Cron, Period, Secret, TimeZone};
use crate::datadir::key_files::KeyFiles;

/// Everything that can be configured.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub module_config: ModuleConfig,
    pub spacetimedb_config: SpacetimedbConfig,
    pub server_config: ServerConfig,
    pub feature_flags: FeatureFlags,
    pub repository: RepositoryConfig,
    pub archive: ArchiveConfig,
    pub schedule: ScheduleConfig,
    pub retention: RetentionConfig,
    pub export: ExportConfig,
    pub telemetry: TelemetryConfig,
    pub http: HttpConfig,
    pub deploy: DeployConfig,
    pub drill: DrillConfig,
}

/// The module that `deploy` publishes.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModuleConfig {
    /// The module's source directory.
    pub module_dir: Option<PathBuf>,
    /// The compiled module.
    pub module_path: Option<PathBuf>,
    /// Build the module before publishing it.
    pub build_module: bool,
}

/// The server beside the sidecar.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SpacetimedbConfig {
    /// The server's data directory.
    pub db_path: Option<PathBuf>,
    /// Address the server listens on.
    pub address: String,
    pub port: u16,
    pub log_level: LogLevel,
    /// Where the server is reached; `http://address:port` when left out.
    pub url: Option<String>,
    /// The database of the bundled module, by name or identity. Events are streamed from it.
    pub database: Option<String>,
    /// A file with the token of an identity that may read it: its owner, an admin or a member.
    pub token_file: Option<PathBuf>,
    /// The server binary; found on PATH when left out.
    pub server_bin: Option<PathBuf>,
    /// The server's token keys, captured into restore points of an encrypted repository.
    pub key_dir: Option<PathBuf>,
    /// The private token key, where the two are not in one directory under their usual names.
    pub private_key_file: Option<PathBuf>,
    /// The public token key; goes with `private_key_file`.
    pub public_key_file: Option<PathBuf>,
    /// What to do when a server started by `run -- COMMAND` ends.
    pub restart: Restart,
    /// The longest wait before a restart; waits double from one second.
    pub restart_backoff_max: Period,
    /// A server that was asked to stop is killed after this long.
    pub stop_timeout: Period,
    /// A PEM file of further certificate authorities for the server, where it is reached over https://.
    pub ca_file: Option<PathBuf>,
}

impl Default for SpacetimedbConfig {
    fn default() -> Self {
        Self {
            db_path: None,
            address: "127.0.0.1".into(),
            port: 3000,
            log_level: LogLevel::Info,
            url: None,
            database: None,
            token_file: None,
            server_bin: None,
            key_dir: None,
            private_key_file: None,
            public_key_file: None,
            restart: Restart::OnFailure,
            restart_backoff_max: Period::seconds(60),
            stop_timeout: Period::seconds(6),
            ca_file: None,
        }
    }
}

impl SpacetimedbConfig {
    /// Where the server is reached.
    pub fn server_url(&self) -> String {
        let made = || match self.address.parse::<std::net::IpAddr>() {
            // What listens everywhere is reached here.
            Ok(address) if address.is_unspecified() => format!("http://127.0.0.1:{}", self.port),
            Ok(std::net::IpAddr::V6(address)) => format!("http://[{address}]:{}", self.port),
            _ => format!("http://{}:{}", self.address, self.port),
        };
        self.url.as_ref().map_or_else(made, |url| url.trim_end_matches('/').to_owned())
    }

    /// The token keys that are named here, and so are captured.
    pub fn named_keys(&self) -> Option<KeyFiles> {
        match (&self.private_key_file, &self.public_key_file) {
            (Some(private), Some(public)) => Some(KeyFiles { private: private.clone(), public: public.clone() }),
            _ => self.key_dir.as_deref().map(KeyFiles::in_dir),
        }
    }

    /// The token keys of a server on `data_dir`, there already or to be made by it.
    pub fn keys_of(&self, data_dir: &Path) -> KeyFiles {
        let beside = || KeyFiles::in_dir(&crate::durable::beside(data_dir, ".keys"));
        // Where a restore puts captured keys, too.
        self.named_keys().or_else(|| KeyFiles::in_settings(data_dir)).unwrap_or_else(beside)
    }

    /// From here on the token keys are those in `dir`.
    pub fn use_keys_in(&mut self, dir: &Path) {
        (self.key_dir, self.private_key_file, self.public_key_file) = (Some(dir.to_owned()), None, None);
    }
}

/// How much a server logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// When a server that ended is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    Never,
    /// After a crash or an exit code other than 0.
    OnFailure,
    Always,
}

/// Limits of the server, applied by `deploy` and server mode.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Further clients are refused by the module.
    pub max_connections: u32,
    /// Limit of every call to the server, milliseconds.
    pub timeout_ms: u64,
    /// The server's page pool, MiB.
    pub cache_size_mb: u64,
    /// Only known identities may use the module.
    pub auth_required: bool,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self { max_connections: 100, timeout_ms: 30_000, cache_size_mb: 512, auth_required: true }
    }
}

/// Features of the bundled module.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FeatureFlags {
    pub enable_state_versioning: bool,
    pub enable_audit_log: bool,
    pub enable_metrics: bool,
    pub enable_caching: bool,
    pub enable_distribution: bool,
}

impl Default for FeatureFlags {
    fn default() -> Self {
        Self {
            enable_state_versioning: true,
            enable_audit_log: true,
            enable_metrics: true,
            enable_caching: true,
            enable_distribution: false,
        }
    }
}

/// What `deploy` sees to besides the module.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DeployConfig {
    /// Identities that are made admins of the bundled module. None is removed.
    pub admins: Vec<String>,
    /// Identities that may use the bundled module while server_config.auth_required is on. None is removed.
    pub members: Vec<String>,
    /// The longest that the server may take to come up, and each step of the verification.
    pub timeout: Timeout,
}

/// A length of time with a default of a minute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Timeout(pub Period);

impl Default for Timeout {
    fn default() -> Self {
        Self(Period::seconds(60))
    }
}

/// Where backups go, and how.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RepositoryConfig {
    /// `/path` or `file:///path`, `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.
    #[serde(deserialize_with = "crate::repository::address::as_url")]
    pub url: Option<String>,
    /// age recipients (`age1...`) that a new repository seals to.
    pub recipients: Vec<String>,
    /// age identity files, needed to read a sealed repository.
    pub identity_files: Vec<PathBuf>,
    /// zstd level, 1 to 19.
    pub compression_level: i32,
    /// The longest a single request to the store may take.
    pub request_timeout: Period,
    /// Tries of one request before it counts as failed; the archiver then waits and begins anew.
    pub request_retries: u32,
    /// The S3 endpoint, where it is not AWS; AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL when left out.
    pub endpoint: Option<String>,
    /// AWS_REGION or AWS_DEFAULT_REGION when left out.
    pub region: Option<String>,
    /// Address buckets as `endpoint/bucket` (true) or `bucket.endpoint` (false); the endpoint is given without the bucket.
    pub path_style: bool,
    /// S3 credentials; AWS_* variables and instance roles are used when left out.
    pub access_key_id: Option<Secret>,
    pub secret_access_key: Option<Secret>,
    pub session_token: Option<Secret>,
    /// `STANDARD_IA`, `GLACIER_IR` and so on, for bulk objects; the bucket's default when left out.
    pub storage_class: Option<String>,
    /// `AES256` or `aws:kms`.
    pub server_side_encryption: Option<String>,
    pub sse_kms_key_id: Option<String>,
    /// Send a SHA-256 of every object: some servers demand it where objects are locked.
    pub checksum: bool,
    /// A PEM file of further certificate authorities.
    pub ca_file: Option<PathBuf>,
    /// How long the one writer's lease lasts without renewal; a writer that crashed is replaced after it.
    pub lease_duration: Period,
}

impl Default for RepositoryConfig {
    fn default() -> Self {
        Self {
            url: None,
            recipients: Vec::new(),
            identity_files: Vec::new(),
            compression_level: crate::backup::DEFAULT_LEVEL,
            request_timeout: Period::seconds(30),
            request_retries: 3,
            endpoint: None,
            region: None,
            path_style: true,
            access_key_id: None,
            secret_access_key: None,
            session_token: None,
            storage_class: None,
            server_side_encryption: None,
            sse_kms_key_id: None,
            checksum: false,
            ca_file: None,
            lease_duration: Period::seconds(30),
        }
    }
}

/// How the daemon archives.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ArchiveConfig {
    /// The longest a commit waits before its object is written.
    pub flush_interval: Period,
    /// An object is written at once when this much log is waiting.
    pub flush_bytes: ByteSize,
    /// Merge small log objects into larger ones.
    pub compaction: bool,
    /// How often to look for objects to merge.
    pub compaction_interval: Period,
    /// How long merged objects stay before they are deleted.
    pub compaction_grace: Period,
    /// Lag beyond this is a problem.
    pub lag_alert: Period,
    /// Where the daemon keeps its own notes: what it reported archived, when schedules last ran.
    pub state_dir: Option<PathBuf>,
}

impl Default for ArchiveConfig {
    fn default() -> Self {
        Self {
            flush_interval: Period::seconds(1),
            flush_bytes: ByteSize(4 << 20),
            compaction: true,
            compaction_interval: Period::seconds(300),
            compaction_grace: Period::seconds(3600),
            lag_alert: Period::seconds(60),
            state_dir: None,
        }
    }
}

/// What the daemon does when. Cron expressions have six fields, seconds first; nothing runs that has none.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// An IANA name such as `Europe/Berlin`.
    pub time_zone: TimeZone,
    /// Runs start up to this much later, at random, so that many sidecars do not start at once.
    pub jitter: Period,
    pub restore_point: Option<Cron>,
    pub verify: Option<Cron>,
    /// Exports of the tables in export.tables.
    pub export: Option<Cron>,
    /// Removes what retention does not keep.
    pub prune: Option<Cron>,
    /// Restores the newest restore point to a scratch directory and boots a server on it.
    pub drill: Option<Cron>,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self {
            time_zone: TimeZone::UTC,
            jitter: Period::seconds(0),
            restore_point: None,
            verify: None,
            export: None,
            prune: None,
            drill: None,
        }
    }
}

/// Exports of tables as files for query engines; needs spacetimedb_config.database.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ExportConfig {
    /// What the schedule exports, besides configuration files.
    pub tables: Vec<String>,
    /// Tables whose rows are added and never changed: exported from where the last export ended. Each needs a unique column
    /// of type u64 that rises. Other tables are exported whole, when they changed.
    pub append_only: Vec<String>,
    /// `ndjson`, `parquet` or both.
    pub formats: Vec<Format>,
    /// A file holds at most so many rows; 32 MiB of text and the end of a day end it too.
    pub rows_per_file: u64,
    /// After an export, remove events older than this from the database, once their files were read back. Off when left out.
    pub trim_after: Option<Period>,
}

impl Default for ExportConfig {
    fn default() -> Self {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Self {
            tables: names(&["event_log", "state_version", "config"]),
            append_only: names(&["event_log", "state_version", "metric"]),
            formats: vec![Format::Ndjson, Format::Parquet],
            rows_per_file: 100_000,
            trim_after: None,
        }
    }
}

/// The form of exported files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Lines of JSON, compressed with zstd.
    Ndjson,
    /// Apache Parquet, compressed with zstd.
    Parquet,
}

impl Format {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ndjson => "ndjson",
            Self::Parquet => "parquet",
        }
    }

    /// The format of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Ndjson, Self::Parquet].into_iter().find(|format| format.name() == name)
    }

    /// How names of files end.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Ndjson => "ndjson.zst",
            Self::Parquet => "parquet",
        }
    }
}

/// What the sidecar tells of itself, and to whom.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// An OTLP collector, `http://host:4318` or `http://host:4317`; OTEL_EXPORTER_OTLP_ENDPOINT when left out, and without
    /// either nothing is sent.
    pub otlp_endpoint: Option<String>,
    /// OTEL_EXPORTER_OTLP_PROTOCOL when left out, and `http/protobuf` without that.
    pub otlp_protocol: Option<OtlpProtocol>,
    /// `NAME=VALUE` each, sent with every request; OTEL_EXPORTER_OTLP_HEADERS too.
    #[serde(deserialize_with = "value::secrets")]
    pub otlp_headers: Vec<Secret>,
    /// OTEL_EXPORTER_OTLP_COMPRESSION when left out.
    pub otlp_compression: Option<OtlpCompression>,
    /// The longest a request to the collector may take; OTEL_EXPORTER_OTLP_TIMEOUT when left out, and 10 s without that.
    pub otlp_timeout: Option<Period>,
    /// A PEM file of further certificate authorities for the collector; OTEL_EXPORTER_OTLP_CERTIFICATE when left out.
    pub otlp_ca_file: Option<PathBuf>,
    /// Stream the bundled module's events as traces and log records, and its measurements and versions of state as log
    /// records; needs a collector and spacetimedb_config.database.
    pub events: bool,
    /// Stream reducer calls of every database as spans, from their logs; needs a collector.
    pub calls: bool,
    /// Stream what modules log, of every database, as log records; needs a collector.
    pub module_logs: bool,
    /// How often the bundled module is asked to write its system status, which is a few transactions each time; 0 for
    /// never. Without that, its figures come from its rows and from the server's counts of them, which writes nothing.
    pub status_interval: Period,
    /// The share of traces that is sent, 0.0 to 1.0; OTEL_TRACES_SAMPLER when left out, and all without that. Log records
    /// and counts are always of all events.
    pub trace_ratio: Option<f64>,
    /// How often metrics are pushed; OTEL_METRIC_EXPORT_INTERVAL when left out, and every 60 s without that.
    pub metrics_interval: Option<Period>,
    /// The name of this service in telemetry; OTEL_SERVICE_NAME, then `inner-universe`, when left out.
    pub service_name: Option<String>,
    /// An address that is called while all is well, and raises an alarm elsewhere when it hears nothing.
    pub heartbeat_url: Option<Secret>,
    /// How often the heartbeat is sent.
    pub heartbeat_interval: Period,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            otlp_endpoint: None,
            otlp_protocol: None,
            otlp_headers: Vec::new(),
            otlp_compression: None,
            otlp_timeout: None,
            otlp_ca_file: None,
            events: true,
            calls: true,
            module_logs: true,
            status_interval: Period::seconds(0),
            trace_ratio: None,
            metrics_interval: None,
            service_name: None,
            heartbeat_url: None,
            heartbeat_interval: Period::seconds(60),
        }
    }
}

impl TelemetryConfig {
    /// Which traces are sent.
    pub fn sampler(&self) -> opentelemetry_sdk::trace::Sampler {
        use opentelemetry_sdk::trace::Sampler;
        let argument = std::env::var("OTEL_TRACES_SAMPLER_ARG").ok().and_then(|text| text.trim().parse::<f64>().ok());
        match (self.trace_ratio, std::env::var("OTEL_TRACES_SAMPLER").as_deref()) {
            (Some(ratio), _) => Sampler::TraceIdRatioBased(ratio),
            (None, Ok("always_off" | "parentbased_always_off")) => Sampler::AlwaysOff,
            (None, Ok("traceidratio" | "parentbased_traceidratio")) => {
                Sampler::TraceIdRatioBased(argument.filter(|ratio| (0.0..=1.0).contains(ratio)).unwrap_or(1.0))
            }
            _ => Sampler::AlwaysOn,
        }
    }
}

/// How to speak to a collector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OtlpProtocol {
    #[serde(rename = "grpc")]
    Grpc,
    #[serde(rename = "http/protobuf")]
    Http,
}

/// How requests to a collector are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OtlpCompression {
    None,
    Gzip,
}

/// The sidecar's own HTTP interface: health, metrics, status page, API.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Serve it at all.
    pub enabled: bool,
    /// Address and port. Beyond this machine only with a token.
    pub listen: String,
    /// The bearer token of the API. Without one everything may be read and nothing triggered.
    pub token: Option<Secret>,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self { enabled: true, listen: "127.0.0.1:9464".into(), token: None }
    }
}
