//! Inner products of a few rows with a few others, the core of `linear` and attention.
//!
//! Invariant: a product's bits depend on its two rows alone, not on the tile's size: each has one
//! vector of sixteen partial sums, filled from the first column to the last, padded with zeros at
//! the end, and summed by one tree.

use super::{LANES, Simd};
use crate::cpu::element::Stored;

/// `out[i][j] = x[i] · w[j]`; all rows have the same length.
#[inline(always)]
pub(crate) fn tile<S: Simd, E: Stored, const M: usize, const N: usize>(
    simd: S,
    x: [&[f32]; M],
    w: [&[E]; N],
) -> [[f32; N]; M] {
    let length = w[0].len();
    let vectors = length / LANES;
    let (mut x_vectors, mut w_vectors) = ([[].as_slice(); M], [[].as_slice(); N]);
    for i in 0..M {
        x_vectors[i] = &x[i][..length].as_chunks::<LANES>().0[..vectors];
    }
    for j in 0..N {
        w_vectors[j] = &w[j][..length].as_chunks::<LANES>().0[..vectors];
    }

    // Loops, not closures: a closure is a function of its own, and one that is not inlined would be
    // compiled without the instructions.
    let mut sums = [[simd.splat(0.0); N]; M];
    let mut w_c = [simd.splat(0.0); N];
    for c in 0..vectors {
        for j in 0..N {
            w_c[j] = E::load(simd, at(w_vectors[j], c));
        }
        for i in 0..M {
            let x_c = simd.load(at(x_vectors[i], c));
            for j in 0..N {
                sums[i][j] = simd.mul_add(x_c, w_c[j], sums[i][j]);
            }
        }
    }
    let tail = vectors * LANES..length;
    if !tail.is_empty() {
        for j in 0..N {
            w_c[j] = E::load(simd, &padded(&w[j][tail.clone()]));
        }
        for i in 0..M {
            let x_c = simd.load(&padded(&x[i][tail.clone()]));
            for j in 0..N {
                sums[i][j] = simd.mul_add(x_c, w_c[j], sums[i][j]);
            }
        }
    }
    let mut out = [[0.0; N]; M];
    for i in 0..M {
        for j in 0..N {
            out[i][j] = simd.sum(sums[i][j]);
        }
    }
    out
}

/// `vectors[c]`, where `c` is below the length that [`tile`] cut all its rows to.
#[inline(always)]
fn at<T>(vectors: &[[T; LANES]], c: usize) -> &[T; LANES] {
    debug_assert!(c < vectors.len());
    #[expect(
        unsafe_code,
        reason = "a check here makes the sums live in memory, at a third of the speed"
    )]
    // SAFETY: the rows were cut to `vectors` vectors each, and `c` runs up to that.
    unsafe {
        vectors.get_unchecked(c)
    }
}

/// `x · w`.
#[inline(always)]
pub(crate) fn dot<S: Simd, E: Stored>(simd: S, x: &[f32], w: &[E]) -> f32 {
    tile(simd, [x], [w])[0][0]
}

/// Fewer than sixteen values, and zeros after them.
#[inline(never)]
fn padded<E: Stored>(values: &[E]) -> [E; LANES] {
    let mut all = [E::zeroed(); LANES];
    all[..values.len()].copy_from_slice(values);
    all
}
