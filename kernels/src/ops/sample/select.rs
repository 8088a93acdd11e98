//! The likeliest tokens without sorting them all.
//!
//! A token's key sorts by logit and then by smaller id, so keys are never equal and "the first n" is exact.

use super::whole;

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
pub(super) fn nucleus(keys: &mut [u64], weights: &[f32], target: u64) -> Cut {
    let mut sum = 0;
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
            sum += whole(weights[id(key) as usize]);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    #[test]
    fn keys_sort_by_logit_and_then_by_smaller_id() {
        let logits = [
            f32::NEG_INFINITY,
            f32::MIN,
            -1.5,
            -1e-40,
            0.0,
            1e-40,
            2.0,
            f32::MAX,
        ];
        for (a, b) in logits.iter().zip(&logits[1..]) {
            assert!(key(*a, 0) < key(*b, 9), "{a} {b}");
        }
        assert!(key(1.0, 3) > key(1.0, 4));
        assert!(key(-0.0, 3) > key(0.0, 4));
        assert_eq!(id(key(-7.5, 123_456)), 123_456);
    }

    #[test]
    fn the_nucleus_is_the_shortest_prefix_that_suffices() {
        let mut rng = Rng::new(30);
        for _ in 0..50 {
            let count = rng.within(1..3000);
            // Many of them equal.
            let weights: Vec<f32> = (0..count)
                .map(|_| rng.within(1..40) as f32 / 40.0)
                .collect();
            let mut keys: Vec<u64> = (0_u32..).zip(&weights).map(|(id, w)| key(*w, id)).collect();
            let total: u64 = weights.iter().copied().map(whole).sum();
            let target = total / 100 * rng.within(0..100) as u64;
            let cut = nucleus(&mut keys.clone(), &weights, target);
            keys.sort_unstable_by(|a, b| b.cmp(a));
            let mut sum = 0;
            let expected = keys.iter().find(|&&key| {
                sum += whole(weights[id(key) as usize]);
                sum >= target
            });
            assert_eq!(cut, Cut(*expected.unwrap()));
        }
    }
}
