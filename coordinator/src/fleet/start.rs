//! From processes that do not exist to a group that can compute: launch, admit, load, allocate,
//! join.
//!
//! Each phase asks all ranks at once, waits for all under one deadline, and is measured. Decides
//! nothing about memory: how many blocks fit is the caller's arithmetic. Invariant: if a phase
//! fails, every process that was started is gone when the fault is returned.

use super::fault::{Cause, Fault, Phase};
use super::inbox::{Inbox, Outlet};
use super::member::{Child, Member};
use super::{Fleet, frame};
use crate::clock::{now, since};
use futures_util::future::join_all;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use topology::ids::{Epoch, Rank};
use topology::launch::{Launch, local};
use topology::link::{Admitted, Certificate, LinkError, Listener};
use topology::placement::Device;
use topology::wire::{FromShard, Hello, Load, Loaded, ToShard};

/// Longest time from the last process's start to the last shard's `Hello`.
const ADMIT_LIMIT: Duration = Duration::from_secs(20);
/// Longest time to take memory for KV blocks; large pools are zeroed page by page.
const ALLOCATE_LIMIT: Duration = Duration::from_secs(120);
/// Longest time to form the communicator.
const JOIN_LIMIT: Duration = Duration::from_secs(60);

/// What to start.
#[derive(Debug)]
pub struct Setup {
    /// The program that is both this process and the shard.
    pub program: OsString,
    /// Which of a shard's log lines are written.
    pub log_level: String,
    /// One for each rank.
    pub devices: Vec<Device>,
    /// What every rank loads.
    pub load: Load,
    /// Deadlines.
    pub limits: Limits,
    /// Held for as long as any shard process may exist: closed when all are gone, whatever became
    /// of the fleet.
    pub alive: mpsc::Sender<()>,
}

/// Deadlines that the operator sets.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For reading weights.
    pub startup: Duration,
    /// For each step.
    pub step: Duration,
}

/// Something to show while shards start.
#[derive(Clone, Debug)]
pub enum StartEvent {
    /// A process exists.
    Launched {
        /// Which.
        rank: Rank,
        /// Its process id.
        pid: u32,
    },
    /// It said on what it computes.
    Admitted {
        /// Which.
        rank: Rank,
        /// As the operator would name it.
        device: String,
    },
    /// It reads weights.
    Loading {
        /// Which.
        rank: Rank,
        /// Bytes that are in place.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// Its weights are in place.
    Loaded {
        /// Which.
        rank: Rank,
    },
}

/// A rank that is ready.
#[derive(Clone, Debug)]
pub struct RankReport {
    /// Which.
    pub rank: Rank,
    /// Its process id.
    pub pid: u32,
    /// On what it computes.
    pub device: String,
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// Bytes of workspace.
    pub workspace_bytes: u64,
    /// Bytes of KV blocks.
    pub kv_bytes: u64,
    /// Bytes of its device that were free after loading.
    pub free_bytes: u64,
}

/// What came of the start.
#[derive(Clone, Debug)]
pub struct Ready {
    /// KV blocks on every rank.
    pub num_blocks: u32,
    /// One per rank, in order.
    pub ranks: Vec<RankReport>,
    /// How long each phase took, in order.
    pub phases: Vec<(Phase, Duration)>,
}

/// Measures phases.
#[derive(Debug)]
struct Stopwatch {
    begun: Instant,
    phases: Vec<(Phase, Duration)>,
}

impl Stopwatch {
    fn done(&mut self, phase: Phase) {
        self.phases.push((phase, since(self.begun)));
        self.begun = now();
    }
}

impl Fleet {
    /// Starts all shards and brings them to where they can compute. `choose_blocks` says from what
    /// ranks took, in order, how many KV blocks each gets, or why none.
    ///
    /// # Errors
    /// The [`Fault`] of the first rank that did not get there.
    pub async fn start(
        setup: &Setup,
        choose_blocks: impl FnOnce(&[Loaded]) -> Result<u32, String>,
        mut tell: impl FnMut(StartEvent),
    ) -> Result<(Self, Ready), Fault> {
        let mut watch = Stopwatch {
            begun: now(),
            phases: Vec::new(),
        };
        let (inbox, outlet) = Inbox::new(setup.devices.len());
        let mut listener = Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST))
            .map_err(|e| Fault::group(Cause::Launch(e.to_string())))?;
        let children = launch_all(setup, &listener, &outlet, &mut tell).await?;
        watch.done(Phase::Launch);
        let mut fleet = Self {
            members: Vec::new(),
            inbox,
            epoch: Epoch::default(),
            step_limit: setup.limits.step,
        };
        let hellos = fleet
            .admit(children, &mut listener, &outlet, &mut tell)
            .await;
        let hellos = match hellos {
            Ok(hellos) => hellos,
            Err(fault) => return Err(fleet.give_up(fault).await),
        };
        watch.done(Phase::Admit);
        match fleet
            .prepare(setup, choose_blocks, &mut watch, &mut tell)
            .await
        {
            Ok((num_blocks, loaded, kv_bytes)) => {
                let ready = Ready {
                    num_blocks,
                    ranks: reports(&hellos, &loaded, &kv_bytes),
                    phases: watch.phases,
                };
                Ok((fleet, ready))
            }
            Err(fault) => Err(fleet.give_up(fault).await),
        }
    }

    async fn give_up(self, fault: Fault) -> Fault {
        self.end(Duration::ZERO).await;
        fault
    }

    /// Waits for every child's link. Children that are not admitted are ended.
    async fn admit(
        &mut self,
        mut children: BTreeMap<Rank, Child>,
        listener: &mut Listener,
        outlet: &Outlet,
        tell: &mut impl FnMut(StartEvent),
    ) -> Result<Vec<Hello>, Fault> {
        let mut admitted: BTreeMap<Rank, (Member, Hello)> = BTreeMap::new();
        while !children.is_empty() {
            let next = tokio::select! {
                next = listener.accept(ADMIT_LIMIT) => next.map_err(|e| not_admitted(e, &children)),
                fault = self.inbox.fault() => Err(fault),
            };
            let next = next.and_then(|next: Admitted| {
                let rank = next.hello.rank;
                let unknown = || Fault::of(rank, Cause::Launch("no such rank was started".into()));
                let child = children.remove(&rank).ok_or_else(unknown)?;
                Ok((child, next))
            });
            match next {
                Ok((child, next)) => {
                    let hello = next.hello.clone();
                    tell(StartEvent::Admitted {
                        rank: hello.rank,
                        device: hello.device.clone(),
                    });
                    let member = Member::new(child, next, outlet.clone());
                    admitted.insert(hello.rank, (member, hello));
                }
                Err(fault) => {
                    join_all(
                        children
                            .into_values()
                            .map(|child| child.end(Duration::ZERO)),
                    )
                    .await;
                    self.members = admitted.into_values().map(|(member, _)| member).collect();
                    return Err(fault);
                }
            }
        }
        let (members, hellos) = admitted.into_values().unzip();
        self.members = members;
        Ok(hellos)
    }

    /// Load, allocate, join: what the wire's order says. Returns the number of blocks, what ranks
    /// said after loading, and the bytes of their blocks.
    async fn prepare(
        &mut self,
        setup: &Setup,
        choose_blocks: impl FnOnce(&[Loaded]) -> Result<u32, String>,
        watch: &mut Stopwatch,
        tell: &mut impl FnMut(StartEvent),
    ) -> Result<(u32, Vec<Loaded>, Vec<u64>), Fault> {
        let all = 0..self.members.len();
        let world_size = u32::try_from(all.len()).unwrap_or(u32::MAX);
        self.send_all(&ToShard::Welcome { world_size }).await?;
        self.send_all(&ToShard::Load(setup.load.clone())).await?;
        let limit = setup.limits.startup;
        let loading =
            self.inbox.gather(
                all.clone(),
                Phase::Load,
                limit,
                |rank, message| match message {
                    FromShard::Progress {
                        bytes_done: done,
                        bytes_total: total,
                    } => {
                        tell(StartEvent::Loading { rank, done, total });
                        Ok(None)
                    }
                    FromShard::Loaded(loaded) => {
                        tell(StartEvent::Loaded { rank });
                        Ok(Some(loaded))
                    }
                    other => Err(other),
                },
            );
        let loaded = loading.await?;
        watch.done(Phase::Load);

        let no_room = |why| Fault::group(Cause::NoRoom(why));
        let num_blocks = choose_blocks(&loaded).map_err(no_room)?;
        self.send_all(&ToShard::Allocate { num_blocks }).await?;
        let take = |_, message| match message {
            FromShard::Allocated { kv_bytes } => Ok(Some(kv_bytes)),
            other => Err(other),
        };
        let gathering = self
            .inbox
            .gather(all.clone(), Phase::Allocate, ALLOCATE_LIMIT, take);
        let kv_bytes = gathering.await?;
        watch.done(Phase::Allocate);

        self.join().await?;
        watch.done(Phase::Join);
        Ok((num_blocks, loaded, kv_bytes))
    }

    /// Forms the communicator of the current epoch.
    async fn join(&mut self) -> Result<(), Fault> {
        let epoch = self.epoch;
        if let Some(first) = self.members.first_mut() {
            first.send(&frame(&ToShard::MakeComm { epoch })?).await?;
        }
        let made = |_, message| match message {
            FromShard::CommMade { epoch: of, comm_id } if of == epoch => Ok(Some(comm_id)),
            other => Err(other),
        };
        let made = self
            .inbox
            .gather(0..1, Phase::Join, JOIN_LIMIT, made)
            .await?;
        let comm_id = made.into_iter().next().unwrap_or_default();
        self.send_all(&ToShard::JoinComm { epoch, comm_id }).await?;
        let joined = |_, message| match message {
            FromShard::Joined { epoch: of } if of == epoch => Ok(Some(())),
            other => Err(other),
        };
        let all = 0..self.members.len();
        self.inbox
            .gather(all, Phase::Join, JOIN_LIMIT, joined)
            .await?;
        Ok(())
    }
}

/// Starts all processes at once and tells each what to do.
async fn launch_all(
    setup: &Setup,
    listener: &Listener,
    outlet: &Outlet,
    tell: &mut impl FnMut(StartEvent),
) -> Result<BTreeMap<Rank, Child>, Fault> {
    let launched = |e: &dyn std::fmt::Display| Cause::Launch(e.to_string());
    let coordinator = listener
        .local_addr()
        .map_err(|e| Fault::group(launched(&e)))?;
    let arguments = ["shard", "--log", &setup.log_level];
    let ranks = (0..).map(Rank).zip(&setup.devices);
    let launches = ranks.map(async |(rank, device)| {
        let started = local::start_for(device, &setup.program, arguments).await;
        let started = started.map_err(|e| Fault::of(rank, launched(&e)))?;
        listener.expect(rank, started.certificate.clone());
        let launch = launch(coordinator, listener.certificate(), rank, device);
        let process = started.launch(&launch).await;
        process
            .map(|process| (rank, process))
            .map_err(|e| Fault::of(rank, launched(&e)))
    });
    // Those that did start are killed when they are dropped with the others' fault.
    let processes: Result<Vec<_>, Fault> = join_all(launches).await.into_iter().collect();
    let children = processes?.into_iter().map(|(rank, process)| {
        let pid = process.pid().unwrap_or_default();
        tell(StartEvent::Launched { rank, pid });
        let alive = setup.alive.clone();
        (rank, Child::watch(rank, process, outlet.clone(), alive))
    });
    Ok(children.collect())
}

fn launch(
    coordinator: SocketAddr,
    certificate: &Certificate,
    rank: Rank,
    device: &Device,
) -> Launch {
    Launch {
        coordinator,
        certificate: certificate.clone(),
        rank,
        device: device.clone(),
    }
}

/// Names the rank that is missing, or that came and could not be used.
fn not_admitted(error: LinkError, missing: &BTreeMap<Rank, Child>) -> Fault {
    match error {
        LinkError::NotAdmitted { rank, reason } => Fault::of(rank, Cause::Launch(reason)),
        LinkError::TimedOut(limit) => Fault {
            rank: missing.keys().next().copied(),
            cause: Cause::Deadline {
                phase: Phase::Admit,
                limit,
            },
        },
        other => Fault::group(Cause::Launch(other.to_string())),
    }
}

fn reports(hellos: &[Hello], loaded: &[Loaded], kv_bytes: &[u64]) -> Vec<RankReport> {
    let ranks = hellos.iter().zip(loaded).zip(kv_bytes);
    let report = |((hello, loaded), kv_bytes): ((&Hello, &Loaded), &u64)| RankReport {
        rank: hello.rank,
        pid: hello.pid,
        device: hello.device.clone(),
        weight_bytes: loaded.weight_bytes,
        workspace_bytes: loaded.workspace_bytes,
        kv_bytes: *kv_bytes,
        free_bytes: loaded.free_bytes,
    };
    ranks.map(report).collect()
}
