//! The KV block pool in device memory, `[layer][block][kv head][key, value][block_size][head_dim]`.
//!
//! The order is the CPU backend's. In FlashInfer's words that is the layout HND with strides of
//! `2 * block_size * head_dim` elements between heads and `local_kv_heads` times that between blocks; values
//! begin `block_size * head_dim` elements after keys. Blocks hold anything until written.

use super::device::Memory;
use crate::backend::KvLayout;
use std::ffi::c_void;

/// Keys and values of all layers.
#[derive(Debug)]
pub struct CudaKvCache {
    memory: Memory,
    layout: KvLayout,
}

impl CudaKvCache {
    /// Takes over `memory`, which holds all blocks of `layout`.
    pub(crate) fn new(memory: Memory, layout: KvLayout) -> Self {
        assert!(
            memory.bytes() >= layout.block_bytes() * layout.blocks,
            "the memory holds the blocks"
        );
        Self { memory, layout }
    }

    /// Its shape.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Bytes of one layer's blocks.
    pub fn layer_bytes(&self) -> usize {
        self.layout.block_bytes() / self.layout.layers * self.layout.blocks
    }

    /// The first key of a layer, on the device.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer(&self, layer: usize) -> *const c_void {
        self.memory.at(self.layer_start(layer))
    }

    /// The first key of a layer, on the device, to be written.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer_mut(&mut self, layer: usize) -> *mut c_void {
        let start = self.layer_start(layer);
        self.memory.at_mut(start)
    }

    fn layer_start(&self, layer: usize) -> usize {
        let layers = self.layout.layers;
        assert!(layer < layers, "layer {layer} of {layers}");
        layer * self.layer_bytes()
    }
}
