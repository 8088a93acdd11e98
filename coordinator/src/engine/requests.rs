//! What clients ask for: taken or refused, passed on, dropped when they go.
//!
//! The part of the loop that needs no shard, and so goes on while the loop waits for one: whoever submits hears at
//! once whether it is taken, also in the middle of a long step and while a group is formed again. Plans nothing.
//! Invariant: every submission gets one answer, unless no one waits for that any more; then it is
//! neither computed nor counted.

use super::DrainDeadline;
use super::handle::{Submission, SubmitError};
use super::streams::{Streams, Taken};
use crate::clock::now;
use crate::metrics::Metrics;
use crate::scheduler::Scheduler;
use crate::scheduler::request::EventKind;
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, watch};

/// Requests that have not ended, those who listen to them, and where new ones come from.
#[derive(Debug)]
pub(super) struct Requests {
    pub(super) scheduler: Scheduler,
    pub(super) metrics: Arc<Metrics>,
    streams: Streams,
    submissions: mpsc::Receiver<Submission>,
    shutdown: watch::Receiver<DrainDeadline>,
}

impl Requests {
    pub(super) fn new(
        scheduler: Scheduler,
        (submissions, shutdown): (mpsc::Receiver<Submission>, watch::Receiver<DrainDeadline>),
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            scheduler,
            metrics,
            streams: Streams::default(),
            submissions,
            shutdown,
        }
    }

    /// What says when the process is to end.
    pub(super) fn shutdown(&self) -> watch::Receiver<DrainDeadline> {
        self.shutdown.clone()
    }

    /// Whether it is to end.
    pub(super) fn is_draining(&self) -> bool {
        self.shutdown.borrow().is_some()
    }

    /// Cancels what no one listens to. Nothing is kept of it.
    pub(super) fn drop_abandoned(&mut self) {
        let abandoned = self.streams.take_abandoned(now(), &self.metrics);
        if abandoned.is_empty() {
            return;
        }
        for id in abandoned {
            self.scheduler.cancel(id);
        }
        self.deliver(now());
    }

    /// Takes all that was submitted.
    pub(super) fn take_all(&mut self) {
        while let Ok(submission) = self.submissions.try_recv() {
            self.take(submission);
        }
    }

    /// Waits for a submission and takes it. Who has given up makes room for others. Cancel-safe.
    pub(super) async fn take_next(&mut self) {
        match self.submissions.recv().await {
            Some(submission) => self.take_with_others(submission),
            None => std::future::pending().await, // no one is left who could submit
        }
    }

    /// Waits for a submission and takes it, or until the process is told to end. Cancel-safe.
    pub(super) async fn take_next_or_drain(&mut self) {
        tokio::select! {
            biased;
            Some(submission) = self.submissions.recv() => self.take(submission),
            Ok(()) = self.shutdown.changed() => {}
            else => std::future::pending().await,
        }
    }

    /// Takes what is submitted until `done` is. Who gives up meanwhile makes room for others.
    pub(super) async fn take_while<T>(&mut self, done: impl Future<Output = T>) -> T {
        let mut done = pin!(done);
        loop {
            tokio::select! {
                biased;
                done = &mut done => return done,
                Some(submission) = self.submissions.recv() => self.take_with_others(submission),
            }
        }
    }

    /// Takes a submission and all that wait behind it.
    fn take_with_others(&mut self, submission: Submission) {
        self.drop_abandoned();
        self.take(submission);
        self.take_all();
        self.record_stats();
    }

    fn take(&mut self, submission: Submission) {
        if submission.is_abandoned() {
            return;
        }
        let Submission {
            choices,
            events,
            answer,
            cancelled,
            arrived,
        } = submission;
        let taken = Taken::all(&choices);
        let answered = if self.is_draining() {
            Err(SubmitError::Draining)
        } else {
            self.scheduler.add(choices).map_err(SubmitError::from)
        };
        match &answered {
            Ok(()) => {
                self.record_params(&taken);
                self.streams.open(&taken, (&events, &cancelled), arrived);
            }
            Err(error) => self.record_rejection(error),
        }
        // Whoever asked may have gone just now; then the stream is closed too and is cancelled next turn.
        let _ = answer.send(answered);
    }

    /// Passes on what happened to sequences when a step was planned, or answered, at `when`. Whether all of a prompt
    /// was scored.
    pub(super) fn deliver(&mut self, when: Instant) -> bool {
        let mut has_scores = false;
        for event in self.scheduler.take_events() {
            has_scores |= matches!(event.kind, EventKind::PromptScores(_));
            let slow = self.streams.deliver(event, when, &self.metrics);
            if let Some(slow) = slow {
                self.scheduler.cancel(slow);
            }
        }
        has_scores
    }

    /// Every open stream, and every submission not yet taken, ends with a sentence.
    pub(super) fn end(&mut self, sentence: &str) {
        self.streams.fail_all(sentence, now(), &self.metrics);
        self.submissions.close();
        while let Ok(submission) = self.submissions.try_recv() {
            let refused = Err(SubmitError::NotReady(sentence.to_owned()));
            let _ = submission.answer.send(refused);
        }
    }
}
