//! After a fault: the epoch ends, what is gone is replaced, the group forms again.
//!
//! Survivors keep process, device context and weights; they leave their collective when told to, or
//! are killed. Replacements start while survivors still leave. Every rank goes its own way through
//! the [`Stage`]s, and all meet at the join. Decides nothing about requests, nor how often it is
//! tried. Invariant: a rank takes part in the new epoch only if it confirmed the end of the old one,
//! or never was in it.

use super::fault::{Cause, Fault, Phase};
use super::host::{Host, Shard};
use super::inbox::unexpected;
use super::start::{ALLOCATE_LIMIT, StartEvent};
use super::{Fleet, frame};
use futures_util::future::join_all;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};
use topology::ids::{Epoch, Rank};
use topology::wire::{FromShard, Hello, Loaded, ToShard};

/// How long a survivor may take to leave its collective. It kills itself after 2 s; this covers one that
/// cannot even do that, because it is frozen or cut off.
const LEAVE_LIMIT: Duration = Duration::from_millis(2500);

/// A shard and how far it is.
#[derive(Debug)]
pub(super) struct Member<S> {
    pub(super) shard: S,
    /// What it said of itself.
    pub(super) hello: Hello,
    /// What it took, once it has said so.
    pub(super) loaded: Option<Loaded>,
    pub(super) kv_bytes: u64,
    stage: Stage,
}

/// Where a shard stands on its way to the join, and until when it may stand there.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// It was told to read its weights.
    Loading(Instant),
    /// It was told to take memory for its KV blocks.
    Allocating(Instant),
    /// It can join, or has.
    Standing,
    /// It was told that its epoch is over.
    Leaving(Instant),
}

impl<S> Member<S> {
    /// One that has nothing yet; whoever brings up all of them counts for it.
    pub(super) fn new(shard: S, hello: Hello) -> Self {
        Self {
            shard,
            hello,
            loaded: None,
            kv_bytes: 0,
            stage: Stage::Standing,
        }
    }

    /// One that is ready to join.
    pub(super) fn standing(shard: S, hello: Hello, loaded: Loaded, kv_bytes: u64) -> Self {
        Self {
            loaded: Some(loaded),
            kv_bytes,
            ..Self::new(shard, hello)
        }
    }
}

impl Stage {
    fn deadline(self) -> Option<(Instant, Phase, Duration)> {
        match self {
            Self::Standing => None,
            Self::Leaving(until) => Some((until, Phase::Leave, LEAVE_LIMIT)),
            Self::Allocating(until) => Some((until, Phase::Allocate, ALLOCATE_LIMIT)),
            // The limit is the operator's; the caller knows it.
            Self::Loading(until) => Some((until, Phase::Load, Duration::ZERO)),
        }
    }
}

impl<H: Host> Fleet<H> {
    /// See [`super::Group::recover`].
    pub(super) async fn form_again(&mut self, fault: &Fault) -> Result<Epoch, Fault> {
        let over = self.epoch;
        self.epoch = over.next();
        self.inbox.begin(self.epoch);
        self.steps.clear();
        if let Some(rank) = fault.rank.filter(|_| fault.is_its_ranks_own()) {
            self.inbox.give_up_on(rank, fault.cause.clone());
        }
        self.dismiss(over).await;
        self.complete(over).await?;
        self.join().await?;
        Ok(self.epoch)
    }

    fn ranks(&self) -> impl Iterator<Item = Rank> + use<H> {
        (0..self.setup.load.tensor_parallel_size).map(Rank)
    }

    /// Tells whoever may be in a collective of `over` to leave it.
    async fn dismiss(&mut self, over: Epoch) {
        let until = Instant::now() + LEAVE_LIMIT;
        let abort = ToShard::Abort { epoch: over };
        let told = (0..)
            .map(Rank)
            .zip(&mut self.members)
            .map(|(rank, member)| {
                let abort = &abort;
                async move {
                    let member = member.as_mut()?;
                    if let Stage::Loading(_) | Stage::Allocating(_) = member.stage {
                        return None; // it was in no epoch yet
                    }
                    member.stage = Stage::Leaving(until);
                    let sent = member.shard.send_urgent(abort).await;
                    sent.err().map(|cause| (rank, cause))
                }
            });
        for (rank, cause) in join_all(told).await.into_iter().flatten() {
            self.inbox.give_up_on(rank, cause);
        }
    }

    /// Until every rank has a shard that can join. Each rank is replaced once at most.
    async fn complete(&mut self, over: Epoch) -> Result<(), Fault> {
        let mut replaced: Vec<Rank> = Vec::new();
        loop {
            let missing = |rank: &Rank| self.is_missing(*rank);
            let missing: Vec<Rank> = self.ranks().filter(missing).collect();
            if let Some(again) = missing.iter().find(|rank| replaced.contains(rank)) {
                return Err(self.inbox.fault_of(*again));
            }
            if !missing.is_empty() {
                self.replace(&missing).await?;
                replaced.extend(missing);
            }
            let waiting = self.members.iter().flatten();
            let deadlines = waiting.filter_map(|member| member.stage.deadline());
            let Some((next, ..)) = deadlines.min_by_key(|(until, ..)| *until) else {
                return Ok(());
            };
            match timeout_at(next, self.inbox.hear()).await {
                Ok((rank, Some(message))) => self.advance(rank, message, over).await,
                Ok((_, None)) => {} // gone, and replaced in the next turn
                Err(_) => self.give_up_on_the_late(),
            }
        }
    }

    fn is_missing(&self, rank: Rank) -> bool {
        let member = self.members.get(rank.index());
        member.is_none_or(Option::is_none) || self.inbox.is_gone(rank)
    }

    /// Ends what is left of `ranks` and starts their successors, which begin to load.
    async fn replace(&mut self, ranks: &[Rank]) -> Result<(), Fault> {
        let old = ranks.iter().map(|rank| self.members[rank.index()].take());
        let old: Vec<_> = old.flatten().collect();
        // Device memory is free only when the old process is gone.
        join_all(old.into_iter().map(|old| old.shard.give_way())).await;
        let sources: Vec<_> = ranks.iter().map(|rank| self.inbox.replace(*rank)).collect();
        let mut tell = |event| {
            if let StartEvent::Launched { rank, pid } = event {
                tracing::info!(%rank, pid, "a new shard process takes the rank's place");
            }
        };
        let launching = self.host.launch(&sources, self.inbox.outlet(), &mut tell);
        let launched = launching.await?;
        let orders = self.orders();
        let until = Instant::now() + self.setup.limits.startup;
        for (rank, (hello, mut shard)) in ranks.iter().zip(launched.shards) {
            for order in &orders {
                if let Err(cause) = shard.send(&frame(order)?).await {
                    self.inbox.give_up_on(*rank, cause);
                }
            }
            let stage = Stage::Loading(until);
            self.members[rank.index()] = Some(Member {
                stage,
                ..Member::new(shard, hello)
            });
        }
        Ok(())
    }

    /// Takes a rank one stage on. One that says something else is given up.
    async fn advance(&mut self, rank: Rank, message: FromShard, over: Epoch) {
        let num_blocks = self.num_blocks;
        let Some(member) = self.members[rank.index()].as_mut() else {
            return; // it was replaced while this was on its way
        };
        let phase = match (member.stage, &message) {
            (Stage::Loading(_), FromShard::Progress { .. }) => return,
            (Stage::Loading(_), FromShard::Loaded(loaded)) => {
                member.loaded = Some(loaded.clone());
                let allocate = frame(&ToShard::Allocate { num_blocks });
                let sent = match &allocate {
                    Ok(allocate) => member.shard.send(allocate).await,
                    Err(fault) => Err(fault.cause.clone()),
                };
                member.stage = Stage::Allocating(Instant::now() + ALLOCATE_LIMIT);
                if let Err(cause) = sent {
                    self.inbox.give_up_on(rank, cause);
                }
                return;
            }
            (Stage::Allocating(_), FromShard::Allocated { kv_bytes }) => {
                member.kv_bytes = *kv_bytes;
                member.stage = Stage::Standing;
                return;
            }
            (Stage::Leaving(_), FromShard::Aborted { epoch }) if *epoch == over => {
                member.stage = Stage::Standing;
                return;
            }
            (stage, _) => stage.deadline().map_or(Phase::Idle, |(_, phase, _)| phase),
        };
        let fault = unexpected(rank, phase, &message);
        self.inbox.give_up_on(rank, fault.cause);
    }

    fn give_up_on_the_late(&mut self) {
        let now = Instant::now();
        for (rank, member) in (0..).map(Rank).zip(&self.members) {
            let deadline = member.as_ref().and_then(|member| member.stage.deadline());
            if let Some((until, phase, limit)) = deadline
                && until <= now
            {
                let limit = match phase {
                    Phase::Load => self.setup.limits.startup,
                    _ => limit,
                };
                self.inbox
                    .give_up_on(rank, Cause::Deadline { phase, limit });
            }
        }
    }
}
