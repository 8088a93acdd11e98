//! RMSNorm over each head of the query and key parts of `qkv`, in place (Qwen3, Gemma 3); values stay as they are.
//!
//! `qkv: [tokens, (local_heads + 2 * local_kv_heads) * head_dim]`, `weights: [head_dim]` for queries and keys.

use crate::backend::{Heads, Norm};
use crate::cpu::element::by_element;
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use crate::ops::rms_norm::Normalise;

/// The fast path.
pub(crate) fn head_norm(
    cpu: &CpuBackend,
    qkv: &mut CpuTensor,
    heads: Heads,
    (query, key): (&CpuWeight, &CpuWeight),
    norm: Norm,
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
                        cpu.isa.run(Normalise { x, weight, norm });
                    }
                });
            }
        });
}

/// The kernel of `head_norm.cu`.
#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "the launcher is C")]
pub(crate) mod cuda {
    use crate::backend::{Heads, Norm};
    use crate::cuda::launch::{check_qkv, int, long};
    use crate::cuda::{CudaBackend, CudaTensor, CudaWeight, element_code};
    use std::ffi::{c_int, c_void};

    unsafe extern "C" {
        fn cluster_head_norm(
            stream: *mut c_void,
            element: c_int,
            qkv: *mut c_void,
            query_weight: *const c_void,
            key_weight: *const c_void,
            tokens: i64,
            heads: i32,
            kv_heads: i32,
            head_dim: i32,
            eps: f32,
            weight_offset: f32,
        ) -> c_int;
    }

    /// Queues it. All are of one element.
    pub(crate) fn head_norm(
        cuda: &CudaBackend,
        qkv: &mut CudaTensor,
        heads: Heads,
        (query, key): (&CudaWeight, &CudaWeight),
        norm: Norm,
    ) {
        check_qkv(qkv.width(), heads);
        for weight in [query, key] {
            assert_eq!(
                (weight.rows(), weight.cols()),
                (1, heads.head_dim),
                "one weight for each column of a head"
            );
        }
        let element = qkv.element();
        // SAFETY: the sizes are those of the memory of tensor and weights.
        let code = unsafe {
            cluster_head_norm(
                cuda.stream(),
                element_code(element),
                qkv.pointer_mut(),
                query.pointer_as(element),
                key.pointer_as(element),
                long(qkv.rows()),
                int(heads.local_heads),
                int(heads.local_kv_heads),
                int(heads.head_dim),
                norm.eps,
                norm.weight_offset,
            )
        };
        cuda.launched("head_norm", code);
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::{Backend, Heads};
    use crate::ops::rms_norm::tests::{NORMS, reference};
    use crate::testing::{ELEMENTS, Rng, assert_close, backends, bits, tensor, weight};

    #[test]
    fn is_the_reference_over_queries_and_keys_and_a_row_alone_gives_the_same_bits() {
        let mut rng = Rng::new(4);
        for cpu in backends() {
            for (element, norm) in ELEMENTS.into_iter().flat_map(|e| NORMS.map(|n| (e, n))) {
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
                cpu.head_norm(&mut qkv, heads, (&query, &key), norm);

                let queries = heads.local_heads * dim;
                let keys = queries + heads.local_kv_heads * dim;
                for (row, before) in before.chunks_exact(width).enumerate() {
                    let mut expected = reference(&before[..queries], &query_values, norm);
                    expected.extend(reference(&before[queries..keys], &key_values, norm));
                    expected.extend_from_slice(&before[keys..]);
                    assert_close(qkv.row(row), &expected, 1e-6, 1e-5);
                    let mut alone = tensor(&cpu, before, width);
                    cpu.head_norm(&mut alone, heads, (&query, &key), norm);
                    assert_eq!(bits(alone.values()), bits(qkv.row(row)));
                }
            }
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernel_gives_the_same() {
        use crate::cuda::testing::{assert_twin, each_element, read, values};
        each_element(105, |cuda, rng| {
            for dim in [1, 8, 33, 64, 96, 128, 200, 256, 512, rng.within(1..300)] {
                let heads = Heads {
                    local_heads: rng.within(1..9),
                    local_kv_heads: rng.within(1..4),
                    head_dim: dim,
                };
                let (rows, width) = (rng.within(1..9), heads.qkv_width());
                let norm = rng.pick(&NORMS);
                let (query, query_values) = weight(rng, cuda, (1, dim), cuda.element());
                let (key, key_values) = weight(rng, cuda, (1, dim), cuda.element());
                let before = values(cuda, rng, rows * width);
                let mut qkv = tensor(cuda, &before, width);
                cuda.head_norm(&mut qkv, heads, (&query, &key), norm);

                let queries = heads.local_heads * dim;
                let keys = queries + heads.local_kv_heads * dim;
                let mut expected = Vec::new();
                for before in before.chunks_exact(width) {
                    expected.extend(reference(&before[..queries], &query_values, norm));
                    expected.extend(reference(&before[queries..keys], &key_values, norm));
                    expected.extend_from_slice(&before[keys..]);
                }
                assert_twin(cuda, &read(cuda, &qkv), &expected);
            }
        });
    }
}
