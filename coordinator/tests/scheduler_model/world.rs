//! A scheduler, a shard and their clients, driven at random from one seed.
//!
//! The world keeps its own, simpler account of every sequence, from events alone, and compares.

use crate::ledger::Ledger;
use crate::oracle::{Rng, VOCAB_SIZE};
use crate::requests::{Requests, config};
use crate::shard::Shard;
use coordinator::scheduler::{Scheduler, SchedulerConfig, Stats};
use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hasher};
use std::ops::AddAssign;
use topology::ids::{Epoch, Step};
use topology::wire::{RowOutput, ScoredToken, StepPlan, TokenScore};

/// What happened, so that a test can tell whether it saw anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) operations: u64,
    pub(crate) steps: u64,
    pub(crate) finished: u64,
    pub(crate) cancelled: u64,
    pub(crate) cancelled_in_step: u64,
    pub(crate) refused: u64,
    pub(crate) resets: u64,
    pub(crate) recomputations: u64,
    pub(crate) preemptions: u64,
    pub(crate) hit_tokens: u64,
    pub(crate) bad_answers: u64,
    pub(crate) scored_prompts: u64,
    pub(crate) given_up: u64,
    /// Steps planned while another was under way.
    pub(crate) ahead: u64,
    /// Rows that left a token to the step before.
    pub(crate) left_to_shard: u64,
    /// Tokens computed for sequences that had ended.
    pub(crate) discarded: u64,
}

/// One run.
#[derive(Debug)]
pub(crate) struct World {
    rng: Rng,
    config: SchedulerConfig,
    scheduler: Scheduler,
    shard: Shard,
    requests: Requests,
    ledger: Ledger,
    /// Plans that were not answered.
    plans: VecDeque<StepPlan>,
    epoch: Epoch,
    next_step: Step,
    seen: Seen,
    trace: DefaultHasher,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let config = config(&mut rng);
        Self {
            scheduler: Scheduler::new(config.clone()).expect("the configuration is valid"),
            shard: Shard::new(config.num_blocks, config.block_size),
            requests: Requests::new(&mut rng, &config),
            ledger: Ledger::new(&config),
            config,
            plans: VecDeque::new(),
            epoch: Epoch(0),
            next_step: Step(0),
            seen: Seen::default(),
            trace: DefaultHasher::new(),
            rng,
        }
    }

    /// Drives the world for some operations, then lets it come to rest. Gives what was seen and a
    /// hash of every plan and event.
    pub(crate) fn run(mut self, operations: u64) -> (Seen, u64) {
        // Some worlds are flooded, some idle.
        let adds = self.rng.between(5, 40);
        let resets = [0, 1, 1, 8][self.rng.between(0, 3) as usize];
        while self.seen.operations < operations {
            match self.rng.between(0, 199) {
                roll if roll < adds => self.add(),
                roll if roll < adds + 12 => self.cancel(),
                roll if roll < adds + 12 + resets => self.reset(),
                _ => self.step(),
            }
        }
        self.come_to_rest();
        let counters = self.scheduler.stats().counters;
        self.seen.preemptions = counters.preemptions;
        self.seen.recomputations = counters.recomputations;
        self.seen.hit_tokens = counters.prefix_cache_hits;
        self.seen.discarded = counters.discarded_tokens;
        assert_eq!(counters.steps, self.seen.steps);
        (self.seen, self.trace.finish())
    }

    /// Nothing new comes: all that was accepted ends within bounded steps, and no block is held.
    fn come_to_rest(&mut self) {
        let longest = self.config.max_sequence_tokens() as u64;
        let bound = 2 * 3 * longest * (self.ledger.len() as u64 + 1);
        let mut operations = 0;
        while self.ledger.len() > 0 {
            self.step();
            operations += 1;
            assert!(
                operations <= bound,
                "S4: {operations} operations and no rest"
            );
        }
        // Steps of sequences that have ended may still be out.
        while self.scheduler.has_work() {
            self.step();
        }
        let stats = self.scheduler.stats();
        assert_eq!(
            (stats.running, stats.waiting, stats.waiting_tokens),
            (0, 0, 0)
        );
        assert_eq!(stats.blocks_used, 0, "K10: blocks are held at rest");
        assert!(!self.scheduler.has_work());
        assert_eq!(self.scheduler.schedule(), None);
    }

    fn add(&mut self) {
        let requests = self.requests.make(&mut self.rng);
        let expected = self.ledger.verdict(&requests, &self.config);
        let verdict = self.scheduler.add(requests.clone());
        assert_eq!(verdict, expected, "S6, S7, S9: {requests:?}");
        match verdict {
            Ok(()) => self.ledger.add(requests),
            Err(_) => self.seen.refused += 1,
        }
        self.after_operation();
    }

    fn cancel(&mut self) {
        let id = match self.ledger.any(&mut self.rng) {
            Some(id) if !self.rng.one_in(8) => id,
            _ => self.requests.any_id(&mut self.rng),
        };
        let before = self.scheduler.stats();
        let known = self.scheduler.cancel(id);
        assert_eq!(known, self.ledger.cancel(id), "S1: {id:?}");
        if !self.plans.is_empty() {
            let after = self.scheduler.stats();
            self.seen.cancelled_in_step += u64::from(before.running > after.running);
        }
        self.seen.cancelled += u64::from(known);
        self.after_operation();
    }

    /// A fault: whatever the shard did, its memory is lost.
    fn reset(&mut self) {
        for plan in std::mem::take(&mut self.plans) {
            if self.rng.one_in(2) {
                break;
            }
            self.shard.run(&plan);
        }
        self.shard.wipe();
        self.epoch = self.epoch.next();
        self.next_step = Step(0);
        self.scheduler.reset(self.epoch);
        self.ledger.forget_computation();
        let stats = self.scheduler.stats();
        assert_eq!(stats.blocks_free, stats.blocks_total, "K10 after a fault");
        assert!(self.scheduler.apply(&[]).is_err(), "a late answer");
        self.seen.resets += 1;
        self.after_operation();
    }

    /// Plans a step, or computes the oldest that is planned.
    fn step(&mut self) {
        let ahead = !self.plans.is_empty();
        if ahead && self.rng.one_in(2) || !self.schedule() {
            match self.plans.pop_front() {
                Some(plan) => self.apply(&plan),
                None => assert_eq!(
                    self.ledger.len(),
                    0,
                    "S4: sequences wait and no step is planned"
                ),
            }
        }
        self.after_operation();
    }

    /// Says whether there was a step to plan.
    fn schedule(&mut self) -> bool {
        let before = self.scheduler.stats();
        let under_way = self.plans.len();
        let Some(plan) = self.scheduler.schedule() else {
            let after = self.scheduler.stats();
            assert_eq!(before, after, "no step was planned and something changed");
            return false;
        };
        let after = self.scheduler.stats();
        assert!(
            under_way == 0 || under_way == 1 && self.config.async_scheduling,
            "{under_way} steps were under way"
        );
        self.seen.ahead += under_way as u64;
        let left = plan.rows.iter().filter(|row| row.last_from.is_some());
        self.seen.left_to_shard += left.count() as u64;
        let tokens: usize = plan.rows.iter().map(|row| row.tokens.len()).sum();
        assert!(tokens <= self.config.max_num_batched_tokens as usize, "S3");
        assert!(
            (1..=self.config.max_num_seqs as usize).contains(&plan.rows.len()),
            "S3"
        );
        assert!(
            plan.rows.len() == after.running || under_way == 1 && plan.rows.len() < after.running,
            "S4: a running sequence has no row"
        );
        let computed = |stats: &Stats| stats.counters.prefill_tokens + stats.counters.decode_tokens;
        assert_eq!(computed(&after) - computed(&before), tokens as u64);
        assert_eq!((plan.epoch, plan.step), (self.epoch, self.next_step));
        let preempted = after.counters.preemptions - before.counters.preemptions;
        if preempted == 0 {
            self.check_mixed(&before, &after, plan.rows.len());
        }
        assert!(preempted == 0 || under_way == 0);
        if before.suspects > 0 {
            assert_eq!((plan.rows.len(), under_way), (1, 0), "a suspect runs alone");
        } else if preempted > 0 {
            let left = before.running - usize::try_from(preempted).expect("small");
            assert_eq!(
                after.running, left,
                "S5: what was taken from one went to a new one"
            );
        }
        self.next_step = self.next_step.next();
        self.seen.steps += 1;
        self.ledger.step_planned(&plan);
        hash_plan(&mut self.trace, &plan);
        self.plans.push_back(plan);
        true
    }

    /// Beside sequences that generate, prompts get no more than the limit, or their part of the backlog; and a row a token.
    fn check_mixed(&self, before: &Stats, after: &Stats, rows: usize) {
        let limit = self.config.max_mixed_prefill_tokens as usize;
        let prefill = after.counters.prefill_tokens - before.counters.prefill_tokens;
        let generates = after.counters.decode_tokens > before.counters.decode_tokens;
        // One that was preempted may come back with a single token to compute: it did not generate when it was planned.
        let lost = after.counters.preemptions + after.counters.recomputations > 0;
        let came_back = lost && after.waiting < before.waiting;
        let most = before.waiting_tokens.div_ceil(8).max(limit) + rows;
        assert!(
            limit == 0 || !generates || came_back || prefill <= most as u64,
            "{prefill} prompt tokens beside sequences that generate, {rows} rows"
        );
    }

    fn apply(&mut self, plan: &StepPlan) {
        let rows = self.shard.run(plan);
        self.ledger.check_rows(&rows);
        let outputs: Vec<RowOutput> = rows.into_iter().map(|row| row.output).collect();
        if self.rng.one_in(16) {
            self.answer_badly(&outputs);
        }
        self.scheduler.apply(&outputs).expect("the answer is right");
    }

    /// A shard gone wrong is named, and changes nothing.
    fn answer_badly(&mut self, right: &[RowOutput]) {
        let mut wrong = right.to_vec();
        let row = usize::try_from(self.rng.below(right.len() as u64)).expect("small");
        match self.rng.between(0, 4) {
            0 => wrong.truncate(row),
            1 => wrong.push(RowOutput::default()),
            2 => wrong[row].targets.push(TokenScore::default()),
            3 => {
                let token = VOCAB_SIZE + self.rng.between(0, 9);
                wrong[row].sampled = Some(ScoredToken { token, score: None });
            }
            _ => {
                wrong[row].sampled = match wrong[row].sampled {
                    Some(_) => None,
                    None => Some(ScoredToken::default()),
                }
            }
        }
        let before = self.scheduler.stats();
        let said = self
            .scheduler
            .apply(&wrong)
            .expect_err("the answer is wrong");
        assert!(!said.to_string().is_empty());
        assert_eq!(
            self.scheduler.stats(),
            before,
            "a wrong answer changed something"
        );
        assert!(self.scheduler.take_events().is_empty());
        self.seen.bad_answers += 1;
    }

    fn after_operation(&mut self) {
        self.seen.operations += 1;
        for event in self.scheduler.take_events() {
            hash_event(&mut self.trace, &event);
            self.ledger.event(event, &mut self.seen);
        }
        if let Err(broken) = self.scheduler.check() {
            panic!("{broken}\n{:?}", self.scheduler);
        }
        self.ledger.check(&self.scheduler.stats());
        check_sums(&self.scheduler.stats());
    }
}

impl AddAssign for Seen {
    fn add_assign(&mut self, other: Self) {
        self.operations += other.operations;
        self.steps += other.steps;
        self.finished += other.finished;
        self.cancelled += other.cancelled;
        self.cancelled_in_step += other.cancelled_in_step;
        self.refused += other.refused;
        self.resets += other.resets;
        self.recomputations += other.recomputations;
        self.preemptions += other.preemptions;
        self.hit_tokens += other.hit_tokens;
        self.bad_answers += other.bad_answers;
        self.scored_prompts += other.scored_prompts;
        self.given_up += other.given_up;
        self.ahead += other.ahead;
        self.left_to_shard += other.left_to_shard;
        self.discarded += other.discarded;
    }
}

fn check_sums(stats: &Stats) {
    let parts = [
        stats.kv_tokens_used(),
        stats.kv_tokens_evictable(),
        stats.kv_tokens_free(),
    ];
    assert_eq!(parts.iter().sum::<usize>(), stats.kv_tokens_total(), "K1");
}

fn hash_plan(trace: &mut DefaultHasher, plan: &StepPlan) {
    trace.write_u64(plan.step.0);
    for row in &plan.rows {
        trace.write_u32(row.position);
        row.tokens.iter().for_each(|token| trace.write_u32(*token));
        row.blocks.iter().for_each(|block| trace.write_u32(block.0));
        trace.write_usize(row.targets.len());
        trace.write_u8(u8::from(row.sampling.is_some()));
    }
}

fn hash_event(trace: &mut DefaultHasher, event: &coordinator::scheduler::request::Event) {
    use coordinator::scheduler::request::EventKind;
    trace.write_u64(event.id.0);
    let (kind, value) = match &event.kind {
        EventKind::Started { cached_tokens } => (0, *cached_tokens),
        EventKind::PromptScores(_) => (1, 0),
        EventKind::Token { token, .. } => (2, *token),
        EventKind::Finished(reason) => (3, *reason as u32),
    };
    trace.write_u8(kind);
    trace.write_u32(value);
}
