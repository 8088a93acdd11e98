//! What the scheduler is asked to generate, and what it says about it.
//!
//! A *sequence* is the unit of scheduling; a request for `n` choices is `n` sequences over one
//! prompt. Nothing here knows of text: stop strings, detokenising and JSON are the caller's.

use std::sync::Arc;
use topology::wire::{LogitBias, TokenScore};

/// Names a sequence for its whole life; never used twice by one scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// One sequence to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its name.
    pub id: SequenceId,
    /// Prompt tokens; at least one, each below the vocabulary's size.
    pub prompt: Arc<[u32]>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most tokens to generate. 0 only together with `prompt_logprobs`.
    pub max_tokens: u32,
    /// No token of `stop_token_ids` is chosen before this many.
    pub min_tokens: u32,
    /// Tokens that end the sequence (end of text included, unless ignored).
    pub stop_token_ids: Vec<u32>,
    /// Lower is sooner, as in `vllm`; equal priorities are served in order of arrival.
    pub priority: i32,
    /// Blocks are shared only between sequences of the same salt.
    pub cache_salt: u64,
    /// `Some(n)`: score each prompt token after the first, with `n` alternatives.
    pub prompt_logprobs: Option<u32>,
}

/// How tokens are chosen; field by field what [`topology::wire::Sampling`] says.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// Always present: the edge draws one where the user gave none.
    pub seed: u64,
    /// Biases on logits.
    pub logit_bias: Vec<LogitBias>,
    /// Never chosen.
    pub banned_token_ids: Vec<u32>,
    /// If not empty, only these are chosen.
    pub allowed_token_ids: Vec<u32>,
    /// `Some(n)`: score each generated token, with `n` alternatives.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            logit_bias: Vec::new(),
            banned_token_ids: Vec::new(),
            allowed_token_ids: Vec::new(),
            logprobs: None,
        }
    }
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A token of `stop_token_ids`; it is the last token reported.
    Stop,
    /// `max_tokens` or the model's length was reached.
    Length,
    /// Cancelled by the caller.
    Cancelled,
    /// The shards failed each time they computed it, also when they computed nothing else.
    Error,
}

/// Something that happened to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// To whom.
    pub id: SequenceId,
    /// What.
    pub kind: EventKind,
}

/// What can happen to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    /// First computation of this sequence was planned (once; not again after a preemption).
    Started {
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
    },
    /// All prompt tokens after the first, scored, in order; comes before the first `Token`.
    PromptScores(Vec<TokenScore>),
    /// The next generated token.
    Token {
        /// 0, 1, 2, … without gap or repeat.
        index: u32,
        /// The token.
        token: u32,
        /// Present when `logprobs` was asked for.
        score: Option<TokenScore>,
    },
    /// The last event of every sequence.
    Finished(FinishReason),
}

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The queue's limit in sequences is reached.
    #[error("the queue is full ({waiting} of at most {limit} requests wait); try again later")]
    TooManyRequests {
        /// Sequences that wait.
        waiting: usize,
        /// `--max-num-queued-reqs`.
        limit: usize,
    },
    /// The queue's limit in prompt tokens is reached.
    #[error("the queue is full ({waiting} of at most {limit} prompt tokens wait); try again later")]
    TooManyTokens {
        /// Tokens that wait.
        waiting: usize,
        /// `--max-num-queued-tokens`.
        limit: usize,
    },
    /// Prompt and `max_tokens` can never fit.
    #[error(
        "This model's maximum context length is {limit} tokens. However, you requested {prompt} prompt tokens \
         and {max_tokens} tokens to generate. Reduce the prompt or max_tokens."
    )]
    TooLong {
        /// Prompt tokens.
        prompt: usize,
        /// Tokens to generate.
        max_tokens: u32,
        /// The smaller of `--max-model-len` and what all KV blocks hold.
        limit: usize,
    },
    /// Larger than the whole queue, so that trying again would not help.
    #[error(
        "this request asks for {asked} {what} at once, but at most {limit} may wait; ask for fewer \
         choices or shorter prompts, or split it"
    )]
    TooLarge {
        /// `sequences` or `prompt tokens`.
        what: &'static str,
        /// How many it holds.
        asked: usize,
        /// How many the queue holds.
        limit: usize,
    },
    /// Breaks a rule of [`Request`]; the edge answers these before they come here.
    #[error("{0}")]
    Invalid(&'static str),
}

impl Refusal {
    /// Whether the same request may be taken later: 429 if so, 400 if not.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::TooManyRequests { .. } | Self::TooManyTokens { .. } => true,
            Self::TooLong { .. } | Self::TooLarge { .. } | Self::Invalid(_) => false,
        }
    }
}
