//! What vectors do around the products of tiles: they quantise rows, write codes out as bytes, and bring what comes out of
//! products into sums. What is not here: which of them, and when.
//!
//! Invariant: a sum is rounded as in `codes.rs`, in the same order.

use super::{CHUNK, Line, STEP, Shape, chunks};
use crate::cpu::CpuTensor;
use crate::cpu::matrix::Strip;
use crate::cpu::quantized::{Columns, PanelScales, Segment};
use crate::cpu::simd::amx::Signed;
use crate::cpu::simd::{CODES, Kernel, LANES, Simd};
use crate::ops::linear::activations::{Factor, quantized};
use crate::quantized::Code;
use bytemuck::Zeroable;
use std::ops::Range;

/// Quantises one tile of rows through one block.
pub(super) struct LayOut<'a> {
    pub(super) x: &'a CpuTensor,
    pub(super) columns: &'a Columns,
    pub(super) segments: &'a [Segment],
    pub(super) rows: Range<usize>,
    pub(super) shape: Shape,
    pub(super) run: &'a mut [Signed],
}

impl Kernel for LayOut<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let count = self.shape.tile_rows;
        let (lines, factors) = self.run.split_at_mut(self.shape.chunk_lines * count);
        let factors = &mut bytemuck::cast_slice_mut(factors)
            [..self.segments.len() * count * size_of::<Factor>()];
        let factors: &mut [Factor] = bytemuck::cast_slice_mut::<u8, _>(factors);
        for place in 0..count {
            let row = self.rows.clone().nth(place).map(|row| self.x.row(row));
            let mut lines = lines.iter_mut().skip(place).step_by(count);
            for (segment, factors) in self.segments.iter().zip(factors.chunks_exact_mut(count)) {
                let lines = lines.by_ref().take(chunks(segment));
                let Some(row) = row else {
                    factors[place] = Factor::zeroed();
                    lines.for_each(|line| *line = [0; CHUNK]);
                    continue;
                };
                // Weights come less their zeros.
                quantized(self.columns, segment, row, 0, |codes, factor| {
                    factors[place] = factor;
                    for (codes, line) in codes.as_chunks::<CHUNK>().0.iter().zip(lines) {
                        *line = *codes;
                    }
                });
            }
        }
    }
}

/// Writes codes out as bytes less `zero`; what lies behind them in `to` stays what it is.
#[inline(always)]
pub(super) fn write_out(code: Code, zero: u8, cells: &[Line], to: &mut [Line]) {
    if code == Code::Int4 {
        // A cell's low halves are one line, its high ones the next; two cells lie side by side.
        let (cells, _) = cells.as_chunks::<2>();
        let (lines, _) = to.as_chunks_mut::<4>();
        for (lines, cells) in lines.iter_mut().zip(cells) {
            for i in 0..2 {
                lines[i] = less::<15, 0>(&cells[i], zero);
                lines[2 + i] = less::<15, 4>(&cells[i], zero);
            }
        }
    } else {
        for (line, cell) in to.iter_mut().zip(cells) {
            *line = less::<255, 0>(cell, zero);
        }
    }
}

/// Some bits of each byte, less the same number.
#[inline(always)]
fn less<const MASK: u8, const SHIFT: u32>(cell: &Line, zero: u8) -> Line {
    let mut line = [0; CODES];
    for i in 0..CODES {
        line[i] = ((cell[i] >> SHIFT) & MASK).wrapping_sub(zero);
    }
    line
}

/// What is still to be added to codes.
#[derive(Clone, Copy)]
pub(super) enum Offsets<'a> {
    Nothing,
    Same(f32),
    Each(PanelScales<'a>),
}

/// Adds the products of one tile of rows with one or two segments to its sums.
pub(super) struct Fold<'a> {
    pub(super) segments: &'a [Segment],
    pub(super) scales: PanelScales<'a>,
    pub(super) offsets: Offsets<'a>,
    /// `[segments][rows]`
    pub(super) factors: &'a [Factor],
    /// `[2][rows]` of each segment; those of the second are `apart` lines behind.
    pub(super) dots: &'a [[i32; LANES]],
    pub(super) apart: usize,
    /// `[2][rows]`
    pub(super) sums: &'a mut [[f32; LANES]],
}

impl Kernel for Fold<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let is_zero = matches!(self.offsets, Offsets::Nothing);
        match (self.segments.len(), is_zero) {
            (1, true) => self.add::<S, 1, false>(simd),
            (1, false) => self.add::<S, 1, true>(simd),
            (_, true) => self.add::<S, STEP, false>(simd),
            (_, false) => self.add::<S, STEP, true>(simd),
        }
    }
}

impl Fold<'_> {
    /// With `N` segments.
    #[inline(always)]
    fn add<S: Simd, const N: usize, const OFFSETS: bool>(self, simd: S) {
        let zero = simd.splat(0.0);
        let (mut scales, mut offsets) = ([[zero; 2]; N], [[zero; 2]; N]);
        for n in 0..N {
            let group = self.segments[n].group;
            scales[n] = self.scales.load(simd, group, 0);
            match self.offsets {
                Offsets::Nothing => (),
                Offsets::Same(offset) => offsets[n] = [simd.splat(offset); 2],
                Offsets::Each(all) => offsets[n] = all.load(simd, group, 0),
            }
        }
        let rows = self.sums.len() / 2;
        let (upper, lower) = self.sums.split_at_mut(rows);
        // Of the first segment and of the last, which may be the same.
        let factors = [
            &self.factors[..rows],
            &self.factors[(N - 1) * rows..][..rows],
        ];
        let (first, last) = (self.dots, &self.dots[(N - 1) * self.apart..]);
        let first = first[..rows].iter().zip(&first[rows..2 * rows]);
        let last = last[..rows].iter().zip(&last[rows..2 * rows]);
        let products = factors[0]
            .iter()
            .zip(first)
            .zip(factors[1].iter().zip(last));
        for ((upper, lower), (first, last)) in upper.iter_mut().zip(lower).zip(products) {
            let products = [first, last];
            let mut sums = [simd.load(upper), simd.load(lower)];
            for n in 0..N {
                let (factor, dots) = products[n];
                let dots = [simd.load_i32(dots.0), simd.load_i32(dots.1)];
                let (scale, sum) = (simd.splat(factor.scale), simd.splat(factor.sum));
                for half in 0..2 {
                    let mut dot = dots[half];
                    if OFFSETS {
                        // Exact: all are integers, and so small that what comes out is one of f32.
                        dot = simd.mul_add(sum, offsets[n][half], dot);
                    }
                    let scaled = simd.mul_add(dot, scales[n][half], zero);
                    sums[half] = simd.mul_add(scaled, scale, sums[half]);
                }
            }
            *upper = simd.to_array(sums[0]);
            *lower = simd.to_array(sums[1]);
        }
    }
}

/// Ends one tile's sums over a block, which then begin at zero again.
pub(super) struct Close<'a> {
    /// `[2][rows]`
    pub(super) block: &'a mut [[f32; LANES]],
    /// Over all blocks before, unless the block is the first, and with it then. `[2][rows]`
    pub(super) panel: &'a mut [[f32; LANES]],
    pub(super) is_first: bool,
    /// Where they go instead if the block is the last. `[rows]`
    pub(super) out: Option<Strip<'a>>,
}

impl Kernel for Close<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            block,
            panel,
            is_first,
            mut out,
        } = self;
        let rows = block.len() / 2;
        let (upper, lower) = block.split_at_mut(rows);
        let (panel_upper, panel_lower) = panel.split_at_mut(rows);
        let sums = upper.iter_mut().zip(lower);
        let before = panel_upper.iter_mut().zip(panel_lower);
        for (row, (sums, before)) in sums.zip(before).enumerate() {
            let mut both = [*sums.0, *sums.1];
            if !is_first {
                both[0] = plus(simd, &both[0], before.0);
                both[1] = plus(simd, &both[1], before.1);
            }
            if let Some(out) = &mut out {
                *out.row(row) = both;
            } else {
                [*before.0, *before.1] = both;
            }
            [*sums.0, *sums.1] = [[0.0; LANES]; 2];
        }
    }
}

#[inline(always)]
fn plus<S: Simd>(simd: S, one: &[f32; LANES], other: &[f32; LANES]) -> [f32; LANES] {
    let sum = simd.mul_add(simd.splat(1.0), simd.load(one), simd.load(other));
    simd.to_array(sum)
}
