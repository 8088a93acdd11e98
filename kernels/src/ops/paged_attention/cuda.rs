//! Launch of the attention kernel of `cuda.cu`: any element, head size up to 256, group, window and soft cap.
//!
//! It is there for shapes that FlashInfer has no instance for, and to check FlashInfer by; it uses no
//! tensor cores. The cache may be of another element than the activations.

#![expect(unsafe_code, reason = "the launcher is C")]

use crate::backend::{Attention, Heads};
use crate::cuda::launch::{KvStrides, check_qkv, int, long};
use crate::cuda::{CudaBackend, CudaBatch, CudaKvCache, CudaTensor, element_code};
use std::ffi::{c_int, c_void};

unsafe extern "C" {
    fn cluster_paged_attention(
        stream: *mut c_void,
        element: c_int,
        cache_element: c_int,
        qkv: *const c_void,
        keys: *const c_void,
        values: *const c_void,
        positions: *const u32,
        token_rows: *const u32,
        row_starts: *const u32,
        block_starts: *const u32,
        blocks: *const u32,
        out: *mut c_void,
        tokens: i64,
        rows: i64,
        heads: i32,
        kv_heads: i32,
        head_dim: i32,
        block_size: i32,
        block_stride: i64,
        head_stride: i64,
        token_stride: i64,
        window: i64,
        scale: f32,
        soft_cap: f32,
    ) -> c_int;
}

/// Largest head that the kernel takes.
pub(crate) const LARGEST_HEAD: usize = 256;

/// Queues it. `qkv` and `out` are of one element.
pub(crate) fn attend(
    cuda: &CudaBackend,
    batch: &CudaBatch,
    attention: &Attention,
    (qkv, cache): (&CudaTensor, &CudaKvCache),
    out: &mut CudaTensor,
) {
    let layout = cache.layout();
    let heads = Heads {
        local_heads: attention.local_heads,
        local_kv_heads: layout.local_kv_heads,
        head_dim: layout.head_dim,
    };
    check_qkv(qkv.width(), heads);
    assert!(
        attention.local_heads.is_multiple_of(layout.local_kv_heads),
        "heads are in equal groups"
    );
    assert!(
        layout.head_dim <= LARGEST_HEAD,
        "heads of up to {LARGEST_HEAD}"
    );
    assert_eq!(
        (out.rows(), out.width(), out.element()),
        (
            batch.num_tokens(),
            attention.local_heads * layout.head_dim,
            qkv.element()
        ),
        "a row of out for each token, as wide as the queries, of their element"
    );
    assert_eq!(qkv.rows(), out.rows(), "a row of qkv for each token");
    let strides = KvStrides::of(layout);
    let keys = cache.layer(attention.layer);
    // SAFETY: the sizes are those of the memory of tensors, batch and cache; the upload checked the rows. Blocks
    // are the plan's, which the coordinator takes from the pool that the layout describes.
    let code = unsafe {
        cluster_paged_attention(
            cuda.stream(),
            element_code(qkv.element()),
            element_code(layout.element),
            qkv.pointer(),
            keys,
            keys.wrapping_byte_add(strides.values_offset_bytes),
            batch.positions(),
            batch.token_rows(),
            batch.row_starts(),
            batch.block_starts(),
            batch.blocks(),
            out.pointer_mut(),
            long(out.rows()),
            long(batch.num_rows()),
            int(heads.local_heads),
            int(heads.local_kv_heads),
            int(heads.head_dim),
            int(layout.block_size),
            strides.block,
            strides.head,
            strides.token,
            attention.sliding_window.map_or(0, i64::from),
            attention.scale,
            attention.logit_soft_cap.unwrap_or(0.0),
        )
    };
    cuda.launched("paged_attention", code);
}
