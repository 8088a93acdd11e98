//! What one step has room for: tokens to compute, and bytes in its two messages.
//!
//! A plan says everything about every row, and rank 0 answers with all scores that were asked for.
//! Both have to fit a frame, or one client's long prompt with a penalty, or many log-probabilities,
//! would end the cluster. Bytes are therefore given out like blocks: who does not fit waits, who no
//! longer fits is preempted. Sizes here are upper bounds, of the encoding and of what the decoder
//! counts; nothing is encoded.
//!
//! Invariant: a sequence that [`fits_alone`] is planned when no other runs.

use super::SchedulerConfig;
use super::request::{Request, SamplingParams};
use super::sequence::Sequence;
use topology::wire::{self, MAX_FRAME_BYTES};

/// A token or block id of 32 bits: four bytes in a row's lists, a variable length of at most five elsewhere.
const ID_BYTES: usize = 5;
/// A token with a float, as in biases and alternatives.
const PAIR_BYTES: usize = ID_BYTES + 4;
/// All fields of fixed size of a row, of its sampling or its output, lengths of lists included.
const ROW_BYTES: usize = 256;
/// The same of one score.
const SCORE_BYTES: usize = 64;
/// What stands around the rows.
const HEAD_BYTES: usize = 256;
/// Each token to compute may be a target too.
const STEP_TOKEN_BYTES: usize = 2 * ID_BYTES;

/// Most tokens of a step: their part of a plan leaves the other half to the rows.
pub(super) const MAX_STEP_TOKENS: usize = MAX_FRAME_BYTES / 2 / STEP_TOKEN_BYTES;

/// Room in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// Tokens to compute.
    tokens: usize,
    /// Of those, tokens that close a gap.
    prefill: usize,
    /// Tokens that all gaps are thought to have, if `prefill` follows from them.
    backlog: Option<usize>,
    bytes: Bytes,
}

/// Bytes of the two messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bytes {
    plan: usize,
    answer: usize,
}

impl Room {
    /// An empty step.
    pub(super) fn new(config: &SchedulerConfig) -> Self {
        let tokens = config.max_num_batched_tokens as usize;
        let plan = MAX_FRAME_BYTES - HEAD_BYTES;
        Self {
            tokens,
            prefill: tokens,
            backlog: None,
            bytes: Bytes {
                plan: plan.saturating_sub(tokens * STEP_TOKEN_BYTES),
                answer: MAX_FRAME_BYTES - HEAD_BYTES,
            },
        }
    }

    /// The same beside sequences that generate, for gaps of so many tokens in all.
    pub(super) fn mixed(self, backlog: usize, config: &SchedulerConfig) -> Self {
        Self {
            prefill: config.mixed_prefill(backlog),
            backlog: Some(backlog),
            ..self
        }
    }

    /// The gaps have so many tokens less: the cache had them.
    pub(super) fn cached(&mut self, tokens: usize, config: &SchedulerConfig) {
        if let Some(backlog) = &mut self.backlog {
            let before = config.mixed_prefill(*backlog);
            *backlog = backlog.saturating_sub(tokens);
            let less = before - config.mixed_prefill(*backlog);
            self.prefill = self.prefill.saturating_sub(less);
        }
    }

    /// Whether there is room for a sequence that waits.
    pub(super) fn admits(&self) -> bool {
        self.tokens > 0 && self.prefill > 0
    }

    /// Takes the bytes of a row with one token, or nothing and says `false`.
    pub(super) fn take_row(&mut self, sequence: &Sequence, block_size: u32) -> bool {
        let generated = sequence.num_generated();
        let Some(left) = self
            .bytes
            .less(needs(&sequence.request, generated, block_size))
        else {
            return false;
        };
        self.bytes = left;
        true
    }

    /// Takes tokens for a row whose bytes were taken: of `gap` as many as are allowed, leaving
    /// `behind` to others. At least one.
    pub(super) fn take_tokens(
        &mut self,
        sequence: &Sequence,
        behind: usize,
        config: &SchedulerConfig,
    ) -> usize {
        let mut gap = sequence.gap();
        let alternatives = sequence.request.prompt_logprobs;
        let scored = alternatives.filter(|_| sequence.scores.is_some());
        let score = scored.map(score_bytes);
        if let Some(score) = score {
            gap = gap.min(1 + self.bytes.answer / score);
        }
        let mut left = self.tokens - behind;
        if sequence.in_prefill() {
            // Who runs progresses in every step.
            left = left.min(self.prefill.max(1));
        }
        let taken = config.chunk(gap, left);
        self.tokens -= taken;
        if sequence.in_prefill() {
            self.prefill = self.prefill.saturating_sub(taken);
        }
        self.bytes.answer -= score.map_or(0, |score| score * (taken - 1));
        taken
    }
}

impl Bytes {
    fn less(self, other: Self) -> Option<Self> {
        Some(Self {
            plan: self.plan.checked_sub(other.plan)?,
            answer: self.answer.checked_sub(other.answer)?,
        })
    }
}

/// Whether a step has room for this sequence at its full length, if it runs alone.
pub(super) fn fits_alone(request: &Request, config: &SchedulerConfig) -> bool {
    let longest = needs(request, request.max_tokens as usize, config.block_size);
    Room::new(config).bytes.less(longest).is_some()
}

/// A row that computes one token after `generated`.
fn needs(request: &Request, generated: usize, block_size: u32) -> Bytes {
    let params = &request.sampling;
    let len = request.prompt.len() + generated;
    let ids = [
        len.div_ceil(block_size as usize),
        if params.penalises_prompt() {
            request.prompt.len()
        } else {
            0
        },
        if params.penalises_generated() {
            generated
        } else {
            0
        },
        params.banned_token_ids.len(),
        request.stop_token_ids.len(),
        params.allowed_token_ids.len(),
    ];
    let biases = params.logit_bias.len() * PAIR_BYTES;
    let scores = [params.logprobs, request.prompt_logprobs];
    Bytes {
        plan: ROW_BYTES + ids.iter().sum::<usize>() * ID_BYTES + biases,
        answer: ROW_BYTES + scores.into_iter().flatten().map(score_bytes).sum::<usize>(),
    }
}

fn score_bytes(alternatives: u32) -> usize {
    SCORE_BYTES + alternatives as usize * PAIR_BYTES
}

/// Which tokens a plan has to carry: a parameter that is off costs nothing.
impl SamplingParams {
    pub(super) fn penalises_prompt(&self) -> bool {
        wire::penalises_prompt(self.repetition_penalty)
    }

    pub(super) fn penalises_generated(&self) -> bool {
        let additive = [self.presence_penalty, self.frequency_penalty];
        wire::penalises_generated(self.repetition_penalty, additive)
    }
}

#[cfg(test)]
mod tests {
    use super::super::request::{EventKind, FinishReason, Refusal, SequenceId};
    use super::super::{BadConfig, Scheduler};
    use super::*;
    use topology::wire::{
        FromShard, LogitBias, Ran, RowOutput, ScoredToken, StepPlan, TokenScore, decode, encode,
    };

    /// Ids of this size take the most bytes.
    const LARGE: u32 = 199_000;

    fn config() -> SchedulerConfig {
        SchedulerConfig {
            num_blocks: 1 << 18,
            block_size: 16,
            max_num_seqs: 512,
            max_num_batched_tokens: 1 << 17,
            max_model_len: 1 << 20,
            vocab_size: 200_000,
            max_num_queued_reqs: usize::MAX,
            max_num_queued_tokens: usize::MAX,
            long_prefill_token_threshold: 0,
            max_mixed_prefill_tokens: 0,
            enable_prefix_caching: true,
            async_scheduling: true,
        }
    }

    fn request(id: u64, prompt: usize, max_tokens: u32) -> Request {
        Request {
            id: SequenceId(id),
            prompt: vec![LARGE; prompt].into(),
            sampling: SamplingParams::default(),
            max_tokens,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            priority: 0,
            cache_salt: 0,
            prompt_logprobs: None,
        }
    }

    fn score(alternatives: u32) -> TokenScore {
        TokenScore {
            logprob: -1.0,
            rank: LARGE,
            top: vec![(LARGE, -1.0); alternatives as usize],
        }
    }

    /// The longest answer that a plan asks for.
    fn answer(plan: &StepPlan) -> Vec<RowOutput> {
        let rows = plan.rows.iter();
        rows.map(|row| RowOutput {
            sampled: row.sampling.as_ref().map(|sampling| ScoredToken {
                token: LARGE,
                score: sampling.logprobs.map(score),
            }),
            targets: vec![score(row.target_alternatives); row.targets.len()],
        })
        .collect()
    }

    /// Runs all to their end; each message has to survive the wire. The most rows of a step.
    fn run(scheduler: &mut Scheduler) -> usize {
        let mut rows = 0;
        while let Some(plan) = scheduler.schedule() {
            rows = rows.max(plan.rows.len());
            let bytes = encode(&plan).expect("the plan fits a frame");
            assert!(decode::<StepPlan>(&bytes).expect("it is decoded") == plan);
            let ran = FromShard::Ran(Box::new(Ran {
                epoch: plan.epoch,
                step: plan.step,
                digest: [0xff; 16],
                outputs: answer(&plan),
                chosen: Some([0xff; 16]),
                timings: wire::StepTimings::default(),
            }));
            let bytes = encode(&ran).expect("the answer fits a frame");
            assert!(decode::<FromShard>(&bytes).expect("it is decoded") == ran);
            scheduler
                .apply(&answer(&plan))
                .expect("it answers the plan");
        }
        rows
    }

    fn finished(scheduler: &mut Scheduler) -> usize {
        let events = scheduler.take_events().into_iter();
        let length = EventKind::Finished(FinishReason::Length);
        events.filter(|event| event.kind == length).count()
    }

    #[test]
    fn penalties_over_long_prompts_that_share_blocks_do_not_overfill_a_plan() {
        let mut scheduler = Scheduler::new(config()).unwrap();
        // All share one prompt's blocks, so blocks do not bound them.
        let requests = (0..45).map(|id| {
            let mut request = request(id, 80_000, 2);
            request.sampling.repetition_penalty = 1.1;
            request.sampling.logit_bias = vec![
                LogitBias {
                    token: LARGE,
                    bias: 1.0
                };
                1000
            ];
            request
        });
        scheduler.add(requests.collect()).unwrap();
        let rows = run(&mut scheduler);
        assert!((30..45).contains(&rows), "{rows} rows in one step");
        assert_eq!(finished(&mut scheduler), 45);
    }

    #[test]
    fn who_outgrows_the_plan_is_preempted_and_finishes() {
        let mut scheduler = Scheduler::new(config()).unwrap();
        // 29 of these leave room for fewer bytes than one more token of each takes.
        let requests = (0..29).map(|id| {
            let mut request = request(id, 100_340, 3);
            request.sampling.repetition_penalty = 1.1;
            request
        });
        scheduler.add(requests.collect()).unwrap();
        assert_eq!(run(&mut scheduler), 29);
        assert!(scheduler.stats().counters.preemptions > 0);
        assert_eq!(finished(&mut scheduler), 29);
    }

    #[test]
    fn many_scores_are_asked_for_in_several_steps() {
        let mut scheduler = Scheduler::new(config()).unwrap();
        let scored = (0..3).map(|id| {
            let mut request = request(id, 100, 2);
            request.prompt_logprobs = Some(20_000);
            request
        });
        scheduler.add(scored.collect()).unwrap();
        run(&mut scheduler);
        assert!(scheduler.stats().counters.steps > 4);
        let sampled = (3..30).map(|id| {
            let mut request = request(id, 2, 1);
            request.sampling.logprobs = Some(100_000);
            request
        });
        scheduler.add(sampled.collect()).unwrap();
        let rows = run(&mut scheduler);
        assert!((10..27).contains(&rows), "{rows} rows in one step");
        assert_eq!(finished(&mut scheduler), 30);
    }

    #[test]
    fn what_no_step_has_room_for_is_refused() {
        let mut scheduler = Scheduler::new(SchedulerConfig {
            max_model_len: 1 << 22,
            ..config()
        })
        .unwrap();
        let mut long = request(0, 3_000_000, 1_000_000);
        assert_eq!(scheduler.add(vec![long.clone()]), Ok(()));
        long.id = SequenceId(1);
        long.sampling.repetition_penalty = 1.1;
        let refused = scheduler.add(vec![long]).unwrap_err();
        assert!(matches!(refused, Refusal::Invalid(_)), "{refused}");
        let config = SchedulerConfig {
            max_num_batched_tokens: u32::try_from(MAX_STEP_TOKENS + 1).unwrap(),
            ..config()
        };
        let refused = Scheduler::new(config).unwrap_err();
        assert!(
            matches!(refused, BadConfig::TooManyTokens { .. }),
            "{refused}"
        );
    }
}
