//! Shards that are processes, of this machine or of a node that `ssh` reaches: launch, link, log, end.
//!
//! Where a rank is launched once it is launched again: its replacement starts on the same node.
//! Three tasks per shard: one reads the link, one watches the process, one forwards its log lines.
//! What they hear goes to the fleet's inbox. Invariant: a process ends with the value that stands for
//! it, at the latest when that is dropped.

use super::child::{Body, Child, first_exit};
use super::fault::{Cause, Fault, Phase};
use super::host::{Host, Launched, Shard};
use super::inbox::{Heard, Outlet, Source};
use super::legacy::Keeper;
use super::start::StartEvent;
use super::witness::Witness;
use crate::clock::{now, since};
use futures_util::future::join_all;
use std::ffi::OsString;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use topology::ids::Rank;
use topology::launch::environment;
use topology::launch::local::{self, Process};
use topology::launch::ssh::Remote;
use topology::launch::{Launch, LaunchError};
use topology::link::{Admitted, Certificate, Frame, LinkError, LinkReceiver, LinkSender, Listener};
use topology::placement::Device;
use topology::wire::{FromShard, Hello, ToShard};

/// Longest time from the last process's start to the last shard's `Hello`.
const ADMIT_LIMIT: Duration = Duration::from_secs(20);

/// What to start.
#[derive(Debug)]
pub struct Program {
    /// The program that is both this process and the shard.
    pub path: OsString,
    /// Which of a shard's log lines are written.
    pub log_level: String,
    /// The instruction set that CPU shards compute with, or `auto`.
    pub cpu_isa: String,
    /// One for each rank.
    pub sites: Vec<RankSite>,
    /// The address of this machine that all ranks reach.
    pub address: IpAddr,
    /// Held for as long as any shard process may exist: closed when all are gone, whatever became
    /// of the fleet.
    pub alive: mpsc::Sender<()>,
    /// Who is told of processes and their output.
    pub witness: Arc<dyn Witness>,
    /// Keeps what a successor needs; without one, shards end with this process.
    pub keeper: Option<Keeper>,
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
    pub(super) program: Program,
    pub(super) listener: Listener,
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
        Ok(Self::over(program, listener))
    }

    /// With a socket that is there.
    pub(super) fn over(program: Program, listener: Listener) -> Self {
        if let Some(keeper) = &program.keeper {
            keeper.write(&listener);
        }
        Self { program, listener }
    }

    /// On file from the moment a shard has something to keep.
    fn keep(&mut self, children: &mut [Child], admitted: &[Admitted]) {
        let Some(keeper) = &mut self.program.keeper else {
            return;
        };
        for (child, Admitted { hello, .. }) in children.iter_mut().zip(admitted) {
            if let Some(certificate) = child.certificate.take() {
                keeper.admitted(hello.rank, certificate, hello.pid);
            }
        }
        keeper.write(&self.listener);
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
                let certificate = started.certificate.clone();
                let launch = Launch {
                    coordinator,
                    certificate: self.listener.certificate().clone(),
                    rank,
                    device: site.device.clone(),
                    cpu_isa: self.program.cpu_isa.clone(),
                    interface: site.interface,
                    hold: self
                        .program
                        .keeper
                        .as_ref()
                        .and_then(|keep| keep.hold(rank)),
                };
                Ok((certificate, started.launch(&launch).await?))
            };
            let process = process.await;
            process.map_err(|e: LaunchError| Fault::of(rank, launched(&e)))
        });
        // Those that did start are killed when they are dropped with the others' fault.
        let processes: Result<Vec<_>, Fault> = join_all(launches).await.into_iter().collect();
        let child = |(source, (certificate, process)): (&Source, (Certificate, Process))| {
            let process = Box::new(process);
            let body = match self.program.sites[source.rank.index()].remote {
                None => Body::Started(process),
                Some(_) => Body::Reached(process),
            };
            let watched = Child::watch(*source, body, outlet.clone(), self.program.watchers());
            watched.with(certificate)
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
            let is_here = self.program.sites[rank.index()].remote.is_none();
            if is_here && next.hello.pid != children[place].pid {
                // Whom it names could be told to end in its place.
                let (said, pid) = (next.hello.pid, children[place].pid);
                let why = format!("its `pid` is {said}, and process {pid} was started");
                return Err(Fault::of(rank, Cause::Launch(why)));
            }
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
        self.keep(&mut children, &admitted);
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

impl Program {
    /// Who is told when a process has ended.
    pub(super) fn watchers(&self) -> (mpsc::Sender<()>, Arc<dyn Witness>) {
        (self.alive.clone(), self.witness.clone())
    }
}

impl LocalShard {
    /// Joins a process with the link it opened. What it says is reported under its source.
    pub(super) fn new(
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
