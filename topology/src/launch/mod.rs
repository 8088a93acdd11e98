//! How shard processes are started, and how the two ends come to trust each other.
//!
//! ```text
//! parent                                   child: `cluster shard`
//!   start ─────────────────────────────────▶ makes its key
//!         ◀── stdout: {"certificate": …} ─── public half
//!         ─── stdin:  {"coordinator": …} ──▶ where to connect, whose key to believe, which device
//!         ◀── stdout, stderr: log lines ────
//!   stdin closed ──────────────────────────▶ the parent is gone: exits, or keeps what it has for a
//!                                            successor as long as its `hold` says
//! ```
//!
//! Nothing secret is ever in arguments or environment: a shard's private key stays in the process
//! that made it, and what crosses the pipes is public. The same lines work through `ssh`, where
//! other output may come before the announcement.
//!
//! Invariant: each line of the handshake comes within [`LAUNCH_LIMIT`] or the launch has failed.

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
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// How long each line of the handshake may take.
pub const LAUNCH_LIMIT: Duration = Duration::from_secs(10);

/// Longest line of the handshake in bytes; a list of a thousand cores fits.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// What a child says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// The public half of the key it made.
    pub certificate: Certificate,
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

/// How a shard waits for another coordinator, which takes over its weights. On the coordinator's host only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// For how many seconds.
    pub seconds: u32,
    /// What the coordinator leaves to its successor. While this file is not there, nobody will come.
    pub legacy: PathBuf,
    /// File for its log lines once nobody reads them from its pipe.
    pub log: PathBuf,
}

impl Hold {
    /// Where the shard says until when it waits, in seconds since 1970; there while it does.
    pub fn notice(&self) -> PathBuf {
        notice(&self.log)
    }
}

/// [`Hold::notice`] of the shard with this log file.
pub fn notice(log: &std::path::Path) -> PathBuf {
    log.with_extension("held")
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
