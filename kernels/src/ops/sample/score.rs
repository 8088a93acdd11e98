//! Log-probabilities from the raw logits: what the model said before anyone asked for something else.

use super::select::{id, key};
use super::{ONE, Scratch, maximum, sum_pieces, weigh};
use crate::cpu::simd::Isa;
use crate::sampling::Score;

/// What all log-probabilities of a row have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sum {
    /// The largest logit.
    pub(super) max: f32,
    /// `Σ exp(l - max)`, as [`super::whole`] counts.
    pub(super) total: u64,
}

impl Sum {
    /// Log-probability of a token by its logit.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "log-probabilities are reported in f32"
    )]
    pub(super) fn logprob(self, logit: f32) -> f32 {
        let log_sum = (self.total as f64 / ONE).ln();
        (f64::from(logit) - f64::from(self.max) - log_sum) as f32
    }
}

/// Scores `token`, and the `top` likeliest tokens.
pub(super) fn score(
    isa: Isa,
    row: &[f32],
    (token, top): (u32, usize),
    scratch: &mut Scratch,
) -> Score {
    scratch.logits.clear();
    scratch
        .logits
        .extend(row.iter().map(|&logit| ordered(logit)));
    let mut max = maximum(&scratch.logits);
    if max == f32::NEG_INFINITY {
        // No logit says anything: all tokens are as likely.
        scratch.logits.fill(0.0);
        max = 0.0;
    }
    weigh(isa, scratch, max, 1.0);
    let Scratch {
        logits,
        weights,
        sums,
        keys,
        ..
    } = scratch;
    let sum = Sum {
        max,
        total: sum_pieces(isa, weights, sums),
    };
    let logprob = |token: u32| sum.logprob(logits[token as usize]);

    let own = key(logits[token as usize], token);
    let better = (0_u32..)
        .zip(logits.iter())
        .filter(|(id, logit)| key(**logit, *id) > own);
    let rank = 1 + u32::try_from(better.count()).expect("the vocabulary is below 2^32");

    keys.clear();
    if top > 0 {
        keys.extend(
            (0_u32..)
                .zip(logits.iter())
                .map(|(id, logit)| key(*logit, id)),
        );
        if top < keys.len() {
            keys.select_nth_unstable_by(top - 1, |a, b| b.cmp(a));
            keys.truncate(top);
        }
        keys.sort_unstable_by(|a, b| b.cmp(a));
    }
    let top = keys
        .iter()
        .map(|&key| (id(key), logprob(id(key))))
        .collect();
    Score {
        logprob: logprob(token),
        rank,
        top,
    }
}

/// A logit that compares: NaN as minus infinity, plus infinity as the largest number.
fn ordered(logit: f32) -> f32 {
    if logit.is_nan() {
        f32::NEG_INFINITY
    } else {
        logit.min(f32::MAX)
    }
}
