//! The lease: one sidecar writes a repository at a time.
//!
//! Invariants: who holds the lease wrote `lease.json` last and conditionally; the fencing token grows with every change of
//! hands; a holder stops writing before its lease can be taken by another, as its own clock that never steps back tells.
//! No wall clock decides: a lease that was not released is taken only after it stayed unchanged for its own length and a
//! quarter by the taker's stopwatch, or when its holder is a process of this machine that has ended.
//! Even where two writers meet (a process paused in the middle of a request) nothing is lost: objects are written once,
//! under names that carry their offsets, and chains tell histories apart.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use object_store::{PutMode, UpdateVersion};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::clock::{Clock, Stopwatch};
use crate::process::ProcessId;
use crate::repository::directory::Directory;
use crate::repository::manifest::FORMAT;
use crate::repository::{Repository, RepositoryError, document, paths};

/// `lease.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseDocument {
    pub format: u32,
    /// Host, process and a random part.
    pub writer: String,
    /// Grows by one whenever the lease changes hands.
    pub token: u64,
    pub renewed_at: Timestamp,
    /// When it ends unless it is renewed, by the holder's clock; the epoch once it is released.
    pub expires_at: Timestamp,
    /// Grows with every renewal, so that no two of them look alike, whatever the holder's clock does.
    #[serde(default)]
    pub renewals: u64,
    /// The process that holds it, for others on the same machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessId>,
}

impl LeaseDocument {
    /// Returns true if nobody has to wait for it: it was released, or its holder has ended on this machine.
    fn is_free(&self) -> bool {
        self.expires_at <= Timestamp::UNIX_EPOCH || self.process.as_ref().is_some_and(ProcessId::is_dead)
    }

    /// After this long without a renewal it is nobody's: its own length and a quarter.
    fn patience(&self) -> Duration {
        let length = self.expires_at.duration_since(self.renewed_at).as_secs_f64().max(0.0);
        Duration::try_from_secs_f64(length * 1.25).unwrap_or(Duration::MAX)
    }
}

/// Watches the lease of another by a stopwatch: the clocks of the two machines may differ by any amount.
#[derive(Default)]
pub struct LeaseWatch(Option<(LeaseDocument, Stopwatch)>);

impl LeaseWatch {
    /// Notes what the lease looks like now. The stopwatch starts again whenever that has changed.
    pub fn see(&mut self, held: LeaseDocument) {
        if self.0.as_ref().is_none_or(|(seen, _)| *seen != held) {
            self.0 = Some((held, Stopwatch::start()));
        }
    }

    /// How to take the lease, once it stayed unchanged for longer than its holder may write.
    pub fn abandoned(&self) -> Option<Take> {
        let (held, since) = self.0.as_ref()?;
        (since.elapsed_seconds() > held.patience().as_secs_f64()).then(|| Take::Unchanged(Box::new(held.clone())))
    }
}

/// May this process write? Shared by all who do.
#[derive(Debug)]
pub struct Fence {
    /// On the clock that counts through suspension.
    until: Mutex<Duration>,
    lost: AtomicBool,
}

impl Fence {
    /// # Errors
    /// [`RepositoryError::LeaseLost`] when another writer has the lease, or may by now.
    pub fn check(&self) -> Result<(), RepositoryError> {
        if self.lost.load(Ordering::Acquire) {
            return Err(RepositoryError::LeaseLost { expired: false });
        }
        if boot_time() >= *self.until.lock() {
            return Err(RepositoryError::LeaseLost { expired: true });
        }
        Ok(())
    }
}

/// A lease that is held. Dropping it ends all writing under it and leaves it to expire; [`Lease::release`] frees it at once.
pub struct Lease {
    repository: Repository,
    document: Mutex<(LeaseDocument, UpdateVersion)>,
    duration: Duration,
    clock: Arc<dyn Clock>,
    fence: Arc<Fence>,
}

/// When a lease may be taken that another holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Take {
    /// Only if it is free: released, or held by a process of this machine that has ended.
    IfFree,
    /// From this writer, who is known to be gone; from nobody who came after.
    From(String),
    /// If it is as it was seen: not renewed since, so that its holder must be gone.
    Unchanged(Box<LeaseDocument>),
    /// From whoever holds it: the operator has said so.
    Always,
}

impl From<bool> for Take {
    fn from(force: bool) -> Self {
        if force { Self::Always } else { Self::IfFree }
    }
}

/// The share of a lease's time after which its holder stops to write: the rest covers clocks that run apart.
const SAFE_SHARE: u32 = 4;

impl Lease {
    /// Takes the lease if it is free, or as `take` says.
    ///
    /// # Errors
    /// [`RepositoryError::Locked`] when another holds it.
    pub async fn acquire(
        repository: &Repository,
        duration: Duration,
        clock: Arc<dyn Clock>,
        take: impl Into<Take>,
    ) -> Result<Self, RepositoryError> {
        let take = take.into();
        let may_take = |held: &LeaseDocument| match &take {
            Take::IfFree => false,
            Take::From(writer) => held.writer == *writer,
            Take::Unchanged(seen) => *held == **seen,
            Take::Always => true,
        };
        let started = boot_time();
        let now = clock.now();
        let (token, mode) = match read(repository).await? {
            None => (1, PutMode::Create),
            Some((held, _)) if !held.is_free() && !may_take(&held) => {
                return Err(RepositoryError::Locked { writer: held.writer, expires_at: held.expires_at });
            }
            Some((held, version)) => (held.token.saturating_add(1), PutMode::Update(version)),
        };
        let writer = format!(
            "{}:{}:{}",
            rustix::system::uname().nodename().to_string_lossy(),
            std::process::id(),
            ulid::Ulid::new()
        );
        let document = LeaseDocument {
            format: FORMAT,
            writer,
            token,
            renewed_at: now,
            expires_at: expiry(now, duration),
            renewals: 0,
            process: ProcessId::own(),
        };
        let version = replace(repository, &document, mode).await?;
        if !repository.conditional().update {
            settle(repository, &document, clock.as_ref()).await?;
        }
        let fence = Arc::new(Fence {
            until: Mutex::new(started + duration - duration / SAFE_SHARE),
            lost: AtomicBool::new(false),
        });
        Ok(Self { repository: repository.clone(), document: Mutex::new((document, version)), duration, clock, fence })
    }

    /// As [`Self::acquire`], for work that does not wait for others: a lease that its holder seems to have left, as its
    /// time is over by our clock, is watched for as long as it takes to be certain. `watching` learns for how long.
    ///
    /// # Errors
    /// [`RepositoryError::Locked`] when another holds it.
    pub async fn acquire_or_watch(
        repository: &Repository,
        duration: Duration,
        clock: Arc<dyn Clock>,
        take: impl Into<Take>,
        watching: impl FnOnce(&LeaseDocument, Duration),
    ) -> Result<Self, RepositoryError> {
        let mut take = take.into();
        let (mut watch, mut watching) = (LeaseWatch::default(), Some(watching));
        loop {
            let error = match Self::acquire(repository, duration, Arc::clone(&clock), take.clone()).await {
                // A clock of ours that is ahead costs patience only: a holder that is alive renews meanwhile.
                Err(error @ RepositoryError::Locked { expires_at, .. }) if expires_at <= clock.now() => error,
                result => return result,
            };
            let Some(held) = holder(repository).await? else { continue };
            match watching.take() {
                Some(watching) => watching(&held, held.patience()),
                // It was renewed, or taken by another.
                None if watch.0.as_ref().is_none_or(|(seen, _)| *seen != held) => return Err(error),
                None => {}
            }
            let pause = (held.patience() / 10).clamp(Duration::from_millis(50), Duration::from_secs(1));
            watch.see(held);
            take = watch.abandoned().unwrap_or(take);
            clock.sleep(pause).await;
        }
    }

    /// The repository, whose writes now fail once the lease is lost.
    pub fn fenced(&self) -> Repository {
        self.repository.clone().fenced(Arc::clone(&self.fence))
    }

    /// Whether this process may write now, for others to ask.
    pub fn fence(&self) -> Arc<Fence> {
        Arc::clone(&self.fence)
    }

    /// Who holds it: unlike any other writer, of this repository or another.
    pub fn writer(&self) -> String {
        self.document.lock().0.writer.clone()
    }

    pub fn token(&self) -> u64 {
        self.document.lock().0.token
    }

    /// How often to call [`Self::renew`].
    pub fn renewal_interval(&self) -> Duration {
        self.duration / 4
    }

    /// Prolongs the lease.
    ///
    /// # Errors
    /// [`RepositoryError::Locked`] when another has taken it: nothing may be written any more. Other errors may pass.
    pub async fn renew(&self) -> Result<(), RepositoryError> {
        let started = boot_time();
        let now = self.clock.now();
        let (mut document, version) = self.document.lock().clone();
        document.renewed_at = now;
        document.expires_at = expiry(now, self.duration);
        document.renewals = document.renewals.saturating_add(1);
        let ours = |found: &LeaseDocument| found.writer == document.writer && found.token == document.token;
        if !self.repository.conditional().update {
            // What cannot be replaced conditionally is at least looked at first.
            self.still_ours(read(&self.repository).await?, ours)?;
        }
        let version = match replace(&self.repository, &document, PutMode::Update(version)).await {
            Ok(version) => version,
            Err(RepositoryError::Locked { .. } | RepositoryError::Conflict { .. }) => {
                // A renewal whose answer was lost has changed the version too: then the lease still names us.
                let version = self.still_ours(read(&self.repository).await?, ours)?;
                replace(&self.repository, &document, PutMode::Update(version)).await?
            }
            Err(error) => return Err(error),
        };
        *self.document.lock() = (document, version);
        *self.fence.until.lock() = started + self.duration - self.duration / SAFE_SHARE;
        Ok(())
    }

    fn still_ours(
        &self,
        found: Option<(LeaseDocument, UpdateVersion)>,
        ours: impl Fn(&LeaseDocument) -> bool,
    ) -> Result<UpdateVersion, RepositoryError> {
        match found {
            Some((found, version)) if ours(&found) => Ok(version),
            other => {
                self.fence.lost.store(true, Ordering::Release);
                let (writer, expires_at) = match other {
                    Some((found, _)) => (found.writer, found.expires_at),
                    None => ("nobody: lease.json was deleted".into(), self.clock.now()),
                };
                Err(RepositoryError::Locked { writer, expires_at })
            }
        }
    }

    /// Frees the lease, so that the next writer need not wait. A failure does no harm: others wait until it is abandoned.
    pub async fn release(&self) {
        let (mut document, mut version) = self.document.lock().clone();
        self.fence.lost.store(true, Ordering::Release);
        let ours = (document.writer.clone(), document.token);
        // The clock may have been set back since the last renewal: no time of ours says "over" to everyone.
        document.expires_at = Timestamp::UNIX_EPOCH;
        loop {
            let error = match replace(&self.repository, &document, PutMode::Update(version)).await {
                Ok(_) => return,
                Err(error) => error,
            };
            tracing::debug!(%error, "the lease was not released");
            if !matches!(error, RepositoryError::Locked { .. } | RepositoryError::Conflict { .. }) {
                return;
            }
            // A renewal whose answer was lost has changed the version; once another has the lease, it is theirs.
            match read(&self.repository).await {
                Ok(Some((found, newer))) if (&found.writer, found.token) == (&ours.0, ours.1) => version = newer,
                _ => return,
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Nobody renews it any more.
        self.fence.lost.store(true, Ordering::Release);
    }
}

/// Who holds the lease, if anyone ever did.
///
/// # Errors
/// When the store fails or `lease.json` is damaged.
pub async fn holder(repository: &Repository) -> Result<Option<LeaseDocument>, RepositoryError> {
    Ok(read(repository).await?.map(|(document, _)| document))
}

async fn read(repository: &Repository) -> Result<Option<(LeaseDocument, UpdateVersion)>, RepositoryError> {
    let key = paths::lease();
    match repository.store.get(&key).await {
        Ok((bytes, version)) => {
            let found = document::read(&bytes).map_err(|error| RepositoryError::damaged(&key, error))?;
            Ok(Some((found, version)))
        }
        Err(RepositoryError::Missing { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes `lease.json` under a condition.
async fn replace(
    repository: &Repository,
    document: &LeaseDocument,
    mode: PutMode,
) -> Result<UpdateVersion, RepositoryError> {
    let key = paths::lease();
    let bytes = document::write(document);
    repository.check_marker().await?;
    if let Some(directory) = repository.store.directory() {
        let (directory, document) = (directory.clone(), document.clone());
        let create = matches!(mode, PutMode::Create);
        return repository.store.on_disk(&key, move || replace_file(&directory, &document, &bytes, create)).await;
    }
    let mode = match mode {
        PutMode::Update(_) if !repository.conditional().update => PutMode::Overwrite,
        PutMode::Create if !repository.conditional().create => PutMode::Overwrite,
        mode => mode,
    };
    match repository.store.put(&key, bytes.into(), mode).await {
        Err(RepositoryError::Conflict { key }) => match read(repository).await? {
            Some((held, _)) if held.writer != document.writer => {
                Err(RepositoryError::Locked { writer: held.writer, expires_at: held.expires_at })
            }
            _ => Err(RepositoryError::Conflict { key }),
        },
        result => result,
    }
}

/// In a directory a lock of the file system stands for the condition: who holds the lock reads, compares and renames.
fn replace_file(
    directory: &Directory,
    document: &LeaseDocument,
    bytes: &[u8],
    create: bool,
) -> Result<UpdateVersion, RepositoryError> {
    let path = directory.root().join(paths::lease().as_ref());
    let failed = |error: std::io::Error| RepositoryError::Store {
        key: path.display().to_string(),
        source: object_store::Error::Generic { store: "file", source: error.into() },
    };
    let lock = std::fs::File::options().create(true).append(true).open(path.with_extension("lock")).map_err(failed)?;
    // Another user may be the next to write here.
    directory.protect_file(&path.with_extension("lock"));
    lock.lock().map_err(failed)?;
    let held = std::fs::read(&path);
    // A lease that is renewed must be there.
    if !create && matches!(&held, Err(error) if error.kind() == std::io::ErrorKind::NotFound) {
        return Err(RepositoryError::Locked {
            writer: "nobody: lease.json was deleted".into(),
            expires_at: Timestamp::UNIX_EPOCH,
        });
    }
    if let Ok(found) = held
        && let Ok(found) = document::read::<LeaseDocument>(&found)
        && (create
            || found.token > document.token
            || (found.token == document.token && found.writer != document.writer))
    {
        return Err(RepositoryError::Locked { writer: found.writer, expires_at: found.expires_at });
    }
    let written = path.with_extension("json.new");
    let write = || {
        let mut file = std::fs::File::create(&written)?;
        std::io::Write::write_all(&mut file, bytes)?;
        directory.protect_file(&written);
        file.sync_all()?;
        std::fs::rename(&written, &path)
    };
    write().map_err(failed)?;
    Ok(UpdateVersion { e_tag: None, version: None })
}

/// Without conditional writes: wait until a rival's write would show, and see whether ours is still there.
async fn settle(repository: &Repository, document: &LeaseDocument, clock: &dyn Clock) -> Result<(), RepositoryError> {
    for _ in 0..2 {
        clock.sleep(Duration::from_millis(1500)).await;
        match read(repository).await? {
            Some((found, _)) if found.writer == document.writer => {}
            Some((found, _)) => {
                return Err(RepositoryError::Locked { writer: found.writer, expires_at: found.expires_at });
            }
            None => return Err(RepositoryError::Missing { key: paths::lease().to_string() }),
        }
    }
    Ok(())
}

fn expiry(now: Timestamp, duration: Duration) -> Timestamp {
    jiff::SignedDuration::try_from(duration).ok().and_then(|span| now.checked_add(span).ok()).unwrap_or(now)
}

/// Since the machine was started, suspension included.
fn boot_time() -> Duration {
    #[cfg(target_os = "linux")]
    let clock = rustix::time::ClockId::Boottime;
    #[cfg(not(target_os = "linux"))]
    let clock = rustix::time::ClockId::Monotonic;
    let now = rustix::time::clock_gettime(clock);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use futures::future::BoxFuture;

    use super::*;
    use crate::repository::crypto::Keyring;
    use crate::repository::store::Store;

    struct SetClock(Mutex<Timestamp>);

    impl Clock for SetClock {
        fn now(&self) -> Timestamp {
            *self.0.lock()
        }

        fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
            tokio::task::yield_now().boxed()
        }
    }

    fn at(time: &str) -> Arc<SetClock> {
        Arc::new(SetClock(Mutex::new(time.parse().expect("a time"))))
    }

    async fn repository() -> Repository {
        let store = Store::around(Arc::new(object_store::memory::InMemory::new()));
        let clock = at("2026-01-01T00:00:00Z");
        let repository = Repository::open_or_create_in(store, "memory://", Keyring::default(), clock.as_ref()).await;
        repository.expect("a repository")
    }

    /// A lease whose holder another machine could only know by what it wrote.
    async fn held_elsewhere(repository: &Repository, length: Duration, clock: Arc<SetClock>) -> Lease {
        let lease = Lease::acquire(repository, length, clock, false).await.expect("a lease");
        lease.document.lock().0.process = None;
        lease.renew().await.expect("renewed");
        lease
    }

    /// Real time passes; the clock of the test is for wall clocks alone.
    fn pass(length: Duration) {
        let watch = Stopwatch::start();
        while watch.elapsed_seconds() < length.as_secs_f64() {
            std::thread::yield_now();
        }
    }

    #[tokio::test]
    async fn clocks_that_differ_take_no_lease_that_is_renewed() {
        let (repository, length) = (repository().await, Duration::from_millis(400));
        let holder = held_elsewhere(&repository, length, at("2026-01-01T00:00:00Z")).await;
        // A minute, and a year, ahead of the holder: by these clocks the lease has long expired.
        for ahead in ["2026-01-01T00:01:00Z", "2027-01-01T00:00:00Z"] {
            let taken = Lease::acquire(&repository, length, at(ahead), false).await;
            assert!(matches!(taken, Err(RepositoryError::Locked { .. })), "{ahead}");
        }
        // One-shot work watches what looks expired, and sees the renewal.
        let renewing = async {
            pass(length / 4);
            holder.renew().await.expect("renewed");
            std::future::pending::<()>().await
        };
        let mut told = None;
        let watching =
            Lease::acquire_or_watch(&repository, length, at("2027-01-01T00:00:00Z"), false, |_, patience| {
                told = Some(patience);
            });
        let taken = tokio::select! { biased; taken = watching => taken, () = renewing => unreachable!() };
        assert!(matches!(taken, Err(RepositoryError::Locked { .. })));
        assert_eq!(told, Some(Duration::from_millis(500)), "its own length and a quarter");
        holder.renew().await.expect("it still holds the lease");
    }

    #[tokio::test]
    async fn an_abandoned_lease_is_taken_after_its_own_length_and_a_quarter() {
        let (repository, length) = (repository().await, Duration::from_millis(200));
        drop(held_elsewhere(&repository, length, at("2026-01-01T00:00:00Z")).await);
        let waited = Stopwatch::start();
        let later = at("2026-01-01T00:01:00Z");
        let lease =
            Lease::acquire_or_watch(&repository, length, later, false, |_, _| {}).await.expect("it is abandoned");
        assert!(waited.elapsed_seconds() >= 0.25, "{}", waited.elapsed_seconds());
        assert_eq!(lease.token(), 2);
    }

    #[tokio::test]
    async fn a_holder_whose_clock_stands_still_is_seen_to_renew() {
        let (repository, length) = (repository().await, Duration::from_millis(100));
        let lease = held_elsewhere(&repository, length, at("2026-01-01T00:00:00Z")).await;
        let mut watch = LeaseWatch::default();
        for _ in 0..3 {
            watch.see(holder(&repository).await.expect("read").expect("a lease"));
            pass(length);
            assert_eq!(watch.abandoned(), None);
            lease.renew().await.expect("renewed");
        }
        pass(length * 2);
        assert!(matches!(watch.abandoned(), Some(Take::Unchanged(_))));
        watch.see(holder(&repository).await.expect("read").expect("a lease"));
        assert_eq!(watch.abandoned(), None, "it was renewed since");
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_lease_of_a_dead_process_of_this_machine_is_free() {
        let (repository, length, clock) = (repository().await, Duration::from_secs(3600), at("2026-01-01T00:00:00Z"));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("a child");
        let lease = Lease::acquire(&repository, length, Arc::clone(&clock) as _, false).await.expect("a lease");
        lease.document.lock().0.process = ProcessId::of(child.id());
        lease.renew().await.expect("renewed");
        drop(lease);
        let taken = Lease::acquire(&repository, length, Arc::clone(&clock) as _, false).await;
        assert!(matches!(taken, Err(RepositoryError::Locked { .. })), "its process is alive");
        child.kill().expect("kill it");
        child.wait().expect("its end");
        assert_eq!(Lease::acquire(&repository, length, clock, false).await.expect("it is free").token(), 2);
    }

    #[tokio::test]
    async fn leases_of_older_releases_are_read_and_watched() {
        let repository = repository().await;
        let old = serde_json::json!({
            "format": 1, "writer": "host:7:01", "token": 5,
            "renewed_at": "2026-01-01T00:00:00Z", "expires_at": "2026-01-01T00:00:00.2Z",
        });
        repository.put_document(&paths::lease(), &old).await.expect("an old lease");
        let (length, later) = (Duration::from_millis(200), at("2026-01-01T00:01:00Z"));
        let taken = Lease::acquire(&repository, length, Arc::clone(&later) as _, false).await;
        assert!(matches!(taken, Err(RepositoryError::Locked { .. })));
        let lease =
            Lease::acquire_or_watch(&repository, length, later, false, |_, _| {}).await.expect("it is abandoned");
        assert_eq!(lease.token(), 6);
    }

    #[tokio::test]
    async fn a_lease_is_given_back_although_the_answer_to_its_last_renewal_was_lost() {
        let (repository, clock) = (repository().await, at("2026-01-01T01:00:00Z"));
        let length = Duration::from_secs(30);
        let lease = Lease::acquire(&repository, length, Arc::clone(&clock) as _, false).await.expect("a lease");
        let known = lease.document.lock().clone();
        lease.renew().await.expect("renewed");
        *lease.document.lock() = known;
        lease.release().await;
        Lease::acquire(&repository, length, clock, false).await.expect("it is free");
    }

    #[tokio::test]
    async fn a_lease_that_was_given_back_is_free_although_the_clock_was_set_back() {
        let (repository, clock) = (repository().await, at("2026-01-01T01:00:00Z"));
        let length = Duration::from_secs(30);
        let first = Lease::acquire(&repository, length, Arc::clone(&clock) as _, false).await.expect("a lease");
        *clock.0.lock() = "2026-01-01T00:00:00Z".parse().expect("a time");
        let held = Lease::acquire(&repository, length, Arc::clone(&clock) as _, false).await;
        assert!(matches!(held, Err(RepositoryError::Locked { .. })));
        let other = Lease::acquire(&repository, length, Arc::clone(&clock) as _, Take::From("another".into())).await;
        assert!(matches!(other, Err(RepositoryError::Locked { .. })), "only from whom was named");
        first.release().await;
        let second = Lease::acquire(&repository, length, clock, false).await.expect("it is free");
        assert_eq!(second.token(), 2);
    }
}
