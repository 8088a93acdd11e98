//! From a sequence's share of a step to its row of the plan, and what answers such a row may have.
//!
//! Pure translation: how many tokens are computed and in which blocks is decided before.
//!
//! Invariant: a row says everything; the same sequence at the same length gives the same sampling
//! parameters, whatever happened to it before.

use super::sequence::{Rank, Sequence};
use topology::wire::{PlanRow, RowOutput, Sampling};

/// Rank 0's outputs do not answer the plan; its epoch has to end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAnswer {
    /// Nothing was asked.
    #[error("outputs came without a step under way")]
    NoStep,
    /// Not one output for each row.
    #[error("{got} outputs came for {expected} rows")]
    RowCount {
        /// Outputs.
        got: usize,
        /// Rows of the plan.
        expected: usize,
    },
    /// A row that samples has no token, or one that does not has one.
    #[error("row {row}: a token was {}asked for", if *.asked { "" } else { "not " })]
    Token {
        /// Index into the plan.
        row: usize,
        /// Whether the row samples.
        asked: bool,
    },
    /// A token outside the vocabulary.
    #[error("row {row}: token {token} is not in a vocabulary of {vocab_size}")]
    UnknownToken {
        /// Index into the plan.
        row: usize,
        /// What came.
        token: u32,
        /// Tokens in the vocabulary.
        vocab_size: u32,
    },
    /// A log-probability is missing or was not asked for.
    #[error("row {row}: {got} scores came, {expected} were asked for")]
    Scores {
        /// Index into the plan.
        row: usize,
        /// Scores that came.
        got: usize,
        /// Scores the row asked for.
        expected: usize,
    },
}

/// A row of a step under way: what the sequence gets when it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Promise {
    /// Whose it is. The sequence may end before the answer comes.
    pub rank: Rank,
    /// Tokens it computes.
    pub tokens: usize,
    /// Whether a token is chosen after them.
    pub samples: bool,
    /// Whether that comes with its score.
    scored: bool,
    /// Prompt tokens that are scored.
    targets: usize,
}

/// The row for the share of `sequence` in a step. `last_from` is its row in the step before, where that
/// chooses the last token.
pub(super) fn row(sequence: &Sequence, last_from: Option<u32>, block_size: usize) -> PlanRow {
    let start = sequence.planned();
    let end = start + sequence.share;
    let tokens = sequence.tokens();
    let scored = sequence.scored_positions();
    let unknown = last_from.map(|_| 0);
    PlanRow {
        tokens: tokens.range(start..end).chain(unknown).collect(),
        position: narrow(start),
        blocks: sequence.table[..end.div_ceil(block_size)].to_vec(),
        sampling: sequence.samples().then(|| Box::new(sampling(sequence))),
        target_alternatives: if scored.is_empty() {
            0
        } else {
            sequence.request.prompt_logprobs.unwrap_or(0)
        },
        targets: tokens.range(scored.start + 1..scored.end + 1).collect(),
        last_from,
    }
}

/// How the token after the last one is chosen.
fn sampling(sequence: &Sequence) -> Sampling {
    let request = &sequence.request;
    let params = &request.sampling;
    let mut banned = params.banned_token_ids.clone();
    if sequence.num_generated() < request.min_tokens as usize {
        banned.extend_from_slice(&request.stop_token_ids);
    }
    let copy_if = |wanted: bool, tokens: &[u32]| {
        if wanted { tokens.to_vec() } else { Vec::new() }
    };
    Sampling {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        repetition_penalty: params.repetition_penalty,
        seed: params.seed,
        position: narrow(sequence.len()),
        logit_bias: params.logit_bias.clone(),
        banned,
        allowed: params.allowed_token_ids.clone(),
        prompt: copy_if(params.penalises_prompt(), &request.prompt),
        generated: copy_if(params.penalises_generated(), &sequence.generated),
        logprobs: params.logprobs,
    }
}

impl Promise {
    /// What a sequence's share of a step gives.
    pub(super) fn of(sequence: &Sequence) -> Self {
        Self {
            rank: sequence.rank(),
            tokens: sequence.share,
            samples: sequence.samples(),
            scored: sequence.request.sampling.logprobs.is_some(),
            targets: sequence.scored_positions().len(),
        }
    }

    /// Whether `output` can be the answer to row number `row`, which this is.
    pub(super) fn validate(
        &self,
        row: usize,
        output: &RowOutput,
        vocab_size: u32,
    ) -> Result<(), BadAnswer> {
        let asked = self.samples;
        if output.sampled.is_some() != asked {
            return Err(BadAnswer::Token { row, asked });
        }
        let mut expected = self.targets;
        let mut got = output.targets.len();
        if let Some(sampled) = &output.sampled {
            if sampled.token >= vocab_size {
                return Err(BadAnswer::UnknownToken {
                    row,
                    token: sampled.token,
                    vocab_size,
                });
            }
            if got == expected {
                expected = usize::from(self.scored);
                got = usize::from(sampled.score.is_some());
            }
        }
        if got == expected {
            Ok(())
        } else {
            Err(BadAnswer::Scores { row, got, expected })
        }
    }
}

fn narrow(tokens: usize) -> u32 {
    u32::try_from(tokens).expect("a sequence is no longer than max_model_len")
}

#[cfg(test)]
mod tests {
    use super::super::request::{Request, SamplingParams, SequenceId};
    use super::*;
    use topology::ids::BlockId;
    use topology::wire::{ScoredToken, TokenScore};

    fn sequence(change: impl FnOnce(&mut Request)) -> Sequence {
        let mut request = Request {
            id: SequenceId(1),
            prompt: (10..20).collect(),
            sampling: SamplingParams::default(),
            max_tokens: 5,
            min_tokens: 2,
            stop_token_ids: vec![3],
            priority: 0,
            cache_salt: 0,
            prompt_logprobs: None,
        };
        change(&mut request);
        let mut sequence = Sequence::new(request, 0);
        sequence.table = (0..4).map(BlockId).collect();
        sequence
    }

    #[test]
    fn chunks_of_a_scored_prompt_have_each_target_once() {
        for chunk in 1..=10 {
            let mut sequence = sequence(|r| r.prompt_logprobs = Some(2));
            let (mut tokens, mut targets) = (Vec::new(), Vec::new());
            while sequence.computed < 10 {
                sequence.share = chunk.min(sequence.gap());
                let row = row(&sequence, None, 4);
                assert_eq!(row.position as usize, sequence.computed);
                assert!(row.targets.len() <= row.tokens.len());
                assert_eq!(
                    row.blocks.len(),
                    (row.position as usize + row.tokens.len()).div_ceil(4)
                );
                assert_eq!(
                    row.sampling.is_some(),
                    sequence.computed + sequence.share == 10
                );
                tokens.extend(row.tokens);
                targets.extend(row.targets);
                sequence.computed += std::mem::take(&mut sequence.share);
            }
            assert_eq!(tokens, (10..20).collect::<Vec<_>>());
            assert_eq!(targets, (11..20).collect::<Vec<_>>());
        }
    }

    #[test]
    fn penalties_carry_the_tokens_they_need_and_no_others() {
        let tokens_of = |change: fn(&mut Request)| {
            let mut sequence = sequence(change);
            sequence.generated = vec![7, 8];
            (sequence.computed, sequence.share) = (11, 1);
            let sampling = row(&sequence, None, 4).sampling.unwrap();
            assert_eq!(sampling.position, 12);
            assert!(sampling.banned.is_empty(), "two tokens were generated");
            (sampling.prompt.len(), sampling.generated)
        };
        assert_eq!(tokens_of(|_| ()), (0, vec![]));
        assert_eq!(
            tokens_of(|r| r.sampling.presence_penalty = 0.5),
            (0, vec![7, 8])
        );
        assert_eq!(
            tokens_of(|r| r.sampling.frequency_penalty = 0.5),
            (0, vec![7, 8])
        );
        assert_eq!(
            tokens_of(|r| r.sampling.repetition_penalty = 1.5),
            (10, vec![7, 8])
        );
    }

    #[test]
    fn stop_tokens_are_banned_until_min_tokens() {
        let mut sequence = sequence(|r| r.sampling.banned_token_ids = vec![1]);
        sequence.share = 10;
        assert_eq!(row(&sequence, None, 4).sampling.unwrap().banned, [1, 3]);
    }

    #[test]
    fn a_row_that_awaits_a_token_has_its_place_and_what_follows_from_its_number() {
        let mut sequence = sequence(|r| r.sampling.presence_penalty = 0.5);
        // The prompt is computed and one token known; a step under way computes that and chooses another.
        sequence.generated = vec![7];
        (sequence.computed, sequence.scheduled, sequence.pending) = (10, 1, 1);
        assert!(sequence.continues());
        sequence.share = 1;
        assert!(sequence.awaits_token());
        let row = row(&sequence, Some(5), 4);
        assert_eq!(
            (row.tokens, row.position, row.last_from),
            (vec![0], 11, Some(5))
        );
        let sampling = row.sampling.unwrap();
        assert_eq!((sampling.position, sampling.generated), (12, vec![7]));
        assert!(sampling.banned.is_empty(), "there will be two tokens");
        sequence.request.max_tokens = 2;
        assert!(!sequence.continues(), "its last token is under way");
    }

    #[test]
    fn answers_that_do_not_fit_the_row_are_named() {
        let mut sequence = sequence(|r| r.sampling.logprobs = Some(0));
        sequence.share = 10;
        let promise = Promise::of(&sequence);
        let answer = |token, score| RowOutput {
            sampled: Some(ScoredToken { token, score }),
            targets: Vec::new(),
        };
        let score = Some(TokenScore::default());
        let check = |output: &RowOutput| promise.validate(0, output, 50);
        assert_eq!(check(&answer(49, score.clone())), Ok(()));
        assert!(matches!(
            check(&answer(50, score)),
            Err(BadAnswer::UnknownToken { .. })
        ));
        assert!(matches!(
            check(&answer(1, None)),
            Err(BadAnswer::Scores { .. })
        ));
        let nothing = check(&RowOutput::default()).unwrap_err();
        assert_eq!(nothing.to_string(), "row 0: a token was asked for");
    }
}
