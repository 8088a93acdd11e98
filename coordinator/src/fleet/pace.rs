//! How long a step may take before its rank is taken for stuck.
//!
//! A link that is silent and a process that ended are heard of otherwise; this is for a device that
//! hangs while its process lives. The deadline follows what steps took so far, with a large
//! margin, since a false alarm costs a recomputation and a missed one costs every user's patience.
//! Invariant: never above the operator's own limit, and exactly that until enough steps were seen.

use std::time::Duration;

/// Steps before a deadline below the operator's is believed: the first ones touch cold memory.
const WARM_UP: u32 = 16;

/// No deadline is shorter: a machine with more work than cores may pause a process that long.
const FLOOR: Duration = Duration::from_secs(2);

/// How much slower than the slowest step so far, per token, a step may be.
const MARGIN: u32 = 10;

/// What steps took so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    steps: u32,
    /// Longest time per token of a step.
    slowest: Duration,
    /// Longest time of a step.
    longest: Duration,
}

impl Pace {
    /// A step of `tokens` tokens took `took`.
    pub(super) fn record(&mut self, tokens: usize, took: Duration) {
        self.steps = self.steps.saturating_add(1);
        self.slowest = self.slowest.max(took / divisor(tokens));
        self.longest = self.longest.max(took);
    }

    /// How long a step of `tokens` tokens may take, at most `limit`.
    pub(super) fn limit(&self, tokens: usize, limit: Duration) -> Duration {
        if self.steps < WARM_UP {
            return limit;
        }
        let by_token = self.slowest.saturating_mul(divisor(tokens));
        let expected = by_token.max(self.longest);
        FLOOR
            .saturating_add(expected.saturating_mul(MARGIN))
            .min(limit)
    }
}

fn divisor(tokens: usize) -> u32 {
    u32::try_from(tokens.max(1)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(300);
    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_operators_limit_holds_until_steps_were_seen_and_above_all() {
        let mut pace = Pace::default();
        for _ in 0..WARM_UP {
            assert_eq!(pace.limit(1, LIMIT), LIMIT);
            pace.record(1, MS);
        }
        assert_eq!(pace.limit(1, LIMIT), FLOOR + 10 * MS);
        assert_eq!(pace.limit(1, FLOOR / 2), FLOOR / 2);
    }

    #[test]
    fn a_long_prefill_is_no_sickness() {
        let mut pace = Pace::default();
        // Decode steps of one token at 1 ms, then a prompt of 8,192 tokens in one step.
        for _ in 0..100 {
            pace.record(1, MS);
        }
        assert!(pace.limit(8192, LIMIT) > 80 * Duration::from_secs(1));
        // After a step of 10 s even a single token may take long: contexts grow.
        pace.record(512, 10_000 * MS);
        assert!(pace.limit(1, LIMIT) >= Duration::from_secs(100));
    }

    #[test]
    fn nothing_overflows() {
        let mut pace = Pace::default();
        for _ in 0..20 {
            pace.record(0, Duration::MAX);
        }
        assert_eq!(pace.limit(usize::MAX, LIMIT), LIMIT);
    }
}
