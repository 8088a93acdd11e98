//! Finds codes for the numbers of a row, group by group, on the CPU's vectors.
//!
//! What is not here: which columns make a group, and who does which row.
//!
//! Invariant: a weight and what its code stands for differ by at most half a scale, or by the code's last bit with fp8;
//! int4 gives up some of that at a group's ends where the group as a whole gains. All instruction sets find the same
//! codes: nothing is fused, and lanes are folded in one order.

use super::{Code, to_e4m3};
use crate::backend::HostMatrix;
use crate::cpu::element::{Stored, by_element};
use crate::cpu::simd::{Isa, Kernel, LANES, Simd};
use std::marker::PhantomData;

/// Largest code.
const INT8_MOST: f32 = 127.0;
const INT4_MOST: f32 = 15.0;
const FP8_MOST: f32 = 448.0;

/// Parts of a group's range that are tried for its codes: what is beyond is cut off, the rest is finer.
const INT4_RANGES: [f32; 6] = [1.0, 0.96, 0.92, 0.88, 0.84, 0.8];

/// Turns numbers into codes, on the best instruction set that this CPU has.
#[derive(Clone, Copy, Debug)]
pub struct Quantiser(Isa);

/// Where the codes of one row go.
#[derive(Debug)]
pub struct RowOfCodes<'a> {
    /// Where each group of columns ends: ascending, the last is the number of columns.
    pub group_ends: &'a [usize],
    /// `[cols]`
    pub codes: &'a mut [u8],
    /// `[groups]`. No number for a group with a weight that is not finite.
    pub scales: &'a mut [f32],
    /// `[groups]`. Zeros but for [`Code::Int4`].
    pub zeros: &'a mut [u8],
}

impl Quantiser {
    /// Asks the CPU.
    pub fn detect() -> Self {
        Self(Isa::detect())
    }

    /// Finds codes for row `row` of `matrix`.
    ///
    /// # Panics
    /// If there is no such row, it is in codes itself, or `to` has other columns or groups.
    pub fn row(self, code: Code, matrix: &HostMatrix, row: usize, to: RowOfCodes<'_>) {
        let bytes = matrix.element.bytes();
        let row = &matrix.data[row * matrix.row_stride * bytes..][..matrix.cols * bytes];
        let mut numbers = vec![0.0; matrix.cols];
        by_element!(matrix.element, E => self.0.run(Widen::<E> {
            row,
            to: &mut numbers,
            element: PhantomData,
        }));
        self.0.run(Quantise {
            code,
            numbers: &numbers,
            to,
        });
    }
}

/// Reads elements of a row, wherever it starts, as numbers.
struct Widen<'a, E> {
    row: &'a [u8],
    to: &'a mut [f32],
    element: PhantomData<E>,
}

impl<E: Stored> Kernel for Widen<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (vectors, rest) = self.to.as_chunks_mut::<LANES>();
        let (own, behind) = self.row.split_at(vectors.len() * size_of::<[E; LANES]>());
        for (to, from) in vectors
            .iter_mut()
            .zip(own.chunks_exact(size_of::<[E; LANES]>()))
        {
            let elements: [E; LANES] = bytemuck::pod_read_unaligned(from);
            *to = simd.to_array(E::load(simd, &elements));
        }
        for (to, from) in rest.iter_mut().zip(behind.chunks_exact(size_of::<E>())) {
            *to = bytemuck::pod_read_unaligned::<E>(from).widen();
        }
    }
}

/// Finds the codes of one row.
struct Quantise<'a> {
    code: Code,
    /// `[cols]`
    numbers: &'a [f32],
    to: RowOfCodes<'a>,
}

impl Kernel for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let RowOfCodes {
            group_ends,
            codes,
            scales,
            zeros,
        } = self.to;
        assert_eq!(self.numbers.len(), codes.len(), "a code for each column");
        let mut start = 0;
        for ((end, scale), zero) in group_ends.iter().zip(scales).zip(zeros) {
            let (numbers, codes) = (&self.numbers[start..*end], &mut codes[start..*end]);
            (*scale, *zero) = match self.code {
                _ if !are_finite(numbers) => (f32::NAN, 0),
                Code::Int8 => (symmetric(numbers, INT8_MOST, codes, to_int8), 0),
                Code::Fp8 => (symmetric(numbers, FP8_MOST, codes, to_e4m3), 0),
                Code::Int4 => int4(numbers, codes),
            };
            start = *end;
        }
    }
}

#[inline(always)]
fn are_finite(numbers: &[f32]) -> bool {
    // Nothing times what is not finite is no number.
    let nothing = by_lanes(numbers, |sum, number| sum + 0.0 * number);
    !fold(nothing, |one, other| one + other).is_nan()
}

/// Codes as far from zero as `most`, for the number that is farthest. Returns their scale.
#[inline(always)]
fn symmetric(numbers: &[f32], most: f32, codes: &mut [u8], to_code: impl Fn(f32) -> u8) -> f32 {
    let largest = by_lanes(numbers, |most, number| larger(most, number.abs()));
    let largest = fold(largest, larger);
    // A group of zeros has any scale; what divides is never zero.
    let scale = if largest > 0.0 {
        (largest / most).max(f32::MIN_POSITIVE)
    } else {
        1.0
    };
    for (code, number) in codes.iter_mut().zip(numbers) {
        *code = to_code(number / scale);
    }
    scale
}

#[inline(always)]
fn to_int8(number: f32) -> u8 {
    low_byte(smaller(larger(number, -INT8_MOST), INT8_MOST))
}

/// Codes of 4 bits by the range that gives the least squared error. Returns their scale and their zero.
#[inline(always)]
fn int4(numbers: &[f32], codes: &mut [u8]) -> (f32, u8) {
    // Both range over zero, which is so represented exactly.
    let low = fold(by_lanes(numbers, smaller), smaller);
    let high = fold(by_lanes(numbers, larger), larger);
    let (mut least, mut scale, mut zero) = (None, 1.0, 0.0);
    for part in INT4_RANGES {
        let range = part * (high - low) / INT4_MOST;
        let range = if range > 0.0 { range } else { 1.0 };
        let origin = four_bits(nearest(-part * low / range));
        let per_step = 1.0 / range;
        let errors = by_lanes(numbers, |sum, number| {
            let code = four_bits(nearest(number * per_step) + origin);
            let error = number - range * (code - origin);
            sum + error * error
        });
        let errors = fold(errors, |one, other| one + other);
        if least.is_none_or(|least| errors < least) {
            (least, scale, zero) = (Some(errors), range, origin);
        }
    }
    for (code, number) in codes.iter_mut().zip(numbers) {
        *code = low_byte(four_bits(nearest(number / scale) + zero));
    }
    (scale, low_byte(zero))
}

#[inline(always)]
fn four_bits(code: f32) -> f32 {
    smaller(larger(code, 0.0), INT4_MOST)
}

/// Folds each lane from 0 on: one after the other, each result would have to wait for the one before.
#[inline(always)]
fn by_lanes(numbers: &[f32], fold: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = numbers.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, number) in lanes.iter_mut().zip(chunk) {
            *lane = fold(*lane, *number);
        }
    }
    for (lane, number) in lanes.iter_mut().zip(rest) {
        *lane = fold(*lane, *number);
    }
    lanes
}

/// Folds the upper lanes onto the lower ones until there is one.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], fold: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = fold(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// As vectors do it, in one instruction.
#[inline(always)]
fn larger(one: f32, other: f32) -> f32 {
    if one > other { one } else { other }
}

#[inline(always)]
fn smaller(one: f32, other: f32) -> f32 {
    if one < other { one } else { other }
}

/// 1.5 * 2^23: in a sum with it, what follows the point has no place, and a whole number is in the last bits.
const SHIFT: f32 = 12_582_912.0;

/// Rounded to the nearest whole number, halves to even. Of numbers below 2^22.
#[inline(always)]
fn nearest(number: f32) -> f32 {
    (number + SHIFT) - SHIFT
}

/// The nearest whole number, if it has a byte's size, with or without a sign.
#[inline(always)]
fn low_byte(number: f32) -> u8 {
    (number + SHIFT).to_bits().to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ELEMENTS, Rng, host_matrix};

    /// All sets find the same codes, of rows that start anywhere and groups that end anywhere.
    #[test]
    fn every_instruction_set_finds_the_same_codes() {
        let mut rng = Rng::new(71);
        for round in 0..60 {
            let (rows, cols) = (rng.within(1..4), rng.within(1..400));
            let mut group_ends: Vec<usize> = (1..cols).filter(|_| rng.within(0..90) == 0).collect();
            group_ends.push(cols);
            let mut values = rng.values(rows * cols);
            if round % 5 == 0 {
                values[rng.within(0..rows * cols)] = rng.pick(&[f32::NAN, f32::INFINITY, 1e30]);
            }
            let element = rng.pick(&ELEMENTS);
            let matrix = host_matrix(&mut rng, &values, cols, element);
            for code in [Code::Int4, Code::Int8, Code::Fp8] {
                let row = rng.within(0..rows);
                let found = Isa::available().into_iter().map(|isa| {
                    let groups = group_ends.len();
                    let (mut codes, mut scales) = (vec![0; cols], vec![0.0; groups]);
                    let mut zeros = vec![0; groups];
                    let to = RowOfCodes {
                        group_ends: &group_ends,
                        codes: &mut codes,
                        scales: &mut scales,
                        zeros: &mut zeros,
                    };
                    Quantiser(isa).row(code, &matrix, row, to);
                    let scales: Vec<u32> = scales.into_iter().map(f32::to_bits).collect();
                    (codes, scales, zeros)
                });
                let found: Vec<_> = found.collect();
                for other in &found {
                    assert_eq!(other, &found[0], "round {round}, {code:?}");
                }
            }
        }
    }

    /// One code after the other, by the definition, is what vectors find.
    #[test]
    fn int8_codes_are_the_nearest() {
        let mut rng = Rng::new(72);
        let values = rng.values(300);
        let largest = values
            .iter()
            .fold(0.0_f32, |most, value| most.max(value.abs()));
        let matrix = host_matrix(&mut rng, &values, 300, crate::backend::Element::F32);
        let (mut codes, mut scales, mut zeros) = (vec![0; 300], [0.0], [9]);
        let to = RowOfCodes {
            group_ends: &[300],
            codes: &mut codes,
            scales: &mut scales,
            zeros: &mut zeros,
        };
        Quantiser::detect().row(Code::Int8, &matrix, 0, to);
        assert_eq!((scales[0], zeros[0]), (largest / 127.0, 0));
        for (code, value) in codes.iter().zip(&values) {
            let nearest = (value / scales[0]).round_ties_even() as i8;
            assert_eq!(code.cast_signed(), nearest, "{value}");
        }
    }
}
