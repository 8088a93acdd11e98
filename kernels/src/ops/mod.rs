//! One file per operation: the formula and the shapes, a slow and obvious reference, the fast CPU
//! path, and the tests that compare the two.
//!
//! Shared invariant: a row of a result depends on that row's inputs alone, bit for bit, whatever the
//! batch, the tile or the number of threads.

pub(crate) mod embed;
pub(crate) mod gated_activation;
pub(crate) mod gather;
pub(crate) mod head_norm;
pub(crate) mod linear;
pub(crate) mod paged_attention;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod sample;
pub(crate) mod soft_cap;
pub(crate) mod write_kv;
