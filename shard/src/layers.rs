//! The three ways a layer is cut over ranks, in Megatron's words.
//!
//! Column-parallel: each rank has some outputs, no communication. Row-parallel: each rank has some
//! inputs, and the partial sums are added over ranks. Vocab-parallel: each rank has some tokens, of
//! the embedding (summed, zero where the token is another rank's) and of the head (gathered).
//! A feed-forward layer is a column-parallel and a row-parallel one with nothing between them that meets.
//!
//! Invariant: after a row-parallel layer or the embedding all ranks hold the same bits.

use crate::comm::{Comm, CommError};
use crate::weights::Linear;
use kernels::backend::{Activation, Backend, FeedForward};

/// `out = x · weightᵀ (+ bias)` for this rank's outputs. `[rows, in] → [rows, local out]`
pub(crate) fn column_parallel<B: Backend>(
    backend: &B,
    linear: &Linear<B::Weight>,
    x: &B::Tensor,
    out: &mut B::Tensor,
) {
    backend.linear(x, &linear.weight, linear.bias.as_ref(), out);
}

/// `out = sum over ranks of x · weightᵀ (+ bias, on rank 0)`. `[rows, local in] → [rows, out]`
pub(crate) fn row_parallel<B: Backend, C: Comm<B>>(
    (backend, comm): (&B, &mut C),
    linear: &Linear<B::Weight>,
    x: &B::Tensor,
    out: &mut B::Tensor,
) -> Result<(), CommError> {
    backend.linear(x, &linear.weight, linear.bias.as_ref(), out);
    comm.all_reduce_sum(backend, out)
}

/// `out = sum over ranks of activation(x · gateᵀ) * (x · upᵀ) · downᵀ (+ biases, that of `down` on rank 0)`, each rank having
/// some columns of what lies between. `space: [rows, 2 * local between], [rows, local between]`
pub(crate) fn gated_parallel<B: Backend, C: Comm<B>>(
    (backend, comm): (&B, &mut C),
    (gate_up, activation, down): (&Linear<B::Weight>, Activation, &Linear<B::Weight>),
    x: &B::Tensor,
    space: (&mut B::Tensor, &mut B::Tensor),
    out: &mut B::Tensor,
) -> Result<(), CommError> {
    let layer = FeedForward {
        gate_up: (&gate_up.weight, gate_up.bias.as_ref()),
        activation,
        down: (&down.weight, down.bias.as_ref()),
    };
    backend.feed_forward(x, layer, space, out);
    comm.all_reduce_sum(backend, out)
}

/// `out[t] = scale * table[token t]`, whichever rank has it. `→ [tokens, hidden]`
pub(crate) fn vocab_parallel_embedding<B: Backend, C: Comm<B>>(
    (backend, comm): (&B, &mut C),
    batch: &B::DeviceBatch,
    (table, first_token, scale): (&B::Weight, u32, f32),
    out: &mut B::Tensor,
) -> Result<(), CommError> {
    backend.embed(batch, table, first_token, scale, out);
    comm.all_reduce_sum(backend, out)
}

/// Logits of all tokens, soft-capped where the model does so, padding at the end. `[rows, hidden] → part, of several ranks: [rows, vocab_width],
/// out: [rows, world_size * vocab_width]`
pub(crate) fn vocab_parallel_head<B: Backend, C: Comm<B>>(
    (backend, comm): (&B, &mut C),
    (head, soft_cap): (&B::Weight, Option<f32>),
    x: &B::Tensor,
    (part, out): (Option<&mut B::Tensor>, &mut B::Tensor),
) -> Result<(), CommError> {
    let compute = |out: &mut B::Tensor| {
        backend.linear(x, head, None, out);
        if let Some(cap) = soft_cap {
            backend.soft_cap(cap, out);
        }
    };
    let Some(part) = part else {
        // One rank's part is the whole.
        compute(out);
        return Ok(());
    };
    compute(part);
    comm.all_gather(backend, part, out)
}
