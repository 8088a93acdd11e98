//! The HTTP side's end of the engine: submit a request, read its events.
//!
//! Dropping the [`Events`] cancels the request: the engine looks at every step whether anyone
//! still listens, and takes nothing whose sender has gone ([`Submission::is_abandoned`]). One choice
//! alone is ended by [`Events::cancel`], when a stop string was found in its text. Both channels are
//! bounded.

use crate::clock::now;
use crate::scheduler::request::{FinishReason, Refusal, Request, SequenceId};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;
use tokio::sync::{mpsc, oneshot, watch};
use topology::wire::TokenScore;

/// Submissions that may wait for the engine's next turn; beyond that callers wait their turn too.
pub const SUBMIT_CAPACITY: usize = 1024;

/// Events a stream may be behind before it is cut: a client that does not read for this many tokens
/// (at 200 bytes each, about 400 KiB with its JSON) is not coming back.
pub const EVENT_CAPACITY: usize = 2048;

/// Added to [`EVENT_CAPACITY`] for each choice, since all choices of a submission share the channel
/// and a step may give each of them an event.
pub const EVENTS_PER_CHOICE: usize = 64;

/// One or more sequences that are taken or refused together (`n` choices, a batch of prompts).
#[derive(Debug)]
pub struct Submission {
    /// The sequences; `choices[i]`'s events carry `choice: i`.
    pub choices: Vec<Request>,
    /// Where events go. All choices share it.
    pub events: mpsc::Sender<StreamEvent>,
    /// Whether it was taken.
    pub answer: oneshot::Sender<Result<(), SubmitError>>,
    /// Choices the caller no longer wants; keep a clone beside each running sequence.
    pub cancelled: Cancelled,
    /// When it was submitted: what it waits to be taken is part of what its client waits.
    pub arrived: Instant,
}

impl Submission {
    /// Whether nobody waits for its answer any more.
    pub fn is_abandoned(&self) -> bool {
        self.answer.is_closed()
    }
}

/// Which choices of a submission the caller has cancelled. Cheap to clone and to ask.
#[derive(Clone, Debug)]
pub struct Cancelled(Arc<[AtomicBool]>);

impl Cancelled {
    /// None of `choices` choices.
    pub fn new(choices: usize) -> Self {
        Self((0..choices).map(|_| AtomicBool::new(false)).collect())
    }

    /// Whether `choice` was cancelled.
    pub fn contains(&self, choice: usize) -> bool {
        self.0
            .get(choice)
            .is_some_and(|flag| flag.load(Ordering::Relaxed))
    }

    fn add(&self, choice: usize) {
        if let Some(flag) = self.0.get(choice) {
            flag.store(true, Ordering::Relaxed);
        }
    }
}

/// Something that happened to one choice of a submission.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamEvent {
    /// Index into [`Submission::choices`].
    pub choice: usize,
    /// What happened.
    pub kind: StreamEventKind,
}

/// What can happen to a choice.
#[derive(Clone, Debug, PartialEq)]
pub enum StreamEventKind {
    /// First computation planned; prompt tokens found in the prefix cache.
    Started {
        /// Tokens not computed again.
        cached_tokens: u32,
    },
    /// All prompt tokens after the first, scored.
    PromptScores(Vec<TokenScore>),
    /// The next token.
    Token {
        /// 0, 1, 2, … without gap or repeat.
        index: u32,
        /// The token.
        token: u32,
        /// Present when `logprobs` was asked for.
        score: Option<TokenScore>,
    },
    /// The choice's last event.
    Finished(FinishReason),
    /// The choice's last event when the cluster could not go on; a sentence for the client.
    Failed(String),
}

/// Why a submission is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The scheduler's word: 429 if [`Refusal::is_temporary`], otherwise 400.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// 503: the process is shutting down.
    #[error("the server is draining and takes no new requests")]
    Draining,
    /// 503: shards are loading or gone.
    #[error("the cluster is not ready: {0}")]
    NotReady(String),
}

/// Where the cluster stands, for `/health`, `/ready` and refusals.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Readiness {
    /// Shards are starting.
    #[default]
    Loading,
    /// Serving.
    Ready,
    /// A fault ended the epoch, and the group is formed again; why. Requests are taken and wait.
    Recovering(String),
    /// Finishing what runs, taking nothing new.
    Draining,
    /// A fault that ends the process; why.
    Failed(String),
}

impl Readiness {
    /// How far it is from serving: of several groups, the one with the most says where the whole stands.
    pub fn severity(&self) -> u8 {
        match self {
            Self::Ready => 0,
            Self::Draining => 1,
            Self::Loading => 2,
            Self::Recovering(_) => 3,
            Self::Failed(_) => 4,
        }
    }
}

/// A cheap, cloneable way to reach the engine.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    submissions: mpsc::Sender<Submission>,
    readiness: watch::Receiver<Readiness>,
    next_id: Arc<AtomicU64>,
}

/// The events of one submission. Dropping it cancels what still runs.
#[derive(Debug)]
pub struct Events {
    receiver: mpsc::Receiver<StreamEvent>,
    cancelled: Cancelled,
}

impl Events {
    /// The next event; `None` when the engine has nothing more to say, or has cut a stream that was
    /// not read ([`EVENT_CAPACITY`]).
    pub async fn recv(&mut self) -> Option<StreamEvent> {
        self.receiver.recv().await
    }

    /// [`Events::recv`] for hand-written futures.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<StreamEvent>> {
        self.receiver.poll_recv(context)
    }

    /// Ends one choice while the others go on. Events of it that are under way may still come.
    pub fn cancel(&self, choice: usize) {
        self.cancelled.add(choice);
    }
}

impl EngineHandle {
    /// A handle, and the engine's end of the submissions.
    pub fn new(readiness: watch::Receiver<Readiness>) -> (Self, mpsc::Receiver<Submission>) {
        let (submissions, receiver) = mpsc::channel(SUBMIT_CAPACITY);
        (
            Self {
                submissions,
                readiness,
                next_id: Arc::default(),
            },
            receiver,
        )
    }

    /// A name for a new sequence.
    pub fn next_id(&self) -> SequenceId {
        SequenceId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Where the cluster stands now.
    pub fn readiness(&self) -> Readiness {
        let state = self.readiness.borrow().clone();
        if self.submissions.is_closed() && !matches!(state, Readiness::Failed(_)) {
            // The engine is gone without a word; what it said last is not true any more.
            return Readiness::Failed("the engine has stopped".into());
        }
        state
    }

    /// Whether requests are taken now.
    ///
    /// # Errors
    /// Why not.
    pub fn admits(&self) -> Result<(), SubmitError> {
        match self.readiness() {
            Readiness::Ready | Readiness::Recovering(_) => Ok(()),
            Readiness::Draining => Err(SubmitError::Draining),
            Readiness::Loading => Err(SubmitError::NotReady("shards are loading".into())),
            Readiness::Failed(why) => Err(SubmitError::NotReady(why)),
        }
    }

    /// Waits until requests are taken; `None` if that will never be.
    pub async fn until_admits(&self) -> Option<()> {
        let mut readiness = self.readiness.clone();
        let admits =
            |state: &Readiness| matches!(state, Readiness::Ready | Readiness::Recovering(_));
        readiness.wait_for(admits).await.ok()?;
        (!self.submissions.is_closed()).then_some(())
    }

    /// Hands `choices` to the engine; all are taken or none.
    ///
    /// # Errors
    /// [`SubmitError`] if the cluster is not ready, drains, or the scheduler refuses.
    pub async fn submit(&self, choices: Vec<Request>) -> Result<Events, SubmitError> {
        self.admits()?;
        let capacity = EVENT_CAPACITY + EVENTS_PER_CHOICE * choices.len();
        let (events, receiver) = mpsc::channel(capacity);
        let (answer, answered) = oneshot::channel();
        let gone = || SubmitError::NotReady("the engine has stopped".into());
        let cancelled = Cancelled::new(choices.len());
        let submission = Submission {
            choices,
            events,
            answer,
            cancelled: cancelled.clone(),
            arrived: now(),
        };
        self.submissions
            .send(submission)
            .await
            .map_err(|_| gone())?;
        answered.await.map_err(|_| gone())??;
        Ok(Events {
            receiver,
            cancelled,
        })
    }
}
