//! One run: a cluster, its clients and its faults, all from one seed.
//!
//! The real engine, scheduler and fleet run on simulated machines until all clients have what they are
//! due; then the cluster must be whole, idle and empty, and end. Invariant: a seed gives the same
//! run every time, to the last event.

use super::clients::{Client, Excuses, Served};
use super::faults::{Ill, Plan};
use super::host::SimHost;
use super::oracle;
use super::watched::Watched;
use super::world::{MS, World};
use crate::engine::handle::{EngineHandle, Readiness};
use crate::engine::{Connections, DrainDeadline, Engine};
use crate::fleet::{Fault, Fleet, Limits, Setup};
use crate::metrics::{Metrics, Registry, Subject};
use crate::scheduler::{Scheduler, SchedulerConfig};
use fastrand::Rng;
use futures_util::future::join_all;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use topology::ids::{Epoch, Rank};
use topology::wire::{Load, ModelLocation};

/// How long after the last fault everyone must have been served: a join that hangs, a load that never
/// ends and a few attempts, with the pauses between them.
const SERVED_WITHIN: Duration = Duration::from_secs(900);

/// What a run is about.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) world_size: u32,
    pub(super) config: SchedulerConfig,
    pub(super) attempts: u32,
    /// Whether faults may come before the cluster was ever ready.
    pub(super) troubled_start: bool,
    /// When nothing can be mended any more.
    pub(super) hopeless_at: Option<Duration>,
    /// When the process is asked to end, and how long it has.
    pub(super) drain: Option<(Duration, Duration)>,
}

/// What came of a run.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Hash of all that happened.
    pub(super) trace: u64,
    pub(super) violations: Vec<String>,
    pub(super) log: Vec<String>,
    pub(super) faults: u32,
    pub(super) recoveries: u32,
    pub(super) tokens: usize,
    pub(super) finished: usize,
    pub(super) failed: usize,
    /// Time that went by in the run.
    pub(super) took: Duration,
}

/// Runs a seed.
pub(super) fn run(seed: u64, verbose: bool) -> Report {
    paused(simulate(seed, verbose))
}

/// Runs what only waits for time, in no time.
pub(super) fn paused<T>(run: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime without I/O needs nothing");
    runtime.block_on(run)
}

async fn simulate(seed: u64, verbose: bool) -> Report {
    let mut rng = Rng::with_seed(seed);
    let case = Case::draw(&mut rng);
    let plan = Plan::draw(&mut rng);
    let clients = clients(&mut rng, &case.config);
    let world = World::new(rng, plan, verbose);
    world.note(format_args!("{case:?}"));
    let mut report = Report::default();
    if let Some(fleet) = start(&world, &case).await {
        serve(&world, &case, (fleet, clients), &mut report).await;
    }
    let state = world.lock();
    report.faults = state.plan.struck;
    report.took = state.elapsed();
    drop(state);
    (report.trace, report.violations, report.log) = world.report_all();
    report
}

impl Case {
    fn draw(rng: &mut Rng) -> Self {
        let kind = rng.u32(0..12);
        let some = |rng: &mut Rng| Duration::from_millis(rng.u64(0..30_000));
        let hopeless_at = (kind == 0).then(|| some(rng));
        let drain = (kind == 1 || kind == 2).then(|| {
            let limit = [2, 20, 5000][rng.usize(0..3)];
            (some(rng), Duration::from_secs(limit))
        });
        Self {
            world_size: rng.u32(1..=4),
            config: oracle::config(rng),
            attempts: if hopeless_at.is_some() {
                rng.u32(0..=3)
            } else {
                100
            },
            troubled_start: rng.u32(0..4) == 0,
            hopeless_at,
            drain,
        }
    }

    fn setup(&self) -> Setup {
        let config = &self.config;
        Setup {
            load: Load {
                model: ModelLocation::BuiltIn,
                tensor_parallel_size: self.world_size,
                dtype: "auto".into(),
                quantization: "auto".to_owned(),
                kv_cache_dtype: "auto".to_owned(),
                block_size: config.block_size,
                max_model_len: config.max_model_len,
                max_num_batched_tokens: config.max_num_batched_tokens,
                max_num_seqs: config.max_num_seqs,
                async_scheduling: config.async_scheduling,
                enforce_eager: false,
            },
            generation: 0,
            limits: Limits {
                startup: Duration::from_secs(60),
                step: Duration::from_secs(10),
            },
        }
    }
}

fn clients(rng: &mut Rng, config: &SchedulerConfig) -> Vec<Client> {
    let within = [1, 2000, 40_000][rng.usize(0..3)];
    let count = [3, 8, 14][rng.usize(0..3)];
    let client = |name| Client {
        name,
        at: Duration::from_millis(rng.u64(0..within)),
        choices: oracle::requests(rng, config),
        leaves_after: (rng.u32(0..8) == 0).then(|| rng.usize(0..20)),
        cancels_after: (rng.u32(0..10) == 0).then(|| rng.usize(0..20)),
    };
    (0..count).map(client).collect()
}

/// A cluster that is ready. A start that fails leaves nothing, and is tried again.
pub(super) async fn start(world: &Arc<World>, case: &Case) -> Option<Fleet<SimHost>> {
    let budget = world.lock().plan.budget;
    if !case.troubled_start {
        world.calm_down();
    }
    for _ in 0..30 {
        world.lock().ending = true;
        let host = SimHost {
            world: Arc::clone(world),
        };
        let blocks = case.config.num_blocks;
        let started = Fleet::start(host, case.setup(), |_| Ok(blocks), |_| {}).await;
        match started {
            Ok((fleet, _)) => {
                let mut state = world.lock();
                state.ending = false;
                if !case.troubled_start {
                    state.plan.budget = budget;
                }
                let now = state.elapsed();
                state.plan.over_at += now;
                state.note(format_args!("ready"));
                return Some(fleet);
            }
            Err(fault) => {
                world.note(format_args!("no start: {fault}"));
                expect_all_gone(world);
            }
        }
    }
    world.violation(format_args!("it never starts"));
    None
}

fn expect_all_gone(world: &World) {
    let mut state = world.lock();
    if state.procs.iter().any(|proc| proc.alive) {
        state.violation(format_args!("a process is left"));
    }
}

/// A ready cluster with an engine.
pub(super) struct Cluster {
    world: Arc<World>,
    pub(super) handle: EngineHandle,
    pub(super) shutdown: watch::Sender<DrainDeadline>,
    metrics: Arc<Metrics>,
    recoveries: Arc<AtomicU32>,
    engine: JoinHandle<Result<(), Fault>>,
}

impl Cluster {
    pub(super) fn new(world: &Arc<World>, case: &Case, fleet: Fleet<SimHost>) -> Self {
        let recoveries = Arc::new(AtomicU32::new(0));
        let group = Watched {
            fleet,
            world: Arc::clone(world),
            world_size: case.world_size,
            epoch: Epoch::default(),
            sent: VecDeque::new(),
            recoveries: Arc::clone(&recoveries),
        };
        let subject = Subject {
            model_name: "simulated".into(),
            world_size: case.world_size,
        };
        let registry = Arc::new(Registry::new(case.config.max_model_len, "test"));
        let metrics = Arc::new(Metrics::new(registry, &subject));
        let (readiness, ready) = watch::channel(Readiness::Loading);
        let (handle, submissions) = EngineHandle::new(ready);
        let (shutdown, on_shutdown) = watch::channel(None);
        let connections = Connections {
            submissions,
            shutdown: on_shutdown,
            readiness,
            metrics: Arc::clone(&metrics),
            max_recovery_attempts: case.attempts,
        };
        let scheduler = Scheduler::new(case.config.clone()).expect("it is valid");
        let engine = tokio::spawn(Engine::new(scheduler, group, connections).run());
        Self {
            world: Arc::clone(world),
            handle,
            shutdown,
            metrics,
            recoveries,
            engine,
        }
    }

    /// The process is asked to end, and ends.
    pub(super) async fn end(self, fails: bool) {
        let world = &self.world;
        match timeout(SERVED_WITHIN, self.engine).await {
            Err(_) => world.violation(format_args!("the engine does not end")),
            Ok(Err(panic)) => world.violation(format_args!("the engine panics: {panic}")),
            Ok(Ok(Err(fault))) if !fails => world.violation(format_args!("given up: {fault}")),
            Ok(Ok(Ok(()))) if fails => world.violation(format_args!("it did not fail")),
            Ok(Ok(_)) => {}
        }
        if fails && !matches!(self.handle.readiness(), Readiness::Failed(_)) {
            world.violation(format_args!("it does not say that it failed"));
        }
        expect_all_gone(world);
    }

    /// After all faults and requests: it is ready, computes, and holds nothing.
    async fn expect_whole(&self, case: &Case) {
        let world = &self.world;
        sleep(world.some_ms(0, 20_000)).await;
        world.calm_down();
        let until = Instant::now() + SERVED_WITHIN;
        // What was struck last may not have been noticed yet.
        sleep(Duration::from_secs(5)).await;
        while self.handle.readiness() != Readiness::Ready && Instant::now() < until {
            sleep(Duration::from_secs(1)).await;
        }
        let choices = {
            let mut state = world.lock();
            oracle::requests(&mut state.rng, &case.config)
        };
        let last = Client {
            name: 1000,
            at: Duration::ZERO,
            choices,
            leaves_after: None,
            cancels_after: None,
        };
        let excuses = Excuses {
            failure: false,
            shutdown: None,
        };
        let told = last.run(
            Arc::clone(world),
            self.handle.clone(),
            (case.world_size, excuses),
        );
        if timeout(SERVED_WITHIN, told).await.is_err() {
            world.violation(format_args!("a whole cluster does not serve"));
        }
        sleep(100 * MS).await;
        let text = self.metrics.registry().render();
        for name in [
            "cluster_kv_tokens{model_name=\"simulated\",state=\"used\"",
            "vllm:num_requests_running{",
            "vllm:num_requests_waiting{",
        ] {
            let empty = |line: &str| line.starts_with(name) && line.ends_with(" 0");
            if !text.lines().any(empty) {
                world.violation(format_args!("{name} is not 0"));
            }
        }
    }
}

async fn serve(
    world: &Arc<World>,
    case: &Case,
    (fleet, clients): (Fleet<SimHost>, Vec<Client>),
    report: &mut Report,
) {
    let cluster = Cluster::new(world, case, fleet);
    sleep(MS).await; // the engine says that it is ready
    let now = world.lock().elapsed();
    let excuses = Excuses {
        failure: case.hopeless_at.is_some(),
        shutdown: case.drain.map(|(at, _)| now + at),
    };
    let storm = Arc::clone(world);
    let storm = tokio::spawn(async move { storm.storm().await });
    let fate = tokio::spawn(fate(
        Arc::clone(world),
        (case.hopeless_at, case.drain),
        cluster.shutdown.clone(),
    ));
    let within = world.lock().plan.over_at + SERVED_WITHIN;
    let told = clients.into_iter().map(|client| {
        let handle = cluster.handle.clone();
        client.run(Arc::clone(world), handle, (case.world_size, excuses))
    });
    match timeout(within, join_all(told)).await {
        Ok(served) => report.count(&served),
        Err(_) => world.violation(format_args!("not everyone is served in {within:?}")),
    }
    let recoveries = Arc::clone(&cluster.recoveries);
    if case.hopeless_at.is_some() || case.drain.is_some() {
        fate.await.expect("it does not panic");
        cluster.end(case.hopeless_at.is_some()).await;
    } else {
        cluster.expect_whole(case).await;
        let deadline = Instant::now() + Duration::from_secs(60);
        cluster.shutdown.send_replace(Some(deadline));
        cluster.end(false).await;
    }
    storm.abort();
    report.recoveries = recoveries.load(Ordering::Relaxed);
}

/// What becomes of the whole cluster while it serves.
async fn fate(
    world: Arc<World>,
    (hopeless_at, drain): (Option<Duration>, Option<(Duration, Duration)>),
    shutdown: watch::Sender<DrainDeadline>,
) {
    if let Some((at, limit)) = drain {
        sleep(at).await;
        world.note(format_args!("it is to end within {limit:?}"));
        shutdown.send_replace(Some(Instant::now() + limit));
    }
    if let Some(at) = hopeless_at {
        sleep(at).await;
        let someone = {
            let mut state = world.lock();
            state.plan.no_launch = true;
            state.alive_of(Rank(0))
        };
        if let Some(someone) = someone {
            world.strike(someone, Ill::Kill);
        }
    }
}

impl Report {
    fn count(&mut self, served: &[Served]) {
        for served in served {
            self.tokens += served.tokens;
            self.finished += served.finished;
            self.failed += served.failed;
        }
    }
}
