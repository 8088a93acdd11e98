//! A shard of another node that somebody else started: found again, followed, ended.
//!
//! What a coordinator leaves to its successor of a shard that it reaches through `ssh`. The program that the shard runs
//! attends it there ([`crate::launch::attend`]). Decides nothing. Invariant: no other process is ended than the one
//! that is meant, whatever has its number by now, also where the node was started again.

use super::{Remote, Target};
use crate::launch::attend::{Attended, Charge};
use crate::launch::local::{self, Process, Started};
use crate::launch::process::ProcessId;
use crate::launch::{LaunchError, log_of};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;

/// Looks after the shard of `$2`. `$1`: the program.
const ATTEND: &str = r#"exec "$1" shard --attend "$2""#;
/// Longest time until the node has ended a process that it was told to.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Where a shard is, and which one it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Away {
    target: Target,
    program: String,
    charge: Charge,
}

impl Remote {
    /// The shard of `process` on this node.
    pub fn away(&self, process: ProcessId) -> Away {
        Away {
            target: self.target.clone(),
            program: self.program(),
            charge: Charge {
                process,
                log: log_of(process, Path::new(&self.work_dir)),
            },
        }
    }
}

impl Away {
    /// File of its log lines on its node, once its coordinator does not read them.
    pub fn log(&self) -> &Path {
        &self.charge.log
    }

    /// As the program takes it.
    pub(super) fn charge(&self) -> Result<String, LaunchError> {
        let charge = serde_json::to_string(&self.charge);
        charge.map_err(|e| LaunchError::Handshake(e.to_string()))
    }

    /// Has it looked after: the process that is returned says what it says, from where that was read last, and
    /// ends with it; dismissed, it ends it first, and closed without a word it leaves it alone. Also whether the shard
    /// runs.
    ///
    /// # Errors
    /// [`LaunchError`] with what to do: the node is not reached, or the program is not there any more.
    pub async fn attend(&self) -> Result<(bool, Process), LaunchError> {
        let arguments = self
            .target
            .arguments(ATTEND, &[&self.program, &self.charge()?]);
        let started = local::first_word("ssh".as_ref(), arguments, &[]).await;
        let started: Started<Attended> = started.map_err(|e| self.target.explain(e))?;
        Ok((started.said.is_running, started.at_work()))
    }

    /// Ends it for good. Whether it still ran.
    ///
    /// # Errors
    /// As [`Self::attend`]; and if it has not ended in time.
    pub async fn end(&self) -> Result<bool, LaunchError> {
        let (is_running, mut attendant) = self.attend().await?;
        // Nobody reads any more: what it says is passed over.
        attendant.lines = None;
        match attendant.dismiss(END_LIMIT).await {
            Some(status) if status.success() => Ok(is_running),
            _ => Err(LaunchError::Node(format!(
                "{}: shard process {} there could not be ended",
                self.target, self.charge.process.pid
            ))),
        }
    }
}
