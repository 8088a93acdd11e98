//! One shard: its process, its link, its log.
//!
//! Three tasks per shard: one reads the link, one watches the process, one forwards its log lines.
//! What they hear goes to the fleet's inbox. Invariant: the process ends with its member, at the
//! latest when the member is dropped.

use super::fault::{Cause, Fault};
use super::inbox::{Heard, Outlet};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;
use topology::ids::Rank;
use topology::launch::local::Process;
use topology::link::{Admitted, Frame, LinkReceiver, LinkSender};
use topology::wire::{FromShard, ToShard};

/// How long the system may take to end a process that was killed.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// A process that was started and whose exit will be heard of.
#[derive(Debug)]
pub(super) struct Child {
    /// How long it may take to end; sent once. Dropping it is as good as zero.
    end: oneshot::Sender<Duration>,
    watcher: JoinHandle<()>,
}

/// A shard that was admitted.
#[derive(Debug)]
pub(super) struct Member {
    rank: Rank,
    child: Child,
    sender: LinkSender<ToShard>,
    reader: JoinHandle<()>,
}

impl Child {
    /// Watches `process`; its log lines and its exit are reported under `rank`. `alive` is held until
    /// the process is gone.
    pub(super) fn watch(
        rank: Rank,
        mut process: Process,
        outlet: Outlet,
        alive: mpsc::Sender<()>,
    ) -> Self {
        let lines = process.lines.take();
        let log = lines.map(|lines| tokio::spawn(forward_log(rank, lines)).abort_handle());
        let (end, ending) = oneshot::channel();
        let watcher = tokio::spawn(async move {
            watch((rank, log), process, outlet, ending).await;
            drop(alive);
        });
        Self { end, watcher }
    }

    /// Gives the process `limit` to end by itself, kills it then, and waits for that.
    pub(super) async fn end(self, limit: Duration) {
        // An error means that the process ended by itself.
        let _ = self.end.send(limit);
        let _ = self.watcher.await;
    }
}

impl Member {
    /// Joins a process with the link it opened. What it says is reported under its rank.
    pub(super) fn new(child: Child, admitted: Admitted, outlet: Outlet) -> Self {
        let rank = admitted.hello.rank;
        Self {
            rank,
            child,
            sender: admitted.sender,
            reader: tokio::spawn(read(rank, admitted.receiver, outlet)),
        }
    }

    /// Sends a frame that may be meant for others too.
    pub(super) async fn send(&mut self, frame: &Frame<ToShard>) -> Result<(), Fault> {
        let sent = self.sender.send_frame(frame).await;
        sent.map_err(|e| Fault::of(self.rank, Cause::LinkLost(e.to_string())))
    }

    /// Ends the process, within `limit` by itself.
    pub(super) async fn end(self, limit: Duration) {
        self.child.end(limit).await;
        self.reader.abort();
    }
}

async fn read(rank: Rank, mut receiver: LinkReceiver<FromShard>, outlet: Outlet) {
    loop {
        let (heard, over) = match receiver.recv().await {
            Ok(message) => (Heard::Message(message), false),
            Err(error) => (Heard::Gone(Cause::LinkLost(error.to_string())), true),
        };
        // Without a reader the fleet is gone, and so is whatever this could say.
        if outlet.send((rank, heard)).await.is_err() || over {
            return;
        }
    }
}

async fn watch(
    (rank, log): (Rank, Option<AbortHandle>),
    mut process: Process,
    outlet: Outlet,
    mut ending: oneshot::Receiver<Duration>,
) {
    let limit = tokio::select! {
        status = process.wait() => {
            let how = match status {
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            };
            let heard = Heard::Gone(Cause::Exited(how));
            tokio::select! {
                _ = outlet.send((rank, heard)) => {}
                _ = &mut ending => {}
            }
            return;
        }
        limit = &mut ending => limit.unwrap_or_else(|_| {
            // The fleet was dropped on demand. That its link ends is no news from the shard.
            log.iter().for_each(AbortHandle::abort);
            Duration::ZERO
        }),
    };
    // It was told to stop; its pipe stays open, or it would take its parent for dead.
    if timeout(limit, process.wait()).await.is_err() {
        if !limit.is_zero() {
            tracing::warn!(%rank, "the shard did not end within {limit:?} and is killed");
        }
        process.kill();
        if timeout(KILL_LIMIT, process.wait()).await.is_err() {
            tracing::error!(%rank, "the system does not end the shard's process");
        }
    }
}

/// Shards write lines such as `2026-01-01T00:00:00Z  INFO shard::session: text`; here they keep
/// level and text.
async fn forward_log(rank: Rank, mut lines: mpsc::Receiver<String>) {
    let rank = rank.0;
    while let Some(line) = lines.recv().await {
        let mut words = line.split_ascii_whitespace();
        let level = words.by_ref().nth(1).unwrap_or_default();
        let target = words.next().filter(|word| word.ends_with(':'));
        let text = line
            .split_once(target.unwrap_or(level))
            .map_or(&*line, |(_, text)| text.trim_start());
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
}
