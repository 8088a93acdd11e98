//! Quantises a matrix of numbers while it is loaded (`--quantization`).
//!
//! int8 and fp8 have a scale for each output, from the largest of the weights *on this rank*: of a row-parallel layer,
//! whose ranks each hold a part of an output's inputs, every rank has a scale of its own. So no rank reads what is not
//! its own, and the more ranks, the finer the scales; ranks of a column-parallel layer have what one rank would have.
//! int4 has a scale and a zero for each 128 inputs, counted from the first input of the whole weight, so that any number
//! of ranks has the same ones, unless a rank's range ends within a group.
//!
//! Invariant: a weight and what its code stands for differ by at most half a scale, or by the code's last bit with fp8;
//! int4 gives up some of that at a group's ends where the group as a whole gains.

use super::{over_threads, to_u32};
use anyhow::{Result, ensure};
use bytes::Bytes;
use half::{bf16, f16};
use kernels::backend::{Element, HostMatrix};
use kernels::quantized::{HostQuantized, e4m3, to_e4m3};
use topology::quantization::{Code, Grouping};

/// Largest code.
const INT8_MOST: f32 = 127.0;
const INT4_MOST: f32 = 15.0;
const FP8_MOST: f32 = 448.0;

/// Parts of a group's range that are tried for its codes: what is beyond is cut off, the rest is finer.
const INT4_RANGES: [f32; 6] = [1.0, 0.96, 0.92, 0.88, 0.84, 0.8];

/// `matrix` in codes. Its first column is input `first_input` of the whole weight.
///
/// # Errors
/// If a weight is not finite.
pub(super) fn quantise(matrix: &HostMatrix, code: Code, first_input: u32) -> Result<HostQuantized> {
    let HostMatrix { rows, cols, .. } = *matrix;
    let group_ends = group_ends(Grouping::at_load(code), first_input, cols);
    let groups = group_ends.len();
    let mut data = vec![0; rows * cols];
    let mut scales = vec![0.0; rows * groups];
    let mut zeros = vec![0; rows * groups];
    let outputs = scales.chunks_mut(groups).zip(zeros.chunks_mut(groups));
    let outputs = data
        .chunks_mut(cols.max(1))
        .zip(outputs)
        .enumerate()
        .collect();
    over_threads(outputs, cols, |(row, (codes, (scales, zeros)))| {
        let mut weights = vec![0.0; cols];
        read_row(matrix, row, &mut weights);
        let mut start = 0;
        for ((end, scale), zero) in group_ends.iter().zip(scales).zip(zeros) {
            (*scale, *zero) = group(code, &weights[start..*end], &mut codes[start..*end]);
            start = *end;
        }
    });
    ensure!(
        scales.iter().all(|scale| scale.is_finite()),
        "a weight is not finite, so that it cannot be quantized; load it without --quantization"
    );
    Ok(HostQuantized {
        code: super::code(code),
        data: Bytes::from(data),
        rows,
        cols,
        row_stride: cols,
        inputs: None,
        group_ends,
        scales,
        zeros: if code == Code::Int4 {
            zeros
        } else {
            Vec::new()
        },
    })
}

/// Where each group of the columns ends.
fn group_ends(grouping: Grouping, first_input: u32, cols: usize) -> Vec<usize> {
    let group = |column: usize| grouping.group_of(first_input + to_u32(column));
    let ends = (1..cols).filter(|column| group(*column) != group(column - 1));
    ends.chain([cols]).collect()
}

/// Row `row` of a matrix as numbers. `out: [cols]`
pub(super) fn read_row(matrix: &HostMatrix, row: usize, out: &mut [f32]) {
    fn read<const N: usize>(bytes: &[u8], out: &mut [f32], to_float: impl Fn([u8; N]) -> f32) {
        for (to, bytes) in out.iter_mut().zip(bytes.chunks_exact(N)) {
            *to = to_float(bytes.try_into().expect("a chunk of this length"));
        }
    }
    let bytes = &matrix.data[row * matrix.row_stride * matrix.element.bytes()..];
    match matrix.element {
        Element::F32 => read(bytes, out, f32::from_le_bytes),
        Element::Bf16 => read(bytes, out, |two| bf16::from_le_bytes(two).to_f32()),
        Element::F16 => read(bytes, out, |two| f16::from_le_bytes(two).to_f32()),
        Element::Fp8 => read(bytes, out, |[code]| e4m3(code)),
    }
}

/// Codes of one group of weights; returns its scale and its zero. The scale is no number where a weight is not finite.
fn group(code: Code, weights: &[f32], codes: &mut [u8]) -> (f32, u8) {
    // Nothing times what is not finite is no number.
    let nothing = by_lanes(weights, |sum, weight| sum + 0.0 * weight);
    if nothing.into_iter().any(f32::is_nan) {
        return (f32::NAN, 0);
    }
    let largest = by_lanes(weights, |most, weight| larger(most, weight.abs()));
    let largest = largest.into_iter().fold(0.0, larger);
    // A group of zeros has any scale; one that divides by nothing.
    let scale = |most: f32| if largest > 0.0 { largest / most } else { 1.0 };
    match code {
        Code::Int8 => {
            let scale = scale(INT8_MOST);
            for (code, weight) in codes.iter_mut().zip(weights) {
                let rounded = nearest(weight / scale).clamp(-INT8_MOST, INT8_MOST);
                *code = small(rounded).cast_unsigned();
            }
            (scale, 0)
        }
        Code::Fp8 => {
            let scale = scale(FP8_MOST);
            for (code, weight) in codes.iter_mut().zip(weights) {
                *code = to_e4m3(weight / scale);
            }
            (scale, 0)
        }
        Code::Int4 => {
            // Both range over zero, which is so represented exactly.
            let low = by_lanes(weights, smaller).into_iter().fold(0.0, smaller);
            let high = by_lanes(weights, larger).into_iter().fold(0.0, larger);
            let candidates = INT4_RANGES.map(|part| int4(weights, part * low, part * high));
            let (_, scale, zero) = candidates
                .into_iter()
                .min_by(|one, other| one.0.total_cmp(&other.0))
                .expect("there are ranges");
            for (code, weight) in codes.iter_mut().zip(weights) {
                *code = small(int4_code(*weight, scale, zero)).cast_unsigned();
            }
            (scale, small(zero).cast_unsigned())
        }
    }
}

/// The squared error of a range in 4 bits, its scale and its zero.
fn int4(weights: &[f32], low: f32, high: f32) -> (f32, f32, f32) {
    let scale = (high - low) / INT4_MOST;
    let scale = if scale > 0.0 { scale } else { 1.0 };
    let zero = nearest(-low / scale).clamp(0.0, INT4_MOST);
    let errors = by_lanes(weights, |sum, weight| {
        let error = weight - scale * (int4_code(weight, scale, zero) - zero);
        sum + error * error
    });
    (errors.into_iter().sum(), scale, zero)
}

/// Lanes that are folded side by side.
const LANES: usize = 16;

/// Folds each lane from 0 on: one after the other, each result would have to wait for the one before.
fn by_lanes(weights: &[f32], fold: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = weights.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, weight) in lanes.iter_mut().zip(chunk) {
            *lane = fold(*lane, *weight);
        }
    }
    for (lane, weight) in lanes.iter_mut().zip(rest) {
        *lane = fold(*lane, *weight);
    }
    lanes
}

fn int4_code(weight: f32, scale: f32, zero: f32) -> f32 {
    (nearest(weight / scale) + zero).clamp(0.0, INT4_MOST)
}

/// As vectors do it, in one instruction.
fn larger(one: f32, other: f32) -> f32 {
    if one > other { one } else { other }
}

fn smaller(one: f32, other: f32) -> f32 {
    if one < other { one } else { other }
}

/// Rounded to the nearest whole number, halves to even. Of numbers below 2^22; faster than `round_ties_even` where the
/// compiler may not use an instruction for it.
fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: what follows the point has no place beside it
    (x + SHIFT) - SHIFT
}

/// A whole number of at most 127.
fn small(whole: f32) -> i8 {
    #[expect(clippy::cast_possible_truncation, reason = "it was clamped")]
    let small = whole as i8;
    small
}
