//! One model of a cluster: its shards, its engine, and where they stand.
//!
//! Models share nothing but the process: each has its own fleet with a control plane of its own, scheduler,
//! block table and engine. Invariant: what goes wrong with one is said with its name, and touches no other.

use super::{Failure, manifests};
use crate::admin::board::{Board, Section};
use crate::cli::adopt::{self, Succession};
use crate::cli::args::Up;
use crate::cli::prepare::{Prepared, PreparedModel};
use crate::cli::progress::Progress;
use crate::cli::{nodes, presence};
use crate::clock::since;
use crate::engine::handle::{EngineHandle, Readiness, Submission};
use crate::engine::{Connections, DrainDeadline, Engine};
use crate::fleet::{Fault, Fleet, Keeper, Limits, Program, RankSite, Ready, Setup};
use crate::metrics::{Metrics, Registry, Subject};
use crate::scheduler::{Scheduler, SchedulerConfig};
use anyhow::{Context, Result};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tracing::{Instrument, Span};

/// What there is of a model before a shard is started.
pub(super) struct Group {
    /// As the API shows it.
    pub(super) name: String,
    pub(super) metrics: Arc<Metrics>,
    pub(super) handle: EngineHandle,
    pub(super) readiness: watch::Sender<Readiness>,
    submissions: mpsc::Receiver<Submission>,
    /// Names the model in log lines, where there are several.
    span: Span,
}

/// Shards that can compute, and what they said.
pub(super) struct Started {
    fleet: Fleet,
    pub(super) ready: Ready,
}

/// Where and with what the ranks of all models are started.
pub(super) struct Yard {
    path: PathBuf,
    /// By model, in rank order.
    sites: Vec<Vec<RankSite>>,
    /// The address of this machine that all ranks reach.
    address: IpAddr,
    /// Held for as long as any shard process may exist.
    alive: mpsc::Sender<()>,
    board: Arc<Board>,
}

impl Group {
    pub(super) fn new(model: &PreparedModel, registry: &Arc<Registry>, is_one: bool) -> Self {
        let name = model.model.name().to_owned();
        let subject = Subject {
            model_name: name.clone(),
            world_size: model.placement.world_size(),
        };
        let (readiness, state) = watch::channel(Readiness::Loading);
        let (handle, submissions) = EngineHandle::new(state);
        let span = if is_one {
            Span::none()
        } else {
            // Of the highest level: whatever is logged is logged with it.
            tracing::error_span!("model", name)
        };
        Self {
            metrics: Arc::new(Metrics::new(registry.clone(), &subject)),
            name,
            handle,
            readiness,
            submissions,
            span,
        }
    }

    /// Starts the shards of model number `index`, or takes over those that wait, and waits until
    /// they can compute.
    pub(super) async fn start(
        &self,
        up: &Up,
        (index, all): (usize, &Prepared),
        (yard, progress): (&Yard, &Progress),
        Succession { keeper, heirs }: Succession,
    ) -> Result<Started, Failure> {
        let program = yard.program(up, index, keeper);
        let prepared = &all.models[index];
        let setup = Setup {
            load: prepared.load.clone(),
            limits: Limits {
                startup: Duration::from_secs(up.startup_timeout.into()),
                step: Duration::from_secs(up.step_timeout.into()),
            },
            generation: 0,
        };
        let choose = |loaded: &[_]| {
            prepared
                .choose_blocks(loaded)
                .map_err(|error| error.to_string())
        };
        let tell = |event| progress.show(index, &event);
        // Of shards that wait only those files were read that are not theirs.
        let are_checked = heirs.is_none();
        let check = manifests::verify(up, (index, all), &yard.sites[index], are_checked);
        let starting = adopt::start(program, setup, (heirs.as_ref(), check), choose, tell);
        let started = starting.instrument(self.span.clone()).await;
        let started = started.map_err(Failure::Input)?;
        let (fleet, ready) = started.map_err(|fault| Failure::Fault(self.named(&fault)))?;
        Ok(Started { fleet, ready })
    }

    /// Says what the start took.
    pub(super) fn record(&self, prepared: &PreparedModel, started: &Started, begun: Instant) {
        let (load, ready, metrics) = (&prepared.load, &started.ready, &self.metrics);
        metrics.set_cache_config(
            load.block_size,
            ready.num_blocks,
            &load.dtype,
            prepared.scheduler.enable_prefix_caching,
        );
        for (phase, took) in &ready.phases {
            metrics.set_startup(phase.name(), *took);
        }
        metrics.set_startup("total", since(begun));
        for rank in &ready.ranks {
            for (usage, bytes) in [
                ("weights", rank.weight_bytes),
                ("workspace", rank.workspace_bytes),
                ("kv_blocks", rank.kv_bytes),
                ("free", rank.free_bytes),
            ] {
                metrics.set_rank_memory(rank.rank.0, usage, bytes);
            }
        }
        metrics.engine.ranks_ready.set(ready.ranks.len() as f64);
        metrics.engine.epoch.set(f64::from(ready.epoch.0));
        metrics.live.begin(ready.epoch);
    }

    /// The engine over the shards that were started, to be run to its end.
    ///
    /// # Errors
    /// If the limits do not go with as many blocks as there are.
    pub(super) fn serve(
        self,
        (prepared, started): (&PreparedModel, Started),
        shutdown: watch::Receiver<DrainDeadline>,
        max_recovery_attempts: u32,
    ) -> Result<impl Future<Output = Result<(), Failure>> + Send + use<>> {
        let mut scheduler = Scheduler::new(SchedulerConfig {
            num_blocks: started.ready.num_blocks,
            ..prepared.scheduler.clone()
        })?;
        scheduler.reset(started.ready.epoch);
        let connections = Connections {
            submissions: self.submissions,
            shutdown,
            readiness: self.readiness,
            metrics: self.metrics.clone(),
            max_recovery_attempts,
        };
        let engine = Engine::new(scheduler, started.fleet, connections);
        let (name, span, metrics) = (self.name, self.span, self.metrics);
        Ok(async move {
            let ended = engine.run().instrument(span.clone()).await;
            metrics.engine.ranks_ready.set(0.0);
            ended.map_err(|fault| Failure::Fault(named(&name, &span, &fault)))
        })
    }

    fn named(&self, fault: &Fault) -> String {
        named(&self.name, &self.span, fault)
    }
}

/// With the model's name, where there are several.
fn named(name: &str, span: &Span, fault: &Fault) -> String {
    if span.is_none() {
        fault.to_string()
    } else {
        format!("{name}: {fault}")
    }
}

impl Yard {
    /// Finds out where ranks go.
    pub(super) async fn new(
        prepared: &Prepared,
        (alive, board): (mpsc::Sender<()>, Arc<Board>),
    ) -> Result<Self> {
        let path = std::env::current_exe().context("cannot find this program's own file")?;
        let (sites, address) = match &prepared.topology {
            None => {
                let here = |model: &PreparedModel| {
                    let devices = model.placement.devices.iter().cloned();
                    devices.map(RankSite::here).collect()
                };
                let sites = prepared.models.iter().map(here).collect();
                (sites, Ipv4Addr::LOCALHOST.into())
            }
            Some(topology) => {
                let (topology, path) = (topology.clone(), path.clone());
                let address = topology.coordinator;
                // The program's hash is worth a second in a debug build.
                let sites = tokio::task::spawn_blocking(move || nodes::sites(&topology, &path));
                (
                    sites.await.context("reading this program panicked")??,
                    address,
                )
            }
        };
        Ok(Self {
            path,
            sites,
            address,
            alive,
            board,
        })
    }

    /// What is started for model number `index`.
    fn program(&self, up: &Up, index: usize, keeper: Option<Keeper>) -> Program {
        Program {
            path: self.path.clone().into(),
            log_level: presence::shard_log_level(&up.log_level),
            cpu_isa: up.cpu_isa.name().to_owned(),
            sites: self.sites[index].clone(),
            address: self.address,
            alive: self.alive.clone(),
            witness: Arc::new(Section::new(self.board.clone(), index)),
            keeper,
        }
    }
}
