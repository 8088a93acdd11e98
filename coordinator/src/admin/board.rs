//! What the process knows about itself, for whoever asks.
//!
//! Told by the fleet of processes and their output, by the start of what ranks took; the rest it reads
//! where it is kept. Decides nothing. Invariant: the entry in the run directory says of every rank the
//! process it has now, and every line a shard printed is in its rank's file.

use super::entry::Claim;
use super::shard_log::ShardLog;
use super::status::{Queue, RankStatus, Stand, Status};
use crate::clock::{now, since, unix_seconds, utc};
use crate::engine::handle::Readiness;
use crate::fleet::{Legacy, RankReport, Source, Witness};
use crate::metrics::Metrics;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::watch;
use topology::ids::Rank;
use topology::wire::Hello;

/// The board of one cluster.
#[derive(Debug)]
pub struct Board {
    /// Held for moments; under it a small file is written.
    inner: Mutex<Inner>,
    /// By rank. Apart from the above: a slow disk must not keep anyone from asking.
    logs: Vec<Mutex<ShardLog>>,
    readiness: watch::Receiver<Readiness>,
    metrics: Arc<Metrics>,
    begun: Instant,
}

#[derive(Debug)]
struct Inner {
    claim: Claim,
    ranks: Vec<RankNews>,
}

/// What was heard of a rank.
#[derive(Clone, Debug, Default)]
struct RankNews {
    incarnation: u32,
    device: String,
    /// Why it has no process, where it has none.
    ended: Option<String>,
    used_bytes: u64,
    free_bytes: u64,
}

impl Board {
    /// For the cluster of `claim`, of which nothing was heard yet.
    pub fn new(claim: Claim, readiness: watch::Receiver<Readiness>, metrics: Arc<Metrics>) -> Self {
        let ranks = &claim.state().ranks;
        let logs = ranks.iter().map(|rank| ShardLog::new(rank.log.clone()));
        Self {
            logs: logs.map(Mutex::new).collect(),
            inner: Mutex::new(Inner {
                ranks: vec![RankNews::default(); ranks.len()],
                claim,
            }),
            readiness,
            metrics,
            begun: now(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shards are ready, and took this.
    pub fn loaded(&self, reports: &[RankReport]) {
        for (news, report) in self.inner().ranks.iter_mut().zip(reports) {
            news.used_bytes = report.weight_bytes + report.workspace_bytes + report.kv_bytes;
            news.free_bytes = report.free_bytes;
        }
    }

    /// Requests that are not finished.
    pub fn unfinished(&self) -> u64 {
        self.metrics.live.running() + self.metrics.live.waiting()
    }

    /// The process ends; `how` in a sentence.
    pub fn close(&self, how: &str) {
        let mut inner = self.inner();
        inner.change(|state| state.ended = Some(how.to_owned()));
        // What ended in order has no successor.
        Legacy::remove(inner.claim.dir());
        // Nobody answers there any more.
        let _ = std::fs::remove_file(inner.claim.socket());
    }

    /// Everything.
    pub fn status(&self) -> Status {
        let inner = self.inner();
        let (stand, reason) = stand(&self.readiness.borrow());
        let state = inner.claim.state();
        let live = &self.metrics.live;
        let rank = |(index, news): (usize, &RankNews)| {
            let entry = &state.ranks[index];
            let no_process = entry.pid.is_none() && stand != Stand::Failed;
            RankStatus {
                rank: u32::try_from(index).unwrap_or(u32::MAX),
                host: entry.host.clone(),
                pid: entry.pid,
                device: news.device.clone(),
                state: if no_process { Stand::Starting } else { stand },
                reason: news.ended.clone(),
                replacements: news.incarnation,
                used_bytes: news.used_bytes,
                free_bytes: news.free_bytes,
                last_step_seconds: live.last_step(index).map(|step| step.as_secs_f64()),
                log: entry.log.clone(),
            }
        };
        let (kv_tokens_used, kv_tokens_total) = live.kv_tokens();
        Status {
            name: state.name.clone(),
            pid: state.pid,
            address: state.address,
            model: state.model.clone(),
            topology: state.topology.clone(),
            version: state.version.clone(),
            state: stand,
            reason,
            uptime_seconds: since(self.begun).as_secs_f64(),
            epoch: live.epoch(),
            recoveries: live.recoveries(),
            ranks: inner.ranks.iter().enumerate().map(rank).collect(),
            queue: Queue {
                running: live.running(),
                waiting: live.waiting(),
                kv_tokens_used,
                kv_tokens_total,
            },
        }
    }

    fn write(&self, rank: Rank, line: &str) {
        if let Some(log) = self.logs.get(rank.index()) {
            log.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .line(line);
        }
    }

    /// A line of the coordinator's own among those of the shard, in their form.
    fn note(&self, rank: Rank, text: &str) {
        let time = utc(unix_seconds());
        self.write(rank, &format!("{time}  INFO coordinator: {text}"));
    }
}

impl Inner {
    /// The file is for people; where it cannot be written the cluster serves on.
    fn change(&mut self, change: impl FnOnce(&mut super::entry::State)) {
        if let Err(error) = self.claim.update(change) {
            tracing::warn!("{error:#}");
        }
    }
}

fn stand(readiness: &Readiness) -> (Stand, Option<String>) {
    match readiness {
        Readiness::Loading => (Stand::Starting, None),
        Readiness::Ready => (Stand::Ready, None),
        Readiness::Recovering(why) => (Stand::Recovering, Some(why.clone())),
        Readiness::Draining => (Stand::Draining, None),
        Readiness::Failed(why) => (Stand::Failed, Some(why.clone())),
    }
}

impl Witness for Board {
    fn launched(&self, source: Source, pid: u32) {
        let Source { rank, incarnation } = source;
        self.note(rank, &format!("process {pid} was started here"));
        if let Some(news) = self.inner().ranks.get_mut(rank.index()) {
            news.incarnation = incarnation;
        }
    }

    fn admitted(&self, hello: &Hello) {
        let Hello {
            rank, pid, device, ..
        } = hello;
        let mut inner = self.inner();
        if let Some(news) = inner.ranks.get_mut(rank.index()) {
            news.device.clone_from(device);
            news.ended = None;
            inner.change(|state| state.ranks[rank.index()].pid = Some(*pid));
        }
        let host = inner.claim.state().ranks.get(rank.index());
        let host = host.map_or_else(String::new, |rank| rank.host.clone());
        drop(inner);
        self.note(
            *rank,
            &format!("admitted: process {pid} on {host}, {device}"),
        );
    }

    fn ended(&self, source: Source, how: &str) {
        let Source { rank, incarnation } = source;
        self.note(rank, &format!("its process has ended ({how})"));
        let mut inner = self.inner();
        // A successor may be there already.
        if let Some(news) = inner.ranks.get_mut(rank.index())
            && news.incarnation == incarnation
        {
            news.ended = Some(how.to_owned());
            inner.change(|state| state.ranks[rank.index()].pid = None);
        }
    }

    fn line(&self, rank: Rank, line: &str) {
        self.write(rank, line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::entry::{Entry, tests::state};
    use crate::fleet::Fault;
    use crate::metrics::Subject;

    fn hello(rank: Rank, pid: u32) -> Hello {
        Hello {
            rank,
            pid,
            device: "cpu".into(),
            free_bytes: 0,
            total_bytes: 0,
        }
    }

    #[test]
    fn the_end_of_an_old_process_is_not_its_successors() {
        let place = tempfile::tempdir().unwrap();
        let claim = Claim::take(place.path(), state("a", 1)).unwrap();
        let metrics = Arc::new(Metrics::new(&Subject {
            model_name: "m".into(),
            max_model_len: 8,
            world_size: 2,
            build: "b".into(),
        }));
        let (readiness, state) = watch::channel(Readiness::Ready);
        let board = Board::new(claim, state, metrics);
        let rank = Rank(1);
        let source = |incarnation| Source { rank, incarnation };
        let pid = || board.status().ranks[1].pid;
        board.launched(source(0), 10);
        board.admitted(&hello(rank, 100));
        board.line(rank, "hello");
        assert_eq!(pid(), Some(100));
        // It was cut off: its end is heard of after its successor is there.
        board.launched(source(1), 11);
        board.admitted(&hello(rank, 101));
        board.ended(source(0), "signal: 9");
        assert_eq!(pid(), Some(101));
        board.ended(source(1), "signal: 9");
        let status = board.status();
        assert_eq!(
            (status.ranks[1].pid, status.ranks[1].state),
            (None, Stand::Starting)
        );
        assert_eq!(status.ranks[1].reason.as_deref(), Some("signal: 9"));
        let entries = Entry::all(&[place.path().to_owned()]);
        assert_eq!(entries[0].state.ranks[1].pid, None);
        let log = std::fs::read_to_string(&status.ranks[1].log).unwrap();
        for part in ["process 10 ", "hello\n", "process 11 ", "(signal: 9)"] {
            assert!(log.contains(part), "{part} is not in {log}");
        }
        let fault = Fault::of(rank, crate::fleet::Cause::Diverged).to_string();
        readiness.send_replace(Readiness::Failed(fault.clone()));
        let status = board.status();
        assert_eq!((status.state, status.reason), (Stand::Failed, Some(fault)));
        board.close("it failed");
        let entries = Entry::all(&[place.path().to_owned()]);
        assert_eq!(entries[0].state.ended.as_deref(), Some("it failed"));
    }
}
