//! Rotary position embedding of queries and keys, in place.
//!
//! With `h = head_dim / 2`, `c = table[position][i]`, `s = table[position][h + i]` for `i < h`:
//! `(x[i], x[h + i]) = (x[i] * c - x[h + i] * s, x[h + i] * c + x[i] * s)` in every head.
//! `qkv: [tokens, (local_heads + 2 * local_kv_heads) * head_dim]`, `table: [positions, head_dim]`.

use crate::backend::Heads;
use crate::cpu::{CpuBackend, CpuBatch, CpuTensor};

/// The fast path.
pub(crate) fn rope(
    cpu: &CpuBackend,
    batch: &CpuBatch,
    table: &CpuTensor,
    heads: Heads,
    qkv: &mut CpuTensor,
) {
    let width = qkv.width();
    assert_eq!(width, heads.qkv_width(), "qkv is as wide as its heads");
    assert_eq!(
        table.width(),
        heads.head_dim,
        "the table has a cosine and a sine for each pair"
    );
    assert_eq!(
        qkv.rows(),
        batch.host.num_tokens(),
        "a row of qkv for each token"
    );
    let half = heads.head_dim / 2;
    let rotated = (heads.local_heads + heads.local_kv_heads) * heads.head_dim;
    cpu.threads
        .rows(qkv.values_mut(), width, rotated, |t, row| {
            let (cos, sin) = table.row(batch.host.positions[t] as usize).split_at(half);
            for head in row[..rotated].chunks_exact_mut(heads.head_dim) {
                let (low, high) = head.split_at_mut(half);
                for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
        });
}
