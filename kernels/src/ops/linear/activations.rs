//! Activations as signed 8-bit codes with a scale for each row and segment of columns.
//!
//! `scale = max|x| / 127` over the segment and `code = x / scale`, rounded to nearest even: what a code stands for is at
//! most half a scale from `x`. Rows are quantised once for all threads, into memory that they share, in the order in
//! which products read them: a slot for each tile of rows, `[padded columns / 4][rows of the tile]` quads, then
//! `[segments][rows of the tile]` factors. For matrix tiles they are laid out in `code_tiles`.
//!
//! Invariant: a row's codes follow from that row and from how the weight's columns are cut.

use crate::cpu::CpuTensor;
use crate::cpu::quantized::{Columns, QUAD, SEGMENT, Segment};
use crate::cpu::simd::{IntKernel, IntSimd};
use bytemuck::{Pod, Zeroable};
use std::ops::Range;

/// What products with a row's codes of one segment need beside them.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Factor {
    /// What one stands for.
    pub(super) scale: f32,
    /// Their sum.
    pub(super) sum: f32,
    /// Their sum times what stands for zero in the weight, less than nothing: what products start from.
    pub(super) start: i32,
}

/// The largest code.
const MOST: f32 = 127.0;

/// Below it a segment counts as zero: `127 / max` must be a number.
const LEAST: f32 = 1e-30;

/// Columns of a segment that is shorter than most: what groups of 4-bit codes usually have.
const SHORT: usize = 128;

/// How shared memory is divided.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots {
    /// Rows of the largest tile.
    pub(super) most: usize,
    /// In f32.
    pub(super) quads: usize,
    /// In f32; the quads come first.
    pub(super) slot: usize,
}

/// Finds [`Slots`] for one weight, `room` being how many f32 there are.
pub(super) struct Divide<'a> {
    pub(super) columns: &'a Columns,
    pub(super) room: usize,
}

impl IntKernel for Divide<'_> {
    type Output = Slots;

    #[inline(always)]
    fn run<S: IntSimd>(self, _simd: S) -> Slots {
        let quads = self.columns.padded() / QUAD * size_of::<S::Quad>() / size_of::<f32>();
        let factors = self.columns.segments().len() * size_of::<Factor>() / size_of::<f32>();
        let fits = self.room / (quads + factors);
        assert!(
            fits > 0,
            "a row of {} columns is too wide",
            self.columns.padded()
        );
        // Other sizes of tiles than these are not compiled.
        let most = if fits < S::TILE.0 {
            fits.min(8)
        } else {
            S::TILE.0
        };
        Slots {
            most,
            quads: most * quads,
            slot: most * (quads + factors),
        }
    }
}

/// Quantises a tile of rows into its slot.
pub(super) struct Quantize<'a> {
    pub(super) x: &'a CpuTensor,
    pub(super) columns: &'a Columns,
    /// The code that stands for zero in all of the weight, or 0.
    pub(super) zero: u8,
    pub(super) rows: Range<usize>,
    pub(super) slots: Slots,
    pub(super) slot: &'a mut [f32],
}

impl IntKernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: IntSimd>(self, simd: S) {
        let count = self.rows.len();
        let (quads, factors) = self.slot.split_at_mut(self.slots.quads);
        let quads: &mut [S::Quad] = bytemuck::cast_slice_mut(quads);
        let factors: &mut [Factor] = bytemuck::cast_slice_mut(factors);
        for (m, row) in self.rows.enumerate() {
            let row = self.x.row(row);
            for (segment, factors) in self
                .columns
                .segments()
                .iter()
                .zip(factors.chunks_exact_mut(count))
            {
                let quads = &mut quads[segment.padded.start / QUAD * count + m..];
                let mut quads = quads.iter_mut().step_by(count);
                quantized(self.columns, segment, row, self.zero, |codes, factor| {
                    factors[m] = factor;
                    for codes in &codes.as_chunks::<QUAD>().0[..segment.padded.len() / QUAD] {
                        if let Some(quad) = quads.next() {
                            *quad = simd.quad(*codes);
                        }
                    }
                });
            }
        }
    }
}

/// Hands over the codes of one segment of a row, zeros after them, and what comes with them for weights whose zero is `zero`.
#[inline(always)]
pub(super) fn quantized(
    columns: &Columns,
    segment: &Segment,
    row: &[f32],
    zero: u8,
    to: impl FnOnce(&[i8], Factor),
) {
    if segment.columns.len() <= SHORT {
        let (codes, factor) = quantized_of::<SHORT>(columns, segment, row, zero);
        to(&codes, factor);
    } else {
        let (codes, factor) = quantized_of::<SEGMENT>(columns, segment, row, zero);
        to(&codes, factor);
    }
}

/// The same, of at most `N` columns.
#[inline(always)]
fn quantized_of<const N: usize>(
    columns: &Columns,
    segment: &Segment,
    row: &[f32],
    zero: u8,
) -> ([i8; N], Factor) {
    let mut values = [0.0_f32; N];
    let count = segment.columns.len();
    columns.gather(segment.columns.clone(), row, &mut values[..count]);
    // As integers, sizes are in the order of the numbers, and what is no number is above all.
    let max = values
        .iter()
        .map(|value| value.to_bits() & (u32::MAX >> 1))
        .fold(0, u32::max);
    let max = f32::from_bits(max);
    if !max.is_finite() || max < LEAST {
        let scale = if max.is_finite() { 0.0 } else { f32::NAN };
        let factor = Factor {
            scale,
            ..Factor::zeroed()
        };
        return ([0; N], factor);
    }
    let (inverse, mut sum) = (MOST / max, 0);
    let mut codes = [0; N];
    for (code, value) in codes.iter_mut().zip(values) {
        let rounded = rounded(value * inverse);
        // Far from wrapping, but a check would keep the loop from being one of vectors.
        sum = rounded.wrapping_add(sum);
        *code = rounded.to_le_bytes()[0].cast_signed();
    }
    let factor = Factor {
        scale: max / MOST,
        sum: sum as f32,
        start: -i32::from(zero) * sum,
    };
    (codes, factor)
}

/// To nearest even, of what is smaller than 2^22: adding a number whose last bit is 1 rounds.
#[inline(always)]
fn rounded(value: f32) -> i32 {
    const SHIFT: f32 = 12_582_912.0;
    let bits = (value + SHIFT).to_bits().cast_signed();
    bits.wrapping_sub(SHIFT.to_bits().cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    #[test]
    fn rounds_to_nearest_even() {
        let mut rng = Rng::new(63);
        for value in [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127.0, 0.499_999_97] {
            assert_eq!(rounded(value), value.round_ties_even() as i32);
        }
        for _ in 0..1000 {
            let value = 127.0 * rng.value();
            assert_eq!(rounded(value), value.round_ties_even() as i32);
        }
    }
}
