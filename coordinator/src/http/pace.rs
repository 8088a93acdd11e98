//! How soon a refused client should come back.
//!
//! A place in the queue becomes free when a request ends, so the mean time between the last ends is
//! the honest answer. Does not look at the queue itself: that is the scheduler's.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Ends that are remembered.
const MEMORY: usize = 32;

/// When the last requests ended.
#[derive(Debug, Default)]
pub(super) struct Pace(Mutex<VecDeque<Instant>>);

impl Pace {
    /// A request ended.
    pub(super) fn ended(&self, now: Instant) {
        let mut ends = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ends.len() == MEMORY {
            ends.pop_front();
        }
        ends.push_back(now);
    }

    /// Seconds for `Retry-After`, 1 to 60.
    pub(super) fn retry_after(&self, now: Instant) -> u64 {
        let ends = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(&first) = ends.front() else {
            return 1;
        };
        let count = u32::try_from(ends.len()).unwrap_or(1);
        let interval = now.saturating_duration_since(first) / count;
        let seconds = (interval + Duration::from_millis(999)).as_secs();
        seconds.clamp(1, 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_the_mean_time_between_ends() {
        let pace = Pace::default();
        let start = crate::clock::now();
        assert_eq!(pace.retry_after(start), 1);
        for i in 0..100 {
            pace.ended(start + Duration::from_secs(7 * i));
        }
        assert_eq!(pace.retry_after(start + Duration::from_secs(7 * 100)), 7);
        assert_eq!(pace.retry_after(start + Duration::from_secs(100_000)), 60);
    }
}
