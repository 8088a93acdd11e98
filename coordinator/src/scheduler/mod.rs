//! Decides what every step computes.
//!
//! A value: no clock, no chance, no I/O. The caller asks for a plan, has it computed, and hands
//! back what came of it; between the two it may add and cancel. There are no phases: a sequence
//! has tokens, some of them computed, and every step spends one budget of tokens on closing gaps.
//! A new prompt, a prompt's next chunk, the token chosen last, a sequence that was preempted and
//! one that lost its blocks to a fault differ only in the size of the gap.
//!
//! It does not know text, streams, shards or time.
//!
//! Invariant: between operations [`Scheduler::check`] holds, and the rows of the plan under way
//! are `running`, one by one and in order.

mod blocks;
mod check;
mod config;
mod plan;
mod prefix;
mod queue;
pub mod request;
mod room;
mod sequence;
mod stats;
mod suspects;
#[cfg(test)]
mod tests;

pub use config::{BadConfig, SchedulerConfig};
pub use plan::BadAnswer;
pub use stats::{Counters, Stats};

use blocks::BlockPool;
use queue::Queue;
use request::{Event, EventKind, FinishReason, Refusal, Request, SequenceId};
use room::Room;
use sequence::{Rank, Sequence};
use std::collections::{BTreeMap, BTreeSet};
use topology::ids::{BlockId, Epoch, Step};
use topology::wire::{RowOutput, StepPlan};

/// Waiting sequences that one step may pass over because another computes their prefix just now.
/// A burst of equal prompts is rarely larger, and looking at each costs a lookup of its prefix.
const MAX_PASSED_OVER: usize = 64;

/// The scheduler. Single-threaded; its owner is the step loop.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: BlockPool,
    waiting: Queue,
    /// In order of service. At most `max_num_seqs`.
    running: Vec<Sequence>,
    /// Where each sequence that has not ended is to be found.
    ranks: BTreeMap<SequenceId, Rank>,
    /// Sequences that may be what kills the shards: each is run alone until it has a new token.
    suspects: BTreeSet<Rank>,
    next_arrival: u64,
    epoch: Epoch,
    next_step: Step,
    step_under_way: bool,
    /// The sequence that did not fit last, and the pool's count of releases then: until that
    /// changes, there is no use in looking again.
    blocked: Option<(SequenceId, u64)>,
    events: Vec<Event>,
    last_prefill_tokens: usize,
    last_decode_tokens: usize,
    counters: Counters,
}

impl Scheduler {
    /// A scheduler without sequences, in epoch 0.
    ///
    /// # Errors
    /// [`BadConfig`] if no step could ever be planned with these numbers.
    pub fn new(config: SchedulerConfig) -> Result<Self, BadConfig> {
        config.validate()?;
        Ok(Self {
            pool: BlockPool::new(
                config.num_blocks,
                config.block_size,
                config.enable_prefix_caching,
            ),
            config,
            waiting: Queue::default(),
            running: Vec::new(),
            ranks: BTreeMap::new(),
            suspects: BTreeSet::new(),
            next_arrival: 0,
            epoch: Epoch::default(),
            next_step: Step::default(),
            step_under_way: false,
            blocked: None,
            events: Vec::new(),
            last_prefill_tokens: 0,
            last_decode_tokens: 0,
            counters: Counters::default(),
        })
    }

    /// Takes all of `requests`, or none.
    ///
    /// # Errors
    /// [`Refusal`], in words for the client.
    pub fn add(&mut self, requests: Vec<Request>) -> Result<(), Refusal> {
        self.config.admit(&requests, &self.waiting)?;
        let ids: BTreeSet<SequenceId> = requests.iter().map(|r| r.id).collect();
        if ids.len() < requests.len() || ids.iter().any(|id| self.ranks.contains_key(id)) {
            return Err(Refusal::Invalid("a sequence of this id is being served"));
        }
        for request in requests {
            let sequence = Sequence::new(request, self.next_arrival);
            self.next_arrival += 1;
            self.ranks.insert(sequence.request.id, sequence.rank());
            self.waiting.insert(sequence);
        }
        Ok(())
    }

    /// Ends a sequence: its last event is `Finished(Cancelled)`. Blocks that the step under way
    /// writes are given back when that step is over. Says whether there was such a sequence.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        let Some(rank) = self.ranks.remove(&id) else {
            return false;
        };
        self.suspects.remove(&rank);
        self.emit(id, EventKind::Finished(FinishReason::Cancelled));
        if self.waiting.remove(rank).is_some() {
            return true;
        }
        let index = self
            .running
            .binary_search_by_key(&rank, Sequence::rank)
            .expect("a sequence with a rank waits or runs");
        if self.step_under_way {
            self.running[index].cancelled = true;
        } else {
            let mut sequence = self.running.remove(index);
            self.pool.release(&mut sequence.table);
        }
        true
    }

    /// The next step, or `None` if there is nothing to compute. Must be answered by
    /// [`Self::apply`] or ended by [`Self::reset`] before the next call.
    pub fn schedule(&mut self) -> Option<StepPlan> {
        debug_assert!(!self.step_under_way, "one step at a time");
        if self.step_under_way {
            return None;
        }
        let mut room = Room::new(&self.config);
        if let Some(suspect) = self.suspects.first().copied() {
            self.run_alone(suspect, room);
        } else if !self.continue_running(&mut room) {
            // What was just taken from one sequence is not for a new one.
            self.admit_waiting(room);
        }
        if self.running.is_empty() {
            return None;
        }
        self.count_step();
        self.step_under_way = true;
        let step = self.next_step;
        self.next_step = step.next();
        let block_size = self.config.block_size as usize;
        Some(StepPlan {
            epoch: self.epoch,
            step,
            rows: self
                .running
                .iter()
                .map(|s| plan::row(s, block_size))
                .collect(),
        })
    }

    /// Takes in what the step under way gave: one output for each row.
    ///
    /// # Errors
    /// [`BadAnswer`] if the outputs do not answer the plan; nothing is changed then, and the step
    /// is still under way.
    pub fn apply(&mut self, outputs: &[RowOutput]) -> Result<(), BadAnswer> {
        self.validate(outputs)?;
        self.step_under_way = false;
        let mut running = std::mem::take(&mut self.running);
        let mut outputs = outputs.iter();
        running.retain_mut(|sequence| {
            let output = outputs.next().expect("the outputs were counted");
            let stays = self.advance(sequence, output);
            if !stays {
                self.ranks.remove(&sequence.request.id);
                self.suspects.remove(&sequence.rank());
                self.pool.release(&mut sequence.table);
            }
            stays
        });
        self.running = running;
        Ok(())
    }

    /// A new epoch: the step under way is forgotten, all blocks lost their content, and running
    /// sequences wait in front with the tokens they have. One that killed the shards again and again,
    /// also when it ran alone, ends with `Finished(Error)`.
    pub fn reset(&mut self, epoch: Epoch) {
        self.epoch = epoch;
        self.next_step = Step::default();
        let in_step = std::mem::take(&mut self.step_under_way);
        self.pool.clear();
        for mut sequence in std::mem::take(&mut self.running) {
            if sequence.cancelled {
                continue;
            }
            self.counters.recomputations += 1;
            sequence.forget_computation();
            if !in_step || !self.suspect(&mut sequence) {
                self.waiting.insert(sequence);
            }
        }
    }

    /// What happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Whether any sequence has not ended.
    pub fn has_work(&self) -> bool {
        !self.ranks.is_empty()
    }

    /// Whether a plan is out that was not answered.
    pub fn step_under_way(&self) -> bool {
        self.step_under_way
    }

    /// Where it stands, in numbers.
    pub fn stats(&self) -> Stats {
        let gaps = self.running.iter().filter(|s| s.in_prefill());
        Stats {
            running: self.running.iter().filter(|s| !s.cancelled).count(),
            waiting: self.waiting.len(),
            waiting_tokens: self.waiting.num_tokens() + gaps.map(Sequence::gap).sum::<usize>(),
            queued: self.waiting.num_fresh(),
            queued_tokens: self.waiting.num_fresh_tokens(),
            suspects: self.suspects.len(),
            block_size: self.config.block_size as usize,
            blocks_total: self.pool.num_blocks(),
            blocks_used: self.pool.num_blocks() - self.pool.num_available(),
            blocks_evictable: self.pool.num_idle(),
            blocks_free: self.pool.num_free(),
            last_prefill_tokens: self.last_prefill_tokens,
            last_decode_tokens: self.last_decode_tokens,
            counters: self.counters,
        }
    }

    /// Gives every running sequence its share of the step, in order; where blocks or bytes run out,
    /// the last in order gives its own up. Says whether one did.
    ///
    /// A sequence never takes so much that one behind it gets nothing: all running sequences
    /// progress in every step.
    fn continue_running(&mut self, room: &mut Room) -> bool {
        let block_size = self.config.block_size;
        let rows = self.running.iter();
        let told = rows.take_while(|s| room.take_row(s, block_size)).count();
        let mut preempted = told < self.running.len();
        while told < self.running.len() {
            self.preempt_last();
        }
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            let len = sequence.len();
            if !self.pool.extend(&mut sequence.table, len) {
                // Never in favour of a lower class: the victim is behind the sequence or is it.
                self.preempt_last();
                preempted = true;
                continue;
            }
            let behind = self.running.len() - index - 1;
            let sequence = &mut self.running[index];
            sequence.scheduled = room.take_tokens(sequence, behind, &self.config);
            index += 1;
        }
        preempted
    }

    fn preempt_last(&mut self) {
        let mut victim = self
            .running
            .pop()
            .expect("who needs a block is running itself");
        self.pool.release(&mut victim.table);
        victim.forget_computation();
        self.waiting.insert(victim);
        self.counters.preemptions += 1;
    }

    /// Admits waiting sequences in order, until seats, room or blocks run out.
    ///
    /// The first that does not fit holds back those behind it, or it would never fit.
    fn admit_waiting(&mut self, mut room: Room) {
        let mut passed = None;
        let mut num_passed = 0;
        let mut computing = self.prefixes_under_way();
        while room.tokens > 0 && self.running.len() < self.config.max_num_seqs as usize {
            let Some(candidate) = self.waiting.first_after(passed) else {
                break;
            };
            let (id, rank) = (candidate.request.id, candidate.rank());
            if self.blocked == Some((id, self.pool.num_releases())) {
                break;
            }
            let hits = self.hits(candidate);
            let next = self.next_place(candidate, &hits.blocks);
            let could_hit_more = candidate.may_hit()
                && hits.blocks.len() < self.pool.blocks_for(candidate.len()) - 1;
            if could_hit_more && next.is_some_and(|place| computing.contains(&place)) {
                // Its prefix is on its way: computing it again would take longer than to wait.
                num_passed += 1;
                if num_passed == MAX_PASSED_OVER {
                    break;
                }
                passed = Some(rank);
                continue;
            }
            if !self.fits(candidate, &hits) || !room.take_row(candidate, self.config.block_size) {
                self.blocked = Some((id, self.pool.num_releases()));
                break;
            }
            let sequence = self.waiting.remove(rank).expect("the candidate waits");
            self.start(sequence, hits, &mut room);
            computing.extend(next);
        }
    }

    /// What the cache has for a waiting sequence.
    fn hits(&self, sequence: &Sequence) -> blocks::Hits {
        let tokens = sequence.tokens();
        let visible = if sequence.may_hit() {
            tokens
        } else {
            sequence::Tokens {
                prompt: &[],
                generated: &[],
            }
        };
        self.pool.lookup(sequence.request.cache_salt, visible)
    }

    /// Whether all of a waiting sequence's tokens have room, and beside it one more block for each
    /// running sequence: so it is not preempted again before it got anywhere.
    fn fits(&self, sequence: &Sequence, hits: &blocks::Hits) -> bool {
        let shared = hits.blocks.len() - hits.num_idle;
        let needed = self.pool.blocks_for(sequence.len()) - shared;
        needed + self.running.len() <= self.pool.num_available()
    }

    /// Puts a waiting sequence among the running.
    fn start(&mut self, mut sequence: Sequence, hits: blocks::Hits, room: &mut Room) {
        sequence.computed = hits.blocks.len() * self.config.block_size as usize;
        self.pool.take_hits(&hits.blocks);
        sequence.table = hits.blocks;
        let len = sequence.len();
        let fits = self.pool.extend(&mut sequence.table, len);
        assert!(fits, "a sequence is started only if it fits");
        sequence.scheduled = room.take_tokens(&sequence, 0, &self.config);
        if !sequence.started {
            sequence.started = true;
            if sequence.may_hit() {
                self.counters.prefix_cache_queries += sequence.len() as u64;
                self.counters.prefix_cache_hits += sequence.computed as u64;
            }
            let cached_tokens = u32::try_from(sequence.computed).expect("below max_model_len");
            self.emit(sequence.request.id, EventKind::Started { cached_tokens });
        }
        let index = self
            .running
            .partition_point(|other| other.rank() < sequence.rank());
        self.running.insert(index, sequence);
    }

    /// The blocks of prefixes that this step computes: who needs the same ones better waits.
    fn prefixes_under_way(&self) -> BTreeSet<u64> {
        let block_size = self.config.block_size as usize;
        let prefilling = self.running.iter().filter(|s| s.gap() > 1);
        prefilling
            .filter_map(|s| self.next_place(s, &s.table[..s.computed / block_size]))
            .collect()
    }

    /// A name for the full block that a sequence needs after the first ones.
    fn next_place(&self, sequence: &Sequence, first: &[BlockId]) -> Option<u64> {
        let salt = sequence.request.cache_salt;
        self.pool.next_place(salt, sequence.tokens(), first)
    }

    fn count_step(&mut self) {
        let prefilling = self.running.iter().filter(|s| s.in_prefill());
        self.last_prefill_tokens = prefilling.map(|s| s.scheduled).sum();
        let all: usize = self.running.iter().map(|s| s.scheduled).sum();
        self.last_decode_tokens = all - self.last_prefill_tokens;
        self.counters.steps += 1;
        self.counters.prefill_tokens += self.last_prefill_tokens as u64;
        self.counters.decode_tokens += self.last_decode_tokens as u64;
    }

    fn validate(&self, outputs: &[RowOutput]) -> Result<(), BadAnswer> {
        if !self.step_under_way {
            return Err(BadAnswer::NoStep);
        }
        if outputs.len() != self.running.len() {
            return Err(BadAnswer::RowCount {
                got: outputs.len(),
                expected: self.running.len(),
            });
        }
        for (row, (sequence, output)) in self.running.iter().zip(outputs).enumerate() {
            plan::validate(row, sequence, output, self.config.vocab_size)?;
        }
        Ok(())
    }

    /// Moves a sequence on by its step, and says whether it goes on. What was computed can be
    /// found by others from here on, also if the sequence was cancelled meanwhile.
    fn advance(&mut self, sequence: &mut Sequence, output: &RowOutput) -> bool {
        let block_size = self.config.block_size as usize;
        let before = sequence.computed / block_size;
        sequence.computed += std::mem::take(&mut sequence.scheduled);
        let computed = before..sequence.computed / block_size;
        let tokens = sequence::Tokens {
            prompt: &sequence.request.prompt,
            generated: &sequence.generated,
        };
        let salt = sequence.request.cache_salt;
        self.pool
            .register(salt, tokens, &mut sequence.table, computed);
        if sequence.cancelled {
            return false;
        }
        let id = sequence.request.id;
        if let Some(scores) = &mut sequence.scores {
            scores.extend_from_slice(&output.targets);
            if scores.len() + 1 == sequence.request.prompt.len() {
                let scores = sequence.scores.take().expect("there are scores");
                self.emit(id, EventKind::PromptScores(scores));
            }
        }
        if sequence.gap() > 0 {
            return true;
        }
        if let Some(sampled) = &output.sampled {
            let index = u32::try_from(sequence.generated.len()).expect("at most max_tokens");
            let token = sampled.token;
            let score = sampled.score.clone();
            sequence.generated.push(token);
            self.clear(sequence);
            self.emit(
                id,
                EventKind::Token {
                    index,
                    token,
                    score,
                },
            );
        }
        let end = sequence.end();
        if let Some(reason) = end {
            self.emit(id, EventKind::Finished(reason));
        }
        end.is_none()
    }

    fn emit(&mut self, id: SequenceId, kind: EventKind) {
        self.events.push(Event { id, kind });
    }
}
