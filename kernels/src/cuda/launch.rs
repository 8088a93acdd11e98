//! What launch functions share: sizes as C has them, and the sentence for heads that do not fit.
//!
//! Not a kernel's home: each launch stands beside its operation. Invariant: a size that C cannot hold ends the
//! program before anything is launched with another one.

use crate::backend::{Heads, KvLayout};

/// A size as `int64_t`.
pub(crate) fn long(size: usize) -> i64 {
    i64::try_from(size).expect("no device holds 2^63 of anything")
}

/// A size as `int32_t`.
pub(crate) fn int(size: usize) -> i32 {
    i32::try_from(size).expect("heads and widths stay far below 2^31")
}

/// A size as `uint32_t`.
pub(crate) fn unsigned(size: usize) -> u32 {
    u32::try_from(size).expect("tokens and slots stay below 2^32")
}

/// Checks that a matrix of `width` columns holds `heads`.
///
/// # Panics
/// If it does not.
pub(crate) fn check_qkv(width: usize, heads: Heads) {
    assert_eq!(width, heads.qkv_width(), "qkv is as wide as its heads");
}

/// Where things stand in one layer of the block pool, in elements: `[block][kv head][key, value][token][head_dim]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvStrides {
    /// From one block to the next.
    pub(crate) block: i64,
    /// From one key-value head to the next.
    pub(crate) head: i64,
    /// From one token to the next.
    pub(crate) token: i64,
    /// From the first key to the first value, in bytes.
    pub(crate) values_offset_bytes: usize,
}

impl KvStrides {
    /// Those of a layer of `layout`.
    pub(crate) fn of(layout: KvLayout) -> Self {
        let run = layout.block_size * layout.head_dim;
        Self {
            block: long(2 * run * layout.local_kv_heads),
            head: long(2 * run),
            token: long(layout.head_dim),
            values_offset_bytes: run * layout.element.bytes(),
        }
    }
}
