//! One sequence as the scheduler sees it: what was asked, how far it is, which blocks it holds.
//!
//! There is no "prefill" and no "decode" state. A sequence has tokens, some of them computed; a
//! step closes part of the gap, and when the gap is closed the next token is chosen. Tokens that
//! steps under way will choose count already, though only their number is known. It makes no decision
//! about others.
//!
//! Invariant: `computed + scheduled + share <= len()`, and `generated` only ever grows.

use super::request::{FinishReason, Request};
use topology::ids::BlockId;
use topology::wire::TokenScore;

/// Order of service: priority class, then arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    pub priority: i32,
    pub arrival: u64,
}

/// The tokens of a sequence, prompt and generated, as one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tokens<'a> {
    pub prompt: &'a [u32],
    pub generated: &'a [u32],
}

/// A sequence that has not ended.
#[derive(Debug)]
pub(super) struct Sequence {
    pub request: Request,
    pub arrival: u64,
    pub generated: Vec<u32>,
    /// Tokens whose keys and values are in the blocks.
    pub computed: usize,
    /// Tokens that the steps under way compute.
    pub scheduled: usize,
    /// Tokens that the steps under way choose: they follow `generated` and are not known yet.
    pub pending: usize,
    /// Tokens of the step that is being planned; 0 but while it is.
    pub share: usize,
    /// Blocks held, in order of position.
    pub table: Vec<BlockId>,
    /// Scores of prompt tokens so far; `None` when none are wanted or all are reported.
    pub scores: Option<Vec<TokenScore>>,
    /// Computation was planned at least once.
    pub started: bool,
    /// Steps with it that ended in a fault since its last new token.
    pub faults: u32,
}

impl Tokens<'_> {
    pub(super) fn len(&self) -> usize {
        self.prompt.len() + self.generated.len()
    }
}

impl<'a> Tokens<'a> {
    /// The tokens at these positions; fewer if the sequence ends before.
    pub(super) fn range(
        self,
        range: std::ops::Range<usize>,
    ) -> impl Iterator<Item = u32> + use<'a> {
        let border = self.prompt.len();
        let part = |tokens: &'a [u32], start: usize, end: usize| {
            &tokens[start.min(tokens.len())..end.min(tokens.len())]
        };
        let prompt = part(self.prompt, range.start, range.end);
        let generated = part(
            self.generated,
            range.start.saturating_sub(border),
            range.end.saturating_sub(border),
        );
        prompt.iter().chain(generated).copied()
    }
}

impl Sequence {
    pub(super) fn new(request: Request, arrival: u64) -> Self {
        Self {
            arrival,
            generated: Vec::new(),
            computed: 0,
            scheduled: 0,
            pending: 0,
            share: 0,
            table: Vec::new(),
            scores: request.prompt_logprobs.map(|_| Vec::new()),
            started: false,
            faults: 0,
            request,
        }
    }

    pub(super) fn rank(&self) -> Rank {
        Rank {
            priority: self.request.priority,
            arrival: self.arrival,
        }
    }

    pub(super) fn tokens(&self) -> Tokens<'_> {
        Tokens {
            prompt: &self.request.prompt,
            generated: &self.generated,
        }
    }

    /// Tokens that it has, those that steps under way choose included.
    pub(super) fn len(&self) -> usize {
        self.request.prompt.len() + self.num_generated()
    }

    /// Generated tokens, those that steps under way choose included.
    pub(super) fn num_generated(&self) -> usize {
        self.generated.len() + self.pending
    }

    /// Tokens that are computed when the steps under way are over.
    pub(super) fn planned(&self) -> usize {
        self.computed + self.scheduled
    }

    /// Tokens that no step so far computes.
    pub(super) fn gap(&self) -> usize {
        self.len() - self.planned()
    }

    /// Whether what remains is more than the token chosen last.
    pub(super) fn in_prefill(&self) -> bool {
        self.gap() > 1 || self.num_generated() == 0
    }

    /// Whether another step is of use: not if the steps under way choose its last token.
    pub(super) fn continues(&self) -> bool {
        let is_last = self.pending > 0 && self.num_generated() >= self.max_tokens();
        self.gap() > 0 && !is_last
    }

    fn max_tokens(&self) -> usize {
        self.request.max_tokens as usize
    }

    /// Whether the step that is being planned ends with a new token.
    pub(super) fn samples(&self) -> bool {
        self.share > 0 && self.share == self.gap() && self.request.max_tokens > 0
    }

    /// Whether the last token of the step that is being planned is chosen by the step before it.
    pub(super) fn awaits_token(&self) -> bool {
        self.pending > 0 && self.share == self.gap()
    }

    /// Prompt positions (not tokens) that the step that is being planned scores: position `p`
    /// predicts the token at `p + 1`.
    pub(super) fn scored_positions(&self) -> std::ops::Range<usize> {
        match self.scores {
            Some(_) => {
                let last = self.request.prompt.len() - 1;
                let end = self.planned() + self.share;
                self.planned().min(last)..end.min(last)
            }
            None => 0..0,
        }
    }

    /// The share becomes part of a step under way.
    pub(super) fn send_share(&mut self) {
        self.pending += usize::from(self.samples());
        self.scheduled += std::mem::take(&mut self.share);
    }

    /// Whether cached blocks may stand for computing: not while prompt tokens are to be scored, as
    /// their logits are needed.
    pub(super) fn may_hit(&self) -> bool {
        self.scores.is_none()
    }

    /// Whether, with the tokens it has now, it is at its end.
    pub(super) fn end(&self) -> Option<FinishReason> {
        let stopped = self.generated.last().is_some_and(|last| {
            self.generated.len() > self.request.min_tokens as usize
                && self.request.stop_token_ids.contains(last)
        });
        if stopped {
            Some(FinishReason::Stop)
        } else if self.generated.len() >= self.max_tokens() {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// Its blocks are gone, and with them the steps under way: everything is to be computed again.
    /// Tokens stay.
    pub(super) fn forget_computation(&mut self) {
        self.computed = 0;
        self.scheduled = 0;
        self.pending = 0;
        self.share = 0;
        self.table.clear();
        if let Some(scores) = &mut self.scores {
            scores.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_crosses_from_prompt_to_generated() {
        let tokens = Tokens {
            prompt: &[1, 2, 3],
            generated: &[4, 5],
        };
        for start in 0..7 {
            for end in start..8 {
                let whole = [1, 2, 3, 4, 5];
                let expected = &whole[start.min(5)..end.min(5)];
                assert_eq!(tokens.range(start..end).collect::<Vec<_>>(), expected);
            }
        }
    }
}
