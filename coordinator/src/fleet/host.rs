//! Where shards come from, and what the fleet needs of one.
//!
//! The seam between the fleet's protocol (epochs, phases, replacement) and processes with links.
//! Processes of this machine are [`super::local`]; the simulation brings its own. Invariant: whatever
//! a shard says or suffers arrives in the inbox under the [`Source`] it was launched as.

use super::fault::{Cause, Fault, Phase};
use super::inbox::{Outlet, Source};
use super::start::StartEvent;
use std::time::Duration;
use topology::link::Frame;
use topology::wire::{Hello, ToShard};

/// How long a phase took.
pub type Took = (Phase, Duration);

/// Shards that said who they are.
#[derive(Debug)]
pub struct Launched<S> {
    /// What each said, and the way to it.
    pub shards: Vec<(Hello, S)>,
    /// What launching and admitting them took.
    pub phases: Vec<Took>,
}

/// Starts shards.
pub trait Host: Send + 'static {
    /// What it starts.
    type Shard: Shard;

    /// Starts a shard for each of `sources` and waits until all have said `Hello`; the answers are in
    /// the order of `sources`. From then on, what they say goes to `outlet`.
    ///
    /// # Errors
    /// The [`Fault`] of the first that did not come; none of the others remains.
    fn launch(
        &mut self,
        sources: &[Source],
        outlet: &Outlet,
        tell: &mut (dyn FnMut(StartEvent) + Send),
    ) -> impl Future<Output = Result<Launched<Self::Shard>, Fault>> + Send;
}

/// A shard as the fleet holds it. It ends when this is dropped, at the latest.
pub trait Shard: Send + 'static {
    /// Sends a frame in order.
    ///
    /// # Errors
    /// Why it cannot be reached.
    fn send(&mut self, frame: &Frame<ToShard>) -> impl Future<Output = Result<(), Cause>> + Send;

    /// Sends a message that overtakes those under way.
    ///
    /// # Errors
    /// Why it cannot be reached.
    fn send_urgent(&mut self, message: &ToShard) -> impl Future<Output = Result<(), Cause>> + Send;

    /// Gives it `limit` to end by itself, kills it then, and waits for that.
    fn end(self, limit: Duration) -> impl Future<Output = ()> + Send;

    /// Kills it for another one of its rank, as far as it can be reached. What is left of it has ended before the
    /// other one says `Hello`.
    fn give_way(self) -> impl Future<Output = ()> + Send
    where
        Self: Sized,
    {
        self.end(Duration::ZERO)
    }
}
