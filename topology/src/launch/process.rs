//! Processes of this host that are nobody's children here: told apart, watched, ended.
//!
//! A process id alone is given again to another process some day; with the time its process was started, and which run
//! of the machine that was, it is not. Knows nothing of what the processes do. Invariant: no signal reaches another process than the
//! one that is meant.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::thread;
use tokio::sync::oneshot;

/// How often a watching thread looks whether anyone still wants to know.
const LOOK_EVERY: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// One process of one run of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it was started, in the kernel's ticks since the machine was.
    started: u64,
    /// Which run of which machine: the first half of what its kernel calls it.
    boot: u64,
}

impl ProcessId {
    /// The process that has this number now, if one runs.
    pub fn of(pid: u32) -> Option<Self> {
        let (started, boot) = (started(pid)?, boot());
        Some(Self { pid, started, boot })
    }

    /// This process.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn own() -> io::Result<Self> {
        Self::of(std::process::id()).ok_or_else(|| io::Error::other("there is no /proc"))
    }

    /// Part of a file's name that no other process has.
    pub fn file_name(self) -> String {
        format!("{:016x}-{}-{}", self.boot, self.pid, self.started)
    }

    /// The process with this [`Self::file_name`].
    pub fn from_file_name(name: &str) -> Option<Self> {
        let mut parts = name.split('-');
        let (boot, pid, started) = (parts.next()?, parts.next()?, parts.next()?);
        let boot = u64::from_str_radix(boot, 16).ok()?;
        let (pid, started) = (pid.parse().ok()?, started.parse().ok()?);
        Some(Self { pid, started, boot })
    }

    /// Whether it has ended, as far as this run of this machine can tell.
    pub fn has_ended_here(self) -> bool {
        self.boot == boot() && !self.is_running()
    }

    /// Whether it still runs; one that ended and was not waited for does not.
    pub fn is_running(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Ends it for good, if it still runs.
    pub fn kill(self) {
        // Whom the descriptor means does not change any more, so the look comes after it.
        if let Ok(process) = open(self.pid)
            && self.is_running()
        {
            // It may have ended just now.
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
    }
}

/// A process that is watched; it may be the parent, or anyone's child.
#[derive(Debug)]
pub struct Watched {
    process: Arc<OwnedFd>,
    /// Nothing is ever sent: the watching thread drops its end.
    ended: oneshot::Receiver<()>,
}

impl Watched {
    /// Watches the process that has this number now.
    ///
    /// # Errors
    /// If there is none, or the system cannot watch.
    pub fn new(pid: u32) -> io::Result<Self> {
        let process = Arc::new(open(pid)?);
        let (alive, ended) = oneshot::channel::<()>();
        let watched = process.clone();
        // The only safe way to wait for such a descriptor is to block on it.
        let watch = move || {
            while !alive.is_closed() && !is_readable(&watched) {}
            drop(alive);
        };
        thread::Builder::new().name("watch".into()).spawn(watch)?;
        Ok(Self { process, ended })
    }

    /// Returns when it has ended. Cancel-safe.
    pub async fn ended(&mut self) {
        let _ = (&mut self.ended).await;
    }

    /// Ends it for good.
    pub fn kill(&self) {
        // It may have ended already.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }
}

/// As a process's descriptor is from its end on; waits a moment for it.
fn is_readable(process: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    match poll(&mut fds, Some(&LOOK_EVERY)) {
        Ok(0) | Err(Errno::INTR) => false,
        // An error means that it cannot be watched: whoever relies on it must not take it for alive.
        Ok(_) | Err(_) => true,
    }
}

fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// 0 where the kernel does not say.
fn boot() -> u64 {
    static BOOT: OnceLock<u64> = OnceLock::new();
    *BOOT.get_or_init(|| {
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits = id.replace('-', "");
        let half = digits.get(..16).unwrap_or_default();
        u64::from_str_radix(half, 16).unwrap_or_default()
    })
}

/// Field 22 of `/proc/PID/stat`, unless its process has ended.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name, which may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(started)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    #[tokio::test]
    async fn a_process_is_watched_to_its_end_and_no_other_is_hit() {
        let sleep = || Command::new("sleep").arg("60").stdin(Stdio::null()).spawn();
        let mut child = sleep().unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        assert!(process.is_running() && !process.has_ended_here());
        let named = ProcessId::from_file_name(&process.file_name());
        assert_eq!(named, Some(process));
        assert_eq!(ProcessId::from_file_name("1-2"), None);
        // As if the number had been given to another process since, or the machine been started again.
        let earlier = ProcessId {
            started: process.started - 1,
            ..process
        };
        let before = ProcessId {
            boot: process.boot ^ 1,
            ..process
        };
        assert_ne!(process.boot, 0);
        for other in [earlier, before] {
            other.kill();
            assert!(!other.is_running() && process.is_running());
            assert_ne!(other.file_name(), process.file_name());
        }
        let mut watched = Watched::new(child.id()).unwrap();
        let early = tokio::time::timeout(Duration::from_millis(50), watched.ended()).await;
        assert!(early.is_err(), "it lives");
        process.kill();
        let ended = tokio::time::timeout(Duration::from_secs(10), watched.ended()).await;
        assert!(ended.is_ok());
        assert!(!process.is_running(), "also before it is waited for");
        assert!(process.has_ended_here());
        assert!(!before.has_ended_here(), "who knows");
        child.wait().unwrap();
        watched.kill();
        assert!(ProcessId::of(child.id()).is_none());
        assert!(Watched::new(child.id()).is_err());
    }
}
