//! Shards that are processes, of this machine or of a node that `ssh` reaches: launch, link, log, end.
//!
//! Where a rank is launched once it is launched again: its replacement starts on the same node.
//! Three tasks per shard: one reads the link, one watches the process, one forwards its log lines.
//! What they hear goes to the fleet's inbox. Invariant: a process ends with the value that stands for
//! it, at the latest when that is dropped.

use super::fault::{Cause, Fault, Phase};
use super::host::{Host, Launched, Shard};
use super::inbox::{Heard, Outlet, Source};
use super::start::StartEvent;
use super::witness::Witness;
use crate::clock::{now, since};
use futures_util::future::{join_all, select_all};
use std::ffi::OsString;
use std::net::IpAddr;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use topology::ids::Rank;
use topology::launch::environment;
use topology::launch::local::{self, Process};
use topology::launch::ssh::Remote;
use topology::launch::{Launch, LaunchError};
use topology::link::{Admitted, Frame, LinkError, LinkReceiver, LinkSender, Listener};
use topology::placement::Device;
use topology::wire::{FromShard, Hello, ToShard};

/// Longest time from the last process's start to the last shard's `Hello`.
const ADMIT_LIMIT: Duration = Duration::from_secs(20);

/// How long the system may take to end a process that was killed.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// How long the last lines of a process that is gone are waited for.
const LAST_LINES_LIMIT: Duration = Duration::from_millis(200);

/// What to start.
#[derive(Debug)]
pub struct Program {
    /// The program that is both this process and the shard.
    pub path: OsString,
    /// Which of a shard's log lines are written.
    pub log_level: String,
    /// One for each rank.
    pub sites: Vec<RankSite>,
    /// The address of this machine that all ranks reach.
    pub address: IpAddr,
    /// Held for as long as any shard process may exist: closed when all are gone, whatever became
    /// of the fleet.
    pub alive: mpsc::Sender<()>,
    /// Who is told of processes and their output.
    pub witness: Arc<dyn Witness>,
}

/// Where a rank is.
#[derive(Clone, Debug)]
pub struct RankSite {
    /// What it computes on.
    pub device: Device,
    /// Its node; `None` is this machine.
    pub remote: Option<Arc<Remote>>,
    /// Its node's address for the other ranks; `None` where all ranks are on one host.
    pub interface: Option<IpAddr>,
    /// The network interface that NCCL takes there; `None` leaves it to NCCL.
    pub nccl_interface: Option<String>,
}

impl RankSite {
    /// On this machine, with all other ranks.
    pub fn here(device: Device) -> Self {
        Self {
            device,
            remote: None,
            interface: None,
            nccl_interface: None,
        }
    }
}

/// Starts shards on their sites.
#[derive(Debug)]
pub struct LocalHost {
    program: Program,
    listener: Listener,
}

/// A process that was started and whose exit will be heard of.
#[derive(Debug)]
struct Child {
    source: Source,
    pid: u32,
    /// How long it may take to end; sent once. Dropping it is as good as zero.
    end: oneshot::Sender<Duration>,
    /// How it ended, once it has.
    exited: watch::Receiver<Option<String>>,
    /// Whether it had to be killed.
    watcher: JoinHandle<bool>,
}

/// A shard process that was admitted.
#[derive(Debug)]
pub struct LocalShard {
    child: Child,
    sender: LinkSender<ToShard>,
    reader: JoinHandle<()>,
    /// Its node, and its process id there.
    remote: Option<(Arc<Remote>, u32)>,
}

impl LocalHost {
    /// Opens the socket that shards connect to.
    ///
    /// # Errors
    /// [`Cause::Launch`] if there is none.
    pub fn new(program: Program) -> Result<Self, Fault> {
        let address = program.address;
        let listener = Listener::bind(address).map_err(|e| {
            let why = format!("cannot listen on {address} for shards: {e}");
            Fault::group(Cause::Launch(why))
        })?;
        Ok(Self { program, listener })
    }

    /// Starts all processes at once and tells each what to do.
    async fn start(&self, sources: &[Source], outlet: &Outlet) -> Result<Vec<Child>, Fault> {
        let launched = |e: &dyn std::fmt::Display| Cause::Launch(e.to_string());
        let address = self.listener.local_addr();
        let coordinator = address.map_err(|e| Fault::group(launched(&e)))?;
        let arguments = ["shard", "--log", &self.program.log_level];
        let launches = sources.iter().map(async |source| {
            let rank = source.rank;
            let site = &self.program.sites[rank.index()];
            let process = async {
                let environment = environment::of(&site.device, site.nccl_interface.as_deref());
                let started = match &site.remote {
                    None => local::start_for(&environment, &self.program.path, arguments).await?,
                    Some(remote) => remote.start(&self.program.log_level, &environment).await?,
                };
                self.listener.expect(rank, started.certificate.clone());
                let launch = Launch {
                    coordinator,
                    certificate: self.listener.certificate().clone(),
                    rank,
                    device: site.device.clone(),
                    interface: site.interface,
                };
                started.launch(&launch).await
            };
            let process = process.await;
            process.map_err(|e: LaunchError| Fault::of(rank, launched(&e)))
        });
        // Those that did start are killed when they are dropped with the others' fault.
        let processes: Result<Vec<_>, Fault> = join_all(launches).await.into_iter().collect();
        let child = |(source, process): (&Source, Process)| {
            let after = (self.program.alive.clone(), self.program.witness.clone());
            Child::watch(*source, process, outlet.clone(), after)
        };
        Ok(sources.iter().zip(processes?).map(child).collect())
    }

    /// Waits for every child's link.
    async fn admit(
        &mut self,
        children: &mut [Child],
        tell: &mut (dyn FnMut(StartEvent) + Send),
    ) -> Result<Vec<Admitted>, Fault> {
        let mut admitted: Vec<Option<Admitted>> = children.iter().map(|_| None).collect();
        while let Some(missing) = admitted.iter().position(Option::is_none) {
            let next = tokio::select! {
                next = self.listener.accept(ADMIT_LIMIT) => next,
                fault = first_exit(children) => return Err(fault),
            };
            let next = next.map_err(|e| not_admitted(e, children[missing].source.rank))?;
            let Hello { rank, device, .. } = next.hello.clone();
            let place = children.iter().position(|c| c.source.rank == rank);
            let Some(place) = place.filter(|place| admitted[*place].is_none()) else {
                let why = "no such rank was started".to_owned();
                return Err(Fault::of(rank, Cause::Launch(why)));
            };
            self.program.witness.admitted(&next.hello);
            tell(StartEvent::Admitted { rank, device });
            admitted[place] = Some(next);
        }
        Ok(admitted.into_iter().flatten().collect())
    }
}

impl Host for LocalHost {
    type Shard = LocalShard;

    async fn launch(
        &mut self,
        sources: &[Source],
        outlet: &Outlet,
        tell: &mut (dyn FnMut(StartEvent) + Send),
    ) -> Result<Launched<LocalShard>, Fault> {
        let begun = now();
        let mut children = self.start(sources, outlet).await?;
        let launching = since(begun);
        for child in &children {
            let (rank, pid) = (child.source.rank, child.pid);
            self.program.witness.launched(child.source, pid);
            tell(StartEvent::Launched { rank, pid });
        }
        let admitted = match self.admit(&mut children, tell).await {
            Ok(admitted) => admitted,
            Err(fault) => {
                join_all(children.into_iter().map(|child| child.end(Duration::ZERO))).await;
                return Err(fault);
            }
        };
        let join = |(child, admitted): (Child, Admitted)| {
            let hello = admitted.hello.clone();
            let remote = self.program.sites[hello.rank.index()].remote.clone();
            (
                hello,
                LocalShard::new(child, admitted, (outlet.clone(), remote)),
            )
        };
        Ok(Launched {
            shards: children.into_iter().zip(admitted).map(join).collect(),
            phases: vec![
                (Phase::Launch, launching),
                (Phase::Admit, since(begun).saturating_sub(launching)),
            ],
        })
    }
}

/// Waits until one of `children` has ended. Cancel-safe.
async fn first_exit(children: &mut [Child]) -> Fault {
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

/// Names the rank that is missing, or that came and could not be used.
fn not_admitted(error: LinkError, missing: Rank) -> Fault {
    match error {
        LinkError::NotAdmitted { rank, reason } => Fault::of(rank, Cause::Launch(reason)),
        LinkError::TimedOut(limit) => {
            let phase = Phase::Admit;
            Fault::of(missing, Cause::Deadline { phase, limit })
        }
        other => Fault::group(Cause::Launch(other.to_string())),
    }
}

impl Child {
    /// Watches `process`; its log lines and its exit are reported under `source`. `alive` is held until
    /// the process is gone and its last lines are kept.
    fn watch(
        source: Source,
        mut process: Process,
        outlet: Outlet,
        (alive, witness): (mpsc::Sender<()>, Arc<dyn Witness>),
    ) -> Self {
        let log = Log::forward(source.rank, process.lines.take(), witness.clone());
        let pid = process.pid().unwrap_or_default();
        let (end, ending) = oneshot::channel();
        let (exit, exited) = watch::channel(None);
        let watcher = tokio::spawn(async move {
            let reports = (source, outlet, exit);
            let (killed, how) = watch((process, &log), reports, ending).await;
            log.finish().await;
            witness.ended(source, &how);
            drop(alive);
            killed
        });
        Self {
            source,
            pid,
            end,
            exited,
            watcher,
        }
    }

    /// Gives the process `limit` to end by itself, kills it then, and waits for that. Whether it was
    /// killed.
    async fn end(self, limit: Duration) -> bool {
        // An error means that the process ended by itself.
        let _ = self.end.send(limit);
        self.watcher.await.unwrap_or(true)
    }
}

impl LocalShard {
    /// Joins a process with the link it opened. What it says is reported under its source.
    fn new(
        child: Child,
        admitted: Admitted,
        (outlet, remote): (Outlet, Option<Arc<Remote>>),
    ) -> Self {
        let pid = admitted.hello.pid;
        let reader = tokio::spawn(read(child.source, admitted.receiver, outlet));
        Self {
            child,
            sender: admitted.sender,
            reader,
            remote: remote.map(|remote| (remote, pid)),
        }
    }
}

impl Shard for LocalShard {
    async fn send(&mut self, frame: &Frame<ToShard>) -> Result<(), Cause> {
        let sent = self.sender.send_frame(frame).await;
        sent.map_err(|e| Cause::LinkLost(e.to_string()))
    }

    async fn send_urgent(&mut self, message: &ToShard) -> Result<(), Cause> {
        let sent = self.sender.send_urgent(message).await;
        sent.map_err(|e| Cause::LinkLost(e.to_string()))
    }

    async fn end(self, limit: Duration) {
        let rank = self.child.source.rank;
        let killed = self.child.end(limit).await;
        self.reader.abort();
        if let Some((remote, pid)) = self.remote.filter(|_| killed) {
            // It ends by itself when its `ssh` is gone, unless it is frozen. Nobody waits for that: its
            // replacement needs nothing of it, and its node may not answer.
            tokio::spawn(async move {
                if let Err(error) = remote.kill(pid).await {
                    tracing::warn!(%rank, "cannot see to the end of its old process: {error}");
                }
            });
        }
    }
}

async fn read(source: Source, mut receiver: LinkReceiver<FromShard>, outlet: Outlet) {
    loop {
        let (heard, over) = match receiver.recv().await {
            Ok(message) => (Heard::Message(message), false),
            Err(error) => (Heard::Gone(Cause::LinkLost(error.to_string())), true),
        };
        // Without a reader the fleet is gone, and so is whatever this could say.
        if outlet.send((source, heard)).await.is_err() || over {
            return;
        }
    }
}

/// Whether it had to be killed, and how it ended.
async fn watch(
    (mut process, log): (Process, &Log),
    (source, outlet, exit): (Source, Outlet, watch::Sender<Option<String>>),
    mut ending: oneshot::Receiver<Duration>,
) -> (bool, String) {
    let rank = source.rank;
    let limit = tokio::select! {
        status = process.wait() => {
            let how = said(status);
            exit.send_replace(Some(how.clone()));
            let heard = Heard::Gone(Cause::Exited(how.clone()));
            tokio::select! {
                _ = outlet.send((source, heard)) => {}
                _ = &mut ending => {}
            }
            return (false, how);
        }
        limit = &mut ending => limit.unwrap_or_else(|_| {
            // The fleet was dropped on demand. That its link ends is no news from the shard.
            log.hush();
            Duration::ZERO
        }),
    };
    // It was told to stop; its pipe stays open, or it would take its parent for dead.
    if let Ok(status) = timeout(limit, process.wait()).await {
        return (false, said(status));
    }
    if !limit.is_zero() {
        tracing::warn!(%rank, "the shard did not end within {limit:?} and is killed");
    }
    process.kill();
    let Ok(status) = timeout(KILL_LIMIT, process.wait()).await else {
        tracing::error!(%rank, "the system does not end the shard's process");
        return (true, "it was killed and has not ended".to_owned());
    };
    (true, said(status))
}

fn said(status: Result<ExitStatus, LaunchError>) -> String {
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
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
