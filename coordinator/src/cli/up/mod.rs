//! `cluster up`: from a command line to served models, and from a signal to no process left.
//!
//! Wires the parts together and decides nothing about requests or shards: `group` is one model,
//! `door` the API of all, this the frame around them. Independent things happen
//! at the same time: shards start while tokenizers are read. Invariant: however it ends, shard
//! processes are gone when the exit code is returned, but for those of a process before it that it had not come to take
//! over.

mod door;
mod group;
mod manifests;

use super::adopt::{self, AllHeirs, Succession};
use super::args::Up;
use super::prepare::Prepared;
use super::presence;
use super::progress::{Notes, Progress};
use super::report::{ModelReport, Report};
use super::signals::Signals;
use super::{EXIT_FAULT, EXIT_INPUT, EXIT_NOW, complain};
use crate::admin::board::Board;
use crate::admin::server::{self as admin, Asked, Desk};
use crate::clock::{now, since};
use crate::engine::DrainDeadline;
use crate::engine::handle::Readiness;
use crate::metrics::{Registry, UPKEEP_INTERVAL};
use anyhow::{Context, Result};
use door::Door;
use futures_util::future::try_join_all;
use group::{Group, Started, Yard};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How long shard processes may take to be gone when the cluster was given up.
const TEARDOWN_LIMIT: Duration = Duration::from_secs(2);

/// Why serving ended early.
enum Failure {
    /// The user's to change; nothing was served.
    Input(anyhow::Error),
    /// The cluster's; which model, rank and why.
    Fault(String),
    /// A second signal.
    Now,
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
        let ended = serve(up, (&prepared, heirs), (begun, alive)).await;
        // Whatever was given up above is being killed; nothing is ever sent here.
        let _ = timeout(TEARDOWN_LIMIT, all_gone.recv()).await;
        ended
    });
    // A tokenizer may still be read by a thread that cannot be stopped.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Input(error)) => complain(&error, EXIT_INPUT),
        Err(Failure::Fault(fault)) => complain(&anyhow::anyhow!(fault), EXIT_FAULT),
        Err(Failure::Now) => ExitCode::from(EXIT_NOW),
    }
}

async fn serve(
    up: &Up,
    (prepared, heirs): (&Prepared, AllHeirs),
    (begun, alive): (Instant, mpsc::Sender<()>),
) -> Result<(), Failure> {
    for warning in &prepared.warnings {
        Notes(up.log_format).warn(warning);
    }
    let listener = door::bind(up, prepared.address)
        .await
        .map_err(Failure::Input)?;
    let address = listener.local_addr();
    let address = reachable(address.map_err(|error| Failure::Input(error.into()))?);
    let lengths = prepared.models.iter().map(|model| model.load.max_model_len);
    let registry = Registry::new(lengths.max().unwrap_or_default(), super::BUILD);
    let registry = Arc::new(registry);
    tokio::spawn(upkeep(registry.clone()));
    let is_one = prepared.models.len() == 1;
    let groups = prepared.models.iter();
    let groups: Vec<Group> = groups
        .map(|model| Group::new(model, &registry, is_one))
        .collect();
    let claim = presence::claim(up, prepared, address).map_err(Failure::Input)?;
    let successions = adopt::successions((up, prepared), &claim, heirs).map_err(Failure::Input)?;
    let (socket, journal) = (claim.socket(), claim.background());
    let watched = groups.iter().map(|group| {
        let state = group.readiness.subscribe();
        (state, group.metrics.clone())
    });
    let board = Arc::new(Board::new(claim, watched.collect()));
    let (asked, wishes) = watch::channel(Asked::Nothing);
    let signals = Signals::new(wishes).map_err(Failure::Input)?;
    let desk = Desk {
        board: board.clone(),
        asked,
    };
    let socket = admin::bind(&socket).map_err(Failure::Input)?;
    tokio::spawn(admin::serve(socket, desk));
    let frame = Frame {
        up,
        prepared,
        board: board.clone(),
        begun,
        address,
        journal,
    };
    let ended = frame
        .attend(groups, (listener, registry), (alive, successions), signals)
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

/// What all models of a cluster have in common.
struct Frame<'a> {
    up: &'a Up,
    prepared: &'a Prepared,
    board: Arc<Board>,
    begun: Instant,
    address: SocketAddr,
    /// Where background requests are kept.
    journal: PathBuf,
}

impl Frame<'_> {
    /// Starts shards and serves, until a signal or a fault.
    async fn attend(
        &self,
        groups: Vec<Group>,
        (listener, registry): (TcpListener, Arc<Registry>),
        shards: (mpsc::Sender<()>, Vec<Succession>),
        mut signals: Signals,
    ) -> Result<(), Failure> {
        let engines = groups.iter().map(|group| group.handle.clone()).collect();
        // Both begin now; whichever fails ends the other.
        let starting = async {
            tokio::try_join!(
                Door::open(
                    self.up,
                    self.prepared,
                    (listener, engines),
                    registry,
                    &self.journal
                ),
                self.start(&groups, shards)
            )
        };
        let (door, started) = tokio::select! {
            started = starting => started?,
            () = signals.next() => return Ok(()),
        };
        let mut reports = Vec::new();
        let models = self.prepared.models.iter().zip(&groups).zip(&started);
        for (index, ((model, group), started)) in models.enumerate() {
            group.record(model, started, self.begun);
            self.board.loaded(index, &started.ready.ranks);
            reports.push(ModelReport {
                name: group.name.clone(),
                chat: door.chat[index],
                ready: started.ready.clone(),
                block_size: model.load.block_size,
                max_model_len: model.load.max_model_len,
            });
        }
        let report = Report {
            address: self.address,
            key_needed: !self.prepared.keys.is_empty(),
            models: reports,
            startup: since(self.begun),
        };
        let ended = self.run(groups, started, (&report, &mut signals)).await;
        door.close().await;
        ended
    }

    /// Starts the shards of all models at once; one that fails ends the others.
    async fn start(
        &self,
        groups: &[Group],
        (alive, successions): (mpsc::Sender<()>, Vec<Succession>),
    ) -> Result<Vec<Started>, Failure> {
        let yard = Yard::new(self.prepared, (alive, self.board.clone())).await;
        let yard = yard.map_err(Failure::Input)?;
        let models = self.prepared.models.iter();
        let names = models.map(|model| (model.model.name(), model.placement.world_size()));
        let progress = Progress::new(&names.collect::<Vec<_>>(), Notes(self.up.log_format));
        let groups = groups.iter().zip(successions).enumerate();
        let starts = groups.map(|(index, (group, succession))| {
            let model = (index, self.prepared);
            group.start(self.up, model, (&yard, &progress), succession)
        });
        let started = try_join_all(starts).await;
        progress.finish();
        started
    }

    /// Runs the engines until a signal or a fault has ended all.
    async fn run(
        &self,
        groups: Vec<Group>,
        started: Vec<Started>,
        (report, signals): (&Report, &mut Signals),
    ) -> Result<(), Failure> {
        let (shutdown, on_shutdown) = watch::channel::<DrainDeadline>(None);
        let drain = Drain {
            shutdown,
            limit: Duration::from_secs(self.up.shutdown_timeout.into()),
            readiness: groups.iter().map(|group| group.readiness.clone()).collect(),
        };
        let attempts = self.up.max_recovery_attempts;
        let mut engines = JoinSet::new();
        for ((model, group), started) in self.prepared.models.iter().zip(groups).zip(started) {
            let engine = group.serve((model, started), on_shutdown.clone(), attempts);
            engines.spawn(engine.map_err(Failure::Input)?);
        }
        for readiness in &drain.readiness {
            let mut state = readiness.subscribe();
            // An engine that ended before it was ready says why below.
            let _ = state.wait_for(|state| *state != Readiness::Loading).await;
        }
        // Standard output may be closed; the cluster serves all the same.
        let _ = writeln!(io::stdout(), "{report}");
        self.until_all_ended(engines, &drain, signals).await
    }

    /// A model that cannot go on ends the process, so that whoever supervises it sees that; requests of the
    /// others get the time to finish that they have on SIGTERM.
    async fn until_all_ended(
        &self,
        mut engines: JoinSet<Result<(), Failure>>,
        drain: &Drain,
        signals: &mut Signals,
    ) -> Result<(), Failure> {
        let (mut first_failure, mut was_asked) = (None, false);
        loop {
            let wish = async {
                if was_asked {
                    signals.urgent().await;
                } else {
                    signals.next().await;
                }
            };
            tokio::select! {
                ended = engines.join_next() => {
                    let failure = match ended {
                        None => return first_failure.map_or(Ok(()), Err),
                        Some(Ok(Ok(()))) => continue,
                        Some(Ok(Err(failure))) => failure,
                        Some(Err(panicked)) => Failure::Fault(format!(
                            "the coordinator's own state is broken: {panicked}"
                        )),
                    };
                    first_failure.get_or_insert(failure);
                    if drain.begin() && !engines.is_empty() {
                        let what = "a model cannot go on: finishing the others' running requests";
                        Notes(self.up.log_format).say(what);
                    }
                }
                () = wish => {
                    if was_asked {
                        // With the engines their fleets are dropped, and with those their processes end.
                        engines.shutdown().await;
                        return Err(Failure::Now);
                    }
                    was_asked = true;
                    drain.begin();
                    let what = "finishing running requests; Ctrl-C again ends them";
                    Notes(self.up.log_format).say(what);
                }
            }
        }
    }
}

/// How all models are told to finish.
struct Drain {
    shutdown: watch::Sender<DrainDeadline>,
    limit: Duration,
    readiness: Vec<watch::Sender<Readiness>>,
}

impl Drain {
    /// No new requests from now on, and an end for those that run. Whether it begins with this.
    fn begin(&self) -> bool {
        if self.shutdown.borrow().is_some() {
            return false;
        }
        for readiness in &self.readiness {
            readiness.send_if_modified(|state| {
                let has_failed = matches!(state, Readiness::Failed(_));
                if !has_failed {
                    *state = Readiness::Draining;
                }
                !has_failed
            });
        }
        let deadline = tokio::time::Instant::now() + self.limit;
        self.shutdown.send_replace(Some(deadline));
        true
    }
}

/// Who listens everywhere is reached at home too.
fn reachable(address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), address.port())
    } else {
        address
    }
}

async fn upkeep(registry: Arc<Registry>) {
    let mut every = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        every.tick().await;
        registry.upkeep();
    }
}
