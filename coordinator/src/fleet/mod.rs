//! The shards as seen from here.
//!
//! Starts them, brings them to readiness phase by phase, has them compute steps, of which the next may
//! be sent before the last is answered, and after a fault replaces what is gone and forms the group
//! anew. Owns the epoch; knows nothing of requests or of what a plan means. Invariant: an answer is
//! passed on only if every rank computed the plan that was sent, in the epoch and step it was sent for,
//! and all that sample chose the same tokens; anything else is a [`Fault`], and no shard process
//! outlives the fleet.

mod adopt;
mod child;
mod fault;
mod host;
mod inbox;
mod legacy;
mod local;
mod pace;
mod recover;
#[cfg(test)]
mod simulation;
mod start;
mod steps;
mod terms;
#[cfg(test)]
mod tests;
mod witness;

pub use adopt::TakenOver;
pub use fault::{Cause, Fault, Phase};
pub use host::{Host, Launched, Shard, Took};
pub use inbox::{Heard, Outlet, Source};
pub use legacy::{Ended, Holder, Keeper, Legacy};
pub use local::{LocalHost, LocalShard, Program, RankSite};
pub use start::{Limits, RankReport, Ready, Setup, StartEvent};
pub use terms::{ProgramFile, Terms};
pub use witness::Witness;

use futures_util::future::join_all;
use inbox::Inbox;
use pace::Pace;
use recover::Member;
use std::time::{Duration, Instant};
use steps::Steps;
use topology::ids::{Epoch, Rank};
use topology::link::Frame;
use topology::wire::{RowOutput, StepPlan, StepTimings, ToShard};

/// How long shards get to end by themselves when they are told to.
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// The group of shards of one model.
#[derive(Debug)]
pub struct Fleet<H: Host = LocalHost> {
    host: H,
    /// One for each rank; none while a rank is being replaced.
    members: Vec<Option<Member<H::Shard>>>,
    inbox: Inbox,
    epoch: Epoch,
    /// KV blocks of every rank.
    num_blocks: u32,
    pace: Pace,
    steps: Steps,
    setup: Setup,
}

/// What the engine's loop needs of a group of shards; its tests bring their own.
pub trait Group: Send {
    /// Has all ranks compute `plan`, after those that were sent before. An error means that nothing of
    /// the steps under way counts.
    fn send(&mut self, plan: StepPlan) -> impl Future<Output = Result<(), Fault>> + Send;

    /// What the oldest step under way gave. An error means that nothing of the steps under way counts. Cancel-safe.
    fn receive(&mut self) -> impl Future<Output = Result<StepOutcome, Fault>> + Send;

    /// Waits until something goes wrong while no step is under way. Cancel-safe.
    fn fault(&mut self) -> impl Future<Output = Fault> + Send;

    /// Ends the epoch of `fault`, replaces shards that are gone or do not answer, and forms the group
    /// again. All KV blocks have lost their content. Returns the new epoch.
    ///
    /// # Errors
    /// What went wrong on the way; it may be tried again with that.
    fn recover(&mut self, fault: &Fault) -> impl Future<Output = Result<Epoch, Fault>> + Send;

    /// Tells all shards to end and waits until their processes have; whoever does not within
    /// a few seconds is killed.
    fn stop(self) -> impl Future<Output = ()> + Send;

    /// Kills all shard processes and waits until they are gone.
    fn kill(self) -> impl Future<Output = ()> + Send;
}

/// What a step gave.
#[derive(Debug)]
pub struct StepOutcome {
    /// One for each row of the plan.
    pub outputs: Vec<RowOutput>,
    /// One for each rank.
    pub timings: Vec<StepTimings>,
    /// Tokens that were computed.
    pub tokens: usize,
    /// From sending the plan, or from the end of the step before it, to the last rank's answer.
    pub took: Duration,
    /// When that was.
    pub answered: Instant,
}

impl<H: Host> Group for Fleet<H> {
    async fn send(&mut self, plan: StepPlan) -> Result<(), Fault> {
        self.send_plan(plan).await
    }

    async fn receive(&mut self) -> Result<StepOutcome, Fault> {
        self.receive_answers().await
    }

    async fn fault(&mut self) -> Fault {
        self.inbox.fault().await
    }

    async fn recover(&mut self, fault: &Fault) -> Result<Epoch, Fault> {
        self.form_again(fault).await
    }

    async fn stop(mut self) {
        // A shard that cannot be told any more is killed below.
        let _ = self.send_all(&ToShard::Stop).await;
        self.end(STOP_LIMIT).await;
    }

    async fn kill(self) {
        self.end(Duration::ZERO).await;
    }
}

impl<H: Host> Fleet<H> {
    async fn end(self, limit: Duration) {
        let members = self.members.into_iter().flatten();
        join_all(members.map(|member| member.shard.end(limit))).await;
    }

    /// Encodes once and sends to every rank, also if one cannot be reached.
    async fn send_all(&mut self, message: &ToShard) -> Result<(), Fault> {
        self.send_frame(&frame(message)?).await
    }

    async fn send_frame(&mut self, frame: &Frame<ToShard>) -> Result<(), Fault> {
        let sends = (0..).map(Rank).zip(&mut self.members);
        let sends = sends.map(|(rank, member)| send(rank, member.as_mut(), frame));
        join_all(sends).await.into_iter().collect()
    }

    async fn send_to(&mut self, rank: Rank, frame: &Frame<ToShard>) -> Result<(), Fault> {
        let member = self.members.get_mut(rank.index()).and_then(Option::as_mut);
        send(rank, member, frame).await
    }
}

async fn send(
    rank: Rank,
    member: Option<&mut Member<impl Shard>>,
    frame: &Frame<ToShard>,
) -> Result<(), Fault> {
    let missing = || Fault::of(rank, Cause::LinkLost("it was not replaced yet".into()));
    let sent = member.ok_or_else(missing)?.shard.send(frame).await;
    sent.map_err(|cause| Fault::of(rank, cause))
}

fn frame(message: &ToShard) -> Result<Frame<ToShard>, Fault> {
    let coordinator = |why: String| Fault::group(Cause::Coordinator(why));
    Frame::new(message).map_err(|e| coordinator(e.to_string()))
}
