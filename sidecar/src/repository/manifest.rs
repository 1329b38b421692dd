//! The documents of the repository. Fields are only ever added; readers pass over those they do not know.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::ids::{ContentHash, Identity, Offset, RestorePointId, TimelineId};
use crate::repository::chain::Hole;

/// The repository format this release writes.
pub const FORMAT: u32 = 1;
/// The format of a repository whose hashes have a key: releases that know no keys refuse it.
pub const KEYED_FORMAT: u32 = 2;

/// `repository.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryInfo {
    pub format: u32,
    pub id: RestorePointId,
    pub created_at: Timestamp,
    /// age recipients that every body is sealed to; empty for a plain repository.
    pub recipients: Vec<String>,
    /// The key of hashes that stand in clear, encrypted to the recipients, as base64; none in a repository that is not encrypted,
    /// or was made before there were keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash_key: Option<String>,
}

/// `timeline.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Timeline {
    pub timeline: TimelineId,
    /// The history this one shares up to `fork_offset`, included.
    pub parent: Option<TimelineId>,
    pub fork_offset: Option<Offset>,
    /// The first offset archived on this timeline itself.
    pub start: Offset,
    pub reason: TimelineReason,
    pub created_at: Timestamp,
}

/// Why a timeline began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TimelineReason {
    /// The first archive of a database.
    First,
    /// The log no longer continued what was archived: a restore, a power cut, a copied machine.
    Fork,
    /// Log was deleted before it was archived.
    Gap,
}

/// Every restore point, and which of them cannot be read. Field names are stable.
#[derive(Debug, Clone, Serialize, schemars::JsonSchema)]
pub struct RestorePointList {
    /// Oldest first.
    pub restore_points: Vec<RestorePoint>,
    pub problems: Vec<String>,
}

/// `restore-points/ID.json`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct RestorePoint {
    pub format: u32,
    pub id: RestorePointId,
    pub label: Option<String>,
    pub created_at: Timestamp,
    /// `None` when the server never finished a start.
    pub server_version: Option<String>,
    pub tool_version: String,
    /// The instance capture (control database, programs, configuration) by the hash of its stored bytes.
    pub instance: ContentHash,
    /// What the capture says, by hash: a capture that says the same is not taken twice.
    pub instance_state: ContentHash,
    /// Does the capture hold the token keys?
    pub has_keys: bool,
    pub databases: Vec<DatabasePoint>,
    /// What the live server had at these offsets, where it could be asked; drills compare what they restored with it.
    #[serde(default)]
    pub promises: Vec<DatabasePromise>,
    /// The same in an encrypted repository: encrypted, in Base64. Hashes of rows would let rows be guessed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed_promises: Option<String>,
}

/// What the tables of one database held at a restore point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DatabasePromise {
    pub database: Identity,
    pub offset: Offset,
    pub tables: Vec<TablePromise>,
}

/// What one table held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct TablePromise {
    pub name: String,
    pub rows: u64,
    /// How the rows were written that were hashed.
    #[serde(default, skip_serializing_if = "RowForm::is_json")]
    pub form: RowForm,
    /// The rows' hashes, added up in 32 sums of 64 bits by their first bits, so that their order does not matter; `None` for
    /// a table that was too large to read.
    pub hash: Option<String>,
}

/// A form in which a server writes rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RowForm {
    /// As it answers SQL over HTTP.
    #[default]
    Json,
    /// As it answers queries over a connection.
    Bsatn,
}

impl RowForm {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
    fn is_json(&self) -> bool {
        *self == Self::Json
    }
}

/// Where a restore point stands in one database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DatabasePoint {
    pub identity: Identity,
    pub name: String,
    pub owner: Identity,
    pub replica: u64,
    pub timeline: TimelineId,
    /// Transactions 0 to this one are in the restore point.
    pub offset: Offset,
    /// The latest time of these transactions by the server's clock; `None` when none carried a time.
    pub time: Option<Timestamp>,
    /// The log's chain hash after `offset`.
    pub chain: ContentHash,
    /// The log's history hash after `offset`; absent in restore points of older releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<ContentHash>,
    pub initial_program: ContentHash,
}

/// `retention/ID.json`: what retention has removed, and what it is about to remove. The newest counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retention {
    pub format: u32,
    pub id: RestorePointId,
    pub at: Timestamp,
    /// Log that is missing on purpose.
    pub removed: Vec<RemovedLog>,
    /// Objects that nothing needs any more. They are deleted when their grace is over and still nothing needs them.
    pub marked: Vec<Marked>,
    /// Restore points that are deleted right after this was written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deleting: Vec<RestorePointId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovedLog {
    pub database: Identity,
    pub timeline: TimelineId,
    /// Both ends included.
    pub first: Offset,
    pub last: Offset,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marked {
    pub object: String,
    pub bytes: u64,
    pub since: Timestamp,
}

impl Retention {
    pub(crate) fn has_removed(&self, database: &Identity, hole: &Hole) -> bool {
        self.removed.iter().any(|removed| {
            removed.database == *database
                && removed.timeline == hole.timeline
                && removed.first <= hole.missing
                && removed.last >= hole.last()
        })
    }
}

/// `pins/ID.json`: a restore point that retention keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Pin {
    pub restore_point: RestorePointId,
    pub pinned_at: Timestamp,
}

/// What is needed most of `drills/ID.json`, the result of a drill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct LastDrill {
    pub started_at: Timestamp,
    pub restore_point: RestorePointId,
    pub passed: bool,
    /// The measured recovery time: from the start of the restore until a server served. `None` if none ever did.
    pub rto_ms: Option<u64>,
    /// The measured recovery point: how far the archive was behind the live log.
    pub rpo_ms: Option<u64>,
}

/// `snapshots/T/OFFSET.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotManifest {
    pub format: u32,
    pub identity: Identity,
    pub timeline: TimelineId,
    pub offset: Offset,
    pub replica: u64,
    /// The server's own manifest, itself an entry of one of the packs.
    pub native_manifest: ContentHash,
    /// Bytes of all objects and the native manifest, decompressed.
    pub raw_bytes: u64,
    /// Proves which history it is of; `None` in manifests of earlier releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<HistoryProof>,
    /// Which pack holds what of this snapshot.
    pub packs: Vec<PackUse>,
}

/// A place in the archived log that was the same in the log beside the snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryProof {
    /// The end of a link at or after the snapshot's transaction.
    pub at: Offset,
    /// The chain hash there.
    pub chain: ContentHash,
    /// The hash of the commit that ends there, which does not depend on how commits were cut into links.
    pub last_commit: ContentHash,
}

/// The part of a pack that a snapshot uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackUse {
    pub pack: ContentHash,
    /// The pack's size as stored.
    pub stored_bytes: u64,
    pub entries: Vec<ContentHash>,
}
