//! How shard processes are started, and how the two ends come to trust each other.
//!
//! ```text
//! parent                                   child: `cluster shard`
//!   start ─────────────────────────────────▶ makes its key
//!         ◀── stdout: {"certificate": …} ─── public half, and which process it is
//!         ─── stdin:  {"coordinator": …} ──▶ where to connect, whose key to believe, which device
//!         ◀── stdout, stderr: log lines ────
//!         ─── stdin:  "end" ───────────────▶ exits
//!   stdin closed ──────────────────────────▶ the parent is gone: exits, or keeps what it has for a
//!                                            successor as long as its `hold` says
//! ```
//!
//! Nothing secret is ever in arguments or environment: a shard's private key stays in the process
//! that made it, and what crosses the pipes is public. The same lines work through `ssh`, where
//! other output may come before the announcement.
//!
//! Invariant: each line of the handshake comes within [`LAUNCH_LIMIT`] or the launch has failed.

pub mod attend;
pub mod child;
pub mod environment;
pub mod errand;
pub mod local;
pub mod probe;
pub mod process;
pub mod ssh;

use crate::ids::Rank;
use crate::link::Certificate;
use crate::placement::Device;
use process::ProcessId;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long each line of the handshake may take.
pub const LAUNCH_LIMIT: Duration = Duration::from_secs(10);

/// Longest line of the handshake in bytes; a list of a thousand cores fits.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// The last line to a child: it is to end now. A pipe that closes without it has lost its parent.
const FAREWELL: &[u8] = b"end\n";

/// What a child says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// The public half of the key it made.
    pub certificate: Certificate,
    /// Its process, on its own machine.
    pub process: ProcessId,
}

/// What the child is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Where the coordinator listens (UDP).
    pub coordinator: SocketAddr,
    /// The only certificate to believe there.
    pub certificate: Certificate,
    /// Which rank it is.
    pub rank: Rank,
    /// What it computes on.
    pub device: Device,
    /// `--cpu-isa`: the instruction set that a CPU shard computes with, `auto` for the best that its CPU has.
    pub cpu_isa: String,
    /// Its node's address on the network between the nodes; `None` where all ranks are on one host.
    pub interface: Option<IpAddr>,
    /// What it does when it loses its coordinator; `None`: it ends.
    pub hold: Option<Hold>,
}

/// How a shard waits for another coordinator, which takes over its weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// For how many seconds.
    pub seconds: u32,
    /// What the coordinator leaves to its successor. While this file is not there, nobody will come. `None` on
    /// another host, where it cannot be looked for.
    pub legacy: Option<PathBuf>,
    /// File for its log lines once nobody reads them from its pipe: the coordinator's own, or, on another host, one
    /// that [`attend`] reads and removes.
    pub log: PathBuf,
}

impl Hold {
    /// Where the shard says until when it waits, in seconds since 1970; there while it does. Nobody looks on another
    /// host.
    pub fn notice(&self) -> Option<PathBuf> {
        self.legacy.as_ref().map(|_| notice(&self.log))
    }

    /// Whether what the shard leaves behind is its own to remove: on another host, where nobody looks after it.
    pub fn is_unattended(&self) -> bool {
        self.legacy.is_none() && !is_attended(&self.log)
    }

    /// Removes what shards left beside it on another host that were killed while nobody looked after them. In a
    /// directory that hosts share, others' shards are left alone.
    pub fn forget_the_dead(&self) {
        let files = self.log.parent().and_then(|dir| fs::read_dir(dir).ok());
        for file in files.into_iter().flatten().flatten() {
            let file = file.path().with_extension("log");
            let name = file.file_stem().and_then(OsStr::to_str);
            let process = name.and_then(|name| name.strip_prefix(LOG));
            let process = process.and_then(ProcessId::from_file_name);
            if process.is_some_and(ProcessId::has_ended_here) && !is_attended(&file) {
                remove_log(&file);
            }
        }
    }

    /// Removes what it left there.
    pub fn forget(&self) {
        remove_log(&self.log);
    }
}

/// [`Hold::notice`] of the shard with this log file.
pub fn notice(log: &Path) -> PathBuf {
    log.with_extension("held")
}

/// How far the log of a shard on another host was read; locked for as long as somebody reads there.
fn log_position(log: &Path) -> PathBuf {
    log.with_extension("read")
}

/// How the names of shards' log files on other hosts begin.
const LOG: &str = "shard-";

/// The log file of a shard on another host.
fn log_of(process: ProcessId, work_dir: &Path) -> PathBuf {
    work_dir.join(format!("{LOG}{}.log", process.file_name()))
}

/// How many bytes of the log of a shard on another host were handed on.
pub fn handed_on(log: &Path) -> Option<u64> {
    fs::read_to_string(log_position(log)).ok()?.parse().ok()
}

fn is_attended(log: &Path) -> bool {
    File::open(log_position(log)).is_ok_and(|position| position.try_lock().is_err())
}

fn remove_log(log: &Path) {
    for file in [log, &log_position(log)] {
        // Where nothing was printed there is none.
        let _ = fs::remove_file(file);
    }
}

/// Reads a child's standard input to its end or to the farewell; whether it was that. Nothing else comes there.
fn read_farewell(mut stdin: impl Read) -> bool {
    loop {
        match stdin.read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return matches!(read, Ok(1..)),
        }
    }
}

/// Why a shard process could not be started, or was not told what to do.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The process or its pipes.
    #[error("{0}")]
    Io(String),
    /// Another node, or the way to it; with what to do.
    #[error("{0}")]
    Node(String),
    /// The other end said something else.
    #[error("the handshake went wrong: {0}")]
    Handshake(String),
    /// Too much time went by.
    #[error("{what} took longer than {}s", .limit.as_secs_f32())]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// The deadline.
        limit: Duration,
    },
}

impl LaunchError {
    /// The same of a process that wrote something before it ended.
    fn with_words(self, words: &str) -> Self {
        let said = match self {
            Self::Handshake(said) => said,
            other => other.to_string(),
        };
        Self::Handshake(format!("{said}; it wrote: {words}"))
    }
}

async fn within<T>(
    limit: Duration,
    what: &'static str,
    work: impl Future<Output = Result<T, LaunchError>>,
) -> Result<T, LaunchError> {
    let late = Err(LaunchError::TimedOut { what, limit });
    tokio::time::timeout(limit, work).await.unwrap_or(late)
}

/// One JSON line, its newline included.
fn to_line(value: &impl Serialize) -> Result<Vec<u8>, LaunchError> {
    let mut line = serde_json::to_vec(value).map_err(|e| LaunchError::Handshake(e.to_string()))?;
    line.push(b'\n');
    Ok(line)
}

fn from_line<'a, T: Deserialize<'a>>(line: &'a str, from: &str) -> Result<T, LaunchError> {
    if line.is_empty() {
        return Err(LaunchError::Handshake(format!(
            "{from} ended before it said anything"
        )));
    }
    serde_json::from_str(line).map_err(|e| LaunchError::Handshake(format!("{from}'s line: {e}")))
}
