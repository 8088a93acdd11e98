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
mod streams;
#[cfg(test)]
mod tests;

use crate::clock::{now, since};
use crate::fleet::{Cause, Fault, Group, StepOutcome};
use crate::metrics::Metrics;
use crate::scheduler::Scheduler;
use handle::{Readiness, Submission, SubmitError};
use lead::Lead;
use recovery::Attempts;
use std::sync::Arc;
use std::time::Instant;
use streams::{Streams, Taken};
use tokio::sync::{mpsc, watch};
use topology::ids::Rank;

/// What clients hear whose answer was not finished when the time to shut down was over.
const CUT_BY_SHUTDOWN: &str = "the server is shutting down and the answer was not finished in time";

/// When running requests must have finished; `None` while no one wants the process to end.
pub type DrainDeadline = Option<tokio::time::Instant>;

/// The loop and all it owns.
#[derive(Debug)]
pub struct Engine<G> {
    scheduler: Scheduler,
    fleet: G,
    streams: Streams,
    submissions: mpsc::Receiver<Submission>,
    shutdown: watch::Receiver<DrainDeadline>,
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
        Self {
            scheduler,
            fleet,
            streams: Streams::default(),
            submissions: connections.submissions,
            shutdown: connections.shutdown,
            readiness: connections.readiness,
            metrics: connections.metrics,
            attempts: Attempts::new(connections.max_recovery_attempts),
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
        let shutdown = self.shutdown.clone();
        let ended = tokio::select! {
            biased; // in a fixed order, so that a simulated run can be repeated
            ended = self.serve() => ended,
            () = passed(shutdown) => Ok(()),
        };
        match &ended {
            Ok(()) => {
                self.end_streams(CUT_BY_SHUTDOWN);
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
                self.end_streams(&sentence);
                self.fleet.kill().await;
            }
        }
        ended
    }

    async fn turns(&mut self) -> Result<(), Fault> {
        while self.take_commands().await? {
            if let Some(moment) = self.lead.plan_at().filter(|moment| *moment > now()) {
                self.wait_to_plan(moment).await?;
                continue;
            }
            let planned = now();
            if let Some(plan) = self.scheduler.schedule() {
                self.metrics.engine.schedule_seconds.record(since(planned));
                self.lead.sent(plan.num_tokens(), now());
                self.fleet.send(plan).await?;
                self.deliver(planned);
            } else if self.scheduler.steps_under_way() > 0 {
                let outcome = self.fleet.receive().await?;
                self.apply(&outcome)?;
            } else {
                let cause = Cause::Coordinator("requests wait, but no step was planned".into());
                return Err(Fault::group(cause));
            }
        }
        Ok(())
    }

    /// Until `moment`, which is the next plan's, or until there is something to do before it.
    async fn wait_to_plan(&mut self, moment: Instant) -> Result<(), Fault> {
        tokio::select! {
            biased;
            outcome = self.fleet.receive() => self.apply(&outcome?),
            Some(submission) = self.submissions.recv() => {
                self.take(submission);
                Ok(())
            }
            () = tokio::time::sleep_until(moment.into()) => Ok(()),
        }
    }

    /// Takes in what the oldest step gave.
    fn apply(&mut self, outcome: &StepOutcome) -> Result<(), Fault> {
        self.lead.answered(outcome.took, outcome.answered);
        self.scheduler
            .apply(&outcome.outputs)
            .map_err(|bad| Fault::of(Rank(0), Cause::Answer(bad.to_string())))?;
        if outcome.outputs.iter().any(|row| row.sampled.is_some()) {
            self.attempts.succeeded();
        }
        self.deliver(outcome.answered);
        self.record(outcome);
        Ok(())
    }

    /// Takes what was submitted and drops what no one listens to. Waits while there is nothing to
    /// compute; false: the process is to end and nothing runs any more.
    async fn take_commands(&mut self) -> Result<bool, Fault> {
        for id in self.streams.take_abandoned(now(), &self.metrics) {
            self.scheduler.cancel(id);
        }
        while let Ok(submission) = self.submissions.try_recv() {
            self.take(submission);
        }
        while !self.scheduler.has_work() {
            self.scheduler.take_events(); // of sequences that were cancelled: no one listens
            self.record_stats();
            self.last_answer = None;
            if self.shutdown.borrow().is_some() {
                return Ok(false);
            }
            tokio::select! {
                biased;
                fault = self.fleet.fault() => return Err(fault),
                Some(submission) = self.submissions.recv() => self.take(submission),
                Ok(()) = self.shutdown.changed() => {}
            }
        }
        Ok(true)
    }

    fn take(&mut self, submission: Submission) {
        let Submission {
            choices,
            events,
            answer,
            cancelled,
        } = submission;
        let taken = Taken::all(&choices);
        let answered = if self.shutdown.borrow().is_some() {
            Err(SubmitError::Draining)
        } else {
            self.scheduler.add(choices).map_err(SubmitError::from)
        };
        match &answered {
            Ok(()) => {
                self.record_params(&taken);
                self.streams.open(&taken, (&events, &cancelled), now());
            }
            Err(error) => self.record_rejection(error),
        }
        // Whoever asked may have gone; then the stream is closed too and is cancelled next turn.
        let _ = answer.send(answered);
    }

    /// Passes on what happened to sequences when a step was planned, or answered, at `when`.
    fn deliver(&mut self, when: Instant) {
        for event in self.scheduler.take_events() {
            let slow = self.streams.deliver(event, when, &self.metrics);
            if let Some(slow) = slow {
                self.scheduler.cancel(slow);
            }
        }
    }

    /// Every open stream, and every submission not yet taken, ends with a sentence.
    fn end_streams(&mut self, sentence: &str) {
        self.streams.fail_all(sentence, now(), &self.metrics);
        self.submissions.close();
        while let Ok(submission) = self.submissions.try_recv() {
            let refused = Err(SubmitError::NotReady(sentence.to_owned()));
            let _ = submission.answer.send(refused);
        }
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
