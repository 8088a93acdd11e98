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

#[cfg(test)]
mod tests {
    use crate::backend::{Backend, Heads};
    use crate::ops::rms_norm::tests::reference;
    use crate::testing::{ELEMENTS, Rng, assert_close, backends, bits, tensor, weight};

    #[test]
    fn is_the_reference_over_queries_and_keys_and_a_row_alone_gives_the_same_bits() {
        let mut rng = Rng::new(4);
        for cpu in backends() {
            for element in ELEMENTS {
                let heads = Heads {
                    local_heads: rng.within(1..5),
                    local_kv_heads: rng.within(1..4),
                    head_dim: rng.within(1..70),
                };
                let (rows, width, dim) = (rng.within(1..9), heads.qkv_width(), heads.head_dim);
                let (query, query_values) = weight(&mut rng, &cpu, (1, dim), element);
                let (key, key_values) = weight(&mut rng, &cpu, (1, dim), element);
                let before = rng.values(rows * width);
                let mut qkv = tensor(&cpu, &before, width);
                cpu.head_norm(&mut qkv, heads, (&query, &key), 1e-6);

                let queries = heads.local_heads * dim;
                let keys = queries + heads.local_kv_heads * dim;
                for (row, before) in before.chunks_exact(width).enumerate() {
                    let mut expected = reference(&before[..queries], &query_values, 1e-6);
                    expected.extend(reference(&before[queries..keys], &key_values, 1e-6));
                    expected.extend_from_slice(&before[keys..]);
                    assert_close(qkv.row(row), &expected, 1e-6, 1e-5);
                    let mut alone = tensor(&cpu, before, width);
                    cpu.head_norm(&mut alone, heads, (&query, &key), 1e-6);
                    assert_eq!(bits(alone.values()), bits(qkv.row(row)));
                }
            }
        }
    }
}
