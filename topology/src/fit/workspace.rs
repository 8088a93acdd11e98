//! What a rank works in beside its weights: one count, for the plan and for the shard that takes it.

use super::Sizes;
use crate::model_shape::ModelShape;
use crate::partition::Partition;

/// Logits of this many bytes per rank are enough for one piece; scoring a whole prompt takes several.
const LOGITS_BYTES: usize = 64 << 20;

/// The largest step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSize {
    /// Most tokens of a step.
    pub max_tokens: usize,
    /// Most rows of a step.
    pub max_rows: usize,
    /// Positions of the rotary table.
    pub max_positions: usize,
}

impl StepSize {
    /// That of a server with these sizes.
    pub fn of(sizes: &Sizes) -> Self {
        Self {
            max_tokens: sizes.max_num_batched_tokens as usize,
            // A row has at least one token.
            max_rows: sizes.max_num_seqs.min(sizes.max_num_batched_tokens) as usize,
            max_positions: sizes.max_model_len as usize,
        }
    }

    /// Rows whose logits are computed at a time.
    pub fn logit_rows(self, partition: &Partition) -> usize {
        let row = gathered_vocab(partition) * size_of::<f32>();
        (LOGITS_BYTES / row.max(1)).clamp(1, self.max_rows.max(1))
    }
}

/// Numbers that a decoder works in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// Activations, in the type that is computed in.
    pub computed: u64,
    /// Logits and rotary tables, in 32 bits.
    pub floats: u64,
}

impl Workspace {
    /// Of one rank, for steps of at most this size.
    pub fn of(shape: &ModelShape, partition: &Partition, size: StepSize) -> Self {
        let wide = |count: usize| count as u64;
        let heads = u64::from(partition.local_heads() + partition.local_kv_heads());
        let (hidden, head_dim) = (u64::from(shape.hidden_size), u64::from(shape.head_dim));
        // The residual stream, what a sublayer gets and what it gives; queries, keys and values, and what attention makes of
        // them; gates, what they gate, and what comes of both.
        let per_token =
            3 * hidden + 2 * heads * head_dim + 3 * u64::from(partition.local_intermediate());
        let rows = wide(size.logit_rows(partition));
        let of_others = if partition.world_size > 1 {
            u64::from(partition.vocab_width)
        } else {
            0
        };
        let per_row = wide(gathered_vocab(partition)) + of_others;
        let tables = 1 + u64::from(shape.local_rope.is_some());
        let positions = wide(size.max_positions);
        Self {
            computed: per_token
                .saturating_mul(wide(size.max_tokens))
                .saturating_add(rows.saturating_mul(hidden)),
            floats: rows
                .saturating_mul(per_row)
                .saturating_add((tables * head_dim).saturating_mul(positions)),
        }
    }

    /// In bytes, if one that is computed with has so many.
    pub fn bytes(self, computed: usize) -> u64 {
        let floats = self.floats.saturating_mul(size_of::<f32>() as u64);
        let computed = self.computed.saturating_mul(computed as u64);
        computed.saturating_add(floats)
    }
}

fn gathered_vocab(partition: &Partition) -> usize {
    partition.vocab_width as usize * partition.world_size as usize
}
