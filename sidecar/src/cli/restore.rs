//! `restore`

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use crate::bundle;
use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::{bytes, duration};
use crate::cli::{Context, DataDirArg};
use crate::datadir::key_files::{self, KeyFiles};
use crate::durable::owner::make_dirs;
use crate::durable::{self, OnPath as _};
use crate::ids::{Identity, Offset, RestorePointId, TimelineId};
use crate::release::Release;
use crate::repository::address::Address;
use crate::repository::crypto::Keyring;
use crate::repository::{Repository, instance, paths};
use crate::restore::RestoreError;
use crate::restore::apply::ApplyOptions;
use crate::restore::place::Place;
use crate::restore::plan::{self, RestorePlan, RestoreRequest};
use crate::restore::target::Target;
use crate::scratch::Scratch;
use crate::standalone::command::Binary;

/// What `--to` names: a moment, or the deployment right before which it is.
#[derive(Debug, Clone)]
enum To {
    Moment(Target),
    BeforePublish(String),
}

impl FromStr for To {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("before-publish:") {
            None => text.parse().map(Self::Moment),
            Some(hash) if hash.len() >= 8 && hash.bytes().all(|digit| digit.is_ascii_hexdigit()) => {
                Ok(Self::BeforePublish(hash.to_ascii_lowercase()))
            }
            Some(hash) => Err(format!(
                "`{hash}` is no program's hash: at least its first 8 hexadecimal digits, as `deploy history` shows them"
            )),
        }
    }
}

impl To {
    /// The moment that is meant; the database that was deployed, and the timeline on which it was, are chosen where none is.
    #[cfg_attr(not(feature = "client"), allow(unused_variables, reason = "deployments are unknown then"))]
    async fn resolve(
        self,
        repository: &Repository,
        databases: &mut Vec<String>,
        timeline: &mut Option<TimelineId>,
    ) -> Result<Target, Failure> {
        match self {
            Self::Moment(target) => Ok(target),
            #[cfg(not(feature = "client"))]
            Self::BeforePublish(_) => Err(Failure::usage("this build knows nothing of deployments")),
            #[cfg(feature = "client")]
            Self::BeforePublish(hash) => {
                let records = crate::deploy::record::all(repository).await?;
                let meant = |record: &&crate::deploy::record::DeploymentRecord| {
                    record.module.to_string().starts_with(&hash)
                        && record.publish_offset.is_some()
                        && (databases.is_empty() || databases.iter().any(|database| record.is_of(database)))
                };
                let Some(record) = records.iter().rev().find(meant) else {
                    let message =
                        format!("no deployment in this repository has published {hash}; see `deploy history`");
                    return Err(Failure::new(ExitStatus::NothingToRestore, message));
                };
                let before = record.publish_offset.and_then(|offset| offset.0.checked_sub(1)).ok_or_else(|| {
                    let message =
                        format!("the deployment of {hash} was the database's first, or its transaction is not known");
                    Failure::new(ExitStatus::NothingToRestore, message)
                })?;
                let other = records
                    .iter()
                    .filter(meant)
                    .find(|other| (other.database, other.module) != (record.database, record.module));
                if let Some(other) = other {
                    return Err(Failure::usage(format!(
                        "{hash} was published to {} and to {}, or is how two programs begin; give more of it, or --database",
                        record.name, other.name
                    )));
                }
                if timeline.is_none() {
                    *timeline = timeline_of(repository, record).await?;
                }
                *databases = vec![record.database.to_string()];
                Ok(Target::Offset(Offset(before)))
            }
        }
    }
}

/// The timeline on which a deployment was, from the restore point that it took: offsets mean something on theirs only.
#[cfg(feature = "client")]
async fn timeline_of(
    repository: &Repository,
    record: &crate::deploy::record::DeploymentRecord,
) -> Result<Option<TimelineId>, Failure> {
    let points = repository.restore_points().await?;
    let point = points.restore_points.iter().find(|point| Some(point.id) == record.restore_point);
    let found = point.and_then(|point| point.databases.iter().find(|database| database.identity == record.database));
    if let Some(database) = found {
        return Ok(Some(database.timeline));
    }
    match repository.timelines(&record.database).await?.as_slice() {
        [] | [_] => Ok(None),
        _ => Err(Failure::usage(format!(
            "the restore point of that deployment is gone, and {} has several timelines; give --timeline",
            record.name
        ))),
    }
}

#[derive(Debug, Args)]
pub struct RestoreArgs {
    #[command(flatten)]
    data: DataDirArg,
    /// latest, offset:N, time:RFC3339, label:L, before-publish:HASH (the program of a deployment, or how its hash begins), or a
    /// restore point's id; offsets and times are inclusive
    #[arg(long, default_value = "latest", value_name = "TARGET")]
    to: To,
    /// A database's name or identity; may be given several times; all when left out
    #[arg(long, value_name = "NAME|IDENTITY")]
    database: Vec<String>,
    /// The timeline to restore from; the newest when left out
    #[arg(long, value_name = "T")]
    timeline: Option<TimelineId>,
    /// Where captured token keys go; spacetimedb_config.key_dir when left out and its db_path is restored, DIR.keys otherwise.
    /// The same keys stay as they are; others that are there are refused, or with --force moved aside
    #[arg(long, value_name = "DIR")]
    key_dir: Option<PathBuf>,
    /// Replay the whole log instead of starting from a snapshot: slower, and needs no snapshot to be whole
    #[arg(long)]
    no_snapshot: bool,
    /// Restore from a bundle that `backup create --output` made; `-` is the standard input
    #[arg(long, value_name = "FILE.stb")]
    input: Option<PathBuf>,
    /// The name that the one database that is restored gets
    #[arg(long = "as", value_name = "NAME", value_parser = database_name)]
    name: Option<String>,
    /// Make new token keys: tokens that were given out before are worth nothing at the new server
    #[arg(long)]
    new_identity_keys: bool,
    /// Restore although the server that is installed here is older than the one that wrote the data, and does not open it
    #[arg(long)]
    any_server: bool,
    /// Print the plan and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Move aside what is there, and start even if space looks short
    #[arg(long)]
    force: bool,
}

#[derive(Serialize)]
struct PlanReport {
    dry_run: bool,
    #[serde(serialize_with = "crate::lossy::path")]
    data_dir: PathBuf,
    #[serde(serialize_with = "crate::lossy::option", skip_serializing_if = "Option::is_none")]
    link_target: Option<PathBuf>,
    instance_from: RestorePointId,
    databases: Vec<PlannedDatabase>,
    left_out: Vec<String>,
    /// What is in doubt about the time that was asked for.
    warnings: Vec<String>,
    bytes_to_read: u64,
}

#[derive(Serialize)]
struct PlannedDatabase {
    identity: Identity,
    name: String,
    timeline: TimelineId,
    offset: Offset,
    time: Option<jiff::Timestamp>,
    snapshot_offset: Option<Offset>,
    log_objects: usize,
    bytes_to_read: u64,
}

/// What servers take as a name.
fn database_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
    match !text.is_empty() && text.len() <= 100 && text.chars().all(fits) {
        true => Ok(text.to_owned()),
        false => Err("a name has lower-case letters, digits, `-` and `_`".into()),
    }
}

pub async fn run(context: &Context<'_>, args: RestoreArgs) -> Result<ExitStatus, Failure> {
    let data_dir = args.data.path(context)?;
    let place = Place::find(&data_dir)?;
    // Unpacked beside the target, on whose file system there is to be room; gone with the end of this.
    let mut unpacked = None;
    let repository = match &args.input {
        None => context.repository().await?,
        Some(input) => {
            let parent = durable::parent(&place.target);
            make_dirs(&parent, 0o755)?;
            let dir = Scratch::create_in(&parent, ".inner-universe-bundle-");
            let dir = unpacked.insert(dir.on("write to", &parent)?);
            context.output.progress().phase("unpack the bundle", None);
            bundle::unpack(input, dir.path())?;
            let keys = Keyring::new(&[], &context.config().repository.identity_files)?;
            let address = Address::directory(dir.path()).map_err(Failure::usage)?;
            Repository::open(address.url(), &context.config().repository, keys).await?
        }
    };
    let mut databases = args.database;
    let mut timeline = args.timeline;
    let target = args.to.resolve(&repository, &mut databases, &mut timeline).await?;
    let request = RestoreRequest {
        target: target.clone(),
        databases,
        timeline,
        no_snapshot: args.no_snapshot,
        ..RestoreRequest::default()
    };
    let plan = plan::plan(&repository, &request).await?;
    if !args.any_server {
        refuse_older_server(context, &repository, &plan).await?;
    }
    warn(context, &plan, &target);
    if args.dry_run {
        context.output.result(&report(&plan, data_dir, &place), describe_plan);
        return Ok(ExitStatus::Ok);
    }
    let server = &context.config().spacetimedb_config;
    let live = server.db_path.as_deref().map(durable::canonical);
    let in_place = live == Some(durable::canonical(&data_dir)) && !args.new_identity_keys;
    let options = ApplyOptions {
        data_dir,
        key_dir: args.key_dir.or_else(|| server.key_dir.clone().filter(|_| in_place)),
        force: args.force,
        name: args.name,
        new_keys: args.new_identity_keys,
    };
    let (clock, progress) = (Arc::clone(&context.clock), context.output.progress());
    let name = options.name.clone();
    let mut report = crate::restore::restore(&repository, request, plan, &options, clock, progress).await?;
    if let (Some(name), Some(database)) = (name, report.databases.first_mut()) {
        database.name = name;
    }
    #[cfg(feature = "client")]
    if args.new_identity_keys
        && let (Some(keys), Some(live)) = (&report.keys, &context.config().spacetimedb_config.token_file)
        && live.exists()
    {
        let own = keys.join("token");
        match crate::standalone::keys::sign_again(live, &KeyFiles::in_dir(keys).private, &own) {
            Ok(()) => report.token = Some(own),
            Err(reason) => {
                context.output.warn(&format!("all is restored, but the token was not signed anew: {reason}"))
            }
        }
    }
    let named = context.config().spacetimedb_config.named_keys().filter(|_| in_place);
    context.output.result(&report, |report| {
        let mut text = format!("restored {}\n", report.data_dir.display());
        for database in &report.databases {
            let time = database.time.map(|time| format!(", {time}")).unwrap_or_default();
            text += &format!("  {} up to transaction {}{time}\n", database.name, database.offset);
        }
        if let Some(aside) = &report.moved_aside {
            text += &format!("what was there is now {}\n", aside.display());
        }
        if let Some(keys) = &report.keys {
            text += &format!(
                "the token keys are in {}; {}\n",
                keys.display(),
                use_of_keys(&report.data_dir, keys, named.as_ref())
            );
        }
        if let Some(aside) = &report.keys_moved_aside {
            text += &format!("other keys that were there are now {}\n", aside.display());
        }
        if let Some(token) = &report.token {
            text += &format!("the token of spacetimedb_config.token_file, signed anew, is {}\n", token.display());
        }
        text += &format!(
            "read {}, wrote {}, {}",
            bytes(report.bytes_read),
            bytes(report.bytes_written),
            duration(report.duration_ms)
        );
        text
    });
    Ok(ExitStatus::Ok)
}

/// A server does not open what a newer one wrote: that is known before anything is restored.
async fn refuse_older_server(
    context: &Context<'_>,
    repository: &Repository,
    plan: &RestorePlan,
) -> Result<(), RestoreError> {
    let Some(server) = Binary::find(context.config()).ok().and_then(|binary| binary.version) else { return Ok(()) };
    let id = plan.instance.instance;
    let bytes = repository.get(&paths::instance(id)).await?;
    let Some(written) = instance::version(&id, &bytes, &repository.keys)? else { return Ok(()) };
    match Release::of(Some(&server)).opens(Release::of(Some(&written))) {
        true => Ok(()),
        false => Err(RestoreError::OlderServer { server, written }),
    }
}

/// How a server comes to use restored keys; those that its `config.toml` names go before a directory.
fn use_of_keys(data_dir: &Path, restored: &Path, named: Option<&KeyFiles>) -> String {
    let used = KeyFiles::in_settings(data_dir).or_else(|| named.cloned());
    match used.filter(|files| *files != KeyFiles::in_dir(restored)) {
        None => "start the server with --jwt-key-dir".into(),
        Some(files) => format!(
            "the server uses {} and {}: copy {} and {} there, or start it with --jwt-priv-key-path and --jwt-pub-key-path",
            files.private.display(),
            files.public.display(),
            key_files::PRIVATE,
            key_files::PUBLIC
        ),
    }
}

fn warn(context: &Context<'_>, plan: &RestorePlan, target: &Target) {
    for left_out in &plan.left_out {
        context.output.warn(&format!("left out: {left_out}"));
    }
    for warning in plan.warnings() {
        context.output.warn(&warning);
    }
    if let (Target::Offset(wanted), [database]) = (target, plan.databases.as_slice())
        && database.offset != *wanted
    {
        context.output.warn(&format!(
            "transaction {wanted} lies inside a commit that cannot be cut; restoring up to {} instead",
            database.offset
        ));
    }
}

fn report(plan: &RestorePlan, data_dir: PathBuf, place: &Place) -> PlanReport {
    let databases = plan.databases.iter().map(|database| PlannedDatabase {
        identity: database.identity,
        name: database.name.clone(),
        timeline: database.timeline,
        offset: database.offset,
        time: database.time,
        snapshot_offset: database.snapshot.as_ref().map(|snapshot| snapshot.offset),
        log_objects: database.log.len(),
        bytes_to_read: database.bytes_to_read(),
    });
    PlanReport {
        dry_run: true,
        data_dir,
        link_target: place.link_target(),
        instance_from: plan.instance.id,
        databases: databases.collect(),
        left_out: plan.left_out.clone(),
        warnings: plan.warnings(),
        bytes_to_read: plan.bytes_to_read,
    }
}

fn describe_plan(plan: &PlanReport) -> String {
    let mut text = format!(
        "would restore {} from restore point {}; nothing was changed\n",
        plan.data_dir.display(),
        plan.instance_from
    );
    if let Some(target) = &plan.link_target {
        text += &format!("  {} is a link: {} is what is restored\n", plan.data_dir.display(), target.display());
    }
    for database in &plan.databases {
        let snapshot = match database.snapshot_offset {
            Some(offset) => format!("snapshot at {offset}, then "),
            None => String::new(),
        };
        text += &format!(
            "  {} up to transaction {} of timeline {}: {snapshot}{} log objects\n",
            database.name, database.offset, database.timeline, database.log_objects
        );
    }
    text += &format!("to read: {}", bytes(plan.bytes_to_read));
    text
}
