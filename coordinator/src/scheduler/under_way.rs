//! Steps that were planned and not answered, and what their answers change.
//!
//! Two may be under way: while the shards compute one, the next is planned and sent, as if the first
//! were answered already. All that is not known of its answer is which tokens it chooses, and a row can
//! say "that one". A sequence may turn out to have ended with such a token; its row in the next step was
//! computed for nothing then, and its answer is passed over.
//!
//! Blocks may change hands while steps are under way: shards compute steps in order, so whoever gets
//! a block writes it after all who had it before. Decisions that take something from a sequence
//! (preemption, running a suspect alone) wait until nothing is under way.
//!
//! Invariant: the rows of a step are in order of service, and every row whose sequence has not ended
//! is part of that sequence's `scheduled`.

use super::plan::{self, Promise};
use super::request::EventKind;
use super::room::Room;
use super::sequence::{Rank, Sequence, Tokens};
use super::{BadAnswer, Scheduler};
use topology::wire::{RowOutput, StepPlan};

/// Why a row of the step before is found.
const CHOSEN_BEFORE: &str = "only the step before chooses a token that is not known";

/// A step that is under way: what its rows give.
#[derive(Debug)]
pub(super) struct UnderWay {
    rows: Vec<Promise>,
}

impl UnderWay {
    /// The sequences of all rows.
    pub(super) fn ranks(&self) -> impl Iterator<Item = Rank> {
        self.rows.iter().map(|row| row.rank)
    }

    /// Tokens and chosen tokens of the row of `rank`.
    pub(super) fn share_of(&self, rank: Rank) -> (usize, usize) {
        let row = self.rows.binary_search_by_key(&rank, |row| row.rank);
        row.map_or((0, 0), |row| {
            let row = &self.rows[row];
            (row.tokens, usize::from(row.samples))
        })
    }

    /// Rows and tokens.
    pub(super) fn size(&self) -> (usize, usize) {
        let tokens = self.rows.iter().map(|row| row.tokens);
        (self.rows.len(), tokens.sum())
    }
}

impl Scheduler {
    /// Whether another step may be planned now.
    pub(super) fn may_plan(&self) -> bool {
        match self.under_way.len() {
            0 => true,
            1 => self.config.async_scheduling && self.suspects.is_empty() && self.all_go_on(),
            _ => false,
        }
    }

    /// Whether all running sequences get another step without taking from each other.
    fn all_go_on(&self) -> bool {
        let mut room = Room::new(&self.config);
        let mut blocks = 0;
        for sequence in self.running.iter().filter(|s| s.continues()) {
            blocks += self.pool.blocks_for(sequence.len()) - sequence.table.len();
            if !room.take_row(sequence, self.config.block_size) {
                return false;
            }
        }
        blocks <= self.pool.num_available()
    }

    /// The shares that sequences were given become a step under way, if there are any.
    pub(super) fn send(&mut self) -> Option<StepPlan> {
        let block_size = self.config.block_size as usize;
        // Sequences and rows are in order of service, so each search goes on where the last one ended.
        let mut before = self.under_way.back().map_or(&[][..], |step| &step.rows);
        let all = before.len();
        let mut rows = Vec::with_capacity(self.running.len());
        let mut promises = Vec::with_capacity(self.running.len());
        for sequence in self.running.iter().filter(|sequence| sequence.share > 0) {
            let last_from = sequence.awaits_token().then(|| {
                let rank = sequence.rank();
                while before.split_off_first().expect(CHOSEN_BEFORE).rank != rank {}
                u32::try_from(all - before.len() - 1).expect("at most max_num_seqs rows")
            });
            rows.push(plan::row(sequence, last_from, block_size));
            promises.push(Promise::of(sequence));
        }
        if rows.is_empty() {
            return None;
        }
        self.count_step();
        self.running.iter_mut().for_each(Sequence::send_share);
        self.under_way.push_back(UnderWay { rows: promises });
        let step = self.next_step;
        self.next_step = step.next();
        Some(StepPlan {
            epoch: self.epoch,
            step,
            rows,
        })
    }

    fn count_step(&mut self) {
        self.counters.steps += 1;
        for sequence in &self.running {
            let tokens = if sequence.in_prefill() {
                &mut self.counters.prefill_tokens
            } else {
                &mut self.counters.decode_tokens
            };
            *tokens += sequence.share as u64;
        }
    }

    /// Takes in what the oldest step under way gave: one output for each row.
    ///
    /// # Errors
    /// [`BadAnswer`] if the outputs do not answer the plan; nothing is changed then, and the step
    /// is still under way.
    pub fn apply(&mut self, outputs: &[RowOutput]) -> Result<(), BadAnswer> {
        let step = self.validate(outputs)?;
        let mut running = std::mem::take(&mut self.running);
        // Both are in order of service; rows of sequences that have ended fall between.
        let mut answers = step.rows.iter().zip(outputs).peekable();
        let mut discarded = 0;
        running.retain_mut(|sequence| {
            let rank = sequence.rank();
            while let Some((row, _)) = answers.next_if(|(row, _)| row.rank < rank) {
                discarded += row.tokens as u64;
            }
            let Some((row, output)) = answers.next_if(|(row, _)| row.rank == rank) else {
                return true;
            };
            let stays = self.advance(sequence, row, output);
            if !stays {
                self.ranks.remove(&sequence.request.id);
                self.suspects.remove(&rank);
                self.pool.release(&mut sequence.table);
            }
            stays
        });
        self.counters.discarded_tokens +=
            discarded + answers.map(|(row, _)| row.tokens as u64).sum::<u64>();
        self.running = running;
        Ok(())
    }

    /// The oldest step under way, which these outputs answer.
    fn validate(&mut self, outputs: &[RowOutput]) -> Result<UnderWay, BadAnswer> {
        let step = self.under_way.front().ok_or(BadAnswer::NoStep)?;
        if outputs.len() != step.rows.len() {
            return Err(BadAnswer::RowCount {
                got: outputs.len(),
                expected: step.rows.len(),
            });
        }
        for (index, (row, output)) in step.rows.iter().zip(outputs).enumerate() {
            row.validate(index, output, self.config.vocab_size)?;
        }
        Ok(self.under_way.pop_front().expect("it was looked at"))
    }

    /// Moves a sequence on by its row, and says whether it goes on. What was computed can be
    /// found by others from here on.
    fn advance(&mut self, sequence: &mut Sequence, row: &Promise, output: &RowOutput) -> bool {
        let block_size = self.config.block_size as usize;
        let before = sequence.computed / block_size;
        sequence.computed += row.tokens;
        sequence.scheduled -= row.tokens;
        let computed = before..sequence.computed / block_size;
        let tokens = Tokens {
            prompt: &sequence.request.prompt,
            generated: &sequence.generated,
        };
        let salt = sequence.request.cache_salt;
        self.pool
            .register(salt, tokens, &mut sequence.table, computed);
        let id = sequence.request.id;
        if let Some(scores) = &mut sequence.scores {
            scores.extend_from_slice(&output.targets);
            if scores.len() + 1 == sequence.request.prompt.len() {
                let scores = sequence.scores.take().expect("there are scores");
                self.emit(id, EventKind::PromptScores(scores));
            }
        }
        if let Some(sampled) = &output.sampled {
            let index = u32::try_from(sequence.generated.len()).expect("at most max_tokens");
            let token = sampled.token;
            let score = sampled.score.clone();
            sequence.generated.push(token);
            sequence.pending -= 1;
            self.clear(sequence);
            self.emit(
                id,
                EventKind::Token {
                    index,
                    token,
                    score,
                },
            );
        } else if sequence.computed < sequence.tokens().len() {
            return true; // a prompt's chunk
        }
        let end = sequence.end();
        if let Some(reason) = end {
            self.emit(id, EventKind::Finished(reason));
        }
        end.is_none()
    }
}
