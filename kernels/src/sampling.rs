//! What a sampling kernel is asked and what it answers; the arithmetic is in `ops/sample.rs`.

/// A token that a step takes from the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// It is known.
    Token(u32),
    /// It is on the device: what the request of this index chose when sampling was deferred last
    /// ([`Backend::defer`](crate::backend::Backend::defer)).
    Chosen(u32),
}

/// How to choose or score at one row of logits.
///
/// Order of operations, as in `vllm`: scores are taken from the raw logits; then `allowed`, `logit_bias`, penalties,
/// `banned`; then greedy, or temperature, min-p, top-k, top-p and a draw.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleRequest {
    /// Row of the logits matrix.
    pub row: usize,
    /// Choose a token, or only score a given one.
    pub choice: Choice,
    /// `None`: no scores. `Some(n)`: score the token, and report the `n` likeliest.
    pub logprobs: Option<usize>,
}

/// What is wanted at a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Choice {
    /// This token's score.
    Score(u32),
    /// A token.
    Sample(Box<SampleParams>),
}

/// Parameters of one draw. Neutral values as in `vllm`.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: usize,
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
    /// Randomness is a function of `seed` and `position` alone.
    pub seed: u64,
    /// The position the token will take.
    pub position: u32,
    /// Added to logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// May not be chosen.
    pub banned: Vec<u32>,
    /// If not empty, only these may be chosen.
    pub allowed: Vec<u32>,
    /// Prompt tokens, where a penalty needs them.
    pub prompt: Vec<u32>,
    /// Generated tokens, where a penalty needs them.
    pub generated: Vec<u32>,
    /// One more of them, as [`Last::Chosen`]. Only where sampling is deferred.
    pub last: Option<u32>,
}

/// The answer to a [`SampleRequest`].
#[derive(Clone, Debug, PartialEq)]
pub struct SampleResult {
    /// The chosen (or given) token.
    pub token: u32,
    /// Present when `logprobs` was asked for.
    pub score: Option<Score>,
}

/// Log-probabilities at one row, from the raw logits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Score {
    /// Natural logarithm of the token's probability.
    pub logprob: f32,
    /// The token's place among all, 1 being the likeliest.
    pub rank: u32,
    /// The likeliest tokens with their log-probabilities, best first; ties to the smaller token.
    pub top: Vec<(u32, f32)>,
}
