//! Processes of this host that are nobody's children here: told apart, watched, ended.
//!
//! A process id alone is given again to another process some day; with the time its process was started it
//! is not. Knows nothing of what the processes do. Invariant: no signal reaches another process than the
//! one that is meant.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use tokio::sync::oneshot;

/// How often a watching thread looks whether anyone still wants to know.
const LOOK_EVERY: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// One process, for as long as this machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it was started, in the kernel's ticks since this machine was.
    started: u64,
}

impl ProcessId {
    /// The process that has this number now, if one runs.
    pub fn of(pid: u32) -> Option<Self> {
        let started = started(pid)?;
        Some(Self { pid, started })
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
        assert!(process.is_running());
        // As if the number had been given to another process since.
        let other = ProcessId {
            started: process.started - 1,
            ..process
        };
        other.kill();
        assert!(!other.is_running() && process.is_running());
        let mut watched = Watched::new(child.id()).unwrap();
        let early = tokio::time::timeout(Duration::from_millis(50), watched.ended()).await;
        assert!(early.is_err(), "it lives");
        process.kill();
        let ended = tokio::time::timeout(Duration::from_secs(10), watched.ended()).await;
        assert!(ended.is_ok());
        assert!(!process.is_running(), "also before it is waited for");
        child.wait().unwrap();
        watched.kill();
        assert!(ProcessId::of(child.id()).is_none());
        assert!(Watched::new(child.id()).is_err());
    }
}
