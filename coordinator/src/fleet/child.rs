//! The processes behind shards: what they print, and how they end.
//!
//! Children of this process, or processes that were taken over from one that is gone. Knows nothing of what
//! crosses the link. Invariant: a process ends with the value that stands for it, at the latest when that
//! is dropped.

use super::fault::{Cause, Fault};
use super::inbox::{Heard, Outlet, Source};
use super::witness::Witness;
use futures_util::future::select_all;
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use topology::ids::Rank;
use topology::launch::local::Process;
use topology::launch::process::Watched;
use topology::launch::ssh::Away;
use topology::launch::{Announcement, LaunchError};

/// How long the system may take to end a process that was killed.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What `ssh` exits with where it is not the exit code of what it ran.
const SSH_FAILED: i32 = 255;

/// How long a shard on another node may take to end and say so. One that is frozen or cut off does not, and its
/// replacement waits for this.
const FAREWELL_LIMIT: Duration = Duration::from_millis(300);

/// How a process ended that was not a child of this one.
const UNTOLD: &str = "how, only the coordinator that had started it could tell";

/// How long the last lines of a process that is gone are waited for.
const LAST_LINES_LIMIT: Duration = Duration::from_millis(200);

/// A process whose end is heard of.
#[derive(Debug)]
pub(super) enum Body {
    /// A child of this process.
    Started(Box<Process>),
    /// The `ssh` of a shard on another node: it ends with the shard, or with the way to it.
    Reached(Box<Process>),
    /// The `ssh` of whoever looks after a shard on another node whose parent is gone: as above.
    Attended(Box<Process>),
    /// A process of this machine whose parent is gone.
    Adopted(Adopted),
}

/// Killed when dropped, as a child is.
#[derive(Debug)]
pub(super) struct Adopted(pub(super) Watched);

impl Drop for Adopted {
    fn drop(&mut self) {
        self.0.kill();
    }
}

/// A process that is there and whose exit will be heard of.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) source: Source,
    pub(super) pid: u32,
    /// What it announced to this process.
    pub(super) announced: Option<Announcement>,
    /// What it is found by on another node.
    pub(super) away: Option<Away>,
    /// Ends it, and says whether what may be left of it on another node is its successor's to end. Dropping it ends
    /// it too, and for good.
    end: watch::Sender<Option<bool>>,
    /// How it ended, once it has.
    pub(super) exited: watch::Receiver<Option<String>>,
    watcher: JoinHandle<()>,
}

impl Child {
    /// Watches a process, which may be `away`; its log lines and its exit are reported under `source`. `alive` is held
    /// until the process is gone and its last lines are kept.
    pub(super) fn watch(
        source: Source,
        (mut body, away): (Body, Option<Away>),
        outlet: Outlet,
        (alive, witness): (mpsc::Sender<()>, Arc<dyn Witness>),
    ) -> Self {
        let log = Log::forward(source.rank, body.lines(), witness.clone());
        let pid = body.pid();
        let (end, mut ending) = watch::channel(None);
        let (exit, exited) = watch::channel(None);
        let place = away.clone();
        let watcher = tokio::spawn(async move {
            let reports = (source, outlet, exit);
            let (may_run, how) = watch((body, &log), reports, &mut ending).await;
            log.finish().await;
            witness.ended(source, &how);
            if let Some(away) = place.filter(|_| may_run) {
                // Nobody waits for that: its node may not answer.
                tokio::spawn(end_away(away, ending, (source.rank, alive)));
            }
        });
        Self {
            source,
            pid,
            announced: None,
            away,
            end,
            exited,
            watcher,
        }
    }

    /// A child that announced itself.
    pub(super) fn with(mut self, announced: Announcement) -> Self {
        self.announced = Some(announced);
        self
    }

    /// Whether it has not ended.
    pub(super) fn is_there(&self) -> bool {
        self.exited.borrow().is_none()
    }

    /// Gives the process `limit` to end by itself, kills it then, and waits for that. One that may still run on another
    /// node is ended there later, unless its successor `is_next`, which does that.
    pub(super) async fn end(mut self, limit: Duration, is_next: bool) {
        // Its pipe stays open, or it would take its parent for dead.
        let exited = self.exited.wait_for(Option::is_some);
        let is_late = timeout(limit, exited).await.is_err();
        if is_late && !limit.is_zero() {
            let rank = self.source.rank;
            tracing::warn!(%rank, "the shard did not end within {limit:?} and is killed");
        }
        self.end.send_replace(Some(is_next));
        // An error means that this process ends.
        let _ = self.watcher.await;
    }
}

impl Body {
    /// What it prints, where that comes here. Taken once.
    fn lines(&mut self) -> Option<mpsc::Receiver<String>> {
        match self {
            Self::Started(process) | Self::Reached(process) | Self::Attended(process) => {
                process.lines.take()
            }
            // It writes its file by itself.
            Self::Adopted(_) => None,
        }
    }

    /// 0 where nobody needs it.
    fn pid(&self) -> u32 {
        match self {
            Self::Started(process) | Self::Reached(process) => process.pid().unwrap_or_default(),
            Self::Attended(_) | Self::Adopted(_) => 0,
        }
    }

    /// How it ended, when it has, and whether it may still run on another node. Cancel-safe.
    async fn wait(&mut self) -> (bool, String) {
        let (status, by_ssh) = match self {
            Self::Started(process) => (process.wait().await, false),
            Self::Reached(process) => (process.wait().await, true),
            Self::Attended(process) => match process.wait().await {
                Ok(status) if status.success() => return (false, UNTOLD.to_owned()),
                ended => (ended, true),
            },
            Self::Adopted(process) => {
                process.0.ended().await;
                return (false, UNTOLD.to_owned());
            }
        };
        // An attendant that failed has not seen its end, and an `ssh` that was killed says nothing of it.
        let is_told = matches!(self, Self::Reached(_))
            && status
                .as_ref()
                .is_ok_and(|it| it.code().is_some_and(|code| code != SSH_FAILED));
        (by_ssh && !is_told, told(status, by_ssh))
    }

    /// Ends it for good; on another node it is told to end. Whether it did that by itself.
    async fn kill(&mut self) -> bool {
        match self {
            Self::Started(process) => process.kill(),
            Self::Reached(process) | Self::Attended(process) => {
                let ended = process.dismiss(FAREWELL_LIMIT).await;
                let code = ended.and_then(|status| status.code());
                return code.is_some_and(|code| code != SSH_FAILED);
            }
            Self::Adopted(process) => process.0.kill(),
        }
        false
    }
}

/// How a process ended that this one did not end, and who may have done it. Of a shard on another node `ssh` tells
/// its exit code, but not its signal.
fn told(status: Result<ExitStatus, LaunchError>, by_ssh: bool) -> String {
    let status = match status {
        Ok(status) => status,
        Err(error) => return error.to_string(),
    };
    if by_ssh && status.code() == Some(SSH_FAILED) {
        return format!(
            "{status} of ssh: the connection broke, or a signal ended the shard; the kernel of its node sends one \
             when memory runs out, see `dmesg` there"
        );
    }
    if !by_ssh && status.signal() == Some(Signal::KILL.as_raw()) {
        return format!(
            "{status}, not sent by the coordinator: the kernel does so when memory runs out, see `dmesg` and the \
             memory limit of its cgroup"
        );
    }
    status.to_string()
}

/// Waits until one of `children` has ended. Cancel-safe.
pub(super) async fn first_exit(children: &mut [Child]) -> Fault {
    let exits = children.iter_mut().map(|child| {
        let rank = child.source.rank;
        Box::pin(async move {
            let exited = child.exited.wait_for(Option::is_some).await;
            let how = exited.map_or_else(|e| e.to_string(), |how| how.clone().unwrap_or_default());
            Fault::of(rank, Cause::Exited(how))
        })
    });
    select_all(exits).await.0
}

/// What a child's owner said when it ended it, `None` if it just went. Cancel-safe.
async fn word(ending: &mut watch::Receiver<Option<bool>>) -> Option<bool> {
    let said = ending.wait_for(Option::is_some).await;
    said.ok().and_then(|said| *said)
}

/// Sees to the end of one that may still run on another node. It ends by itself when it hears that it is to, or that
/// nobody wants it, unless it is frozen.
async fn end_away(
    away: Away,
    mut ending: watch::Receiver<Option<bool>>,
    (rank, alive): (Rank, mpsc::Sender<()>),
) {
    let is_next = word(&mut ending).await.unwrap_or(false);
    if !is_next && let Err(error) = away.end().await {
        tracing::warn!(%rank, "cannot see to the end of its old process: {error}");
    }
    drop(alive);
}

/// Whether it may still run on another node, and how it ended.
async fn watch(
    (mut process, log): (Body, &Log),
    (source, outlet, exit): (Source, Outlet, watch::Sender<Option<String>>),
    ending: &mut watch::Receiver<Option<bool>>,
) -> (bool, String) {
    tokio::select! {
        (may_run, how) = process.wait() => {
            exit.send_replace(Some(how.clone()));
            let heard = Heard::Gone(Cause::Exited(how.clone()));
            tokio::select! {
                _ = outlet.send((source, heard)) => {}
                _ = word(ending) => {}
            }
            return (may_run, how);
        }
        word = word(ending) => if word.is_none() {
            // The fleet was dropped on demand. That its link ends is no news from the shard.
            log.hush();
        },
    }
    let may_run = !process.kill().await;
    let Ok((_, how)) = timeout(KILL_LIMIT, process.wait()).await else {
        tracing::error!(rank = %source.rank, "the system does not end the shard's process");
        return (true, "it was killed and has not ended".to_owned());
    };
    (may_run, how)
}

/// A process's output on its way to whoever keeps it and to this process's own log.
#[derive(Debug)]
struct Log {
    task: Option<JoinHandle<()>>,
    hushed: Arc<AtomicBool>,
}

impl Log {
    fn forward(
        rank: Rank,
        lines: Option<mpsc::Receiver<String>>,
        witness: Arc<dyn Witness>,
    ) -> Self {
        let hushed = Arc::new(AtomicBool::new(false));
        let silent = hushed.clone();
        // Of whoever starts it: which model it is a rank of.
        let span = tracing::Span::current();
        // A thread of its own: whoever keeps lines writes files.
        let forward = |mut lines: mpsc::Receiver<String>| {
            tokio::task::spawn_blocking(move || {
                while let Some(line) = lines.blocking_recv() {
                    witness.line(rank, &line);
                    if !silent.load(Ordering::Relaxed) {
                        span.in_scope(|| log_line(rank, &line));
                    }
                }
            })
        };
        Self {
            task: lines.map(forward),
            hushed,
        }
    }

    /// From now on lines are kept, but are no news of this process.
    fn hush(&self) {
        self.hushed.store(true, Ordering::Relaxed);
    }

    /// Waits until the process's last lines are kept.
    async fn finish(self) {
        if let Some(task) = self.task {
            // A grandchild may hold the pipe open; its lines are still kept as they come.
            let _ = timeout(LAST_LINES_LIMIT, task).await;
        }
    }
}

/// Shards write lines such as `2026-01-01T00:00:00Z  INFO shard::session: text`; here they keep
/// level and text.
fn log_line(rank: Rank, line: &str) {
    let rank = rank.0;
    let mut words = line.split_ascii_whitespace();
    let level = words.by_ref().nth(1).unwrap_or_default();
    let target = words.next().filter(|word| word.ends_with(':'));
    let text = line
        .split_once(target.unwrap_or(level))
        .map_or(line, |(_, text)| text.trim_start());
    match level {
        "ERROR" => tracing::error!(target: "shard", rank, "{text}"),
        "WARN" => tracing::warn!(target: "shard", rank, "{text}"),
        "INFO" => tracing::info!(target: "shard", rank, "{text}"),
        "DEBUG" => tracing::debug!(target: "shard", rank, "{text}"),
        "TRACE" => tracing::trace!(target: "shard", rank, "{text}"),
        // Not a log line: a panic, or a library that prints.
        _ => tracing::warn!(target: "shard", rank, "{line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_may_be_for_want_of_memory_says_so() {
        // As `wait` encodes them: a signal in the low byte, an exit code in the next.
        let status = |raw| Ok(ExitStatus::from_raw(raw));
        let killed = told(status(9), false);
        assert!(killed.starts_with("signal: 9"), "{killed}");
        assert!(killed.contains("memory limit of its cgroup"), "{killed}");
        let lost = told(status(255 << 8), true);
        assert!(lost.starts_with("exit status: 255 of ssh"), "{lost}");
        assert!(lost.contains("see `dmesg` there"), "{lost}");
        for (raw, by_ssh) in [(15, false), (255 << 8, false), (4 << 8, true), (9, true)] {
            let plain = told(status(raw), by_ssh);
            assert_eq!(plain, ExitStatus::from_raw(raw).to_string());
        }
    }
}
