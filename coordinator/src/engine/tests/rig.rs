//! A loop over a group of shards that exists in the test alone, and a client.

use super::super::handle::{EngineHandle, Events, Readiness, StreamEventKind};
use super::super::{Connections, DrainDeadline, Engine};
use crate::clock::now;
use crate::fleet::{Cause, Fault, Group, StepOutcome};
use crate::metrics::{Metrics, Registry, Subject};
use crate::scheduler::request::{Request, SamplingParams};
use crate::scheduler::{Scheduler, SchedulerConfig};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use topology::ids::{Epoch, Rank};
use topology::wire::{RowOutput, ScoredToken, StepPlan, StepTimings, TokenScore};

pub(super) const VOCAB: u32 = 100;

/// Says after every token the one that follows it, and counts steps and rows.
#[derive(Debug)]
struct Counting {
    steps: Arc<AtomicU64>,
    rows: Arc<AtomicU64>,
    step_takes: Duration,
    /// Steps, counted over all epochs, that fail.
    fails_at: Vec<u64>,
    /// A token that ends every step in which it is computed.
    poison: Option<u32>,
    /// How many faults can be mended.
    mendable: u32,
    epoch: Epoch,
    sent: VecDeque<(StepPlan, Instant)>,
    /// When the last step was answered.
    free_at: Option<Instant>,
    /// What it chose.
    sampled: Vec<Option<u32>>,
    ended: watch::Sender<Option<&'static str>>,
}

impl Group for Counting {
    async fn send(&mut self, plan: StepPlan) -> Result<(), Fault> {
        assert_eq!(plan.epoch, self.epoch);
        self.sent.push_back((plan, now()));
        assert!(self.sent.len() <= 2, "two steps are under way at most");
        Ok(())
    }

    async fn receive(&mut self) -> Result<StepOutcome, Fault> {
        let (plan, sent) = self.sent.front().expect("a plan was sent");
        self.rows.store(plan.rows.len() as u64, Ordering::SeqCst);
        let begun = self.free_at.max(Some(*sent)).unwrap_or(*sent);
        let answered = begun + self.step_takes;
        tokio::time::sleep_until(answered.into()).await;
        let (mut plan, _) = self.sent.pop_front().expect("it is there still");
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        self.free_at = Some(answered);
        for row in &mut plan.rows {
            if let (Some(from), Some(last)) = (row.last_from, row.tokens.last_mut()) {
                *last = self.sampled[from as usize].expect("the step before chose a token");
            }
        }
        let poison =
            |row: &topology::wire::PlanRow| row.tokens.iter().any(|t| Some(*t) == self.poison);
        if self.fails_at.contains(&step) || plan.rows.iter().any(poison) {
            return Err(Fault::of(
                Rank(1),
                Cause::Exited("signal: 9 (SIGKILL)".into()),
            ));
        }
        let choose = |row: &topology::wire::PlanRow| {
            let last = row.tokens.last().expect("rows have tokens");
            row.sampling.as_ref().map(|_| (last + 1) % VOCAB)
        };
        self.sampled = plan.rows.iter().map(choose).collect();
        let rows = plan.rows.iter().zip(&self.sampled);
        let answer = |(row, token): (&topology::wire::PlanRow, &Option<u32>)| RowOutput {
            sampled: token.map(|token| ScoredToken { token, score: None }),
            targets: vec![TokenScore::default(); row.targets.len()],
        };
        Ok(StepOutcome {
            outputs: rows.map(answer).collect(),
            timings: vec![StepTimings::default(); 2],
            tokens: plan.num_tokens(),
            took: self.step_takes,
            answered,
        })
    }

    async fn fault(&mut self) -> Fault {
        std::future::pending().await
    }

    async fn recover(&mut self, fault: &Fault) -> Result<Epoch, Fault> {
        tokio::time::sleep(self.step_takes).await;
        self.mendable = self.mendable.checked_sub(1).ok_or(fault.clone())?;
        self.epoch = self.epoch.next();
        self.sent.clear();
        Ok(self.epoch)
    }

    async fn stop(self) {
        self.ended.send_replace(Some("stopped"));
    }

    async fn kill(self) {
        self.ended.send_replace(Some("killed"));
    }
}

pub(super) struct Rig {
    pub(super) handle: EngineHandle,
    pub(super) shutdown: watch::Sender<DrainDeadline>,
    pub(super) ended: watch::Receiver<Option<&'static str>>,
    pub(super) steps: Arc<AtomicU64>,
    pub(super) rows: Arc<AtomicU64>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) engine: JoinHandle<Result<(), Fault>>,
}

pub(super) async fn rig(step_takes: Duration, fails_at: Option<u64>) -> Rig {
    failing_rig(step_takes, (Vec::from_iter(fails_at), 0)).await
}

/// A group whose steps fail at those counts, and as many of the faults can be mended.
pub(super) async fn failing_rig(
    step_takes: Duration,
    (fails_at, mendable): (Vec<u64>, u32),
) -> Rig {
    rig_of(step_takes, (fails_at, mendable), None).await
}

pub(super) async fn rig_of(
    step_takes: Duration,
    (fails_at, mendable): (Vec<u64>, u32),
    poison: Option<u32>,
) -> Rig {
    let scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 4096,
        block_size: 16,
        max_num_seqs: 32,
        max_num_batched_tokens: 64,
        max_model_len: 16384,
        vocab_size: VOCAB,
        max_num_queued_reqs: 64,
        max_num_queued_tokens: 10_000,
        long_prefill_token_threshold: 0,
        max_mixed_prefill_tokens: 0,
        enable_prefix_caching: true,
        async_scheduling: true,
    })
    .expect("the configuration is valid");
    let subject = Subject {
        model_name: "test".into(),
        world_size: 2,
    };
    let registry = Arc::new(Registry::new(16384, "test"));
    let metrics = Arc::new(Metrics::new(registry, &subject));
    let (readiness, mut ready) = watch::channel(Readiness::Loading);
    let (handle, submissions) = EngineHandle::new(ready.clone());
    let (shutdown, on_shutdown) = watch::channel(None);
    let (ended, on_end) = watch::channel(None);
    let steps = Arc::new(AtomicU64::new(0));
    let rows = Arc::new(AtomicU64::new(0));
    let group = Counting {
        steps: steps.clone(),
        rows: rows.clone(),
        step_takes,
        fails_at,
        poison,
        mendable,
        epoch: Epoch::default(),
        sent: VecDeque::new(),
        free_at: None,
        sampled: Vec::new(),
        ended,
    };
    let connections = Connections {
        submissions,
        shutdown: on_shutdown,
        readiness,
        metrics: metrics.clone(),
        max_recovery_attempts: if poison.is_some() { 10 } else { 3 },
    };
    let engine = tokio::spawn(Engine::new(scheduler, group, connections).run());
    ready
        .wait_for(|state| *state == Readiness::Ready)
        .await
        .expect("the engine runs");
    Rig {
        handle,
        shutdown,
        ended: on_end,
        steps,
        rows,
        metrics,
        engine,
    }
}

pub(super) fn request(handle: &EngineHandle, first: u32, max_tokens: u32) -> Request {
    Request {
        id: handle.next_id(),
        prompt: [first, first].into(),
        sampling: SamplingParams::default(),
        max_tokens,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        priority: 0,
        cache_salt: 0,
        prompt_logprobs: None,
    }
}

/// Different prompts, 50 tokens after each.
pub(super) fn many(handle: &EngineHandle, count: u32) -> Vec<Request> {
    let each = |first| request(handle, first % VOCAB, 50);
    (0..count).map(each).collect()
}

/// All events of all choices until the channel ends: tokens and the last event, by choice.
pub(super) async fn read_all(
    mut events: Events,
    choices: usize,
) -> Vec<(Vec<u32>, StreamEventKind)> {
    let mut got: Vec<(Vec<u32>, Option<StreamEventKind>)> = vec![(Vec::new(), None); choices];
    while let Some(event) = events.recv().await {
        let (tokens, last) = &mut got[event.choice];
        assert_eq!(*last, None, "nothing comes after the last event");
        match event.kind {
            StreamEventKind::Token { index, token, .. } => {
                assert_eq!(index as usize, tokens.len(), "no gap, no repeat");
                tokens.push(token);
            }
            kind @ (StreamEventKind::Finished(_) | StreamEventKind::Failed(_)) => {
                *last = Some(kind);
            }
            StreamEventKind::Started { .. } | StreamEventKind::PromptScores(_) => {}
        }
    }
    let end = |(tokens, last): (_, Option<_>)| (tokens, last.expect("every choice has an end"));
    got.into_iter().map(end).collect()
}

pub(super) const MS: Duration = Duration::from_millis(1);
