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
use super::legacy::{Holder, Keeper, OwnFile};
use super::start::StartEvent;
use super::witness::Witness;
use crate::clock::{now, since};
use futures_util::future::join_all;
use std::ffi::OsString;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use topology::ids::Rank;
use topology::launch::environment;
use topology::launch::local::{self, Process};
use topology::launch::process::ProcessId;
use topology::launch::ssh::{Away, Remote};
use topology::launch::{Announcement, Launch, LaunchError};
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
    /// What a shard is to be found by on another node.
    pub(super) fn away(&self, process: ProcessId) -> Option<Away> {
        self.remote.as_ref().map(|remote| remote.away(process))
    }

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
    /// Once no other process's shards are on file.
    own: Option<OwnFile>,
    /// By rank, what its last process was found by on another node, where it may still run: the next one ends it.
    pub(super) last: Vec<Option<Away>>,
    /// Says now and then that this coordinator lives.
    _pulse: JoinSet<()>,
}

/// A shard process that was admitted.
#[derive(Debug)]
pub struct LocalShard {
    child: Child,
    sender: LinkSender<ToShard>,
    reader: JoinHandle<()>,
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
        let mut host = Self::over(program, listener);
        host.own();
        Ok(host)
    }

    /// With a socket that is there.
    pub(super) fn over(program: Program, listener: Listener) -> Self {
        let mut pulse = JoinSet::new();
        if let Some(keeper) = &program.keeper {
            keeper.write(&listener);
            pulse.spawn(keeper.pulse());
        }
        Self {
            last: vec![None; program.sites.len()],
            program,
            listener,
            own: None,
            _pulse: pulse,
        }
    }

    /// From now on what is on file ends with this value.
    pub(super) fn own(&mut self) {
        let keeper = self.program.keeper.as_ref();
        self.own = self.own.take().or_else(|| keeper.map(Keeper::own));
    }

    /// On file from the moment a shard has something to keep.
    fn keep(&mut self, children: &[Child], admitted: &[Admitted]) {
        let Some(keeper) = &mut self.program.keeper else {
            return;
        };
        for (child, Admitted { hello, .. }) in children.iter().zip(admitted) {
            if let Some(Announcement {
                certificate,
                process,
            }) = child.announced.clone()
            {
                let holder = Holder {
                    certificate,
                    process,
                    ssh: child.away.as_ref().and_then(|_| ProcessId::of(child.pid)),
                    away: child.away.clone(),
                };
                keeper.admitted(hello.rank, holder);
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
                    Some(remote) => {
                        let last = self.last[rank.index()].as_ref();
                        let log_level = &self.program.log_level;
                        remote.start(log_level, &environment, last).await?
                    }
                };
                let announced = started.said.clone();
                let away = site.away(announced.process);
                self.listener.expect(rank, announced.certificate.clone());
                let keeper = self.program.keeper.as_ref();
                let launch = Launch {
                    coordinator,
                    certificate: self.listener.certificate().clone(),
                    rank,
                    device: site.device.clone(),
                    cpu_isa: self.program.cpu_isa.clone(),
                    interface: site.interface,
                    hold: keeper.and_then(|keeper| keeper.hold(rank, away.as_ref())),
                };
                Ok((announced, away, started.launch(&launch).await?))
            };
            let process = process.await;
            process.map_err(|e: LaunchError| Fault::of(rank, launched(&e)))
        });
        // Those that did start are killed when they are dropped with the others' fault.
        let processes: Result<Vec<_>, Fault> = join_all(launches).await.into_iter().collect();
        let child = |(source, (announced, away, process)): (&Source, Told)| {
            let process = Box::new(process);
            let body = match away {
                None => Body::Started(process),
                Some(_) => Body::Reached(process),
            };
            let watchers = self.program.watchers();
            Child::watch(*source, (body, away), outlet.clone(), watchers).with(announced)
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
            let place = |certificate| place_of(children, certificate);
            let next = match next {
                Ok(next) => next,
                Err(LinkError::NotAdmitted { certificate, .. })
                    if place(&certificate).is_none() =>
                {
                    continue;
                }
                Err(error) => return Err(not_admitted(error, children[missing].source.rank)),
            };
            // One that was expected before these is too late to be taken over: it ends with its link.
            let Some((place, process)) = place(&next.certificate) else {
                continue;
            };
            let Hello { rank, device, .. } = next.hello.clone();
            let is_here = self.program.sites[rank.index()].remote.is_none();
            // Of one on this machine the system knows.
            let pid = if is_here {
                children[place].pid
            } else {
                process.pid
            };
            if next.hello.pid != pid {
                // Whom it names could be told to end in its place.
                let said = next.hello.pid;
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
            self.last[rank.index()].clone_from(&child.away);
            self.program.witness.launched(child.source, pid);
            tell(StartEvent::Launched { rank, pid });
        }
        let admitted = match self.admit(&mut children, tell).await {
            Ok(admitted) => admitted,
            Err(fault) => {
                let ends = children.into_iter();
                join_all(ends.map(|child| child.end(Duration::ZERO, false))).await;
                return Err(fault);
            }
        };
        self.keep(&children, &admitted);
        let join = |(child, admitted): (Child, Admitted)| {
            let hello = admitted.hello.clone();
            (hello, LocalShard::new(child, admitted, outlet.clone()))
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

/// What a process said, what it is found by elsewhere, and the process, which knows what to do.
type Told = (Announcement, Option<Away>, Process);

/// Which of `children` announced this certificate, and as which process.
fn place_of(children: &[Child], certificate: &Certificate) -> Option<(usize, ProcessId)> {
    let announced = children.iter().map(|child| child.announced.as_ref());
    let mut found = announced.enumerate().filter_map(|(place, announced)| {
        let announced = announced.filter(|it| it.certificate == *certificate)?;
        Some((place, announced.process))
    });
    found.next()
}

/// Names the rank that is missing, or that came and could not be used.
fn not_admitted(error: LinkError, missing: Rank) -> Fault {
    match error {
        LinkError::NotAdmitted { rank, reason, .. } => Fault::of(rank, Cause::Launch(reason)),
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
    pub(super) fn new(child: Child, admitted: Admitted, outlet: Outlet) -> Self {
        let reader = tokio::spawn(read(child.source, admitted.receiver, outlet));
        Self {
            child,
            sender: admitted.sender,
            reader,
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
        self.child.end(limit, false).await;
        self.reader.abort();
    }

    async fn give_way(self) {
        self.child.end(Duration::ZERO, true).await;
        self.reader.abort();
    }
}

async fn read(source: Source, mut receiver: LinkReceiver<FromShard>, outlet: Outlet) {
    loop {
        let (heard, over) = match receiver.recv().await {
            Ok(message) => (Heard::Message(message), false),
            Err(LinkError::TimedOut(limit)) => (Heard::Gone(Cause::Silent(limit)), true),
            Err(error) => (Heard::Gone(Cause::LinkLost(error.to_string())), true),
        };
        // Without a reader the fleet is gone, and so is whatever this could say.
        if outlet.send((source, heard)).await.is_err() || over {
            return;
        }
    }
}
