//! Copies the key and value parts of `qkv` to the batch's slots of one layer, rounding to the cache's element.
//!
//! `qkv: [tokens, (local_heads + 2 * local_kv_heads) * head_dim]`; slot `block * block_size + offset`.

use crate::backend::Heads;
use crate::cpu::{CpuBatch, CpuKvCache, CpuTensor};

/// The fast path. One thread: next to the products that made the keys, copying them is nothing.
pub(crate) fn write_kv(
    batch: &CpuBatch,
    layer: usize,
    qkv: &CpuTensor,
    heads: Heads,
    cache: &mut CpuKvCache,
) {
    let layout = cache.layout();
    assert_eq!(
        qkv.width(),
        heads.qkv_width(),
        "qkv is as wide as its heads"
    );
    assert_eq!(
        (heads.local_kv_heads, heads.head_dim),
        (layout.local_kv_heads, layout.head_dim),
        "heads as in the cache"
    );
    assert!(layer < layout.layers, "layer {layer} of {}", layout.layers);
    assert_eq!(
        qkv.rows(),
        batch.host.num_tokens(),
        "a row of qkv for each token"
    );
    let keys_start = heads.local_heads * heads.head_dim;
    let keys_width = heads.local_kv_heads * heads.head_dim;
    for (t, &slot) in batch.host.slots.iter().enumerate() {
        let (keys, values) = qkv.row(t)[keys_start..].split_at(keys_width);
        cache.put(layer, slot as usize, keys, values);
    }
}

/// The kernel of `write_kv.cu`.
#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "the launcher is C")]
pub(crate) mod cuda {
    use crate::backend::Heads;
    use crate::cuda::launch::{KvStrides, check_qkv, int, long, unsigned};
    use crate::cuda::{CudaBackend, CudaBatch, CudaKvCache, CudaTensor, element_code};
    use std::ffi::{c_int, c_void};

    unsafe extern "C" {
        fn cluster_write_kv(
            stream: *mut c_void,
            element: c_int,
            cache_element: c_int,
            qkv: *const c_void,
            slots: *const u32,
            keys: *mut c_void,
            values: *mut c_void,
            tokens: i64,
            heads: i32,
            kv_heads: i32,
            head_dim: i32,
            block_size: i32,
            block_stride: i64,
            head_stride: i64,
            token_stride: i64,
            slot_count: u32,
        ) -> c_int;
    }

    /// Queues it. The cache may be of another element than `qkv`; a slot outside the pool is left out.
    pub(crate) fn write_kv(
        cuda: &CudaBackend,
        batch: &CudaBatch,
        layer: usize,
        (qkv, heads): (&CudaTensor, Heads),
        cache: &mut CudaKvCache,
    ) {
        let layout = cache.layout();
        check_qkv(qkv.width(), heads);
        assert_eq!(
            (heads.local_kv_heads, heads.head_dim),
            (layout.local_kv_heads, layout.head_dim),
            "heads as in the cache"
        );
        assert_eq!(
            qkv.rows(),
            batch.num_tokens(),
            "a row of qkv for each token"
        );
        let strides = KvStrides::of(layout);
        let keys = cache.layer_mut(layer);
        // SAFETY: the sizes are those of the memory of tensor, batch and cache.
        let code = unsafe {
            cluster_write_kv(
                cuda.stream(),
                element_code(qkv.element()),
                element_code(layout.element),
                qkv.pointer(),
                batch.slots(),
                keys,
                keys.wrapping_byte_add(strides.values_offset_bytes),
                long(qkv.rows()),
                int(heads.local_heads),
                int(heads.local_kv_heads),
                int(heads.head_dim),
                int(layout.block_size),
                strides.block,
                strides.head,
                strides.token,
                unsigned(layout.blocks * layout.block_size),
            )
        };
        cuda.launched("write_kv", code);
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::{Backend, Heads, KvLayout};
    use crate::cpu::element::{Stored, by_kv_element};
    #[cfg(feature = "cuda")]
    use crate::testing::ELEMENTS;
    use crate::testing::{KV_ELEMENTS, Rng, backends, rounded, tensor, tokens, upload};

    #[test]
    fn slots_hold_their_tokens_and_the_rest_stays() {
        let mut rng = Rng::new(11);
        let cpu = &backends()[0];
        for element in KV_ELEMENTS {
            let heads = Heads {
                local_heads: 3,
                local_kv_heads: 2,
                head_dim: rng.pick(&[1, 7, 16, 20, 32]),
            };
            let (dim, block_size) = (heads.head_dim, rng.pick(&[1, 5, 8, 16, 32]));
            let layout = KvLayout {
                layers: 3,
                blocks: 4,
                block_size,
                local_kv_heads: 2,
                head_dim: dim,
                element,
            };
            let mut cache = cpu.kv_cache(layout).unwrap();
            assert_eq!(
                layout.block_bytes(),
                3 * block_size * 4 * dim * element.bytes()
            );
            let mut slots: Vec<u32> = (0..4 * block_size as u32).collect();
            rng.shuffle(&mut slots);
            let empty = slots.split_off(2 * block_size);
            let qkv = tensor(
                cpu,
                &rng.values(slots.len() * heads.qkv_width()),
                heads.qkv_width(),
            );
            let batch = upload(cpu, &tokens(vec![0; slots.len()], slots.clone()));
            cpu.write_kv(&batch, 1, &qkv, heads, &mut cache);

            let stored = |layer: usize, slot: u32, head: usize| -> (Vec<f32>, Vec<f32>) {
                let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
                by_kv_element!(element, E => {
                    let blocks = cache.layer::<E>(layer);
                    let key = (0..dim).map(|d| blocks.key((block, head), offset, d).widen());
                    let values = blocks.values((block, head), offset, 1);
                    (key.collect(), values.iter().map(|value| value.widen()).collect())
                })
            };
            for head in 0..2 {
                for (t, &slot) in slots.iter().enumerate() {
                    let (key, value) = ((3 + head) * dim..(4 + head) * dim, (5 + head) * dim);
                    let row = rounded(qkv.row(t), element);
                    let expected = (row[key].to_vec(), row[value..][..dim].to_vec());
                    assert_eq!(stored(1, slot, head), expected);
                    assert_eq!(stored(0, slot, head).0, vec![0.0; dim]);
                    assert_eq!(stored(2, slot, head).1, vec![0.0; dim]);
                }
                for &slot in &empty {
                    assert_eq!(stored(1, slot, head), (vec![0.0; dim], vec![0.0; dim]));
                }
            }
        }
    }

    /// Values from beyond the largest 8-bit float to below the smallest.
    #[cfg(feature = "cuda")]
    fn spread(cuda: &crate::cuda::CudaBackend, rng: &mut Rng, count: usize) -> Vec<f32> {
        let mut values = rng.values(count);
        for x in values.iter_mut().step_by(3) {
            *x *= rng.pick(&[1024.0, 1.0 / 64.0, 1.0 / 1024.0]);
        }
        rounded(&values, cuda.element())
    }

    /// The cache is read back by looking at it: each value alone where attention sees nothing but one token.
    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernel_puts_each_token_where_attention_finds_it() {
        use crate::backend::{Attention, Element, Precision};
        use crate::batch::Batch;
        use crate::cuda::testing::{each_element, read, values};
        use crate::ops::paged_attention::cuda::attend;
        each_element(109, |cuda, rng| {
            for cache_element in ELEMENTS.into_iter().chain([Element::Fp8]) {
                let heads = Heads {
                    local_heads: 2,
                    local_kv_heads: 2,
                    head_dim: rng.pick(&[1, 8, 20, 64, 128]),
                };
                let block_size = rng.within(1..9);
                let layout = KvLayout {
                    layers: 3,
                    blocks: 4,
                    block_size,
                    local_kv_heads: 2,
                    head_dim: heads.head_dim,
                    element: cache_element,
                };
                let mut cache = cuda.kv_cache(layout).unwrap();
                let (width, out_width) = (heads.qkv_width(), 2 * heads.head_dim);
                let mut slots: Vec<u32> = (0..4 * block_size as u32).collect();
                rng.shuffle(&mut slots);
                let empty = slots.split_off(2 * block_size);
                // Only the first are written: the others' slots are outside the pool.
                let mut some_outside = slots.clone();
                some_outside.extend([u32::MAX, 4 * block_size as u32]);
                let written = Batch {
                    slots: some_outside,
                    ..tokens(vec![0; slots.len() + 2], vec![0; slots.len() + 2])
                };
                let before = spread(cuda, rng, (slots.len() + 2) * width);
                let qkv = tensor(cuda, &before, width);
                cuda.write_kv(&upload(cuda, &written), 1, &qkv, heads, &mut cache);

                // One sequence for each slot, seeing the last position only, which is that slot.
                let all: Vec<u32> = slots.iter().chain(&empty).copied().collect();
                let offset = |slot: &u32| slot % block_size as u32;
                let looks = Batch {
                    blocks: all.iter().map(|slot| slot / block_size as u32).collect(),
                    block_starts: (0..=all.len() as u32).collect(),
                    ..tokens(vec![0; all.len()], all.iter().map(offset).collect())
                };
                let queries = tensor(cuda, &values(cuda, rng, all.len() * width), width);
                for layer in 0..3 {
                    let attention = Attention {
                        layer,
                        local_heads: 2,
                        scale: 1.0,
                        sliding_window: Some(1),
                        logit_soft_cap: None,
                    };
                    let mut out = cuda
                        .allocate(all.len(), out_width, Precision::Compute)
                        .unwrap();
                    let looks = upload(cuda, &looks);
                    attend(cuda, &looks, &attention, (&queries, &cache), &mut out);
                    let seen = read(cuda, &out);
                    for (t, seen) in seen.chunks_exact(out_width).enumerate() {
                        let expected = if layer == 1 && t < slots.len() {
                            let row = &before[t * width..][..width];
                            let stored = rounded(&row[width - out_width..], cache_element);
                            rounded(&stored, cuda.element())
                        } else {
                            vec![0.0; out_width]
                        };
                        assert_eq!(seen, expected, "token {t} of layer {layer}");
                    }
                }
            }
        });
    }
}
