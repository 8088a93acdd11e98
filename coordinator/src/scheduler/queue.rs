//! Sequences that wait, in order of service.
//!
//! It only keeps order and counts; who may enter and who may leave is decided by the scheduler.
//!
//! Invariant: the counts are those of the members. Every operation is O(log n), so that a long
//! queue does not slow a step.

use super::sequence::{Rank, Sequence};
use std::collections::BTreeMap;

/// The waiting sequences.
#[derive(Debug, Default)]
pub(super) struct Queue {
    members: BTreeMap<Rank, Sequence>,
    /// Tokens to compute for them.
    num_tokens: usize,
    /// Members that never ran: what the queue's limits are about. Sequences that come back after
    /// a preemption or a fault were admitted already.
    num_fresh: usize,
    /// Prompt tokens of those.
    num_fresh_tokens: usize,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    pub(super) fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    pub(super) fn num_fresh(&self) -> usize {
        self.num_fresh
    }

    pub(super) fn num_fresh_tokens(&self) -> usize {
        self.num_fresh_tokens
    }

    pub(super) fn insert(&mut self, sequence: Sequence) {
        self.num_tokens += sequence.len();
        if !sequence.started {
            self.num_fresh += 1;
            self.num_fresh_tokens += sequence.len();
        }
        let before = self.members.insert(sequence.rank(), sequence);
        debug_assert!(before.is_none(), "arrivals are never used twice");
    }

    pub(super) fn remove(&mut self, rank: Rank) -> Option<Sequence> {
        let sequence = self.members.remove(&rank)?;
        self.num_tokens -= sequence.len();
        if !sequence.started {
            self.num_fresh -= 1;
            self.num_fresh_tokens -= sequence.len();
        }
        Some(sequence)
    }

    /// The first sequence, or the first after `rank`.
    pub(super) fn first_after(&self, rank: Option<Rank>) -> Option<&Sequence> {
        use std::ops::Bound::{Excluded, Unbounded};
        let start = rank.map_or(Unbounded, Excluded);
        Some(self.members.range((start, Unbounded)).next()?.1)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.members.values()
    }

    /// Recomputes the counts.
    pub(super) fn check(&self) -> Result<(), String> {
        let fresh = || self.iter().filter(|s| !s.started);
        let counted = [
            self.iter().map(Sequence::len).sum(),
            fresh().count(),
            fresh().map(Sequence::len).sum(),
        ];
        let kept = [self.num_tokens, self.num_fresh, self.num_fresh_tokens];
        if counted == kept {
            Ok(())
        } else {
            Err(format!(
                "S7: the queue holds {counted:?} tokens, new sequences and their tokens; \
                 it counts {kept:?}"
            ))
        }
    }
}
