//! The real engine and scheduler over a group of shards that says `a` at a pace, and fails when told to.

use super::support::{MAX_MODEL_LEN, Server, Setup, VOCAB};
use coordinator::clock::now;
use coordinator::engine::handle::{EngineHandle, Readiness};
use coordinator::engine::{Connections, Engine};
use coordinator::fleet::{Cause, Fault, Group, StepOutcome};
use coordinator::metrics::{Metrics, Registry, Subject};
use coordinator::scheduler::{Scheduler, SchedulerConfig};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use topology::ids::{Epoch, Rank};
use topology::wire::{RowOutput, ScoredToken, StepPlan, StepTimings};

/// How the group computes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// A step.
    pub(crate) step: Duration,
    /// Each token of a step beyond those that every running sequence has.
    pub(crate) prompt_token: Duration,
    /// To form the group again.
    pub(crate) recovery: Duration,
}

/// A server and what holds its engine.
pub(crate) struct Paced {
    pub(crate) server: Server,
    /// Set: the step under way fails.
    pub(crate) fails: Arc<AtomicBool>,
    pub(crate) metrics: Arc<Metrics>,
    _shutdown: watch::Sender<coordinator::engine::DrainDeadline>,
}

struct Steps {
    pace: Pace,
    fails: Arc<AtomicBool>,
    epoch: Epoch,
    sent: VecDeque<StepPlan>,
    /// When the oldest is answered, once that is waited for: whoever waits again waits no longer.
    answered: Option<Instant>,
}

impl Group for Steps {
    async fn send(&mut self, plan: StepPlan) -> Result<(), Fault> {
        self.sent.push_back(plan);
        Ok(())
    }

    async fn receive(&mut self) -> Result<StepOutcome, Fault> {
        let plan = self.sent.front().expect("a plan was sent");
        let more = plan.num_tokens().saturating_sub(plan.rows.len());
        let more = u32::try_from(more).expect("few");
        let takes = self.pace.step + self.pace.prompt_token * more;
        let answered = *self.answered.get_or_insert_with(|| now() + takes);
        tokio::time::sleep_until(answered.into()).await;
        self.answered = None;
        if self.fails.swap(false, Ordering::SeqCst) {
            let cause = Cause::Exited("signal: 9 (SIGKILL)".into());
            return Err(Fault::of(Rank(1), cause));
        }
        let plan = self.sent.pop_front().expect("it is there still");
        let answer = |row: &topology::wire::PlanRow| RowOutput {
            sampled: row.sampling.as_ref().map(|_| ScoredToken {
                token: u32::from(b'a'),
                score: None,
            }),
            targets: Vec::new(),
        };
        Ok(StepOutcome {
            outputs: plan.rows.iter().map(answer).collect(),
            timings: vec![StepTimings::default()],
            tokens: plan.num_tokens(),
            took: takes,
            answered,
        })
    }

    async fn fault(&mut self) -> Fault {
        std::future::pending().await
    }

    async fn recover(&mut self, _: &Fault) -> Result<Epoch, Fault> {
        tokio::time::sleep(self.pace.recovery).await;
        self.sent.clear();
        self.epoch = self.epoch.next();
        Ok(self.epoch)
    }

    async fn stop(self) {}

    async fn kill(self) {}
}

/// As many sequences at once, and as many that wait.
pub(crate) async fn start(setup: Setup, pace: Pace, (running, waiting): (u32, usize)) -> Paced {
    let scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 8192,
        block_size: 16,
        max_num_seqs: running,
        max_num_batched_tokens: 512,
        max_model_len: MAX_MODEL_LEN,
        vocab_size: VOCAB,
        max_num_queued_reqs: waiting,
        max_num_queued_tokens: 1 << 20,
        long_prefill_token_threshold: 0,
        max_mixed_prefill_tokens: 0,
        enable_prefix_caching: false,
        async_scheduling: true,
    });
    let subject = Subject {
        model_name: "test".into(),
        world_size: 1,
    };
    let registry = Arc::new(Registry::new(MAX_MODEL_LEN, "test"));
    let metrics = Arc::new(Metrics::new(registry, &subject));
    let (readiness, mut ready) = watch::channel(Readiness::Loading);
    let (handle, submissions) = EngineHandle::new(ready.clone());
    let (shutdown, on_shutdown) = watch::channel(None);
    let fails = Arc::new(AtomicBool::new(false));
    let group = Steps {
        pace,
        fails: Arc::clone(&fails),
        epoch: Epoch::default(),
        sent: VecDeque::new(),
        answered: None,
    };
    let connections = Connections {
        submissions,
        shutdown: on_shutdown,
        readiness: readiness.clone(),
        metrics: Arc::clone(&metrics),
        max_recovery_attempts: 3,
    };
    let scheduler = scheduler.expect("the configuration is valid");
    tokio::spawn(Engine::new(scheduler, group, connections).run());
    let is_ready = ready.wait_for(|state| *state == Readiness::Ready).await;
    is_ready.expect("the engine runs");
    Paced {
        server: setup.serve(handle, readiness, Arc::default()).await,
        fails,
        metrics,
        _shutdown: shutdown,
    }
}
