//! `cluster up`: from a command line to a served model, and from a signal to no process left.
//!
//! Wires the parts together and decides nothing about requests or shards. Independent things happen
//! at the same time: shards start while the tokenizer is read. Invariant: however it ends, shard
//! processes are gone when the exit code is returned.

use super::adopt::{self, Heirs};
use super::args::Up;
use super::nodes;
use super::prepare::Prepared;
use super::presence;
use super::progress::{Notes, Progress};
use super::report::Report;
use super::signals::Signals;
use super::{EXIT_FAULT, EXIT_INPUT, EXIT_NOW, complain};
use crate::admin::board::Board;
use crate::admin::server::{self as admin, Asked, Desk};
use crate::clock::{now, since};
use crate::engine::handle::{EngineHandle, Readiness, Submission};
use crate::engine::{Connections, DrainDeadline, Engine};
use crate::fleet::{Cause, Fault, Fleet, Keeper, Limits, Program, RankSite, Ready, Setup};
use crate::http::auth::ApiKeys;
use crate::http::limits::ServerLimits;
use crate::http::{ServedModel, ServerConfig, router, server};
use crate::metrics::{Metrics, Subject, UPKEEP_INTERVAL};
use crate::scheduler::{Scheduler, SchedulerConfig};
use anyhow::{Context, Result};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long answers may still take to reach their clients once the engine has ended.
const FLUSH_LIMIT: Duration = Duration::from_secs(3);

/// How long shard processes may take to be gone when the cluster was given up.
const TEARDOWN_LIMIT: Duration = Duration::from_secs(2);

/// Why serving ended early.
enum Failure {
    /// The user's to change; nothing was served.
    Input(anyhow::Error),
    /// The cluster's.
    Fault(Fault),
    /// A second signal.
    Now,
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Starts a cluster and serves it until it is told to end.
pub fn run(up: &Up) -> ExitCode {
    let begun = now();
    let (prepared, heirs) = match adopt::prepare(up) {
        Ok(found) => found,
        Err(error) => return complain(&error, EXIT_INPUT),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let runtime = match runtime.context("cannot start threads") {
        Ok(runtime) => runtime,
        Err(error) => return complain(&error, EXIT_FAULT),
    };
    let ended = runtime.block_on(async {
        let (alive, mut all_gone) = mpsc::channel(1);
        let ended = serve(up, (prepared, heirs), (begun, alive)).await;
        // Whatever was given up above is being killed; nothing is ever sent here.
        let _ = timeout(TEARDOWN_LIMIT, all_gone.recv()).await;
        ended
    });
    // A tokenizer may still be read by a thread that cannot be stopped.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Input(error)) => complain(&error, EXIT_INPUT),
        Err(Failure::Fault(fault)) => complain(&fault.into(), EXIT_FAULT),
        Err(Failure::Now) => ExitCode::from(EXIT_NOW),
    }
}

async fn serve(
    up: &Up,
    (prepared, heirs): (Prepared, Option<Heirs>),
    (begun, alive): (Instant, mpsc::Sender<()>),
) -> Result<(), Failure> {
    for warning in &prepared.placement.warnings {
        Notes(up.log_format).warn(warning);
    }
    let listener = bind(up, prepared.address).await.map_err(Failure::Input)?;
    let address = listener
        .local_addr()
        .map_err(|e| Failure::Input(e.into()))?;
    let metrics = Arc::new(Metrics::new(&Subject {
        model_name: prepared.model.names[0].clone(),
        max_model_len: prepared.load.max_model_len,
        world_size: prepared.placement.world_size(),
        build: super::BUILD.to_owned(),
    }));
    tokio::spawn(upkeep(metrics.clone()));
    let (readiness, state) = watch::channel(Readiness::Loading);
    let claim = presence::claim(up, &prepared, reachable(address)).map_err(Failure::Input)?;
    let keeper = adopt::keeper((up, &prepared), &claim, heirs.as_ref()).map_err(Failure::Input)?;
    let socket = claim.socket();
    let board = Arc::new(Board::new(claim, state.clone(), metrics.clone()));
    let (asked, wishes) = watch::channel(Asked::Nothing);
    let signals = Signals::new(wishes).map_err(Failure::Input)?;
    let desk = Desk {
        board: board.clone(),
        asked,
    };
    let socket = admin::bind(&socket).map_err(Failure::Input)?;
    tokio::spawn(admin::serve(socket, desk));
    let (handle, submissions) = EngineHandle::new(state);
    let site = Site {
        handle,
        metrics,
        listener,
        readiness,
        submissions,
    };
    let ended = attend(
        up,
        (&prepared, heirs),
        (begun, alive),
        (site, board.clone(), keeper),
        signals,
    )
    .await;
    board.close(&how(&ended, board.unfinished()));
    ended
}

/// How it ended, for whoever asks later.
fn how(ended: &Result<(), Failure>, unfinished: u64) -> String {
    let cut = match unfinished {
        0 => "no request was cut off".to_owned(),
        1 => "1 request was cut off".to_owned(),
        many => format!("{many} requests were cut off"),
    };
    match ended {
        Ok(()) => format!("it ended as asked; {cut}"),
        Err(Failure::Now) => format!("it was ended at once; {cut}"),
        Err(Failure::Input(error)) => format!("it failed: {error:#}"),
        Err(Failure::Fault(fault)) => format!("it failed: {fault}"),
    }
}

/// Starts shards and serves, until a signal or a fault.
async fn attend(
    up: &Up,
    (prepared, heirs): (&Prepared, Option<Heirs>),
    (begun, alive): (Instant, mpsc::Sender<()>),
    (site, board, keeper): (Site, Arc<Board>, Option<Keeper>),
    mut signals: Signals,
) -> Result<(), Failure> {
    let Site {
        handle,
        metrics,
        listener,
        readiness,
        submissions,
    } = site;
    let address = listener
        .local_addr()
        .map_err(|e| Failure::Input(e.into()))?;
    let front = Front {
        handle,
        metrics: metrics.clone(),
        listener,
    };
    // Both begin now; whichever fails ends the other.
    let starting = async {
        tokio::try_join!(
            open(up, prepared, front),
            start(up, (prepared, heirs), (alive, board.clone(), keeper))
        )
    };
    let (door, (fleet, ready)) = tokio::select! {
        started = starting => started?,
        () = signals.next() => return Ok(()),
    };
    record_start(&metrics, prepared, &ready, since(begun));
    board.loaded(&ready.ranks);
    let scheduler = SchedulerConfig {
        num_blocks: ready.num_blocks,
        ..prepared.scheduler.clone()
    };
    let mut scheduler = Scheduler::new(scheduler).map_err(|e| Failure::Input(e.into()))?;
    scheduler.reset(ready.epoch);
    let report = Report {
        address: reachable(address),
        model_name: &prepared.model.names[0],
        chat: door.chat,
        key_needed: !prepared.keys.is_empty(),
        ranks: &ready.ranks,
        num_blocks: ready.num_blocks,
        block_size: prepared.load.block_size,
        max_model_len: prepared.load.max_model_len,
        phases: &ready.phases,
        startup: since(begun),
    };
    let connections = Wiring {
        submissions,
        readiness,
        metrics,
        max_recovery_attempts: up.max_recovery_attempts,
    };
    run_engine(
        scheduler,
        fleet,
        connections,
        (&report, up),
        &mut signals,
        door,
    )
    .await
}

/// What the engine is made of besides scheduler and fleet.
struct Wiring {
    submissions: mpsc::Receiver<Submission>,
    readiness: watch::Sender<Readiness>,
    metrics: Arc<Metrics>,
    max_recovery_attempts: u32,
}

/// Serves until a signal or a fault; then lets answers reach their clients.
async fn run_engine(
    scheduler: Scheduler,
    fleet: Fleet,
    wiring: Wiring,
    (report, up): (&Report<'_>, &Up),
    signals: &mut Signals,
    door: Door,
) -> Result<(), Failure> {
    let (shutdown, on_shutdown) = watch::channel::<DrainDeadline>(None);
    let connections = Connections {
        submissions: wiring.submissions,
        shutdown: on_shutdown,
        readiness: wiring.readiness.clone(),
        metrics: wiring.metrics.clone(),
        max_recovery_attempts: wiring.max_recovery_attempts,
    };
    let mut engine = tokio::spawn(Engine::new(scheduler, fleet, connections).run());
    let mut state = wiring.readiness.subscribe();
    // An engine that ended before it was ready says why below.
    let _ = state.wait_for(|state| *state != Readiness::Loading).await;
    // Standard output may be closed; the cluster serves all the same.
    let _ = writeln!(io::stdout(), "{report}");
    let ended = tokio::select! {
        ended = &mut engine => ended,
        () = signals.next() => {
            wiring.readiness.send_replace(Readiness::Draining);
            let limit = Duration::from_secs(up.shutdown_timeout.into());
            shutdown.send_replace(Some(tokio::time::Instant::now() + limit));
            Notes(up.log_format).say("finishing running requests; Ctrl-C again ends them");
            tokio::select! {
                ended = &mut engine => ended,
                () = signals.urgent() => {
                    // With the engine its fleet is dropped, and with that its processes end.
                    engine.abort();
                    let _ = engine.await;
                    return Err(Failure::Now);
                }
            }
        }
    };
    wiring.metrics.engine.ranks_ready.set(0.0);
    door.close().await;
    match ended {
        Ok(ended) => Ok(ended?),
        Err(panicked) => Err(Failure::Fault(Fault::group(Cause::Coordinator(
            panicked.to_string(),
        )))),
    }
}

/// What there is before a shard is started.
struct Site {
    handle: EngineHandle,
    metrics: Arc<Metrics>,
    listener: TcpListener,
    readiness: watch::Sender<Readiness>,
    submissions: mpsc::Receiver<Submission>,
}

/// What the HTTP server is made of.
struct Front {
    handle: EngineHandle,
    metrics: Arc<Metrics>,
    listener: TcpListener,
}

/// The HTTP server at work.
struct Door {
    /// Whether the model has a chat template.
    chat: bool,
    close: oneshot::Sender<()>,
    server: JoinHandle<io::Result<()>>,
}

impl Door {
    /// Takes no more connections and gives open answers a moment to be read.
    async fn close(self) {
        // An error means that the server has ended already.
        let _ = self.close.send(());
        let _ = self.server.await;
    }
}

/// Reads what text needs and opens the door: until shards are ready it answers 503.
async fn open(up: &Up, prepared: &Prepared, site: Front) -> Result<Door, Failure> {
    let (owned_up, owned) = (up.clone(), prepared.clone());
    let text = tokio::task::spawn_blocking(move || owned.load_text(&owned_up)).await;
    let text = text.context("reading the tokenizer panicked");
    let text = text.and_then(|text| text).map_err(Failure::Input)?;
    let chat = text.template.is_some();
    let limits = ServerLimits {
        max_logprobs: up.max_logprobs,
        drain_timeout: FLUSH_LIMIT,
        ..ServerLimits::default()
    };
    let metrics = site.metrics;
    let router = router(ServerConfig {
        engine: site.handle,
        model: ServedModel {
            names: prepared.model.names.clone(),
            text,
            max_model_len: prepared.load.max_model_len,
            vocab_size: prepared.model.shape.vocab_size,
        },
        keys: ApiKeys::new(&prepared.keys),
        limits: limits.clone(),
        allowed_origins: up.allowed_origins.clone(),
        seed: up.seed,
        version: super::VERSION.to_owned(),
        metrics: Box::new(move || metrics.render()),
    });
    let (close, closed) = oneshot::channel();
    let closed = async {
        // Dropped or sent: both mean close.
        let _ = closed.await;
    };
    let server = tokio::spawn(server::serve(site.listener, router, limits, closed));
    Ok(Door {
        chat,
        close,
        server,
    })
}

async fn start(
    up: &Up,
    (prepared, heirs): (&Prepared, Option<Heirs>),
    watchers: (mpsc::Sender<()>, Arc<Board>, Option<Keeper>),
) -> Result<(Fleet, Ready), Failure> {
    let program = program(up, prepared, watchers).await;
    let program = program.map_err(Failure::Input)?;
    let setup = Setup {
        load: prepared.load.clone(),
        limits: Limits {
            startup: Duration::from_secs(up.startup_timeout.into()),
            step: Duration::from_secs(up.step_timeout.into()),
        },
        generation: 0,
    };
    let mut progress = Progress::new(prepared.placement.world_size(), Notes(up.log_format));
    let choose = |loaded: &[_]| {
        prepared
            .choose_blocks(up, loaded)
            .map_err(|e| e.to_string())
    };
    let show = |event| progress.show(&event);
    let started = adopt::start(program, setup, heirs.as_ref(), choose, show).await;
    progress.finish();
    Ok(started?)
}

/// What is started, and where.
async fn program(
    up: &Up,
    prepared: &Prepared,
    (alive, witness, keeper): (mpsc::Sender<()>, Arc<Board>, Option<Keeper>),
) -> Result<Program> {
    let path = std::env::current_exe().context("cannot find this program's own file")?;
    let (sites, address) = match &prepared.topology {
        None => {
            let devices = prepared.placement.devices.iter().cloned();
            let sites = devices.map(RankSite::here).collect();
            (sites, Ipv4Addr::LOCALHOST.into())
        }
        Some(topology) => {
            let (topology, path) = (topology.clone(), path.clone());
            let address = topology.coordinator;
            // The program's hash is worth a second in a debug build.
            let sites = tokio::task::spawn_blocking(move || nodes::sites(&topology, &path)).await;
            (sites.context("reading this program panicked")??, address)
        }
    };
    Ok(Program {
        path: path.into(),
        log_level: presence::shard_log_level(&up.log_level),
        cpu_isa: up.cpu_isa.name().to_owned(),
        sites,
        address,
        alive,
        witness,
        keeper,
    })
}

fn record_start(metrics: &Metrics, prepared: &Prepared, ready: &Ready, total: Duration) {
    let load = &prepared.load;
    metrics.set_cache_config(
        load.block_size,
        ready.num_blocks,
        &load.dtype,
        prepared.scheduler.enable_prefix_caching,
    );
    for (phase, took) in &ready.phases {
        metrics.set_startup(phase.name(), *took);
    }
    metrics.set_startup("total", total);
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

async fn bind(up: &Up, address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let (ip, port) = (address.ip(), address.port());
        match error.kind() {
            io::ErrorKind::AddrInUse => {
                let holder = presence::holder(up, port);
                let by = holder.map_or_else(String::new, |holder| format!(" by {holder}"));
                anyhow::anyhow!(
                    "port {port} of {ip} is in use{by}; give another --port, or 0 for a free one"
                )
            }
            io::ErrorKind::PermissionDenied => anyhow::anyhow!(
                "port {port} may not be used by this user; give a --port above 1023"
            ),
            io::ErrorKind::AddrNotAvailable => {
                anyhow::anyhow!("{ip} is no address of this machine; give --host one that is")
            }
            _ => anyhow::anyhow!("cannot serve on {address}: {error}"),
        }
    })
}

/// Who listens everywhere is reached at home too.
fn reachable(address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), address.port())
    } else {
        address
    }
}

async fn upkeep(metrics: Arc<Metrics>) {
    let mut every = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        every.tick().await;
        metrics.upkeep();
    }
}
