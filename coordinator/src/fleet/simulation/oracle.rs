//! What the simulated model answers, reduced to hashing, and requests to ask it.
//!
//! A token is a function of all tokens before it, of the seed and of its position, and takes every
//! rank's share: a wrong, missing or foreign entry of any rank's KV memory gives another token. Knows
//! nothing of epochs or blocks; that is the point of comparing with it.

use crate::scheduler::SchedulerConfig;
use crate::scheduler::request::{FinishReason, Request, SamplingParams};
use fastrand::Rng;
use std::sync::Arc;

/// Tokens of the vocabulary; few, so that stop tokens come up.
pub(super) const VOCAB_SIZE: u32 = 64;

/// The empty prefix.
pub(super) const EMPTY: u64 = 0x9E37_79B9_7F4A_7C15;

/// The prefix one token longer.
pub(super) fn chain(prefix: u64, token: u32) -> u64 {
    mix(prefix.rotate_left(7) ^ u64::from(token + 1).wrapping_mul(0xD6E8_FEB8_6659_FD93))
}

/// What a rank adds to the sum for a row whose tokens it remembers as `prefix`.
pub(super) fn share(prefix: u64, rank: u32) -> u64 {
    mix(prefix ^ u64::from(rank + 1).wrapping_mul(EMPTY))
}

/// The token at `position`, from the sum of all shares.
pub(super) fn choose(sum: u64, seed: u64, position: u32) -> u32 {
    let hash = mix(sum ^ mix(seed ^ u64::from(position)));
    u32::try_from(hash % u64::from(VOCAB_SIZE)).expect("below the vocabulary's size")
}

/// The whole answer to a request, computed at once and undisturbed.
pub(super) fn answer(request: &Request, world_size: u32) -> (Vec<u32>, FinishReason) {
    let mut prefix = request.prompt.iter().fold(EMPTY, |p, t| chain(p, *t));
    let mut tokens = Vec::new();
    loop {
        let shares = (0..world_size).map(|rank| share(prefix, rank));
        let sum = shares.fold(0, u64::wrapping_add);
        let position = request.prompt.len() + tokens.len();
        let position = u32::try_from(position).expect("sequences are short");
        let token = choose(sum, request.sampling.seed, position);
        prefix = chain(prefix, token);
        tokens.push(token);
        if request.stop_token_ids.contains(&token) {
            return (tokens, FinishReason::Stop);
        }
        if tokens.len() == request.max_tokens as usize {
            return (tokens, FinishReason::Length);
        }
    }
}

/// A pool in which sequences push each other out, and steps that take prompts in chunks.
pub(super) fn config(rng: &mut Rng) -> SchedulerConfig {
    let max_num_seqs = rng.u32(1..=8);
    SchedulerConfig {
        num_blocks: rng.u32(24..=64),
        block_size: rng.u32(2..=6),
        max_num_seqs,
        max_num_batched_tokens: max_num_seqs + rng.u32(4..=60),
        max_model_len: 96,
        vocab_size: VOCAB_SIZE,
        max_num_queued_reqs: usize::MAX,
        max_num_queued_tokens: usize::MAX,
        long_prefill_token_threshold: [0, 0, 7][rng.usize(0..3)],
        max_mixed_prefill_tokens: [0, 1, 7][rng.usize(0..3)],
        enable_prefix_caching: rng.u32(0..6) > 0,
        async_scheduling: rng.u32(0..4) > 0,
    }
}

/// One request, or several choices over one prompt, without names. Prompts begin alike.
pub(super) fn requests(rng: &mut Rng, config: &SchedulerConfig) -> Vec<Request> {
    let longest = config.max_sequence_tokens();
    let common = rng.usize(0..=longest / 3);
    let own = rng.usize(1..=longest / 4);
    let beginning = (0..).map(|i| (i * 7) % VOCAB_SIZE).take(common);
    let end = (0..own).map(|_| rng.u32(0..VOCAB_SIZE));
    let prompt: Arc<[u32]> = beginning.chain(end.collect::<Vec<_>>()).collect();
    let left = u32::try_from(longest - prompt.len()).expect("sequences are short");
    let max_tokens = rng.u32(1..=left.min(48));
    let stops = rng.usize(0..=2) / 2;
    let choices = [1, 1, 1, 3][rng.usize(0..4)];
    let mut one = || Request {
        id: crate::scheduler::request::SequenceId(0),
        prompt: Arc::clone(&prompt),
        sampling: SamplingParams {
            seed: rng.u64(..),
            ..SamplingParams::default()
        },
        max_tokens,
        min_tokens: 0,
        stop_token_ids: (0..stops).map(|_| rng.u32(0..VOCAB_SIZE)).collect(),
        priority: rng.i32(0..2),
        cache_salt: 0,
        prompt_logprobs: None,
    };
    (0..choices).map(|_| one()).collect()
}

/// Scrambles 64 bits (splitmix64's finalizer).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
