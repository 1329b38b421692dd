//! Which history a snapshot is of: what its manifest says of the log beside it, compared with the archived log.

use crate::datadir::commit::Frame;
use crate::ids::{ContentHash, Offset};
use crate::repository::chain::{LogChain, LogEntry};
use crate::repository::manifest::{SnapshotManifest, Timeline};
use crate::repository::{Repository, RepositoryError};

impl Repository {
    /// Returns whether a snapshot is of the history that it is filed under; `None` if that is unknown: its manifest is of an
    /// earlier release, or the log to compare with is gone or cannot be opened. `chain` is the log of a timeline that takes
    /// transactions up to `until` from the snapshot's own.
    pub(crate) async fn is_of_history(
        &self,
        snapshot: &SnapshotManifest,
        timelines: &[Timeline],
        chain: &LogChain,
        until: Option<Offset>,
    ) -> Result<Option<bool>, RepositoryError> {
        let Some(proof) = snapshot.history else { return Ok(None) };
        let own;
        let chain = if until.is_some_and(|until| until < proof.at) {
            own = self.log_chain(&snapshot.identity, timelines, snapshot.timeline).await?;
            &own
        } else {
            chain
        };
        let Some(entry) = chain.range(proof.at, proof.at).first() else { return Ok(None) };
        let header = match self.log_header(&entry.key()).await {
            Ok(header) => header,
            Err(error) if error.is_damage() => return Ok(None),
            Err(error) => return Err(error),
        };
        if let Some(link) = header.links.iter().find(|link| link.last == proof.at) {
            // The chain depends on how commits were cut into links; the commit, which carries offset, caller and time, does not.
            return Ok(Some(link.chain == proof.chain || link.last_commit == proof.last_commit));
        }
        match self.commit_ending_at(entry, proof.at).await {
            Ok(found) => Ok(Some(found == Some(proof.last_commit))),
            Err(error) if error.is_damage() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The hash of the commit whose last transaction is `at`, from the body of the object that holds it.
    async fn commit_ending_at(&self, entry: &LogEntry, at: Offset) -> Result<Option<ContentHash>, RepositoryError> {
        let open = self.open_log(entry).await?;
        let Some(index) = open.header.links.iter().position(|link| link.last >= at) else { return Ok(None) };
        let part = open.header.part_of_link(index);
        let stored = self.log_part(&open, part).await?;
        let commits = open.header.decode_part(&open.key, part, &stored, &self.keys)?;
        let hashing = self.hashing()?;
        let mut rest: &[u8] = &commits;
        while let Frame::Commit(commit) = Frame::parse(open.header.log_version, rest) {
            if commit.last() >= at {
                return Ok((commit.last() == at).then(|| hashing.name_of(commit.bytes)));
            }
            rest = &rest[commit.bytes.len()..];
        }
        Ok(None)
    }
}
