//! The name of every object. Numbers are padded, so names sort as offsets do.

use object_store::path::Path as Key;

use crate::ids::{ContentHash, Identity, Offset, RestorePointId, TimelineId};

const LOG_SUFFIX: &str = ".iulog";

pub fn repository() -> Key {
    Key::from("repository.json")
}

pub fn lease() -> Key {
    Key::from("lease.json")
}

/// A scratch object, by which it is tried what a store does.
pub fn probe(id: ulid::Ulid) -> Key {
    Key::from(format!("probe/{id}"))
}

/// Returns true for objects that are large and read seldom: log objects, packs, captures, programs, exported files. What
/// names them, and what changes, is not.
pub fn is_bulk(key: &Key) -> bool {
    let folder = key.parts().next();
    folder.is_some_and(|folder| matches!(folder.as_ref(), "databases" | "instance" | "programs"))
        && !key.as_ref().ends_with(".json")
}

pub fn databases() -> Key {
    Key::from("databases")
}

pub fn timelines(database: &Identity) -> Key {
    Key::from(format!("databases/{database}/timelines"))
}

pub fn timeline(database: &Identity, timeline: TimelineId) -> Key {
    Key::from(format!("databases/{database}/timelines/{timeline}/timeline.json"))
}

/// The database and timeline that the folders of a timeline's object tell.
pub fn parse_timeline(key: &Key) -> Option<(Identity, TimelineId)> {
    let mut parts = key.parts();
    if parts.next()?.as_ref() != "databases" {
        return None;
    }
    let database = parts.next()?.as_ref().parse().ok()?;
    (parts.next()?.as_ref() == "timelines")
        .then(|| parts.next()?.as_ref().parse().ok())
        .flatten()
        .map(|id| (database, id))
}

/// Where a timeline's log objects of every level lie.
pub fn logs(database: &Identity, timeline: TimelineId) -> Key {
    Key::from(format!("databases/{database}/timelines/{timeline}/log"))
}

pub fn log(database: &Identity, timeline: TimelineId, level: u8, first: Offset, last: Offset) -> Key {
    log_folder(database, timeline, level).join(log_name(first, last))
}

pub fn log_folder(database: &Identity, timeline: TimelineId, level: u8) -> Key {
    Key::from(format!("databases/{database}/timelines/{timeline}/log/L{level}"))
}

/// A log object's name in the folder of its level.
pub fn log_name(first: Offset, last: Offset) -> String {
    format!("{}-{}{LOG_SUFFIX}", first.padded(), last.padded())
}

/// The range that a log object's name tells, both ends included.
pub fn parse_log(key: &Key) -> Option<(Offset, Offset)> {
    let (first, last) = key.filename()?.strip_suffix(LOG_SUFFIX)?.split_once('-')?;
    let (first, last) = (Offset::from_padded(first).ok()?, Offset::from_padded(last).ok()?);
    (first <= last && last.0 < u64::MAX).then_some((first, last))
}

/// The level that a log object's folder tells.
pub fn parse_log_level(key: &Key) -> Option<u8> {
    let folder = key.parts().rev().nth(1)?;
    folder.as_ref().strip_prefix('L')?.parse().ok()
}

/// The timeline that a log object's folders tell.
pub fn parse_log_timeline(key: &Key) -> Option<TimelineId> {
    let mut parts = key.parts().rev().skip(2);
    (parts.next()?.as_ref() == "log").then(|| parts.next()?.as_ref().parse().ok()).flatten()
}

pub fn snapshots(database: &Identity, timeline: TimelineId) -> Key {
    Key::from(format!("databases/{database}/snapshots/{timeline}"))
}

pub fn snapshot(database: &Identity, timeline: TimelineId, offset: Offset) -> Key {
    Key::from(format!("databases/{database}/snapshots/{timeline}/{}.json", offset.padded()))
}

pub fn parse_snapshot(key: &Key) -> Option<Offset> {
    Offset::from_padded(key.filename()?.strip_suffix(".json")?).ok()
}

/// The database, timeline and offset that a snapshot's key tells.
pub fn parse_snapshot_place(key: &Key) -> Option<(Identity, TimelineId, Offset)> {
    let mut parts = key.parts().skip(1);
    let database = parts.next()?.as_ref().parse().ok()?;
    let is_snapshot = parts.next()?.as_ref() == "snapshots";
    let timeline = parts.next()?.as_ref().parse().ok()?;
    is_snapshot.then(|| parse_snapshot(key)).flatten().map(|offset| (database, timeline, offset))
}

pub fn packs(database: &Identity) -> Key {
    Key::from(format!("databases/{database}/packs"))
}

pub fn pack(database: &Identity, id: ContentHash) -> Key {
    Key::from(format!("databases/{database}/packs/{id}.pack"))
}

pub fn instance(id: ContentHash) -> Key {
    Key::from(format!("instance/{id}.tar.zst"))
}

pub fn restore_points() -> Key {
    Key::from("restore-points")
}

pub fn restore_point(id: RestorePointId) -> Key {
    Key::from(format!("restore-points/{id}.json"))
}

/// The id that the name of a restore point, a pin or a retention document tells.
pub fn parse_restore_point(key: &Key) -> Option<RestorePointId> {
    key.filename()?.strip_suffix(".json")?.parse().ok()
}

/// Where a damaged object is kept that was written anew.
pub fn damaged(key: &Key, at: jiff::Timestamp) -> Key {
    Key::from(format!("damaged/{}/{key}", at.strftime("%Y%m%dT%H%M%S%3fZ")))
}

pub fn pins() -> Key {
    Key::from("pins")
}

pub fn pin(id: RestorePointId) -> Key {
    Key::from(format!("pins/{id}.json"))
}

pub fn retentions() -> Key {
    Key::from("retention")
}

pub fn retention(id: RestorePointId) -> Key {
    Key::from(format!("retention/{id}.json"))
}

pub fn drills() -> Key {
    Key::from("drills")
}

pub fn drill(id: RestorePointId) -> Key {
    Key::from(format!("drills/{id}.json"))
}

pub fn deployments() -> Key {
    Key::from("deployments")
}

pub fn deployment(id: RestorePointId) -> Key {
    Key::from(format!("deployments/{id}.json"))
}

/// A program that was deployed.
pub fn program(hash: &ContentHash, sealed: bool) -> Key {
    Key::from(format!("programs/{hash}.wasm.zst{}", if sealed { ".age" } else { "" }))
}

/// Everything that was exported from a database.
pub fn exports(database: &Identity) -> Key {
    Key::from(format!("databases/{database}/exports"))
}

/// A file of exported rows; `folders` are partitions in the form `name=value`.
pub fn export_file(database: &Identity, format: &str, series: &str, folders: &str, name: &str) -> Key {
    Key::from(format!("databases/{database}/exports/{format}/{series}/{folders}/{name}"))
}

pub fn export_manifests(database: &Identity) -> Key {
    Key::from(format!("databases/{database}/exports/manifests"))
}

pub fn export_series(database: &Identity, series: &str) -> Key {
    Key::from(format!("databases/{database}/exports/manifests/{series}"))
}

pub fn export_manifest(database: &Identity, series: &str, first: u64, last: u64) -> Key {
    Key::from(format!("databases/{database}/exports/manifests/{series}/{first:020}-{last:020}.json"))
}

/// The numbers that a manifest's name tells, both ends included.
pub fn parse_export_manifest(key: &Key) -> Option<(u64, u64)> {
    let (first, last) = key.filename()?.strip_suffix(".json")?.split_once('-')?;
    Some((Offset::from_padded(first).ok()?.0, Offset::from_padded(last).ok()?.0))
}

/// The manifest of a step's rows in another format than its own.
pub fn export_copy(database: &Identity, series: &str, (first, last): (u64, u64), format: &str) -> Key {
    Key::from(format!("databases/{database}/exports/manifests/{series}/{first:020}-{last:020}.{format}.json"))
}

/// The numbers and the format in the name of such a manifest.
pub fn parse_export_copy(key: &Key) -> Option<((u64, u64), &str)> {
    let (numbers, format) = key.filename()?.strip_suffix(".json")?.split_once('.')?;
    let (first, last) = numbers.split_once('-')?;
    Some(((Offset::from_padded(first).ok()?.0, Offset::from_padded(last).ok()?.0), format))
}

/// How far each format of a series reaches.
pub fn export_positions(database: &Identity, series: &str) -> Key {
    Key::from(format!("databases/{database}/exports/positions/{series}.json"))
}

/// What an export is about to write.
pub fn export_plan(database: &Identity, series: &str) -> Key {
    Key::from(format!("databases/{database}/exports/plans/{series}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        let database = Identity([7; 32]);
        let key = log(&database, TimelineId(3), 0, Offset(5), Offset(99));
        assert_eq!(parse_log(&key), Some((Offset(5), Offset(99))));
        assert_eq!(parse_snapshot(&snapshot(&database, TimelineId(1), Offset(8))), Some(Offset(8)));
        assert_eq!(parse_log(&Key::from("x/L0/9-1.iulog")), None);
        let step = export_manifest(&database, "event_log.2", 1, 9);
        let copy = export_copy(&database, "event_log.2", (1, 9), "parquet");
        assert_eq!((parse_export_manifest(&step), parse_export_copy(&step)), (Some((1, 9)), None));
        assert_eq!((parse_export_manifest(&copy), parse_export_copy(&copy)), (None, Some(((1, 9), "parquet"))));
    }
}
