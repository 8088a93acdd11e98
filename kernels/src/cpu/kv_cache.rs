//! The KV block pool in host memory, `[layer][block][kv head][key, value]`.
//!
//! Values are `[block_size][head_dim]`. So are keys, unless both sizes are multiples of sixteen, as they are in practice:
//! then sixteen keys are a panel of cells, as weights are, `[block_size / 16][head_dim / 2]`, and scores need no
//! sums across lanes. Either way attention reads memory in order. Blocks hold anything until written.

use super::element::{Stored, by_element};
use super::simd::{CELL, LANES};
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
            Element::Fp8 => panic!("8-bit floats are elements of a GPU's caches"),
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
            let packed = is_packed(&self.layout);
            for head in 0..local_kv_heads {
                let base = (((layer * blocks) + block) * local_kv_heads + head) * 2 * run;
                let (to_keys, to_values) = all[base..base + 2 * run].split_at_mut(run);
                let part = head * head_dim..(head + 1) * head_dim;
                let to = &mut to_values[offset * head_dim..][..head_dim];
                for (to, from) in to.iter_mut().zip(&values[part.clone()]) {
                    *to = E::narrow(*from);
                }
                let key = keys[part].iter().map(|value| E::narrow(*value));
                if packed {
                    let (group, lane) = (offset / LANES, offset % LANES);
                    let to = &mut to_keys[group * LANES * head_dim..][..LANES * head_dim];
                    for (d, value) in key.enumerate() {
                        to[d / 2 * CELL + E::place(d % 2, lane)] = value;
                    }
                } else {
                    let to = &mut to_keys[offset * head_dim..][..head_dim];
                    to.iter_mut().zip(key).for_each(|(to, value)| *to = value);
                }
            }
        });
    }
}

/// Whether keys are in cells.
fn is_packed(layout: &KvLayout) -> bool {
    layout.block_size.is_multiple_of(LANES) && layout.head_dim.is_multiple_of(LANES)
}

/// One layer's blocks, for attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerBlocks<'a, E> {
    layout: KvLayout,
    values: &'a [E],
}

impl<'a, E: Stored> LayerBlocks<'a, E> {
    /// Their shape.
    pub(crate) fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Whether [`Self::key_cells`] are there.
    pub(crate) fn is_packed(&self) -> bool {
        is_packed(&self.layout)
    }

    /// Sixteen keys of one head, from `offset` on, a multiple of sixteen. `[head_dim / 2]` cells
    ///
    /// # Panics
    /// If they are not packed.
    #[inline]
    pub(crate) fn key_cells(&self, block: usize, kv_head: usize, offset: usize) -> &'a [[E; CELL]] {
        assert!(
            self.is_packed(),
            "keys that are not packed read as if they were"
        );
        let size = LANES * self.layout.head_dim;
        let (keys, _) = self.head(block, kv_head);
        keys[offset / LANES * size..][..size].as_chunks().0
    }

    /// One element of a key.
    #[inline]
    pub(crate) fn key(&self, (block, kv_head): (usize, usize), offset: usize, d: usize) -> E {
        let head_dim = self.layout.head_dim;
        if self.is_packed() {
            let cells = self.key_cells(block, kv_head, offset / LANES * LANES);
            cells[d / 2][E::place(d % 2, offset % LANES)]
        } else {
            self.head(block, kv_head).0[offset * head_dim + d]
        }
    }

    /// `count` values of one head from `offset` on. `[count, head_dim]`
    #[inline]
    pub(crate) fn values(
        &self,
        (block, kv_head): (usize, usize),
        offset: usize,
        count: usize,
    ) -> &'a [E] {
        let head_dim = self.layout.head_dim;
        &self.head(block, kv_head).1[offset * head_dim..][..count * head_dim]
    }

    /// All keys and values of one head in one block, `block_size * head_dim` elements each.
    #[inline]
    fn head(&self, block: usize, kv_head: usize) -> (&'a [E], &'a [E]) {
        let run = self.layout.block_size * self.layout.head_dim;
        let base = (block * self.layout.local_kv_heads + kv_head) * 2 * run;
        self.values[base..base + 2 * run].split_at(run)
    }
}
