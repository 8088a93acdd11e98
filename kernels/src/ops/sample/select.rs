//! The likeliest tokens without sorting them all.
//!
//! A token's key sorts by logit and then by smaller id, so keys are never equal and "the first n" is exact.

/// Larger for a larger logit, and among equals for a smaller id. The logit is not NaN.
pub(super) fn key(logit: f32, id: u32) -> u64 {
    // Adding zero turns -0 into 0, which is its equal.
    let bits = (logit + 0.0).to_bits();
    // Negative floats sort backwards by their bits.
    let ordered = if bits >> 31 == 1 {
        !bits
    } else {
        bits | 1 << 31
    };
    u64::from(ordered) << 32 | u64::from(!id)
}

/// The id in a key.
#[expect(clippy::cast_possible_truncation, reason = "the id is the low half")]
pub(super) fn id(key: u64) -> u32 {
    !(key as u32)
}

/// The key of the last token that stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut(pub(super) u64);

impl Cut {
    /// Takes the weight from all tokens after the cut.
    pub(super) fn apply(self, logits: &[f32], weights: &mut [f32]) {
        for ((id, logit), weight) in (0_u32..).zip(logits).zip(weights) {
            *weight = if key(*logit, id) < self.0 {
                0.0
            } else {
                *weight
            };
        }
    }
}

/// Where the sum of the likeliest tokens' weights first reaches `target`. `keys` are in any order.
pub(super) fn nucleus(keys: &mut [u64], weights: &[f32], target: f64) -> Cut {
    let mut sum = 0.0;
    let mut rest = keys;
    let mut last = Cut(0);
    // Most of the probability is usually in few tokens, so sort few at first.
    let mut count = 64;
    while !rest.is_empty() {
        if count < rest.len() {
            rest.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
        }
        let (head, tail) = rest.split_at_mut(count.min(rest.len()));
        head.sort_unstable_by(|a, b| b.cmp(a));
        for &key in &*head {
            sum += f64::from(weights[id(key) as usize]);
            last = Cut(key);
            if sum >= target {
                return last;
            }
        }
        rest = tail;
        count *= 8;
    }
    last
}
