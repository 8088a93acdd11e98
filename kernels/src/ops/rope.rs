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

/// The kernel of `rope.cu`.
#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "the launcher is C")]
pub(crate) mod cuda {
    use crate::backend::{Element, Heads};
    use crate::cuda::launch::{check_qkv, int, long};
    use crate::cuda::{CudaBackend, CudaBatch, CudaTensor, element_code};
    use std::ffi::{c_int, c_void};

    unsafe extern "C" {
        fn cluster_rope(
            stream: *mut c_void,
            element: c_int,
            qkv: *mut c_void,
            table: *const f32,
            positions: *const u32,
            tokens: i64,
            table_rows: i64,
            heads: i32,
            kv_heads: i32,
            head_dim: i32,
        ) -> c_int;
    }

    /// Queues it. The table is f32; a position that it does not have gives NaN.
    pub(crate) fn rope(
        cuda: &CudaBackend,
        batch: &CudaBatch,
        table: &CudaTensor,
        heads: Heads,
        qkv: &mut CudaTensor,
    ) {
        check_qkv(qkv.width(), heads);
        assert_eq!(
            (table.width(), table.element()),
            (heads.head_dim, Element::F32),
            "the table has a cosine and a sine for each pair, in f32"
        );
        assert_eq!(
            qkv.rows(),
            batch.num_tokens(),
            "a row of qkv for each token"
        );
        // SAFETY: the sizes are those of the memory of tensor, table and batch.
        let code = unsafe {
            cluster_rope(
                cuda.stream(),
                element_code(qkv.element()),
                qkv.pointer_mut(),
                table.pointer().cast(),
                batch.positions(),
                long(qkv.rows()),
                long(table.rows()),
                int(heads.local_heads),
                int(heads.local_kv_heads),
                int(heads.head_dim),
            )
        };
        cuda.launched("rope", code);
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::{Backend, Heads};
    use crate::testing::{Rng, assert_close, backends, bits, tensor, tokens, upload};

    /// Rotates one row by the angles `position * theta^(-2i / head_dim)`.
    fn reference(row: &[f32], position: u32, heads: Heads) -> Vec<f32> {
        let (dim, half) = (heads.head_dim, heads.head_dim / 2);
        let mut out = row.to_vec();
        for head in 0..heads.local_heads + heads.local_kv_heads {
            for i in 0..half {
                let (sin, cos) = angle(position, i, dim).sin_cos();
                let (a, b) = (row[head * dim + i], row[head * dim + half + i]);
                out[head * dim + i] = a * cos - b * sin;
                out[head * dim + half + i] = b * cos + a * sin;
            }
        }
        out
    }

    fn angle(position: u32, i: usize, dim: usize) -> f32 {
        position as f32 * 10_000_f32.powf(-2.0 * i as f32 / dim as f32)
    }

    #[test]
    fn is_the_reference_and_a_row_alone_gives_the_same_bits() {
        let mut rng = Rng::new(5);
        for cpu in backends() {
            let heads = Heads {
                local_heads: rng.within(1..5),
                local_kv_heads: rng.within(1..4),
                head_dim: 2 * rng.within(1..40),
            };
            let (dim, width, rows) = (heads.head_dim, heads.qkv_width(), rng.within(1..20));
            let table: Vec<f32> = (0..50)
                .flat_map(|p| {
                    let angles = move |i| angle(p, i, dim);
                    let cos = (0..dim / 2).map(move |i| angles(i).cos());
                    cos.chain((0..dim / 2).map(move |i| angles(i).sin()))
                })
                .collect();
            let table = tensor(&cpu, &table, dim);
            let before = rng.values(rows * width);
            let positions: Vec<u32> = (0..rows).map(|_| rng.within(0..50) as u32).collect();
            let mut qkv = tensor(&cpu, &before, width);
            let batch = tokens(vec![0; rows], positions.clone());
            cpu.rope(&upload(&cpu, &batch), &table, heads, &mut qkv);
            for (row, before) in before.chunks_exact(width).enumerate() {
                let expected = reference(before, positions[row], heads);
                assert_close(qkv.row(row), &expected, 1e-6, 1e-6);
                let mut alone = tensor(&cpu, before, width);
                let batch = upload(&cpu, &tokens(vec![0], vec![positions[row]]));
                cpu.rope(&batch, &table, heads, &mut alone);
                assert_eq!(bits(alone.values()), bits(qkv.row(row)));
            }
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernel_gives_the_same_and_positions_outside_the_table_show() {
        use crate::backend::Precision;
        use crate::cuda::testing::{assert_twin, each_element, read, values};
        each_element(106, |cuda, rng| {
            for dim in [2, 14, 16, 64, 80, 128, 256, 2 * rng.within(1..100)] {
                let heads = Heads {
                    local_heads: rng.within(1..9),
                    local_kv_heads: rng.within(1..4),
                    head_dim: dim,
                };
                let (width, rows) = (heads.qkv_width(), rng.within(2..20));
                let cos = |p| (0..dim / 2).map(move |i| angle(p, i, dim).cos());
                let sin = |p| (0..dim / 2).map(move |i| angle(p, i, dim).sin());
                let values_of_table: Vec<f32> =
                    (0..50).flat_map(|p| cos(p).chain(sin(p))).collect();
                let mut table = cuda.allocate(50, dim, Precision::F32).unwrap();
                cuda.write(&values_of_table, &mut table).unwrap();
                let before = values(cuda, rng, rows * width);
                let mut positions: Vec<u32> = (0..rows).map(|_| rng.within(0..50) as u32).collect();
                // The table's last row, and the one after it.
                (positions[0], positions[1]) = (49, 50);
                let mut qkv = tensor(cuda, &before, width);
                let batch = upload(cuda, &tokens(vec![0; rows], positions.clone()));
                cuda.rope(&batch, &table, heads, &mut qkv);
                let after = read(cuda, &qkv);
                let rotated = (heads.local_heads + heads.local_kv_heads) * dim;
                for (row, before) in before.chunks_exact(width).enumerate() {
                    let after = &after[row * width..][..width];
                    if positions[row] < 50 {
                        assert_twin(cuda, after, &reference(before, positions[row], heads));
                    } else {
                        assert!(after[..rotated].iter().all(|value| value.is_nan()));
                        assert_eq!(after[rotated..], before[rotated..]);
                    }
                }
            }
        });
    }
}
