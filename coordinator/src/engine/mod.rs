//! The step loop, and the handle by which the rest of the process reaches it.
//!
//! `take commands → schedule (pure) → fleet.send | fleet.receive (the only I/O) → apply (pure) →
//! deliver`: every turn sends a step or takes in what one gave, nothing between. While one is computed the
//! next is sent, early enough that shards do not wait for it and late enough that requests do not wait
//! behind it. The loop knows no text, HTTP or process; what a step computes is the scheduler's decision, how it is
//! computed the shards'. A fault takes it to `recovery` and back. Invariant: however the loop ends,
//! every stream that was opened got its last event.

pub mod handle;
mod lead;
mod record;
mod recovery;
mod requests;
mod streams;
#[cfg(test)]
mod tests;

use crate::clock::{now, since};
use crate::fleet::{Cause, Fault, Group, StepOutcome};
use crate::metrics::Metrics;
use crate::scheduler::Scheduler;
use handle::{Readiness, Submission};
use lead::Lead;
use recovery::Attempts;
use requests::Requests;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, watch};
use topology::ids::Rank;

/// What clients hear whose answer was not finished when the time to shut down was over.
const CUT_BY_SHUTDOWN: &str = "the server is shutting down and the answer was not finished in time";

/// When running requests must have finished; `None` while no one wants the process to end.
pub type DrainDeadline = Option<tokio::time::Instant>;

/// The loop and all it owns.
#[derive(Debug)]
pub struct Engine<G> {
    requests: Requests,
    fleet: G,
    readiness: watch::Sender<Readiness>,
    metrics: Arc<Metrics>,
    attempts: Attempts,
    lead: Lead,
    /// When the last step was answered, unless there was a pause after it.
    last_answer: Option<Instant>,
}

/// What the loop is connected to.
#[derive(Debug)]
pub struct Connections {
    /// The engine's end of [`handle::EngineHandle::new`].
    pub submissions: mpsc::Receiver<Submission>,
    /// Set once, when the process is to end.
    pub shutdown: watch::Receiver<DrainDeadline>,
    /// What `/health` and `/ready` say.
    pub readiness: watch::Sender<Readiness>,
    /// Where numbers go.
    pub metrics: Arc<Metrics>,
    /// How often in a row the group may be formed again after faults.
    pub max_recovery_attempts: u32,
}

impl<G: Group> Engine<G> {
    /// A loop over a fleet that is ready.
    pub fn new(scheduler: Scheduler, fleet: G, connections: Connections) -> Self {
        let Connections {
            submissions,
            shutdown,
            readiness,
            metrics,
            max_recovery_attempts,
        } = connections;
        let ends = (submissions, shutdown);
        Self {
            requests: Requests::new(scheduler, ends, Arc::clone(&metrics)),
            fleet,
            readiness,
            metrics,
            attempts: Attempts::new(max_recovery_attempts),
            lead: Lead::default(),
            last_answer: None,
        }
    }

    /// Serves until it is told to end and running requests are finished, or a fault that cannot be
    /// mended. All shards are gone when it returns.
    ///
    /// # Errors
    /// The [`Fault`] that ended it.
    pub async fn run(mut self) -> Result<(), Fault> {
        // Whoever ends the process before it served has said so already.
        self.change(&Readiness::Loading, Readiness::Ready);
        let shutdown = self.requests.shutdown();
        let ended = tokio::select! {
            biased; // in a fixed order, so that a simulated run can be repeated
            ended = self.serve() => ended,
            () = passed(shutdown) => Ok(()),
        };
        match &ended {
            Ok(()) => {
                self.requests.end(CUT_BY_SHUTDOWN);
                self.fleet.stop().await;
            }
            Err(fault) => {
                tracing::error!(
                    rank = fault.rank.map(|rank| rank.0),
                    "the cluster fails: {fault}"
                );
                let sentence = format!("the cluster failed: {fault}");
                self.readiness
                    .send_replace(Readiness::Failed(sentence.clone()));
                self.requests.end(&sentence);
                self.fleet.kill().await;
            }
        }
        ended
    }

    async fn turns(&mut self) -> Result<(), Fault> {
        while self.take_commands().await? {
            if let Some(moment) = self.lead.plan_at().filter(|moment| *moment > now()) {
                self.wait(Some(moment)).await?;
                continue;
            }
            let planned = now();
            if let Some(plan) = self.requests.scheduler.schedule() {
                self.metrics.engine.schedule_seconds.record(since(planned));
                self.lead.sent(plan.num_tokens(), now());
                self.fleet.send(plan).await?;
                self.requests.deliver(planned);
            } else if self.requests.scheduler.steps_under_way() > 0 {
                self.wait(None).await?;
            } else {
                let cause = Cause::Coordinator("requests wait, but no step was planned".into());
                return Err(Fault::group(cause));
            }
        }
        Ok(())
    }

    /// Until the oldest step is answered, and taken in; or there is something to do before: something was submitted,
    /// or `moment` has come, which is the next plan's.
    async fn wait(&mut self, moment: Option<Instant>) -> Result<(), Fault> {
        tokio::select! {
            biased;
            outcome = self.fleet.receive() => self.apply(&outcome?),
            () = self.requests.take_next() => Ok(()),
            () = come(moment) => Ok(()),
        }
    }

    /// Takes in what the oldest step gave.
    fn apply(&mut self, outcome: &StepOutcome) -> Result<(), Fault> {
        self.lead.answered(outcome.took, outcome.answered);
        self.requests
            .scheduler
            .apply(&outcome.outputs)
            .map_err(|bad| Fault::of(Rank(0), Cause::Answer(bad.to_string())))?;
        let has_token = outcome.outputs.iter().any(|row| row.sampled.is_some());
        let has_scores = self.requests.deliver(outcome.answered);
        if has_token || has_scores {
            self.attempts.succeeded();
        }
        self.record(outcome);
        Ok(())
    }

    /// Takes what was submitted and drops what no one listens to. Waits while there is nothing to
    /// compute; false: the process is to end and nothing runs any more.
    async fn take_commands(&mut self) -> Result<bool, Fault> {
        self.requests.drop_abandoned();
        self.requests.take_all();
        while !self.requests.scheduler.has_work() {
            self.requests.scheduler.take_events(); // of sequences that were cancelled: no one listens
            self.requests.record_stats();
            self.last_answer = None;
            if self.requests.is_draining() {
                return Ok(false);
            }
            tokio::select! {
                biased;
                fault = self.fleet.fault() => return Err(fault),
                () = self.requests.take_next_or_drain() => {}
            }
        }
        Ok(true)
    }
}

/// Waits for a moment, if there is one.
async fn come(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// Waits until the deadline of a shutdown has passed; for ever if none comes.
async fn passed(mut shutdown: watch::Receiver<DrainDeadline>) {
    let deadline = match shutdown.wait_for(Option::is_some).await {
        Ok(deadline) => *deadline,
        Err(_) => None, // no one is left who could ask for it
    };
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
