//! Clients of a simulated cluster, who know what they must be told.
//!
//! Each compares what it hears, event by event, with the oracle. Some leave early, some end one choice
//! and go on with the others. Invariant: whoever stays to the end hears exactly one last event for each
//! choice, and all tokens before it.

use super::oracle::answer;
use super::world::World;
use crate::engine::handle::{EngineHandle, StreamEvent, StreamEventKind, SubmitError};
use crate::scheduler::request::{FinishReason, Request};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

/// When and how a client asks.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) name: usize,
    pub(super) at: Duration,
    pub(super) choices: Vec<Request>,
    /// After so many tokens it goes away.
    pub(super) leaves_after: Option<usize>,
    /// After so many tokens it ends the first choice.
    pub(super) cancels_after: Option<usize>,
}

/// Which ends that are not an answer a client may meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Excuses {
    /// The cluster fails for good.
    pub(super) failure: bool,
    /// The process ends, at that time.
    pub(super) shutdown: Option<Duration>,
}

/// How it went.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Served {
    pub(super) tokens: usize,
    pub(super) finished: usize,
    pub(super) failed: usize,
}

struct Choice {
    expected: (Vec<u32>, FinishReason),
    got: usize,
    ended: bool,
    cancelled: bool,
}

impl Client {
    /// Asks, and reads until there is nothing more to hear.
    pub(super) async fn run(
        mut self,
        world: Arc<World>,
        handle: EngineHandle,
        (world_size, excuses): (u32, Excuses),
    ) -> Served {
        sleep(self.at).await;
        for choice in &mut self.choices {
            choice.id = handle.next_id();
        }
        let choice = |request: &Request| Choice {
            expected: answer(request, world_size),
            got: 0,
            ended: false,
            cancelled: false,
        };
        let mut choices: Vec<Choice> = self.choices.iter().map(choice).collect();
        let name = self.name;
        world.note(format_args!("client {name} asks"));
        let mut events = match handle.submit(std::mem::take(&mut self.choices)).await {
            Ok(events) => events,
            Err(error) => {
                if !excuses.refusal(&world, &error) {
                    world.violation(format_args!("client {name} is refused: {error}"));
                }
                return Served::default();
            }
        };
        let mut served = Served::default();
        while let Some(event) = events.recv().await {
            let choice = &mut choices[event.choice];
            if let Err(why) = choice.hear(&event, &mut served, excuses) {
                let number = event.choice;
                world.violation(format_args!("client {name}, choice {number}: {why}"));
            }
            if self
                .leaves_after
                .is_some_and(|after| served.tokens >= after)
            {
                world.note(format_args!("client {name} leaves"));
                return served;
            }
            if self
                .cancels_after
                .take_if(|after| served.tokens >= *after)
                .is_some()
            {
                events.cancel(0);
                choices[0].cancelled = true;
            }
        }
        world.note(format_args!("client {name} has all: {served:?}"));
        if choices.iter().any(|it| !it.ended && !it.cancelled) {
            world.violation(format_args!("client {name} heard no end"));
        }
        served
    }
}

impl Choice {
    fn hear(
        &mut self,
        event: &StreamEvent,
        served: &mut Served,
        excuses: Excuses,
    ) -> Result<(), String> {
        if self.ended {
            return Err(format!("{event:?} after the end"));
        }
        let (tokens, reason) = &self.expected;
        match &event.kind {
            StreamEventKind::Started { .. } if self.got == 0 => Ok(()),
            StreamEventKind::Token { index, token, .. } => {
                let due = (self.got as u64, tokens.get(self.got));
                self.got += 1;
                served.tokens += 1;
                if (u64::from(*index), Some(token)) == due {
                    Ok(())
                } else {
                    Err(format!("token {index} is {token}, due was {due:?}"))
                }
            }
            StreamEventKind::Finished(got) => {
                self.ended = true;
                served.finished += 1;
                if got == reason && self.got == tokens.len() {
                    Ok(())
                } else {
                    Err(format!("{got:?} after {}, due was {reason:?}", self.got))
                }
            }
            StreamEventKind::Failed(why) => {
                self.ended = true;
                served.failed += 1;
                let shutdown = excuses.shutdown.is_some() && why.contains("shutting down");
                let failure = excuses.failure && why.contains("the cluster failed");
                if shutdown || failure {
                    Ok(())
                } else {
                    Err(format!("it failed: {why}"))
                }
            }
            other => Err(format!("{other:?}")),
        }
    }
}

impl Excuses {
    fn refusal(self, world: &World, error: &SubmitError) -> bool {
        let now = world.lock().elapsed();
        let shutdown = self.shutdown.is_some_and(|at| at <= now);
        match error {
            SubmitError::Refused(_) => false,
            SubmitError::Draining => shutdown,
            SubmitError::NotReady(_) => shutdown || self.failure,
        }
    }
}
