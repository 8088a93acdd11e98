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
