//! Processes that end with this one, however this one ends.
//!
//! Invariant: the kernel sends the signal when the *thread* ends that started the process; so one thread, which lives as long
//! as this process, starts them all.

use std::io;
use std::sync::{LazyLock, mpsc};

use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::standalone::temporary::STOP;

type Start = Box<dyn FnOnce() + Send>;

/// The way to the thread; `None` where there is none to be had.
static STARTER: LazyLock<Option<mpsc::Sender<Start>>> = LazyLock::new(|| {
    let (sender, starts) = mpsc::channel::<Start>();
    let thread = std::thread::Builder::new().name("starter".into());
    thread.spawn(move || starts.into_iter().for_each(|start| start())).ok().map(|_| sender)
});

/// Starts a process that is asked to end once this one has ended.
pub(super) async fn spawn(mut command: Command) -> io::Result<Child> {
    end_with_us(&mut command);
    let (answer, started) = oneshot::channel();
    let runtime = Handle::current();
    let start: Start = Box::new(move || {
        let _runtime = runtime.enter();
        let _ = answer.send(command.spawn());
    });
    let gone = || io::Error::other("the thread that starts processes has ended");
    STARTER.as_ref().ok_or_else(gone)?.send(start).map_err(|_| gone())?;
    started.await.map_err(|_| gone())?
}

#[cfg(target_os = "linux")]
fn end_with_us(command: &mut Command) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(STOP))?;
        // It may have ended before this was asked for.
        match rustix::process::getppid() {
            Some(found) if found == parent => Ok(()),
            _ => Err(io::Error::from(io::ErrorKind::Interrupted)),
        }
    };
    #[expect(
        unsafe_code,
        reason = "between fork and exec there are system calls alone, which neither allocate nor lock"
    )]
    unsafe {
        command.pre_exec(move || {
            // What a shell has set us to ignore in the background must still end the server.
            libc::signal(libc::SIGINT, libc::SIG_DFL);
            prepare()
        });
    }
}

#[cfg(not(target_os = "linux"))]
fn end_with_us(_: &mut Command) {}
