//! News that a log was written to. Only an idle archiver listens: a server at work makes thousands of writes a second.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

/// Wakes once for each time it was armed.
pub(super) struct Wake {
    path: PathBuf,
    news: Arc<Notify>,
    /// `None` where there are no notifications: then polling goes on alone.
    watcher: Option<RecommendedWatcher>,
    armed: bool,
}

impl Wake {
    pub(super) fn new(path: &Path) -> Self {
        let news = Arc::new(Notify::new());
        let told = Arc::clone(&news);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Our own reading makes events too.
            if !matches!(event, Ok(notify::Event { kind: notify::EventKind::Access(_), .. })) {
                told.notify_one();
            }
        });
        if let Err(error) = &watcher {
            tracing::debug!(path = %path.display(), %error, "no notifications of writes; the log is polled");
        }
        Self { path: path.to_owned(), news, watcher: watcher.ok(), armed: false }
    }

    /// Does the next write wake? Also where it never will, so that nobody waits for arming.
    pub(super) fn is_armed(&self) -> bool {
        self.armed
    }

    pub(super) fn arm(&mut self) {
        self.armed = true;
        if let Some(watcher) = &mut self.watcher
            && let Err(error) = watcher.watch(&self.path, RecursiveMode::NonRecursive)
        {
            tracing::debug!(path = %self.path.display(), %error, "no notifications of writes for now; the log is polled");
        }
    }

    /// Waits for a write after arming; then no longer listens. Never, when not armed.
    pub(super) async fn written(&mut self) {
        if !self.armed {
            std::future::pending::<()>().await;
        }
        self.news.notified().await;
        self.armed = false;
        if let Some(watcher) = &mut self.watcher {
            // The directory may be gone meanwhile.
            let _ = watcher.unwatch(&self.path);
        }
    }
}
