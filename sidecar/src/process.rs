//! A process of this machine, told apart from every other process that this or any machine ever ran.
//!
//! Invariant: a process counts as dead only when that is certain. A process id alone proves nothing: ids are reused, and
//! containers have process ids of their own. So the boot, the namespace of the ids and the start time are part of the
//! identity, and whatever cannot be compared counts as alive.

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};

/// Which process, in documents that outlive it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// This start of this machine.
    boot: String,
    /// The namespace that `pid` belongs to.
    namespace: String,
    pid: u32,
    /// When the process started, in clock ticks since the boot.
    started: u64,
}

impl ProcessId {
    /// This process; `None` where the system does not provide what it takes.
    pub fn own() -> Option<Self> {
        Self::of(std::process::id())
    }

    /// A process that is alive now.
    pub fn of(pid: u32) -> Option<Self> {
        Some(Self { boot: boot()?, namespace: namespace()?, pid, started: started(pid)? })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns true if this process is certain to be one of this machine that has ended.
    pub fn is_dead(&self) -> bool {
        if boot().as_ref() != Some(&self.boot) || namespace().as_ref() != Some(&self.namespace) {
            return false;
        }
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return false };
        // Where `/proc` hides the processes of others, the signal that is never sent still says whether there is one.
        match test_kill_process(pid) {
            Err(Errno::SRCH) => true,
            _ => started(self.pid).is_some_and(|started| started != self.started),
        }
    }

    /// Returns true if this process is certain to be alive on this machine.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }
}

/// The signals that this process ignores, a bit for each from that of number 1; none where the system does not say.
pub fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}

fn boot() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(boot.trim().to_owned()).filter(|boot| !boot.is_empty())
}

fn namespace() -> Option<String> {
    std::fs::read_link("/proc/self/ns/pid").ok()?.into_os_string().into_string().ok()
}

/// The 22nd field of `/proc/PID/stat`; the second, a name in parentheses, may hold anything. `None` for one that has ended
/// and is only not yet waited for.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = std::str::from_utf8(stat.get(after_name + 1..)?).ok()?.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_dead_only_once_it_has_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("a child");
        let id = ProcessId::of(child.id()).expect("its identity");
        assert!(id.is_alive() && !id.is_dead());
        child.kill().expect("kill it");
        child.wait().expect("its end");
        assert!(id.is_dead() && !id.is_alive());
    }

    #[test]
    fn another_process_under_the_same_number_is_not_taken_for_it() {
        let own = ProcessId::own().expect("an identity");
        assert!(own.is_alive() && !own.is_dead());
        let before = ProcessId { started: own.started + 1, ..own };
        assert!(before.is_dead() && !before.is_alive());
    }

    #[test]
    fn processes_of_other_boots_and_containers_are_never_called_dead() {
        let own = ProcessId::own().expect("an identity");
        // No process has this number here; whether one has it there cannot be known.
        let gone = ProcessId { pid: 0x3fff_ffff, ..own };
        assert!(gone.is_dead());
        assert!(!ProcessId { boot: "another".into(), ..gone.clone() }.is_dead());
        assert!(!ProcessId { namespace: "pid:[1]".into(), ..gone }.is_dead());
    }
}
