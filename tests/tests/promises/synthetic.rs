//! Backups and restores of hand-made data directories, through the library, with a store in memory.

use std::path::Path;
use std::sync::Arc;

pub use harness::synthetic::{Synthetic, log_of, record};
use inner_universe::backup::{self, BackupError, BackupOptions, BackupReport};
use inner_universe::clock::SystemClock;
use inner_universe::datadir::DataDir;
use inner_universe::progress::Silent;
use inner_universe::repository::Repository;
use inner_universe::repository::crypto::Keyring;
use inner_universe::repository::store::Store;
use inner_universe::restore::RestoreError;
use inner_universe::restore::apply::{self, ApplyOptions, RestoreReport};
use inner_universe::restore::plan::{RestoreRequest, plan};
use object_store::memory::InMemory;

/// A repository in memory, and the store behind it for damage.
pub async fn repository() -> (Repository, Arc<InMemory>) {
    let store = Arc::new(InMemory::new());
    let repository =
        Repository::open_or_create_in(Store::around(store.clone()), "memory://", Keyring::default(), &SystemClock)
            .await
            .expect("open");
    (repository, store)
}

pub async fn back_up(repository: &Repository, data: &Path) -> Result<BackupReport, BackupError> {
    let data = DataDir::open(data)?;
    backup::create(repository, &data, &BackupOptions::default(), Arc::new(SystemClock), Arc::new(Silent)).await
}

pub async fn restore(
    repository: &Repository,
    request: &RestoreRequest,
    to: &Path,
) -> Result<RestoreReport, RestoreError> {
    let plan = plan(repository, request).await?;
    let options = ApplyOptions::to(to.to_owned());
    apply::apply(repository, &plan, &options, Arc::new(SystemClock), Arc::new(Silent)).await
}
