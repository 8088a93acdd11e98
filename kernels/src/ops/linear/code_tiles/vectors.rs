//! What vectors do around the products of tiles: they quantise rows, write codes out as bytes, and bring what comes out of
//! products into sums. What is not here: which of them, and when.
//!
//! Invariant: a sum is rounded as in `codes.rs`, in the same order.

use super::{CHUNK, STEP, Shape, chunks};
use crate::cpu::CpuTensor;
use crate::cpu::matrix::Strip;
use crate::cpu::quantized::{Columns, PanelScales, Segment};
use crate::cpu::simd::amx::Signed;
use crate::cpu::simd::{CODES, Kernel, LANES, Simd};
use crate::ops::linear::activations::{Factor, SEGMENT, quantized};
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
                let nothing = ([0; SEGMENT], Factor::zeroed());
                // Weights come less their zeros.
                let quantized = |row| quantized(self.columns, segment, row, 0);
                let (codes, factor) = row.map_or(nothing, quantized);
                factors[place] = factor;
                let (codes, _) = codes.as_chunks::<CHUNK>();
                for (codes, line) in codes[..chunks(segment)].iter().zip(&mut lines) {
                    *line = *codes;
                }
            }
        }
    }
}

/// Codes as bytes less their zero.
pub(super) struct WriteOut<'a> {
    pub(super) cells: &'a [[u8; CODES]],
    pub(super) code: Code,
    pub(super) zero: u8,
    /// What lies behind them stays what it is.
    pub(super) to: &'a mut [Signed],
}

impl Kernel for WriteOut<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let write = |to: &mut Signed, cell: &[u8; CODES], code: fn(u8) -> u8| {
            // Apart from both, so that the compiler need not care whether they overlap.
            let mut line = [0; CODES];
            for (to, byte) in line.iter_mut().zip(cell) {
                *to = code(*byte).wrapping_sub(self.zero).cast_signed();
            }
            *to = line;
        };
        if self.code == Code::Int4 {
            // A cell's low halves are one line, its high ones the next; two cells lie side by side.
            let (cells, _) = self.cells.as_chunks::<2>();
            let (lines, _) = self.to.as_chunks_mut::<4>();
            for (lines, cells) in lines.iter_mut().zip(cells) {
                for (i, cell) in cells.iter().enumerate() {
                    write(&mut lines[i], cell, |byte| byte & 15);
                    write(&mut lines[2 + i], cell, |byte| byte >> 4);
                }
            }
        } else {
            for (line, cell) in self.to.iter_mut().zip(self.cells) {
                write(line, cell, |byte| byte);
            }
        }
    }
}

/// Products of a step, for which scales and zeros count, and sums that they come to.
pub(super) struct Take<'a> {
    pub(super) segments: &'a [Segment],
    pub(super) scales: PanelScales<'a>,
    pub(super) offsets: Option<PanelScales<'a>>,
    /// Those of each tile. `[segments][rows]`
    pub(super) factors: &'a [&'a [Factor]],
    pub(super) rows: usize,
    /// `[segments][tiles][2][rows]`
    pub(super) dots: &'a [[i32; LANES]],
    /// Sums over the block so far, unless the step is the block's first. `[tiles][2][rows]`
    pub(super) block: &'a mut [[f32; LANES]],
    pub(super) is_first: bool,
    /// If the step is the block's last: sums over all blocks so far, unless the block is the first. `[tiles][2][rows]`
    pub(super) panel: Option<&'a mut [[f32; LANES]]>,
    pub(super) is_first_block: bool,
    /// Where they go instead if that block is the last, too, and `panel` stays as it is. `[tiles][rows]`
    pub(super) out: Option<Strip<'a>>,
}

impl Kernel for Take<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if self.panel.is_some() {
            self.step::<S, true>(simd);
        } else {
            self.step::<S, false>(simd);
        }
    }
}

impl Take<'_> {
    /// The `LAST` of a block, or another one.
    #[inline(always)]
    fn step<S: Simd, const LAST: bool>(self, simd: S) {
        match (self.segments.len(), self.offsets.is_some()) {
            (1, false) => self.add::<S, LAST, 1, false>(simd),
            (1, true) => self.add::<S, LAST, 1, true>(simd),
            (_, false) => self.add::<S, LAST, STEP, false>(simd),
            (_, true) => self.add::<S, LAST, STEP, true>(simd),
        }
    }

    /// With `N` segments.
    #[inline(always)]
    fn add<S: Simd, const LAST: bool, const N: usize, const OFFSETS: bool>(self, simd: S) {
        let (zero, one) = (simd.splat(0.0), simd.splat(1.0));
        let (mut scales, mut offsets) = ([[zero; 2]; N], [[zero; 2]; N]);
        for n in 0..N {
            let group = self.segments[n].group;
            scales[n] = self.scales.load(simd, group, 0);
            if let Some(all) = self.offsets {
                offsets[n] = all.load(simd, group, 0);
            }
        }
        let rows = self.rows;
        let of_segment = self.factors.len() * 2 * rows;
        let panel = self.panel.unwrap_or_default();
        let mut out = self.out;
        for (tile, factors) in self.factors.iter().enumerate() {
            let lines = tile * 2 * rows;
            let (mut of_rows, mut dots) = ([&factors[..0]; N], [[&self.dots[..0]; 2]; N]);
            for n in 0..N {
                of_rows[n] = &factors[n * rows..][..rows];
                let first = n * of_segment + lines;
                dots[n] = [first, first + rows].map(|first| &self.dots[first..][..rows]);
            }
            let block = halves(&mut self.block[lines..], rows);
            let (from, count) = if LAST { (lines, rows) } else { (0, 0) };
            let panel = halves(&mut panel[from..], count);
            for row in 0..rows {
                let mut sums = [zero; 2];
                if !self.is_first {
                    sums = [simd.load(&block[0][row]), simd.load(&block[1][row])];
                }
                for n in 0..N {
                    let factor = &of_rows[n][row];
                    let (scale, sum) = (simd.splat(factor.scale), simd.splat(factor.sum));
                    for half in 0..2 {
                        let mut dot = simd.load_i32(&dots[n][half][row]);
                        if OFFSETS {
                            dot = simd.mul_add(sum, offsets[n][half], dot);
                        }
                        let scaled = simd.mul_add(dot, scales[n][half], zero);
                        sums[half] = simd.mul_add(scaled, scale, sums[half]);
                    }
                }
                for half in 0..2 {
                    if !LAST {
                        block[half][row] = simd.to_array(sums[half]);
                        continue;
                    }
                    let mut sum = sums[half];
                    if !self.is_first_block {
                        sum = simd.mul_add(one, sum, simd.load(&panel[half][row]));
                    }
                    match &mut out {
                        Some(out) => out.put(tile * rows + row, half, simd.to_array(sum)),
                        None => panel[half][row] = simd.to_array(sum),
                    }
                }
            }
        }
    }
}

/// The first `count`, and as many after them.
#[inline(always)]
fn halves<T>(all: &mut [T], count: usize) -> [&mut [T]; 2] {
    let (first, second) = all.split_at_mut(count);
    [first, &mut second[..count]]
}
