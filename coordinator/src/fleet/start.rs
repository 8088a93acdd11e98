//! From processes that do not exist to a group that can compute: launch, admit, load, allocate,
//! join.
//!
//! Each phase asks all ranks at once, waits for all under one deadline, and is measured. Decides
//! nothing about memory: how many blocks fit is the caller's arithmetic. Invariant: if a phase
//! fails, every process that was started is gone when the fault is returned.

use super::fault::{Cause, Fault, Phase};
use super::host::{Host, Launched, Took};
use super::inbox::Inbox;
use super::pace::Pace;
use super::recover::Member;
use super::steps::Steps;
use super::{Fleet, frame};
use crate::clock::{now, since};
use std::time::{Duration, Instant};
use topology::ids::{Epoch, Rank};
use topology::wire::{FromShard, Load, Loaded, ToShard};

/// Longest time to take memory for KV blocks; large pools are zeroed page by page.
pub(super) const ALLOCATE_LIMIT: Duration = Duration::from_secs(120);
/// Longest time to make a communicator's identity, for which no rank waits for another.
const MAKE_COMM_LIMIT: Duration = Duration::from_secs(20);
/// Longest time to form the communicator.
const JOIN_LIMIT: Duration = Duration::from_secs(60);

/// What all ranks do.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What every rank loads.
    pub load: Load,
    /// Deadlines.
    pub limits: Limits,
    /// Counts the coordinators of these shards, from 0.
    pub generation: u32,
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
    /// A process that lost its coordinator was taken over, with its weights.
    Adopted {
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
    /// The first epoch.
    pub epoch: Epoch,
    /// KV blocks on every rank.
    pub num_blocks: u32,
    /// One per rank, in order.
    pub ranks: Vec<RankReport>,
    /// How long each phase took, in order.
    pub phases: Vec<Took>,
}

/// Measures phases.
#[derive(Debug)]
pub(super) struct Stopwatch {
    begun: Instant,
    pub(super) phases: Vec<Took>,
}

impl Stopwatch {
    /// From now on, after what was measured elsewhere.
    pub(super) fn new(phases: Vec<Took>) -> Self {
        let begun = now();
        Self { begun, phases }
    }

    pub(super) fn done(&mut self, phase: Phase) {
        self.phases.push((phase, since(self.begun)));
        self.begun = now();
    }
}

impl<H: Host> Fleet<H> {
    /// Starts all shards and brings them to where they can compute. `choose_blocks` says from what
    /// ranks took, in order, how many KV blocks each gets, or why none.
    ///
    /// # Errors
    /// The [`Fault`] of the first rank that did not get there.
    pub async fn start(
        host: H,
        setup: Setup,
        choose_blocks: impl FnOnce(&[Loaded]) -> Result<u32, String>,
        mut tell: impl FnMut(StartEvent) + Send,
    ) -> Result<(Self, Ready), Fault> {
        let world_size = setup.load.tensor_parallel_size;
        let mut fleet = Self::empty(host, setup);
        match fleet.bring_up(world_size, choose_blocks, &mut tell).await {
            Ok(ready) => Ok((fleet, ready)),
            Err(fault) => {
                fleet.end(Duration::ZERO).await;
                Err(fault)
            }
        }
    }

    /// Without any shard yet.
    pub(super) fn empty(host: H, setup: Setup) -> Self {
        let world_size = setup.load.tensor_parallel_size;
        Self {
            host,
            members: Vec::new(),
            inbox: Inbox::new(world_size as usize),
            epoch: Epoch::default(),
            num_blocks: 0,
            pace: Pace::default(),
            steps: Steps::default(),
            setup,
        }
    }

    async fn bring_up(
        &mut self,
        world_size: u32,
        choose_blocks: impl FnOnce(&[Loaded]) -> Result<u32, String>,
        tell: &mut (impl FnMut(StartEvent) + Send),
    ) -> Result<Ready, Fault> {
        let ranks = (0..world_size).map(Rank);
        let sources: Vec<_> = ranks.map(|rank| self.inbox.source(rank)).collect();
        let launching = self.host.launch(&sources, self.inbox.outlet(), tell);
        let Launched { shards, phases } = launching.await?;
        let members = shards.into_iter();
        let members = members.map(|(hello, shard)| Some(Member::new(shard, hello)));
        self.members = members.collect();
        let mut watch = Stopwatch::new(phases);
        let loaded = self.load(&mut watch, tell).await?;
        let no_room = |why| Fault::group(Cause::NoRoom(why));
        self.num_blocks = choose_blocks(&loaded).map_err(no_room)?;
        let kv_bytes = self.allocate().await?;
        let took = loaded.into_iter().zip(kv_bytes);
        for (member, (loaded, kv_bytes)) in self.members.iter_mut().flatten().zip(took) {
            member.loaded = Some(loaded);
            member.kv_bytes = kv_bytes;
        }
        watch.done(Phase::Allocate);
        self.join().await?;
        watch.done(Phase::Join);
        Ok(self.ready(watch.phases))
    }

    pub(super) fn ready(&self, phases: Vec<Took>) -> Ready {
        let members = self.members.iter().flatten();
        Ready {
            epoch: self.epoch,
            num_blocks: self.num_blocks,
            ranks: members.filter_map(report).collect(),
            phases,
        }
    }

    /// Has all ranks read their weights.
    async fn load(
        &mut self,
        watch: &mut Stopwatch,
        tell: &mut impl FnMut(StartEvent),
    ) -> Result<Vec<Loaded>, Fault> {
        for message in self.orders() {
            self.send_all(&message).await?;
        }
        let all = 0..self.members.len();
        let limit = self.setup.limits.startup;
        let take = |rank, message| match message {
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
        };
        let loaded = self.inbox.gather(all, Phase::Load, limit, take).await?;
        watch.done(Phase::Load);
        Ok(loaded)
    }

    /// The first messages to a shard that was admitted: who it is, and what it loads.
    pub(super) fn orders(&self) -> [ToShard; 2] {
        let load = self.setup.load.clone();
        let world_size = load.tensor_parallel_size;
        let welcome = ToShard::Welcome {
            world_size,
            generation: self.setup.generation,
            pid: std::process::id(),
        };
        [welcome, ToShard::Load(load)]
    }

    /// Has all ranks take memory for the KV blocks; the bytes each took.
    async fn allocate(&mut self) -> Result<Vec<u64>, Fault> {
        let num_blocks = self.num_blocks;
        self.send_all(&ToShard::Allocate { num_blocks }).await?;
        let all = 0..self.members.len();
        let take = |_, message| match message {
            FromShard::Allocated { kv_bytes } => Ok(Some(kv_bytes)),
            other => Err(other),
        };
        self.inbox
            .gather(all, Phase::Allocate, ALLOCATE_LIMIT, take)
            .await
    }

    /// Forms the communicator of the current epoch.
    pub(super) async fn join(&mut self) -> Result<(), Fault> {
        let epoch = self.epoch;
        self.send_to(Rank(0), &frame(&ToShard::MakeComm { epoch })?)
            .await?;
        let made = |_, message| match message {
            FromShard::CommMade { epoch: of, comm_id } if of == epoch => Ok(Some(comm_id)),
            other => Err(other),
        };
        let made = self
            .inbox
            .gather(0..1, Phase::MakeComm, MAKE_COMM_LIMIT, made)
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

/// `None` for one that has not loaded.
fn report<S>(member: &Member<S>) -> Option<RankReport> {
    let (hello, loaded) = (&member.hello, member.loaded.as_ref()?);
    Some(RankReport {
        rank: hello.rank,
        pid: hello.pid,
        device: hello.device.clone(),
        weight_bytes: loaded.weight_bytes,
        workspace_bytes: loaded.workspace_bytes,
        kv_bytes: member.kv_bytes,
        free_bytes: loaded.free_bytes,
    })
}
