//! The inner product of two rows.
//!
//! Invariant: one vector of sixteen partial sums, filled from the first column to the last, padded with zeros at
//! the end, and summed by one tree.

use super::{LANES, Simd};
use crate::cpu::element::Stored;

/// `x · w`; both have the same length.
#[inline(always)]
pub(crate) fn dot<S: Simd, E: Stored>(simd: S, x: &[f32], w: &[E]) -> f32 {
    let (x_vectors, x_rest) = x.as_chunks::<LANES>();
    let (w_vectors, w_rest) = w.as_chunks::<LANES>();
    let mut sums = simd.splat(0.0);
    for (x, w) in x_vectors.iter().zip(w_vectors) {
        sums = simd.mul_add(simd.load(x), E::load(simd, w), sums);
    }
    if !x_rest.is_empty() {
        let (x, w) = (padded(x_rest), padded(w_rest));
        sums = simd.mul_add(simd.load(&x), E::load(simd, &w), sums);
    }
    simd.sum(sums)
}

/// Fewer than sixteen values, and zeros after them.
#[inline(never)]
fn padded<E: Stored>(values: &[E]) -> [E; LANES] {
    let mut all = [E::zeroed(); LANES];
    all[..values.len()].copy_from_slice(values);
    all
}
