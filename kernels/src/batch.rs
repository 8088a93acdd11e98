//! What one step works on, as flat arrays that a device can take in one copy.
//!
//! Rows are sequences; each brings one or more new tokens. All rows' tokens stand one after the
//! other. Built by the shard from a plan; kernels only read it.

use crate::sampling::Last;

/// The index arrays of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids. `[tokens]`
    pub token_ids: Vec<u32>,
    /// Tokens (indices into the step) whose ids are on the device, and the requests that chose them
    /// ([`Last::Chosen`]). Only for backends that defer sampling. `[at most rows]`
    pub left: Vec<(u32, u32)>,
    /// Position of each token in its sequence. `[tokens]`
    pub positions: Vec<u32>,
    /// Where each token's key and value go: `block * block_size + offset`. `[tokens]`
    pub slots: Vec<u32>,
    /// Row r's tokens are `row_starts[r]..row_starts[r + 1]`. `[rows + 1]`
    pub row_starts: Vec<u32>,
    /// Tokens of each row's sequence after this step: the last new token's position + 1. `[rows]`
    pub context_lens: Vec<u32>,
    /// Block ids of all rows, one row after the other. `[sum of blocks]`
    pub blocks: Vec<u32>,
    /// Row r's blocks are `block_starts[r]..block_starts[r + 1]`. `[rows + 1]`
    pub block_starts: Vec<u32>,
    /// Tokens (indices into the step) whose logits are wanted, ascending. `[logit rows]`
    pub logit_tokens: Vec<u32>,
}

impl Batch {
    /// New tokens of all rows.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Sequences.
    pub fn num_rows(&self) -> usize {
        self.context_lens.len()
    }

    /// Sets the last token of each row that has one in `tokens`. `[rows]`
    pub fn set_last_tokens(&mut self, tokens: &[Option<Last>]) {
        for (end, token) in self.row_starts[1..].iter().zip(tokens) {
            match token {
                Some(Last::Token(token)) => self.token_ids[*end as usize - 1] = *token,
                Some(Last::Chosen(request)) => self.left.push((*end - 1, *request)),
                None => {}
            }
        }
    }

    /// Empties the arrays and keeps their memory.
    pub fn clear(&mut self) {
        self.token_ids.clear();
        self.left.clear();
        self.positions.clear();
        self.slots.clear();
        self.row_starts.clear();
        self.context_lens.clear();
        self.blocks.clear();
        self.block_starts.clear();
        self.logit_tokens.clear();
    }
}
