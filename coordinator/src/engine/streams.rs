//! Who listens to which sequence.
//!
//! Turns the scheduler's events into stream events, and counts what they say about requests. Does
//! not wait: a stream is written to only while it has room, and one whose client stopped reading
//! is ended. Invariant: every choice gets exactly one last event, because each keeps one place of
//! its channel in reserve for it.

use super::handle::{Cancelled, StreamEvent, StreamEventKind};
use crate::metrics::{Metrics, Outcome};
use crate::scheduler::request::{Event, EventKind, FinishReason, Request, SequenceId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;
use tokio::sync::mpsc;

/// What a client is told whose stream was ended because it did not read.
pub(super) const SLOW_CLIENT: &str = "the client does not read its stream; the answer was cut here";

/// What a client is told whose request was given up.
pub(super) const GIVEN_UP: &str = "the shards failed each time they computed this request, also when \
     they computed nothing else; it was given up";

/// All sequences someone listens to.
#[derive(Debug, Default)]
pub(super) struct Streams {
    open: BTreeMap<SequenceId, Stream>,
}

/// One sequence's listener, and what is measured about it.
#[derive(Debug)]
struct Stream {
    choice: usize,
    /// Choices that share the channel; each has a place in reserve.
    choices: usize,
    events: mpsc::Sender<StreamEvent>,
    cancelled: Cancelled,
    prompt_tokens: usize,
    /// When it was submitted.
    arrived: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    generated: u32,
    /// Tokens of the longest choice of this prompt that has ended; its other choices share it.
    longest: Arc<AtomicU32>,
}

impl Streams {
    /// Listens to sequences that the scheduler has just taken.
    pub(super) fn open(
        &mut self,
        choices: &[Taken],
        (events, cancelled): (&mpsc::Sender<StreamEvent>, &Cancelled),
        arrived: Instant,
    ) {
        let mut longest = Arc::default();
        let mut prompt = 0;
        for (choice, taken) in choices.iter().enumerate() {
            if taken.prompt != prompt {
                (prompt, longest) = (taken.prompt, Arc::default());
            }
            let stream = Stream {
                choice,
                choices: choices.len(),
                events: events.clone(),
                cancelled: cancelled.clone(),
                prompt_tokens: taken.prompt_tokens,
                arrived,
                started: None,
                first_token: None,
                last_token: None,
                generated: 0,
                longest: Arc::clone(&longest),
            };
            self.open.insert(taken.id, stream);
        }
    }

    /// Forgets the sequences no one wants any more, and says which.
    pub(super) fn take_abandoned(&mut self, now: Instant, metrics: &Metrics) -> Vec<SequenceId> {
        let abandoned: Vec<SequenceId> = self
            .open
            .iter()
            .filter(|(_, stream)| stream.is_abandoned())
            .map(|(id, _)| *id)
            .collect();
        for stream in abandoned.iter().filter_map(|id| self.open.remove(id)) {
            // One choice is cancelled alone when a stop string was found in its text; a client that
            // goes away closes the channel of all.
            let stopped = stream.cancelled.contains(stream.choice);
            let outcome = if stopped {
                Outcome::Stop
            } else {
                Outcome::Abort
            };
            stream.count_end(outcome, now, metrics);
        }
        abandoned
    }

    /// Passes an event on. `now` is when its step was planned (for a start) or answered.
    /// Some(id): the client does not read; cancel this sequence.
    pub(super) fn deliver(
        &mut self,
        event: Event,
        now: Instant,
        metrics: &Metrics,
    ) -> Option<SequenceId> {
        let id = event.id;
        // Cancelled sequences have no listener; their last event is nobody's.
        let stream = self.open.get_mut(&id)?;
        stream.count(&event.kind, now, metrics);
        if let EventKind::Finished(reason) = event.kind {
            let stream = self.open.remove(&id)?;
            let outcome = match reason {
                FinishReason::Stop => Outcome::Stop,
                FinishReason::Length => Outcome::Length,
                FinishReason::Cancelled => Outcome::Abort,
                FinishReason::Error => Outcome::Error,
            };
            stream.count_end(outcome, now, metrics);
            stream.send_last(match reason {
                FinishReason::Error => StreamEventKind::Failed(GIVEN_UP.into()),
                _ => event.kind.into(),
            });
            return None;
        }
        if stream.events.capacity() > stream.choices {
            // The room was just seen and this is the only sender: closed is the only failure, and
            // the next turn notices that.
            let _ = stream.events.try_send(stream.event(event.kind.into()));
            return None;
        }
        let stream = self.open.remove(&id)?;
        stream.count_end(Outcome::Abort, now, metrics);
        metrics.engine.slow_streams_cut_total.increment(1);
        stream.send_last(StreamEventKind::Failed(SLOW_CLIENT.into()));
        Some(id)
    }

    /// Ends every stream with a sentence for its client.
    pub(super) fn fail_all(&mut self, sentence: &str, now: Instant, metrics: &Metrics) {
        for (_, stream) in std::mem::take(&mut self.open) {
            stream.count_end(Outcome::Error, now, metrics);
            stream.send_last(StreamEventKind::Failed(sentence.to_owned()));
        }
    }
}

/// What is kept of a request once the scheduler has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    id: SequenceId,
    /// Choices of one prompt stand together and share its tokens: they have the same number here.
    pub(super) prompt: usize,
    prompt_tokens: usize,
    /// As asked for.
    pub(super) max_tokens: u32,
}

impl Taken {
    /// What is kept of a submission.
    pub(super) fn all(choices: &[Request]) -> Vec<Self> {
        let prompts = choices.chunk_by(|one, next| Arc::ptr_eq(&one.prompt, &next.prompt));
        let numbered = prompts.enumerate();
        let choices = numbered.flat_map(|(prompt, of_it)| of_it.iter().map(move |it| (prompt, it)));
        choices
            .map(|(prompt, request)| Self {
                id: request.id,
                prompt,
                prompt_tokens: request.prompt.len(),
                max_tokens: request.max_tokens,
            })
            .collect()
    }
}

impl Stream {
    fn is_abandoned(&self) -> bool {
        self.events.is_closed() || self.cancelled.contains(self.choice)
    }

    fn event(&self, kind: StreamEventKind) -> StreamEvent {
        StreamEvent {
            choice: self.choice,
            kind,
        }
    }

    /// Sends into the place in reserve. A closed channel has no one left to tell.
    fn send_last(&self, kind: StreamEventKind) {
        let sent = self.events.try_send(self.event(kind));
        debug_assert!(
            !matches!(sent, Err(mpsc::error::TrySendError::Full(_))),
            "a place in reserve was used twice"
        );
    }

    fn count(&mut self, kind: &EventKind, now: Instant, metrics: &Metrics) {
        let requests = &metrics.requests;
        match kind {
            EventKind::Started { cached_tokens } => {
                self.started = Some(now);
                requests
                    .prompt_tokens_total
                    .increment(self.prompt_tokens as u64);
                requests
                    .prompt_tokens_cached_total
                    .increment(u64::from(*cached_tokens));
                requests
                    .queue_time_seconds
                    .record(now.saturating_duration_since(self.arrived));
            }
            EventKind::Token { .. } => {
                self.generated += 1;
                requests.generation_tokens_total.increment(1);
                if let Some(last) = self.last_token {
                    requests.inter_token_latency_seconds.record(now - last);
                } else {
                    self.first_token = Some(now);
                    requests
                        .time_to_first_token_seconds
                        .record(now - self.arrived);
                }
                self.last_token = Some(now);
            }
            EventKind::PromptScores(_) | EventKind::Finished(_) => {}
        }
    }

    /// Measures the whole request. Tokens that came are counted however it ended.
    fn count_end(&self, outcome: Outcome, now: Instant, metrics: &Metrics) {
        let requests = &metrics.requests;
        metrics.finished(outcome);
        requests
            .e2e_request_latency_seconds
            .record(now - self.arrived);
        requests.prompt_tokens.record(self.prompt_tokens as f64);
        requests.generation_tokens.record(f64::from(self.generated));
        let longest = self.longest.fetch_max(self.generated, Ordering::Relaxed);
        if Arc::strong_count(&self.longest) == 1 {
            // The others of this prompt have ended before.
            let longest = longest.max(self.generated);
            requests
                .max_num_generation_tokens
                .record(f64::from(longest));
        }
        if let Some(started) = self.started {
            requests.inference_time_seconds.record(now - started);
        }
        if let (Some(started), Some(first)) = (self.started, self.first_token) {
            requests.prefill_time_seconds.record(first - started);
        }
        if let (Some(first), Some(last)) = (self.first_token, self.last_token) {
            requests.decode_time_seconds.record(last - first);
            if self.generated > 1 {
                let mean = (last - first) / (self.generated - 1);
                requests.time_per_output_token_seconds.record(mean);
            }
        }
    }
}

impl From<EventKind> for StreamEventKind {
    fn from(kind: EventKind) -> Self {
        match kind {
            EventKind::Started { cached_tokens } => Self::Started { cached_tokens },
            EventKind::PromptScores(scores) => Self::PromptScores(scores),
            EventKind::Token {
                index,
                token,
                score,
            } => Self::Token {
                index,
                token,
                score,
            },
            EventKind::Finished(FinishReason::Error) => {
                Self::Failed("the cluster could not compute this request".into())
            }
            EventKind::Finished(reason) => Self::Finished(reason),
        }
    }
}
