//! What a model would answer, reduced to hashing: every token and score is a pure function of all
//! tokens before it and of the sampling parameters.
//!
//! So a wrong, missing or foreign key-value entry anywhere in a prefix changes what comes after,
//! and any two ways of computing the same sequence can be compared by their tokens.

use topology::wire::{Sampling, ScoredToken, TokenScore};

/// Tokens of the vocabulary.
pub(crate) const VOCAB_SIZE: u32 = 24;

/// The empty prefix.
pub(crate) const EMPTY: u64 = 0x9E37_79B9_7F4A_7C15;

/// A seeded generator (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(EMPTY);
        mix(self.0)
    }

    /// Below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// In `from..=to`.
    pub(crate) fn between(&mut self, from: u32, to: u32) -> u32 {
        from + u32::try_from(self.below(u64::from(to - from) + 1)).expect("below to")
    }

    /// True once in `n`.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Scrambles 64 bits.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The prefix one token longer.
pub(crate) fn chain(prefix: u64, token: u32) -> u64 {
    mix(prefix.rotate_left(7) ^ u64::from(token).wrapping_mul(0xD6E8_FEB8_6659_FD93))
}

/// The prefix of all of `tokens`.
pub(crate) fn prefix_of(tokens: &[u32]) -> u64 {
    tokens
        .iter()
        .fold(EMPTY, |prefix, token| chain(prefix, *token))
}

/// The token that follows a prefix. Every parameter has a say, so that none can go missing.
pub(crate) fn choose(prefix: u64, sampling: &Sampling) -> ScoredToken {
    let mut state = mix(prefix ^ sampling.seed).wrapping_add(u64::from(sampling.position));
    for parameter in [
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
    ] {
        state = mix(state ^ u64::from(parameter.to_bits()));
    }
    state = mix(state ^ u64::from(sampling.top_k));
    for bias in &sampling.logit_bias {
        state = mix(state ^ u64::from(bias.token) ^ u64::from(bias.bias.to_bits()) << 32);
    }
    for (tag, tokens) in [(1, &sampling.prompt), (2, &sampling.generated)] {
        state = tokens
            .iter()
            .fold(state ^ tag, |state, token| chain(state, *token));
    }
    let mut rng = Rng(state);
    let token = loop {
        let token = match sampling.allowed.as_slice() {
            [] => rng.between(0, VOCAB_SIZE - 1),
            allowed => allowed[usize::try_from(rng.below(allowed.len() as u64)).expect("small")],
        };
        if !sampling.banned.contains(&token) {
            break token;
        }
    };
    ScoredToken {
        token,
        score: sampling.logprobs.map(|n| score(prefix, token, n)),
    }
}

/// The score of `target` after a prefix, with `alternatives`.
pub(crate) fn score(prefix: u64, target: u32, alternatives: u32) -> TokenScore {
    let mut rng = Rng(chain(prefix, target));
    let mut log = || -1.0 - rng.between(0, 1000) as f32 / 256.0;
    TokenScore {
        logprob: log(),
        rank: target + 1,
        top: (0..alternatives).map(|token| (token, log())).collect(),
    }
}
