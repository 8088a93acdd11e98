//! Random requests: prompts with common beginnings, every kind of parameter, few of each.

use crate::oracle::{Rng, VOCAB_SIZE};
use coordinator::scheduler::SchedulerConfig;
use coordinator::scheduler::request::{Request, SamplingParams, SequenceId};
use std::sync::Arc;
use topology::wire::LogitBias;

/// A pool so small that preemption and eviction are daily business.
pub(crate) fn config(rng: &mut Rng) -> SchedulerConfig {
    let block_size = rng.between(1, 6);
    let max_num_seqs = rng.between(1, 8);
    SchedulerConfig {
        num_blocks: rng.between(8, 40),
        block_size,
        max_num_seqs,
        max_num_batched_tokens: max_num_seqs + rng.between(0, 40),
        max_model_len: rng.between(12, 120),
        vocab_size: VOCAB_SIZE,
        max_num_queued_reqs: [2, 5, 12, usize::MAX][rng.between(0, 3) as usize],
        max_num_queued_tokens: [60, 300, usize::MAX][rng.between(0, 2) as usize],
        long_prefill_token_threshold: [0, 0, 1, 7][rng.between(0, 3) as usize],
        max_mixed_prefill_tokens: [0, 0, 1, 7][rng.between(0, 3) as usize],
        enable_prefix_caching: !rng.one_in(6),
        async_scheduling: !rng.one_in(4),
    }
}

/// Makes requests that suit a configuration, and now and then one that does not.
#[derive(Debug)]
pub(crate) struct Requests {
    beginnings: Vec<Vec<u32>>,
    longest: u32,
    next_id: u64,
    priorities: i32,
}

impl Requests {
    pub(crate) fn new(rng: &mut Rng, config: &SchedulerConfig) -> Self {
        let longest = u32::try_from(config.max_sequence_tokens()).expect("small");
        let beginnings = (0..3).map(|_| {
            let len = rng.between(1, longest);
            tokens(rng, len)
        });
        Self {
            beginnings: beginnings.collect(),
            longest,
            next_id: 0,
            priorities: i32::from(rng.one_in(2)),
        }
    }

    /// One request, or several choices over one prompt.
    pub(crate) fn make(&mut self, rng: &mut Rng) -> Vec<Request> {
        let first = self.one(rng);
        let choices = if rng.one_in(4) { rng.between(2, 4) } else { 1 };
        let mut all = vec![first];
        while all.len() < choices as usize {
            let mut choice = all[0].clone();
            choice.id = self.id();
            choice.sampling.seed = rng.next();
            all.push(choice);
        }
        all
    }

    /// The last name that was used, or one that was not.
    pub(crate) fn any_id(&self, rng: &mut Rng) -> SequenceId {
        SequenceId(rng.below(self.next_id + 1))
    }

    fn id(&mut self) -> SequenceId {
        self.next_id += 1;
        SequenceId(self.next_id - 1)
    }

    fn one(&mut self, rng: &mut Rng) -> Request {
        let prompt = self.prompt(rng);
        let left = self
            .longest
            .saturating_sub(u32::try_from(prompt.len()).expect("small"));
        let too_long = rng.one_in(60);
        let max_tokens = rng.between(1, left.clamp(1, 40)) + if too_long { left } else { 0 };
        let scored = rng.one_in(8);
        Request {
            id: self.id(),
            prompt,
            sampling: sampling(rng),
            max_tokens: if scored && rng.one_in(3) {
                0
            } else {
                max_tokens
            },
            min_tokens: if rng.one_in(3) {
                rng.between(0, max_tokens)
            } else {
                0
            },
            stop_token_ids: (0..rng.between(0, 2)).map(|_| token(rng)).collect(),
            priority: self.priorities * rng.between(0, 2).cast_signed(),
            cache_salt: rng.below(6) / 4,
            prompt_logprobs: scored.then(|| rng.between(0, 2)),
        }
    }

    /// Mostly a common beginning with an end of its own.
    fn prompt(&self, rng: &mut Rng) -> Arc<[u32]> {
        let beginning = &self.beginnings[rng.between(0, 2) as usize];
        let shared = rng.below(beginning.len() as u64 + 1);
        let mut prompt = beginning[..usize::try_from(shared).expect("small")].to_vec();
        let own = match rng.between(0, 3) {
            0 => 0,
            1 => rng.between(0, 3),
            _ => rng.between(0, self.longest / 2),
        };
        prompt.extend(tokens(rng, own));
        prompt.truncate(self.longest as usize - 1);
        if prompt.is_empty() {
            prompt.push(token(rng));
        }
        prompt.into()
    }
}

fn sampling(rng: &mut Rng) -> SamplingParams {
    let mut params = SamplingParams {
        temperature: rng.between(0, 2) as f32,
        seed: rng.next(),
        ..SamplingParams::default()
    };
    match rng.between(0, 12) {
        0 => params.top_k = rng.between(1, 9),
        1 => params.top_p = 0.5,
        2 => params.min_p = 0.25,
        3 => params.presence_penalty = 0.5,
        4 => params.frequency_penalty = -0.5,
        5 => params.repetition_penalty = 1.5,
        6 => params.logit_bias.push(LogitBias {
            token: token(rng),
            bias: 2.0,
        }),
        7 => params.banned_token_ids.extend(tokens(rng, 3)),
        8 => params.allowed_token_ids.extend(0..10),
        9 => params.logprobs = Some(rng.between(0, 3)),
        _ => {}
    }
    params
}

fn tokens(rng: &mut Rng, len: u32) -> Vec<u32> {
    (0..len).map(|_| token(rng)).collect()
}

fn token(rng: &mut Rng) -> u32 {
    rng.between(0, VOCAB_SIZE - 1)
}
