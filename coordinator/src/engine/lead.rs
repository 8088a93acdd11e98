//! How long the next step's plan may wait while the shards compute this one.
//!
//! Planned as soon as this step is sent, the next one is sure to be there in time, but whatever arrives in the
//! meantime has to wait for both. So planning waits while this step is sure to take longer: as long as the shortest of
//! the last steps of its size, less what planning and sending may take on a busy machine. Decides nothing
//! about what is planned. Invariant: a wait ends before the step is expected to, and with its answer.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Steps of each size that are remembered. Fewer say nothing.
const SAMPLES: usize = 8;

/// The least that is left of a step when the next one is planned: timers have whole milliseconds.
const MIN_LEAD: Duration = Duration::from_millis(2);

/// The part of a step that is left when the next one is planned, unless that is less.
const LEAD_PART: u32 = 4;

/// Sizes of steps, by the number of bits of their count of tokens.
const SIZES: usize = usize::BITS as usize + 1;

/// What recent steps took, and when the one under way began.
#[derive(Debug)]
pub(super) struct Lead {
    recent: [VecDeque<Duration>; SIZES],
    /// Tokens of the steps under way, oldest first.
    under_way: VecDeque<usize>,
    /// When the shards began with the oldest.
    begun: Option<Instant>,
}

impl Default for Lead {
    fn default() -> Self {
        Self {
            recent: std::array::from_fn(|_| VecDeque::with_capacity(SAMPLES)),
            under_way: VecDeque::new(),
            begun: None,
        }
    }
}

impl Lead {
    /// A step of `tokens` tokens was sent.
    pub(super) fn sent(&mut self, tokens: usize, at: Instant) {
        if self.under_way.is_empty() {
            self.begun = Some(at);
        }
        self.under_way.push_back(tokens);
    }

    /// The oldest step was answered, having taken so long.
    pub(super) fn answered(&mut self, took: Duration, at: Instant) {
        let Some(tokens) = self.under_way.pop_front() else {
            return;
        };
        let recent = &mut self.recent[size_of(tokens)];
        recent.truncate(SAMPLES - 1);
        recent.push_front(took);
        self.begun = Some(at);
    }

    /// Steps under way are given up. What steps take may be something else from now on.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Until when the next plan may wait.
    pub(super) fn plan_at(&self) -> Option<Instant> {
        let recent = &self.recent[size_of(*self.under_way.front()?)];
        let expected = recent.iter().min().filter(|_| recent.len() == SAMPLES)?;
        let lead = (*expected / LEAD_PART).max(MIN_LEAD);
        Some(self.begun? + expected.checked_sub(lead)?)
    }
}

fn size_of(tokens: usize) -> usize {
    (usize::BITS - tokens.leading_zeros()) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::now;

    const MS: Duration = Duration::from_millis(1);

    fn after(steps: &[(usize, u32)]) -> (Lead, Instant) {
        let (mut lead, mut at) = (Lead::default(), now());
        for (tokens, ms) in steps {
            lead.sent(*tokens, at);
            at += *ms * MS;
            lead.answered(*ms * MS, at);
        }
        (lead, at)
    }

    #[test]
    fn a_plan_waits_for_most_of_the_shortest_step_of_its_size() {
        let (mut lead, at) = after(&[(64, 40), (64, 50), (64, 60)].repeat(3));
        assert_eq!(lead.plan_at(), None, "none is under way");
        lead.sent(70, at);
        assert_eq!(lead.plan_at(), Some(at + 30 * MS));
        lead.sent(512, at);
        assert_eq!(lead.plan_at(), Some(at + 30 * MS), "the oldest counts");
        lead.answered(45 * MS, at + 45 * MS);
        assert_eq!(lead.plan_at(), None, "of this size, none was seen");
    }

    #[test]
    fn a_short_step_and_an_unknown_one_leave_no_time() {
        let (mut lead, at) = after(&[(1, 1)].repeat(SAMPLES));
        lead.sent(1, at);
        assert_eq!(lead.plan_at(), None);
        let (mut lead, at) = after(&[(1, 100)].repeat(SAMPLES - 1));
        lead.sent(1, at);
        assert_eq!(lead.plan_at(), None);
        lead.answered(100 * MS, at + 100 * MS);
        lead.sent(1, at + 100 * MS);
        assert_eq!(lead.plan_at(), Some(at + 175 * MS));
        lead.forget();
        assert_eq!(lead.plan_at(), None);
    }

    #[test]
    fn it_follows_steps_that_become_shorter_at_once_and_longer_ones_soon() {
        let (mut lead, mut at) = after(&[(8, 20)].repeat(SAMPLES));
        let mut wait = |ms: u32| {
            lead.sent(8, at);
            at += ms * MS;
            lead.answered(ms * MS, at);
            lead.sent(8, at);
            let wait = lead.plan_at().unwrap() - at;
            lead.under_way.clear();
            wait
        };
        assert_eq!(wait(8), 6 * MS);
        let waits: Vec<_> = (0..SAMPLES).map(|_| wait(40)).collect();
        assert_eq!(waits[..SAMPLES - 1], [6 * MS; SAMPLES - 1]);
        assert_eq!(waits[SAMPLES - 1], 30 * MS);
    }
}
