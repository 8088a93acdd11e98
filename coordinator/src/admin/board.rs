//! What the process knows about itself, for whoever asks.
//!
//! Told by the fleets of processes and their output, by the start of what ranks took; the rest it reads
//! where it is kept. Shards of all models are numbered through, those of the first model first; each fleet
//! tells a [`Section`] that knows where its own begin. Decides nothing. Invariant: the entry in the run directory says of every rank the
//! process it has now, and every line a shard printed is in its rank's file.

use super::entry::{self, Claim};
use super::shard_log::ShardLog;
use super::status::{ModelStatus, Queue, RankStatus, Stand, Status};
use crate::clock::{now, since, unix_seconds, utc};
use crate::engine::handle::Readiness;
use crate::fleet::{RankReport, Source, Witness};
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
    /// By shard. Apart from the above: a slow disk must not keep anyone from asking.
    logs: Vec<Mutex<ShardLog>>,
    models: Vec<Watched>,
    begun: Instant,
}

/// Where a model stands, and its numbers.
pub type Watched = (watch::Receiver<Readiness>, Arc<Metrics>);

#[derive(Debug)]
struct Inner {
    claim: Claim,
    ranks: Vec<RankNews>,
}

/// The board as the fleet of one model tells it.
#[derive(Debug)]
pub struct Section {
    board: Arc<Board>,
    /// The number of the model's first shard.
    first: u32,
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
    /// For the cluster of `claim`, of which nothing was heard yet; `models` are those of the claim.
    pub fn new(claim: Claim, models: Vec<Watched>) -> Self {
        let ranks = &claim.state().ranks;
        let logs = ranks.iter().map(|rank| ShardLog::new(rank.log.clone()));
        Self {
            logs: logs.map(Mutex::new).collect(),
            inner: Mutex::new(Inner {
                ranks: vec![RankNews::default(); ranks.len()],
                claim,
            }),
            models,
            begun: now(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the shards of a model begin.
    fn first_of(&self, model: usize) -> usize {
        let inner = self.inner();
        let ranks = &inner.claim.state().ranks;
        ranks.iter().take_while(|rank| rank.model < model).count()
    }

    /// The shards of a model are ready, and took this.
    pub fn loaded(&self, model: usize, reports: &[RankReport]) {
        let first = self.first_of(model);
        let mut inner = self.inner();
        for (news, report) in inner.ranks.iter_mut().skip(first).zip(reports) {
            news.used_bytes = report.weight_bytes + report.workspace_bytes + report.kv_bytes;
            news.free_bytes = report.free_bytes;
        }
    }

    /// Requests that are not finished.
    pub fn unfinished(&self) -> u64 {
        let live = self.models.iter().map(|(_, metrics)| &metrics.live);
        live.map(|live| live.running() + live.waiting()).sum()
    }

    /// The process ends; `how` in a sentence.
    pub fn close(&self, how: &str) {
        let mut inner = self.inner();
        let left = match entry::orphans(inner.claim.dir()) {
            0 => String::new(),
            count => {
                format!("; {count} shards of the process before it still wait for another one")
            }
        };
        inner.change(|state| state.ended = Some(format!("{how}{left}")));
        // Nobody answers there any more.
        let _ = std::fs::remove_file(inner.claim.socket());
    }

    /// Everything.
    pub fn status(&self) -> Status {
        let inner = self.inner();
        let state = inner.claim.state();
        let names = state.models.iter();
        let models = names
            .zip(&self.models)
            .map(|(name, watched)| about(name, watched));
        let models: Vec<ModelStatus> = models.collect();
        let rank = |(index, news): (usize, &RankNews)| {
            let entry = &state.ranks[index];
            let (_, metrics) = &self.models[entry.model];
            let model = &models[entry.model];
            let no_process = entry.pid.is_none() && model.state != Stand::Failed;
            let last_step = metrics.live.last_step(entry.rank as usize);
            RankStatus {
                shard: u32::try_from(index).unwrap_or(u32::MAX),
                model: model.name.clone(),
                rank: entry.rank,
                host: entry.host.clone(),
                pid: entry.pid,
                device: news.device.clone(),
                state: if no_process {
                    Stand::Starting
                } else {
                    model.state
                },
                reason: news.ended.clone(),
                replacements: news.incarnation,
                used_bytes: news.used_bytes,
                free_bytes: news.free_bytes,
                last_step_seconds: last_step.map(|step| step.as_secs_f64()),
                log: entry.log.clone(),
            }
        };
        let ranks = inner.ranks.iter().enumerate().map(rank).collect();
        // The whole serves as well as the model that is worst off.
        let stands = self.models.iter().zip(&models);
        let worst = stands.max_by_key(|((readiness, _), _)| readiness.borrow().severity());
        let worst = worst.map(|(_, model)| {
            let named = |why: &String| match models.len() {
                1 => why.clone(),
                _ => format!("{}: {why}", model.name),
            };
            (model.state, model.reason.as_ref().map(named))
        });
        let (stand, reason) = worst.unwrap_or((Stand::Starting, None));
        Status {
            name: state.name.clone(),
            pid: state.pid,
            address: state.address,
            topology: state.topology.clone(),
            version: state.version.clone(),
            state: stand,
            reason,
            uptime_seconds: since(self.begun).as_secs_f64(),
            models,
            ranks,
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
    fn change(&mut self, change: impl FnOnce(&mut entry::State)) {
        if let Err(error) = self.claim.update(change) {
            tracing::warn!("{error:#}");
        }
    }
}

fn about(name: &str, (readiness, metrics): &Watched) -> ModelStatus {
    let (state, reason) = stand(&readiness.borrow());
    let live = &metrics.live;
    let (kv_tokens_used, kv_tokens_total) = live.kv_tokens();
    ModelStatus {
        name: name.to_owned(),
        state,
        reason,
        epoch: live.epoch(),
        recoveries: live.recoveries(),
        queue: Queue {
            running: live.running(),
            waiting: live.waiting(),
            kv_tokens_used,
            kv_tokens_total,
        },
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

/// What fleets tell; the rank of a source is the shard's number.
impl Board {
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

impl Section {
    /// For the fleet of model number `model`.
    pub fn new(board: Arc<Board>, model: usize) -> Self {
        let first = u32::try_from(board.first_of(model)).unwrap_or(u32::MAX);
        Self { board, first }
    }

    fn shard(&self, rank: Rank) -> Rank {
        Rank(self.first.saturating_add(rank.0))
    }

    fn source(&self, source: Source) -> Source {
        Source {
            rank: self.shard(source.rank),
            ..source
        }
    }
}

impl Witness for Section {
    fn launched(&self, source: Source, pid: u32) {
        self.board.launched(self.source(source), pid);
    }

    fn admitted(&self, hello: &Hello) {
        let mut hello = hello.clone();
        hello.rank = self.shard(hello.rank);
        self.board.admitted(&hello);
    }

    fn ended(&self, source: Source, how: &str) {
        self.board.ended(self.source(source), how);
    }

    fn line(&self, rank: Rank, line: &str) {
        self.board.line(self.shard(rank), line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::entry::{Entry, tests::state};
    use crate::fleet::Fault;
    use crate::metrics::{Registry, Subject};

    fn hello(rank: Rank, pid: u32) -> Hello {
        Hello {
            rank,
            pid,
            device: "cpu".into(),
            free_bytes: 0,
            total_bytes: 0,
        }
    }

    fn metrics(world_size: u32) -> Arc<Metrics> {
        let subject = Subject {
            model_name: "m".into(),
            world_size,
        };
        Arc::new(Metrics::new(Arc::new(Registry::new(8, "b")), &subject))
    }

    #[test]
    fn what_a_fleet_tells_is_its_models_and_the_worst_model_is_the_clusters_state() {
        let place = tempfile::tempdir().unwrap();
        let mut two = state("a", 1);
        two.models = vec!["one".into(), "other".into()];
        let of_other = two.ranks.iter().cloned().map(|mut rank| {
            rank.model = 1;
            rank
        });
        two.ranks = two.ranks.iter().cloned().chain(of_other).collect();
        let claim = Claim::take(place.path(), two).unwrap();
        let channels = [Readiness::Ready, Readiness::Ready].map(watch::channel);
        let watched = channels
            .iter()
            .map(|(_, state)| (state.clone(), metrics(2)));
        let board = Arc::new(Board::new(claim, watched.collect()));
        let section = Section::new(board.clone(), 1);
        let (rank, incarnation) = (Rank(1), 0);
        section.launched(Source { rank, incarnation }, 10);
        section.admitted(&hello(rank, 100));
        section.line(rank, "from the last shard");
        let status = board.status();
        let pids: Vec<_> = status.ranks.iter().map(|rank| rank.pid).collect();
        assert_eq!(pids, [None, None, None, Some(100)]);
        let last = &status.ranks[3];
        let names = (last.shard, &*last.model, last.rank);
        assert_eq!(names, (3, "other", 1));
        let log = std::fs::read_to_string(&last.log).unwrap();
        assert!(log.contains("from the last shard"), "{log}");

        let why = Readiness::Recovering("rank 0 died".into());
        channels[1].0.send_replace(why);
        let status = board.status();
        assert_eq!(status.state, Stand::Recovering);
        assert_eq!(status.reason.as_deref(), Some("other: rank 0 died"));
        let stands: Vec<_> = status.models.iter().map(|model| model.state).collect();
        assert_eq!(stands, [Stand::Ready, Stand::Recovering]);
        assert_eq!(status.ranks[3].state, Stand::Recovering);
        let text = status.to_string();
        assert!(
            text.contains("one: ready") && text.contains("other: recovering"),
            "{text}"
        );
        section.ended(Source { rank, incarnation }, "signal: 9");
        assert_eq!(board.status().ranks[3].pid, None);
    }

    #[test]
    fn the_end_of_an_old_process_is_not_its_successors() {
        let place = tempfile::tempdir().unwrap();
        let claim = Claim::take(place.path(), state("a", 1)).unwrap();
        let metrics = metrics(2);
        let (readiness, state) = watch::channel(Readiness::Ready);
        let board = Board::new(claim, vec![(state, metrics)]);
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
