//! How soon a refused client should come back.
//!
//! A place in the queue becomes free when a request ends, so the mean time between the last ends is
//! the honest answer. Ends of long ago say nothing of now. Does not look at the queue itself: that is the
//! scheduler's.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Ends that are remembered.
const MEMORY: usize = 32;

/// Ends before this are forgotten: after a quiet hour the pauses in it are not the pace. Also the longest answer.
const RECENT: Duration = Duration::from_secs(60);

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
        let mut ends = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let age = |end: &Instant| now.saturating_duration_since(*end);
        while ends.front().is_some_and(|end| age(end) > RECENT) {
            ends.pop_front();
        }
        let Some(first) = ends.front() else {
            return 1;
        };
        let count = u32::try_from(ends.len()).unwrap_or(1);
        let interval = age(first) / count;
        let seconds = (interval + Duration::from_millis(999)).as_secs();
        seconds.clamp(1, RECENT.as_secs())
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
    }

    #[test]
    fn what_ended_long_ago_does_not_count() {
        let pace = Pace::default();
        let start = crate::clock::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for second in 0..10 {
            pace.ended(at(second));
        }
        assert_eq!(pace.retry_after(at(69)), 60, "one is left, a minute old");
        assert_eq!(pace.retry_after(at(3600)), 1);
        pace.ended(at(3600));
        pace.ended(at(3602));
        assert_eq!(pace.retry_after(at(3604)), 2);
    }
}
