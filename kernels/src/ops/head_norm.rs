//! RMSNorm over each head of the query and key parts of `qkv`, in place (Qwen3); values stay as they are.
//!
//! `qkv: [tokens, (local_heads + 2 * local_kv_heads) * head_dim]`, `weights: [head_dim]` for queries and keys.

use crate::backend::Heads;
use crate::cpu::element::by_element;
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use crate::ops::rms_norm::Normalise;

/// The fast path.
pub(crate) fn head_norm(
    cpu: &CpuBackend,
    qkv: &mut CpuTensor,
    heads: Heads,
    (query, key): (&CpuWeight, &CpuWeight),
    eps: f32,
) {
    let width = qkv.width();
    assert_eq!(width, heads.qkv_width(), "qkv is as wide as its heads");
    let Heads {
        local_heads,
        local_kv_heads,
        head_dim,
    } = heads;
    cpu.threads
        .rows(qkv.values_mut(), width, 2 * width, |_, row| {
            let (queries, rest) = row.split_at_mut(local_heads * head_dim);
            let keys = &mut rest[..local_kv_heads * head_dim];
            for (part, weight) in [(queries, query), (keys, key)] {
                by_element!(weight.element(), E => {
                    let weight = weight.vector::<E>();
                    assert_eq!(weight.len(), head_dim, "one weight for each column of a head");
                    for x in part.chunks_exact_mut(head_dim) {
                        cpu.isa.run(Normalise { x, weight, eps });
                    }
                });
            }
        });
}
