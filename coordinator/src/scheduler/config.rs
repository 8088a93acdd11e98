//! The scheduler's limits, under the names of `vllm serve`, and who may enter at all.
//!
//! Invariant: with a valid configuration every admitted sequence fits alone (S6), and every running
//! sequence has a token in every step.

use super::queue::Queue;
use super::request::{Refusal, Request};
use super::room::{MAX_STEP_TOKENS, fits_alone};

/// Steps that a backlog of prompts is spread over: where the limit of prompt tokens beside sequences that generate is less
/// than this part of it, a step holds this part. So a long prompt or a rush of them is worked off at almost full speed, and a
/// load that consists of prompts mostly loses no throughput; both cost the pauses that the limit spares others.
const BACKLOG_STEPS: usize = 8;

/// Fixed for the life of a scheduler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// KV blocks, the same on every rank.
    pub num_blocks: u32,
    /// Tokens per block.
    pub block_size: u32,
    /// Most sequences in one step.
    pub max_num_seqs: u32,
    /// Most tokens in one step; at least `max_num_seqs`.
    pub max_num_batched_tokens: u32,
    /// Longest sequence in tokens, prompt and generated.
    pub max_model_len: u32,
    /// Tokens in the vocabulary: prompts and samples are below.
    pub vocab_size: u32,
    /// Most sequences that wait and never ran; `usize::MAX` for no limit.
    pub max_num_queued_reqs: usize,
    /// Most prompt tokens of those; `usize::MAX` for no limit.
    pub max_num_queued_tokens: usize,
    /// Most tokens of one sequence in one step; 0 for no limit but the budget.
    pub long_prefill_token_threshold: u32,
    /// Most prompt tokens in a step that goes on with sequences that generate, while not many more wait; 0 for no limit but
    /// the budget. Each sequence that runs has a token all the same.
    pub max_mixed_prefill_tokens: u32,
    /// Whether computed blocks are kept for sequences that begin the same.
    pub enable_prefix_caching: bool,
    /// Whether a step is planned while the one before it is computed.
    pub async_scheduling: bool,
}

/// No step could be planned with this configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadConfig {
    /// A limit that cannot be 0 is.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// Fewer tokens than sequences.
    #[error(
        "--max-num-batched-tokens ({tokens}) must be at least --max-num-seqs ({sequences}), so that \
         every running sequence has a token in every step; raise the first or lower the second"
    )]
    FewerTokensThanSequences {
        /// `max_num_batched_tokens`.
        tokens: u32,
        /// `max_num_seqs`.
        sequences: u32,
    },
    /// The tokens of one step alone would fill its message.
    #[error("--max-num-batched-tokens ({tokens}) must be at most {limit}; lower it")]
    TooManyTokens {
        /// `max_num_batched_tokens`.
        tokens: u32,
        /// Most.
        limit: usize,
    },
}

impl SchedulerConfig {
    pub(super) fn validate(&self) -> Result<(), BadConfig> {
        let positive = [
            ("the number of KV blocks", u64::from(self.num_blocks)),
            ("--block-size", u64::from(self.block_size)),
            ("--max-num-seqs", u64::from(self.max_num_seqs)),
            ("--max-model-len", u64::from(self.max_model_len)),
            ("the vocabulary", u64::from(self.vocab_size)),
            ("--max-num-queued-reqs", self.max_num_queued_reqs as u64),
            ("--max-num-queued-tokens", self.max_num_queued_tokens as u64),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(BadConfig::Zero(name));
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(BadConfig::FewerTokensThanSequences {
                tokens: self.max_num_batched_tokens,
                sequences: self.max_num_seqs,
            });
        }
        if self.max_num_batched_tokens as usize > MAX_STEP_TOKENS {
            return Err(BadConfig::TooManyTokens {
                tokens: self.max_num_batched_tokens,
                limit: MAX_STEP_TOKENS,
            });
        }
        Ok(())
    }

    /// Longest sequence in tokens that fits: the model's length, or all blocks.
    pub fn max_sequence_tokens(&self) -> usize {
        let all_blocks = self.num_blocks as usize * self.block_size as usize;
        all_blocks.min(self.max_model_len as usize)
    }

    /// Tokens of a gap that one step closes.
    pub(super) fn chunk(&self, gap: usize, budget: usize) -> usize {
        let threshold = match self.long_prefill_token_threshold {
            0 => usize::MAX,
            threshold => threshold as usize,
        };
        gap.min(budget).min(threshold)
    }

    /// Prompt tokens that a step holds which goes on with sequences that generate, while `backlog` are to be computed.
    pub(super) fn mixed_prefill(&self, backlog: usize) -> usize {
        match self.max_mixed_prefill_tokens {
            0 => usize::MAX,
            limit => backlog.div_ceil(BACKLOG_STEPS).max(limit as usize),
        }
    }

    /// Whether these requests may join the queue.
    pub(super) fn admit(&self, requests: &[Request], queue: &Queue) -> Result<(), Refusal> {
        if requests.is_empty() {
            return Err(Refusal::Invalid("there is nothing to generate"));
        }
        for request in requests {
            self.admit_one(request)?;
        }
        let (count, tokens) = requests
            .iter()
            .fold((0usize, 0usize), |(count, tokens), r| {
                (count + 1, tokens.saturating_add(r.prompt.len()))
            });
        let too_large = |what, asked, limit| Refusal::TooLarge { what, asked, limit };
        if count > self.max_num_queued_reqs {
            return Err(too_large("sequences", count, self.max_num_queued_reqs));
        }
        if tokens > self.max_num_queued_tokens {
            return Err(too_large(
                "prompt tokens",
                tokens,
                self.max_num_queued_tokens,
            ));
        }
        if queue.num_fresh() + count > self.max_num_queued_reqs {
            return Err(Refusal::TooManyRequests {
                waiting: queue.num_fresh(),
                limit: self.max_num_queued_reqs,
            });
        }
        if queue.num_fresh_tokens().saturating_add(tokens) > self.max_num_queued_tokens {
            return Err(Refusal::TooManyTokens {
                waiting: queue.num_fresh_tokens(),
                limit: self.max_num_queued_tokens,
            });
        }
        Ok(())
    }

    fn admit_one(&self, request: &Request) -> Result<(), Refusal> {
        let prompt = request.prompt.len();
        if prompt == 0 {
            return Err(Refusal::Invalid("the prompt is empty"));
        }
        if request.max_tokens == 0 && request.prompt_logprobs.is_none() {
            return Err(Refusal::Invalid(
                "max_tokens is 0 and the prompt is not to be scored: there is nothing to compute",
            ));
        }
        if request.prompt.iter().any(|token| *token >= self.vocab_size) {
            return Err(Refusal::Invalid(
                "the prompt holds a token that is not in the vocabulary",
            ));
        }
        let limit = self.max_sequence_tokens();
        if prompt.saturating_add(request.max_tokens as usize) > limit {
            return Err(Refusal::TooLong {
                prompt,
                max_tokens: request.max_tokens,
                limit,
            });
        }
        if !fits_alone(request, self) {
            return Err(Refusal::Invalid(
                "what this request says of its next token is more than one step can carry: ask for \
                 fewer tokens, log-probabilities or biases, or leave out the penalties",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::request::{SamplingParams, SequenceId};
    use super::super::sequence::Sequence;
    use super::*;

    fn config() -> SchedulerConfig {
        SchedulerConfig {
            num_blocks: 10,
            block_size: 4,
            max_num_seqs: 4,
            max_num_batched_tokens: 16,
            max_model_len: 100,
            vocab_size: 50,
            max_num_queued_reqs: 3,
            max_num_queued_tokens: 30,
            long_prefill_token_threshold: 0,
            max_mixed_prefill_tokens: 0,
            enable_prefix_caching: true,
            async_scheduling: true,
        }
    }

    fn request(id: u64, prompt: u32, max_tokens: u32) -> Request {
        Request {
            id: SequenceId(id),
            prompt: (0..prompt).collect(),
            sampling: SamplingParams::default(),
            max_tokens,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            priority: 0,
            cache_salt: 0,
            prompt_logprobs: None,
        }
    }

    #[test]
    fn limits_are_exact_and_say_whether_to_try_again() {
        let mut queue = Queue::default();
        let admit = |requests: &[Request], queue: &Queue| config().admit(requests, queue);
        assert_eq!(
            admit(&[request(0, 30, 10)], &queue),
            Ok(()),
            "all 10 blocks"
        );
        let too_long = admit(&[request(0, 30, 11)], &queue).unwrap_err();
        assert_eq!(
            too_long,
            Refusal::TooLong {
                prompt: 30,
                max_tokens: 11,
                limit: 40
            }
        );
        let four: Vec<_> = (0..4).map(|id| request(id, 1, 1)).collect();
        assert!(!admit(&four, &queue).unwrap_err().is_temporary());
        assert_eq!(admit(&four[..3], &queue), Ok(()), "n choices count n");
        queue.insert(Sequence::new(request(9, 20, 1), 0));
        assert!(admit(&four[..3], &queue).unwrap_err().is_temporary());
        assert_eq!(admit(&four[..2], &queue), Ok(()));
        assert_eq!(admit(&[request(0, 10, 1)], &queue), Ok(()));
        let full = admit(&[request(0, 11, 1)], &queue).unwrap_err();
        assert_eq!(
            full,
            Refusal::TooManyTokens {
                waiting: 20,
                limit: 30
            }
        );
    }

    #[test]
    fn what_cannot_be_computed_is_refused() {
        let queue = Queue::default();
        let mut unknown = request(0, 4, 1);
        unknown.prompt = [3, 50].into();
        for invalid in [
            vec![],
            vec![request(0, 0, 1)],
            vec![request(0, 4, 0)],
            vec![unknown],
        ] {
            let refusal = config().admit(&invalid, &queue).unwrap_err();
            assert!(matches!(refusal, Refusal::Invalid(_)), "{refusal:?}");
        }
    }

    #[test]
    fn a_budget_below_the_seats_is_refused() {
        let config = SchedulerConfig {
            max_num_batched_tokens: 3,
            ..config()
        };
        let said = config.validate().unwrap_err().to_string();
        assert!(said.contains("--max-num-batched-tokens (3)"), "{said}");
    }
}
