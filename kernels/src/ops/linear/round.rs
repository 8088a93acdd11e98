//! One thread's part of a product: some rows of `x` with the panels of the weight that it claims.
//!
//! The rows are copied once into the thread's memory, in the order in which tiles read them, so that a product's speed
//! does not depend on how far apart rows are. What a sum is, and in which order, is said in `mod.rs`.

use crate::cpu::element::{Stored, by_element};
use crate::cpu::packed::{PANEL_ROWS, Packed};
use crate::cpu::quantized::{PanelScales, Segment};
use crate::cpu::scratch::Space;
use crate::cpu::simd::{CELL, Kernel, LANES, Simd, by_rows, panel, tiles};
use crate::cpu::threads::{Panel, Panels};
use crate::cpu::{CpuTensor, CpuWeight};
use std::marker::PhantomData;
use std::ops::Range;

/// Some rows of `x` times some columns of the weight, in the hands of one thread.
pub(super) struct Round<'a, E> {
    pub(super) x: &'a CpuTensor,
    pub(super) weight: &'a Packed,
    /// To be added, when `segments` are the last.
    pub(super) bias: Option<&'a CpuWeight>,
    pub(super) rows: Range<usize>,
    pub(super) segments: &'a [Segment],
    pub(super) space: &'a mut Space,
    pub(super) stored: PhantomData<E>,
}

/// A thread's part of a round.
pub(super) struct Turn<'a, 'p, E> {
    pub(super) round: Round<'a, E>,
    pub(super) panels: Panels<'p>,
}

impl<E: Stored> Kernel for Turn<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            mut round,
            mut panels,
        } = self;
        let mut is_laid_out = false;
        while let Some((groups, mut panel)) = panels.claim() {
            if !is_laid_out {
                round.lay_out_rows(S::TILE.0);
                is_laid_out = true;
            }
            for (i, group) in groups.enumerate() {
                round.group(simd, (group, i * PANEL_ROWS), &mut panel);
            }
            if let Some(bias) = round.bias {
                add_bias(bias, round.rows.clone(), &mut panel);
            }
        }
    }
}

impl<E: Stored> Round<'_, E> {
    /// Copies the rows into the thread's memory: `[segments][tiles][vectors][rows of the tile][16]`.
    #[inline(always)]
    fn lay_out_rows(&mut self, most: usize) {
        let mut space = self.space.iter_mut();
        let inputs = self.weight.columns().inputs();
        for segment in self.segments {
            let columns = segment.columns.clone();
            for tile in tiles(self.rows.len(), most) {
                for column in columns.clone().step_by(LANES) {
                    for row in tile.clone() {
                        let row = self.x.row(self.rows.start + row);
                        let to = space.next().expect("a round fits into the memory");
                        if let Some(inputs) = inputs {
                            *to = [0.0; LANES];
                            for (to, input) in to.iter_mut().zip(&inputs[column..columns.end]) {
                                *to = row[*input as usize];
                            }
                        } else if let Some(vector) = row[column..columns.end].first_chunk() {
                            *to = *vector;
                        } else {
                            *to = [0.0; LANES];
                            to[..columns.end - column].copy_from_slice(&row[column..columns.end]);
                        }
                    }
                }
            }
        }
    }

    /// 32 columns of `out`.
    #[inline(always)]
    fn group<S: Simd>(&self, simd: S, (group, column): (usize, usize), panel: &mut Panel<'_>) {
        let all = self.weight.cells::<E>();
        let start = group * self.weight.panel_cells();
        let scales = self.weight.scales(group);
        let mut x = 0;
        for segment in self.segments {
            let padded = segment.padded.clone();
            let cells = &all[start + padded.start..start + padded.end];
            // What is read next: this panel's next segment, or the next panel where the round has one segment.
            let next = start
                + if self.segments.len() > 1 {
                    padded.end
                } else {
                    padded.start + self.weight.panel_cells()
                };
            let ahead = &all[next.min(all.len())..(next + padded.len()).min(all.len())];
            let rows = self.rows.len();
            for tile in tiles(rows, S::TILE.0) {
                let vectors = tile.len() * padded.len() / LANES;
                // Each tile asks for as much as it has work.
                let asked = [tile.start, tile.end].map(|row| row * ahead.len() / rows);
                let work = Work {
                    x: &self.space[x..x + vectors],
                    cells,
                    ahead: &ahead[asked[0]..asked[1]],
                    scales: scales.map(|scales| (scales, segment.group)),
                    is_first: padded.start == 0,
                    row: self.rows.start + tile.start,
                    column,
                    out: panel,
                };
                by_rows!(S, tile.len(), M => simd.call(Tile::<E, M>(work)));
                x += vectors;
            }
        }
    }
}

/// A few rows of `out` and 32 of its columns.
struct Work<'a, 'p, E> {
    /// `[vectors][rows][16]`
    x: &'a [[f32; LANES]],
    cells: &'a [[E; CELL]],
    ahead: &'a [[E; CELL]],
    /// What sums are multiplied with, and which group of it.
    scales: Option<(PanelScales<'a>, usize)>,
    /// Whether the sums are the first for their places.
    is_first: bool,
    row: usize,
    /// In the panel.
    column: usize,
    out: &'a mut Panel<'p>,
}

/// Of `M` rows.
struct Tile<'a, 'p, E, const M: usize>(Work<'a, 'p, E>);

impl<E: Stored, const M: usize> Kernel for Tile<'_, '_, E, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(work) = self;
        let (row, column, is_first) = (work.row, work.column, work.is_first);
        prefetch(simd, work.out, row..row + M, column);
        if const { S::TILE.1 >= 2 } {
            let sums = panel::<S, E, M, 2, 0, 2>(simd, work.x, work.cells, work.ahead);
            let sums = scaled::<S, E, M, 2>(simd, sums, work.scales, 0);
            put(simd, work.out, (row, column, is_first), &sums);
        } else {
            let sums = panel::<S, E, M, 1, 0, 2>(simd, work.x, work.cells, work.ahead);
            let sums = scaled::<S, E, M, 1>(simd, sums, work.scales, 0);
            put(simd, work.out, (row, column, is_first), &sums);
            let sums = panel::<S, E, M, 1, 1, 2>(simd, work.x, work.cells, &[]);
            let sums = scaled::<S, E, M, 1>(simd, sums, work.scales, 1);
            put(simd, work.out, (row, column + LANES, is_first), &sums);
        }
    }
}

/// Sums of products with elements that have scales, of the vectors of outputs from the `first` on.
#[inline(always)]
fn scaled<S: Simd, E: Stored, const M: usize, const N: usize>(
    simd: S,
    mut sums: [[S::Vector; N]; M],
    scales: Option<(PanelScales<'_>, usize)>,
    first: usize,
) -> [[S::Vector; N]; M] {
    // A constant condition: elements without one are 16 bits wide or more.
    if const { size_of::<E>() > 1 } {
        return sums;
    }
    if let Some((scales, group)) = scales {
        let (zero, unit) = (simd.splat(0.0), simd.splat(E::UNIT));
        let scales: [S::Vector; N] = scales.load(simd, group, first);
        for n in 0..N {
            let scale = simd.mul_add(scales[n], unit, zero);
            for m in 0..M {
                sums[m][n] = simd.mul_add(sums[m][n], scale, zero);
            }
        }
    }
    sums
}

/// Asks for the places of sums.
#[inline(always)]
pub(super) fn prefetch<S: Simd>(simd: S, panel: &mut Panel<'_>, rows: Range<usize>, column: usize) {
    for row in rows {
        let row = &panel.row(row)[column..];
        simd.prefetch(&row[0]);
        simd.prefetch(&row[LANES.min(row.len() - 1)]);
    }
}

/// Puts sums to `row` and the columns from `column` of the panel on, or adds them; what is beyond the end is the
/// weight's padding.
#[inline(always)]
pub(super) fn put<S: Simd, const M: usize, const N: usize>(
    simd: S,
    panel: &mut Panel<'_>,
    (row, column, is_first): (usize, usize, bool),
    sums: &[[S::Vector; N]; M],
) {
    for m in 0..M {
        let row = panel.row(row + m).get_mut(column..).unwrap_or_default();
        for (out, sums) in row.chunks_mut(LANES).zip(sums[m]) {
            let sums = simd.to_array(sums);
            match (<&mut [f32; LANES]>::try_from(&mut *out), is_first) {
                (Ok(out), true) => *out = sums,
                (Ok(out), false) => {
                    for i in 0..LANES {
                        out[i] += sums[i];
                    }
                }
                (Err(_), is_first) => {
                    for (out, sum) in out.iter_mut().zip(sums) {
                        *out = if is_first { sum } else { *out + sum };
                    }
                }
            }
        }
    }
}

/// Adds the panel's part of `bias` to each of `rows`.
pub(super) fn add_bias(bias: &CpuWeight, rows: Range<usize>, panel: &mut Panel<'_>) {
    by_element!(bias.element(), E => {
        let bias = &bias.vector::<E>()[panel.columns()];
        for row in rows {
            for (value, bias) in panel.row(row).iter_mut().zip(bias) {
                *value += bias.widen();
            }
        }
    });
}
