//! The plan of one step: everything a shard needs to compute it, and what comes back.
//!
//! A plan is complete: positions, tokens, block tables and sampling parameters are all here, so a
//! shard keeps nothing about a request and can die at any moment. The one thing it may leave to the
//! shard is the token that the step before chose ([`PlanRow::last_from`]), so that a step can be sent
//! while the one before it is computed. Parameters that are off cost a byte.

use super::words;
use crate::ids::{BlockId, Epoch, Step};
use bincode::de::Decoder;
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode, impl_borrow_decode};
use std::convert::identity;

/// SHA-256 of the encoded plan, shortened to 16 bytes.
pub type PlanDigest = [u8; 16];

/// What all ranks compute in one step.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct StepPlan {
    /// The epoch it belongs to.
    pub epoch: Epoch,
    /// Its number; a shard accepts only the one after the last.
    pub step: Step,
    /// At least one, at most `max_num_seqs`.
    pub rows: Vec<PlanRow>,
}

impl StepPlan {
    /// Tokens to compute, of all rows.
    pub fn num_tokens(&self) -> usize {
        self.rows.iter().map(|row| row.tokens.len()).sum()
    }
}

/// One sequence's share of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PlanRow {
    /// Tokens to compute, at positions `position..position + tokens.len()`. Never empty.
    pub tokens: Vec<u32>,
    /// Tokens whose keys and values are in the blocks already.
    pub position: u32,
    /// The sequence's blocks, covering `position + tokens.len()` tokens.
    pub blocks: Vec<BlockId>,
    /// Present when a token is to be sampled after the last of `tokens`.
    pub sampling: Option<Box<Sampling>>,
    /// Score these tokens: `targets[i]` against the distribution after `tokens[i]`. Used for
    /// `echo` with `logprobs`; empty otherwise, and never longer than `tokens`.
    pub targets: Vec<u32>,
    /// Alternatives to report with each scored target.
    pub target_alternatives: u32,
    /// The last of `tokens` is what this row of the step before sampled, and stands as 0 here. Where a
    /// penalty needs the generated tokens, it belongs to them too. Only with
    /// [`Load::async_scheduling`](super::Load::async_scheduling).
    pub last_from: Option<u32>,
}

impl Encode for PlanRow {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        let Self {
            tokens,
            position,
            blocks,
            sampling,
            targets,
            target_alternatives,
            last_from,
        } = self;
        words::encode(tokens, identity, encoder)?;
        words::encode(blocks, |block: BlockId| block.0, encoder)?;
        words::encode(targets, identity, encoder)?;
        (position, sampling, target_alternatives, last_from).encode(encoder)
    }
}

impl<Context> Decode<Context> for PlanRow {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let tokens = words::decode(identity, decoder)?;
        let blocks = words::decode(BlockId, decoder)?;
        let targets = words::decode(identity, decoder)?;
        let (position, sampling, target_alternatives, last_from) = Decode::decode(decoder)?;
        Ok(Self {
            tokens,
            position,
            blocks,
            sampling,
            targets,
            target_alternatives,
            last_from,
        })
    }
}

impl_borrow_decode!(PlanRow);

/// How to choose the next token. The fields have the names and neutral values of `vllm`.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// Subtracted once from every token that was generated. 0 is off.
    pub presence_penalty: f32,
    /// Subtracted for each time a token was generated. 0 is off.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output. 1 is off.
    pub repetition_penalty: f32,
    /// Randomness is a function of this and `position` alone, so a replay gives the same token.
    pub seed: u64,
    /// The position the sampled token will take.
    pub position: u32,
    /// Added to logits, before anything else.
    pub logit_bias: Vec<LogitBias>,
    /// Tokens that may not be chosen (end of text before `min_tokens`, `bad_words`).
    pub banned: Vec<u32>,
    /// If not empty, only these may be chosen.
    pub allowed: Vec<u32>,
    /// Prompt tokens, where a penalty needs them; empty otherwise.
    pub prompt: Vec<u32>,
    /// Generated tokens, where a penalty needs them; empty otherwise.
    pub generated: Vec<u32>,
    /// `None`: no log-probability. `Some(n)`: the chosen token's, and the `n` likeliest.
    pub logprobs: Option<u32>,
}

impl Sampling {
    /// Whether a penalty needs [`Self::generated`].
    pub fn penalises_generated(&self) -> bool {
        let additive = [self.presence_penalty, self.frequency_penalty];
        penalises_generated(self.repetition_penalty, additive)
    }
}

/// Whether this penalty needs the prompt's tokens.
pub fn penalises_prompt(repetition: f32) -> bool {
    differs(repetition, 1.0)
}

/// Whether any of these penalties needs the generated tokens; the additive ones are presence and
/// frequency.
pub fn penalises_generated(repetition: f32, additive: [f32; 2]) -> bool {
    penalises_prompt(repetition) || additive.iter().any(|penalty| differs(*penalty, 0.0))
}

/// Whether a penalty is on; exact, because off is one exact value.
#[expect(clippy::float_cmp, reason = "the neutral values are exact")]
fn differs(value: f32, neutral: f32) -> bool {
    value != neutral
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            position: 0,
            logit_bias: Vec::new(),
            banned: Vec::new(),
            allowed: Vec::new(),
            prompt: Vec::new(),
            generated: Vec::new(),
            logprobs: None,
        }
    }
}

/// A bias on one token's logit.
#[derive(Clone, Copy, Debug, PartialEq, Encode, Decode)]
pub struct LogitBias {
    /// The token.
    pub token: u32,
    /// What is added, -100 to 100.
    pub bias: f32,
}

/// What one row gave.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct RowOutput {
    /// Present when the row asked for a sample.
    pub sampled: Option<ScoredToken>,
    /// One entry for each of the row's `targets`.
    pub targets: Vec<TokenScore>,
}

/// A chosen token.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct ScoredToken {
    /// The token.
    pub token: u32,
    /// Present when `logprobs` was asked for.
    pub score: Option<TokenScore>,
}

/// Log-probabilities at one position, from the raw logits (before penalties and temperature).
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct TokenScore {
    /// Natural logarithm of the token's probability.
    pub logprob: f32,
    /// The token's place among all, 1 being the likeliest.
    pub rank: u32,
    /// The likeliest tokens with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}
