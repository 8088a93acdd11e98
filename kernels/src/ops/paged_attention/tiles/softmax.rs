//! The weights of some rows with a part of the keys: scores of tiles become weights of tiles.
//!
//! A row at a time, all its scores being there: one pass for the maximum, one for the weights and their sum. Scores come as
//! exponents of two. Invariant: a row's weights follow from the scores of what it sees, whatever else is in its tiles.

use super::{CHUNK, Turn};
use crate::cpu::scratch::Space;
use crate::cpu::simd::amx::Floats;
use crate::cpu::simd::{CELL, Kernel, LANES, Simd};
use crate::cpu::tanh::soft_capped;
use crate::ops::paged_attention::round::{State, larger};
use half::bf16;
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Turns scores into weights relative to each row's maximum, zero for what is not `seen` of a row.
pub(super) struct Softmax<'a, 'b, F> {
    pub(super) turn: &'a mut Turn<'b>,
    pub(super) soft_cap: Option<f32>,
    pub(super) seen: F,
}

impl<F: Fn(usize) -> Range<usize>> Kernel for Softmax<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let turn = self.turn;
        let (tile_rows, chunks, stride) = (turn.shape.tile_rows, turn.chunks.len(), turn.stride());
        for (i, row) in turn.rows.clone().enumerate() {
            let seen = (self.seen)(row);
            let end = turn.start + chunks * CHUNK;
            let seen = [seen.start, seen.end].map(|at| at.clamp(turn.start, end) - turn.start);
            let (tile, place) = (i / tile_rows, i % tile_rows);
            let mut row = Row {
                scores: &mut turn.scores[2 * tile * tile_rows + place..],
                stride,
                weights: &mut turn.weights[tile * chunks * tile_rows + place..],
                tile_rows,
                chunks,
            };
            turn.states[i] = row.weigh(simd, seen[0]..seen[1], self.soft_cap);
        }
    }
}

/// The scores of one row, its weights, and where they are.
struct Row<'a> {
    /// Every `stride` lines a chunk's first half, and `tile_rows` lines after it the second.
    scores: &'a mut Space,
    stride: usize,
    /// Every `tile_rows` lines a chunk.
    weights: &'a mut [Floats],
    tile_rows: usize,
    chunks: usize,
}

impl Row<'_> {
    /// The scores of a chunk.
    #[inline(always)]
    fn scores(&mut self, chunk: usize) -> [&mut [f32; LANES]; 2] {
        let lines = &mut self.scores[chunk * self.stride..][..=self.tile_rows];
        let [first, .., second] = lines else {
            unreachable!("a tile has rows")
        };
        [first, second]
    }

    #[inline(always)]
    fn weigh<S: Simd>(&mut self, simd: S, seen: Range<usize>, soft_cap: Option<f32>) -> State {
        let own = if seen.is_empty() {
            0..0
        } else {
            seen.start / CHUNK..seen.end.div_ceil(CHUNK)
        };
        for chunk in (0..own.start).chain(own.end..self.chunks) {
            self.weights[chunk * self.tile_rows] = [bf16::ZERO; CELL];
        }
        if own.is_empty() {
            return State::NOTHING;
        }
        if let Some(cap) = soft_cap {
            for chunk in own.clone() {
                for scores in self.scores(chunk) {
                    for score in scores {
                        *score = soft_capped(*score, cap * LOG2_E);
                    }
                }
            }
        }
        for (chunk, edge) in [(own.start, seen.start), (own.end - 1, seen.end)] {
            if !edge.is_multiple_of(CHUNK) {
                let [first, second] = self.scores(chunk);
                mask(first, chunk * CHUNK, &seen);
                mask(second, chunk * CHUNK + LANES, &seen);
            }
        }
        let mut most = [[f32::NEG_INFINITY; LANES]; 2];
        for chunk in own.clone() {
            let [first, second] = self.scores(chunk);
            for lane in 0..LANES {
                most[0][lane] = larger(first[lane], most[0][lane]);
                most[1][lane] = larger(second[lane], most[1][lane]);
            }
        }
        let max = largest(most);
        let mut sums = [0.0; LANES];
        for chunk in own {
            let [first, second] = self.scores(chunk);
            let mut line = [0; LANES];
            for lane in 0..LANES {
                let low = weight(first[lane] - max);
                let high = weight(second[lane] - max);
                // What is summed is what weighs.
                sums[lane] += f32::from_bits(low) + f32::from_bits(high);
                line[lane] = low >> 16 | high;
            }
            self.weights[chunk * self.tile_rows] = bytemuck::cast(line);
        }
        State {
            max: max * LN_2,
            sum: simd.sum(simd.load(&sums)),
        }
    }
}

/// Takes scores of sixteen positions from `first` on that are not `seen` out of the softmax.
#[inline(always)]
fn mask(scores: &mut [f32; LANES], first: usize, seen: &Range<usize>) {
    let [start, end] = [seen.start, seen.end].map(|at| at.saturating_sub(first));
    for (lane, score) in scores.iter_mut().enumerate() {
        *score = if start <= lane && lane < end {
            *score
        } else {
            f32::NEG_INFINITY
        };
    }
}

#[inline(always)]
fn largest([mut most, others]: [[f32; LANES]; 2]) -> f32 {
    for lane in 0..LANES {
        most[lane] = larger(most[lane], others[lane]);
    }
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            most[lane] = larger(most[lane], most[lane + half]);
        }
    }
    most[0]
}

/// The bits of `2^x` rounded to bfloat16, halves upwards.
#[inline(always)]
fn weight(x: f32) -> u32 {
    power(x).to_bits().wrapping_add(0x8000) & 0xffff_0000
}

/// `2^x` within 4e-6 relative for `x <= 0`, which is enough for eight bits; 0 below -125, NaN for NaN.
///
/// As `cpu/exp.rs` does it, with fewer terms, found so that the error is smallest, and fused multiplications.
#[inline(always)]
fn power(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    let shifted = x + ROUND;
    let r = x - (shifted - ROUND);
    let mut p = 0.009_582_853_f32;
    for c in [0.055_906_426, 0.240_240_99, 0.693_124_2, 1.0] {
        p = p.mul_add(r, c);
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < -125.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_are_close_to_the_exact_values() {
        let mut worst = 0.0_f64;
        for i in -1_250_000..=0 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp2();
            worst = worst.max((f64::from(power(x)) - exact).abs() / exact);
        }
        assert!(worst < 4e-6, "off by {worst:e}");
        assert_eq!(weight(0.0), 1.0_f32.to_bits());
        assert_eq!(weight(f32::NEG_INFINITY), 0);
        assert!(f32::from_bits(weight(f32::NAN)).is_nan());
    }
}
