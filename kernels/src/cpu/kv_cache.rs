//! The KV block pool in host memory, `[layer][block][kv head][key, value][block_size][head_dim]`.
//!
//! The keys that one head of one block attends to lie side by side, and so do the values, so
//! attention reads memory in order. Blocks hold anything until written.

use super::element::{Stored, by_element};
use crate::backend::{Element, KvLayout};

/// Keys and values of all layers.
#[derive(Debug)]
pub struct CpuKvCache {
    layout: KvLayout,
    store: Store,
}

#[derive(Debug)]
enum Store {
    Whole(Vec<f32>),
    /// The bits of bfloat16 or half: zeroed vectors of integers come from the system untouched, so that no
    /// page is taken before its block is used.
    Half(Vec<u16>),
}

impl CpuKvCache {
    /// Memory for `layout`. The system hands out the pages when they are first written.
    pub(crate) fn zeroed(layout: KvLayout) -> Self {
        let elements = layout.block_bytes() / layout.element.bytes() * layout.blocks;
        let store = match layout.element {
            Element::F32 => Store::Whole(vec![0.0; elements]),
            Element::Bf16 | Element::F16 => Store::Half(vec![0; elements]),
        };
        Self { layout, store }
    }

    /// Its shape.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// All blocks of one layer.
    pub(crate) fn layer<E: Stored>(&self, layer: usize) -> LayerBlocks<'_, E> {
        let values: &[E] = match &self.store {
            Store::Whole(all) => bytemuck::cast_slice(all),
            Store::Half(all) => bytemuck::cast_slice(all),
        };
        let stride = values.len() / self.layout.layers;
        LayerBlocks {
            layout: self.layout,
            values: &values[layer * stride..][..stride],
        }
    }

    /// Stores the key and value vectors of all heads of one token. `[local_kv_heads * head_dim]` each
    pub(crate) fn put(&mut self, layer: usize, slot: usize, keys: &[f32], values: &[f32]) {
        let KvLayout {
            blocks,
            block_size,
            local_kv_heads,
            head_dim,
            ..
        } = self.layout;
        let (block, offset) = (slot / block_size, slot % block_size);
        assert!(
            block < blocks,
            "slot {slot} is in block {block} of {blocks}"
        );
        by_element!(self.layout.element, E => {
            let all: &mut [E] = match &mut self.store {
                Store::Whole(all) => bytemuck::cast_slice_mut(all),
                Store::Half(all) => bytemuck::cast_slice_mut(all),
            };
            let run = block_size * head_dim;
            for head in 0..local_kv_heads {
                let base = (((layer * blocks) + block) * local_kv_heads + head) * 2 * run;
                let part = head * head_dim..(head + 1) * head_dim;
                for (kind, source) in [keys, values].into_iter().enumerate() {
                    let target = &mut all[base + kind * run + offset * head_dim..][..head_dim];
                    for (to, from) in target.iter_mut().zip(&source[part.clone()]) {
                        *to = E::narrow(*from);
                    }
                }
            }
        });
    }
}

/// One layer's blocks, for attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerBlocks<'a, E> {
    layout: KvLayout,
    values: &'a [E],
}

impl<'a, E: Stored> LayerBlocks<'a, E> {
    /// Keys and values of one head in one block, `[block_size, head_dim]` each.
    #[inline]
    pub(crate) fn head(&self, block: usize, kv_head: usize) -> (&'a [E], &'a [E]) {
        let run = self.layout.block_size * self.layout.head_dim;
        let base = (block * self.layout.local_kv_heads + kv_head) * 2 * run;
        self.values[base..base + 2 * run].split_at(run)
    }
}
