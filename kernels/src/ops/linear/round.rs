//! One thread's part of a product: some rows of `x` with the panels of the weight that it claims.
//!
//! The rows are copied once into the thread's memory, in the order in which tiles read them, so that a product's speed
//! does not depend on how far apart rows are. What a sum is, and in which order, is said in `mod.rs`.

use super::BLOCK;
use crate::cpu::element::{Stored, by_element};
use crate::cpu::packed::{PANEL_ROWS, Packed};
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
    /// To be added, when `columns` are the last.
    pub(super) bias: Option<&'a CpuWeight>,
    pub(super) rows: Range<usize>,
    /// Whole blocks, but for the weight's last.
    pub(super) columns: Range<usize>,
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
            for group in groups {
                round.group(simd, group, &mut panel);
            }
            if let Some(bias) = round.bias {
                add_bias(bias, &mut panel);
            }
        }
    }
}

impl<E: Stored> Round<'_, E> {
    /// Copies the rows into the thread's memory: `[blocks][tiles][vectors][rows of the tile][16]`.
    #[inline(always)]
    fn lay_out_rows(&mut self, most: usize) {
        let mut space = self.space.iter_mut();
        for block in self.columns.clone().step_by(BLOCK) {
            let columns = block..(block + BLOCK).min(self.columns.end);
            for tile in tiles(self.rows.len(), most) {
                for column in columns.clone().step_by(LANES) {
                    for row in tile.clone() {
                        let row = &self.x.row(self.rows.start + row)[column..columns.end];
                        let to = space.next().expect("a round fits into the memory");
                        if let Some(vector) = row.first_chunk() {
                            *to = *vector;
                        } else {
                            *to = [0.0; LANES];
                            to[..row.len()].copy_from_slice(row);
                        }
                    }
                }
            }
        }
    }

    /// 32 columns of `out`.
    #[inline(always)]
    fn group<S: Simd>(&self, simd: S, group: usize, panel: &mut Panel<'_>) {
        let all = self.weight.cells::<E>();
        let start = group * self.weight.panel_cells();
        let mut x = 0;
        for column in self.columns.clone().step_by(BLOCK) {
            let columns = (self.columns.end - column)
                .min(BLOCK)
                .next_multiple_of(LANES);
            let cells = &all[start + column..][..columns];
            // What is read next: this panel's next block, or the next panel where the round has one block.
            let next = start
                + if self.columns.len() > BLOCK {
                    column + columns
                } else {
                    column + self.weight.panel_cells()
                };
            let ahead = &all[next.min(all.len())..(next + columns).min(all.len())];
            let rows = self.rows.len();
            for tile in tiles(rows, S::TILE.0) {
                let vectors = tile.len() * columns / LANES;
                // Each tile asks for as much as it has work.
                let asked = [tile.start, tile.end].map(|row| row * ahead.len() / rows);
                let work = Work {
                    x: &self.space[x..x + vectors],
                    cells,
                    ahead: &ahead[asked[0]..asked[1]],
                    is_first: column == 0,
                    row: self.rows.start + tile.start,
                    column: group * PANEL_ROWS - panel.columns().start,
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
            put(simd, work.out, (row, column, is_first), &sums);
        } else {
            let sums = panel::<S, E, M, 1, 0, 2>(simd, work.x, work.cells, work.ahead);
            put(simd, work.out, (row, column, is_first), &sums);
            let sums = panel::<S, E, M, 1, 1, 2>(simd, work.x, work.cells, &[]);
            put(simd, work.out, (row, column + LANES, is_first), &sums);
        }
    }
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

/// Adds the panel's part of `bias` to each row.
pub(super) fn add_bias(bias: &CpuWeight, panel: &mut Panel<'_>) {
    by_element!(bias.element(), E => {
        let bias = &bias.vector::<E>()[panel.columns()];
        for row in panel.rows() {
            for (value, bias) in panel.row(row).iter_mut().zip(bias) {
                *value += bias.widen();
            }
        }
    });
}
