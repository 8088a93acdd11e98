//! Sequences that may be what kills the shards.
//!
//! A step that ends in a fault takes all of its sequences with it, and most often none is to blame: a
//! process was killed, a device failed. But a sequence that makes its shards fail would do so again in every
//! epoch, and would end every other request with itself. So one that saw several faults without a new
//! token in between becomes a suspect. Suspects run alone, one after the other, until each has a new
//! token; one that goes on to kill the shards when alone is given up.
//!
//! Invariant: `suspects` are the sequences that have not ended and saw [`SUSPECT_AFTER`] faults since
//! their last new token.

use super::Scheduler;
use super::request::{EventKind, FinishReason};
use super::room::Room;
use super::sequence::{Rank, Sequence};

/// Faults without a new token after which a sequence runs alone. Processes that are killed from
/// outside rarely are so often before a single token comes.
pub(super) const SUSPECT_AFTER: u32 = 3;

/// Faults without a new token after which a sequence is given up: the last of them were its own.
const GIVEN_UP_AFTER: u32 = 2 * SUSPECT_AFTER;

impl Scheduler {
    /// A step with this sequence ended in a fault. Says whether it was given up; its last event is out
    /// then.
    pub(super) fn suspect(&mut self, sequence: &mut Sequence) -> bool {
        sequence.faults += 1;
        let rank = sequence.rank();
        if sequence.faults >= GIVEN_UP_AFTER {
            let id = sequence.request.id;
            self.suspects.remove(&rank);
            self.ranks.remove(&id);
            self.emit(id, EventKind::Finished(FinishReason::Error));
            return true;
        }
        if sequence.faults >= SUSPECT_AFTER {
            self.suspects.insert(rank);
        }
        false
    }

    /// This sequence got a token, and the shards live.
    pub(super) fn clear(&mut self, sequence: &mut Sequence) {
        if std::mem::take(&mut sequence.faults) >= SUSPECT_AFTER {
            self.suspects.remove(&sequence.rank());
        }
    }

    /// Plans a step of one suspect and no one else.
    pub(super) fn run_alone(&mut self, suspect: Rank, mut room: Room) {
        let (alone, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.running)
            .into_iter()
            .partition(|sequence| sequence.rank() == suspect);
        self.running = others;
        while !self.running.is_empty() {
            self.preempt_last();
        }
        self.running = alone;
        if !self.running.is_empty() {
            self.continue_running(&mut room);
            return;
        }
        let sequence = self
            .waiting
            .remove(suspect)
            .expect("a suspect waits or runs");
        let hits = self.hits(&sequence);
        let told = room.take_row(&sequence, self.config.block_size);
        debug_assert!(told, "what was admitted fits a step of its own");
        self.start(sequence, hits, &mut room);
    }

    /// The invariant.
    pub(super) fn check_suspects(&self) -> Result<(), String> {
        let all = self.running.iter().chain(self.waiting.iter());
        let found = all
            .filter(|s| s.faults >= SUSPECT_AFTER)
            .map(Sequence::rank);
        let found = found.collect();
        if self.suspects == found {
            Ok(())
        } else {
            Err(format!("suspects are {found:?}, not {:?}", self.suspects))
        }
    }
}
