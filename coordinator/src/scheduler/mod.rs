//! Decides what every step computes.
//!
//! A value: no clock, no chance, no I/O. The caller asks for plans, has them computed, and hands
//! back what came of each, in order; in between it may add and cancel. There are no phases: a sequence
//! has tokens, some of them computed, and every step spends one budget of tokens on closing gaps.
//! A new prompt, a prompt's next chunk, the token chosen last, a sequence that was preempted and
//! one that lost its blocks to a fault differ only in the size of the gap.
//!
//! It does not know text, streams, shards or time. What a step under way changes is in
//! `under_way.rs`.
//!
//! Invariant: between operations [`Scheduler::check`] holds, and `running` is in order of service.

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
mod under_way;

pub use config::{BadConfig, SchedulerConfig};
pub use plan::BadAnswer;
pub use stats::{Counters, Stats};

use blocks::BlockPool;
use queue::Queue;
use request::{Event, EventKind, FinishReason, Refusal, Request, SequenceId};
use room::Room;
use sequence::{Rank, Sequence};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use topology::ids::{BlockId, Epoch, Step};
use topology::wire::StepPlan;
use under_way::UnderWay;

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
    /// Plans that were not answered, the oldest first.
    under_way: VecDeque<UnderWay>,
    /// The sequence that did not fit last, and the pool's count of releases then: until that
    /// changes, there is no use in looking again.
    blocked: Option<(SequenceId, u64)>,
    events: Vec<Event>,
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
            under_way: VecDeque::new(),
            blocked: None,
            events: Vec::new(),
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

    /// Ends a sequence: its last event is `Finished(Cancelled)`. What steps under way still compute for
    /// it is passed over. Says whether there was such a sequence.
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
        let mut sequence = self.running.remove(index);
        self.pool.release(&mut sequence.table);
        true
    }

    /// The next step, or `None` if there is nothing to compute before the steps under way are answered.
    /// Each is answered by [`Self::apply`], in order, or all are ended by [`Self::reset`].
    pub fn schedule(&mut self) -> Option<StepPlan> {
        if !self.may_plan() {
            return None;
        }
        if let Some(suspect) = self.suspects.first().copied() {
            self.run_alone(suspect, Room::new(&self.config));
            return self.send();
        }
        let mut room = self.room();
        if !self.continue_running(&mut room) {
            // What was just taken from one sequence is not for a new one.
            self.admit_waiting(room);
        }
        self.send()
    }

    /// A new epoch: steps under way are forgotten, all blocks lost their content, and running
    /// sequences wait in front with the tokens they have. One that killed the shards again and again,
    /// also when it ran alone, ends with `Finished(Error)`.
    pub fn reset(&mut self, epoch: Epoch) {
        self.epoch = epoch;
        self.next_step = Step::default();
        let steps = std::mem::take(&mut self.under_way);
        let in_step: BTreeSet<Rank> = steps.iter().flat_map(UnderWay::ranks).collect();
        self.pool.clear();
        for mut sequence in std::mem::take(&mut self.running) {
            self.counters.recomputations += 1;
            sequence.forget_computation();
            if !in_step.contains(&sequence.rank()) || !self.suspect(&mut sequence) {
                self.waiting.insert(sequence);
            }
        }
    }

    /// What happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Whether any sequence has not ended, or a plan was not answered.
    pub fn has_work(&self) -> bool {
        !self.ranks.is_empty() || !self.under_way.is_empty()
    }

    /// Plans that were not answered.
    pub fn steps_under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Where it stands, in numbers.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            waiting_tokens: self.backlog(),
            queued: self.waiting.num_fresh(),
            queued_tokens: self.waiting.num_fresh_tokens(),
            suspects: self.suspects.len(),
            block_size: self.config.block_size as usize,
            blocks_total: self.pool.num_blocks(),
            blocks_used: self.pool.num_blocks() - self.pool.num_available(),
            blocks_evictable: self.pool.num_idle(),
            blocks_free: self.pool.num_free(),
            counters: self.counters,
        }
    }

    /// Prompt tokens, or such as are computed again, that no step so far computes; what the cache has of them is found when they
    /// are admitted.
    fn backlog(&self) -> usize {
        let gaps = self.running.iter().filter(|s| s.in_prefill());
        self.waiting.num_tokens() + gaps.map(Sequence::gap).sum::<usize>()
    }

    /// An empty step. Where a sequence generates, it is to be a short one.
    fn room(&self) -> Room {
        let room = Room::new(&self.config);
        let generates = |s: &Sequence| s.continues() && !s.in_prefill();
        if self.running.iter().any(generates) {
            room.mixed(self.backlog(), &self.config)
        } else {
            room
        }
    }

    /// Gives every running sequence its share of the step, in order; where blocks or bytes run out,
    /// the last in order gives its own up. Says whether one did, which may not be while a step is under
    /// way.
    ///
    /// A sequence never takes so much that one behind it gets nothing: all running sequences
    /// progress in every step, but those whose last token is under way.
    fn continue_running(&mut self, room: &mut Room) -> bool {
        let block_size = self.config.block_size;
        let told = |s: &&Sequence| !s.continues() || room.take_row(s, block_size);
        let told = self.running.iter().take_while(told).count();
        let mut preempted = told < self.running.len();
        while told < self.running.len() {
            self.preempt_last();
        }
        let mut behind = self.running.iter().filter(|s| s.continues()).count();
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            index += 1;
            if !sequence.continues() {
                continue;
            }
            let len = sequence.len();
            behind -= 1;
            if !self.pool.extend(&mut sequence.table, len) {
                // Never in favour of a lower class: the victim is behind the sequence or is it.
                self.preempt_last();
                preempted = true;
                index -= 1;
                continue;
            }
            sequence.share = room.take_tokens(sequence, behind, &self.config);
        }
        preempted
    }

    fn preempt_last(&mut self) {
        debug_assert!(self.under_way.is_empty(), "its next token would be lost");
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
        while room.admits() && self.running.len() < self.config.max_num_seqs as usize {
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
        room.cached(sequence.computed, &self.config);
        sequence.share = room.take_tokens(&sequence, 0, &self.config);
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

    /// The blocks of prefixes that this step and the one under way compute: who needs the same ones
    /// better waits.
    fn prefixes_under_way(&self) -> BTreeSet<u64> {
        let block_size = self.config.block_size as usize;
        let prefilling = self.running.iter();
        let prefilling = prefilling.filter(|s| s.tokens().len() > s.computed + 1);
        prefilling
            .filter_map(|s| self.next_place(s, &s.table[..s.computed / block_size]))
            .collect()
    }

    /// A name for the full block that a sequence needs after the first ones.
    fn next_place(&self, sequence: &Sequence, first: &[BlockId]) -> Option<u64> {
        let salt = sequence.request.cache_salt;
        self.pool.next_place(salt, sequence.tokens(), first)
    }

    fn emit(&mut self, id: SequenceId, kind: EventKind) {
        self.events.push(Event { id, kind });
    }
}
