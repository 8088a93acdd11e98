//! One round of a product: some rows of `x` with some columns of the weight.
//!
//! The rows are copied once for all threads, in the order in which tiles read them, so that a product's speed does not
//! depend on how far apart rows are. Then each thread takes the panels of the weight that it claims. What a sum is, and
//! in which order, is said in `mod.rs`.

use super::claims::{Claimed, Claims, Multiplier};
use crate::cpu::element::{Stored, by_element};
use crate::cpu::matrix::Panel;
use crate::cpu::packed::{BLOCK, PANEL_ROWS, Packed};
use crate::cpu::quantized::{Columns, PanelScales, Segment};
use crate::cpu::simd::{CELL, Kernel, LANES, Simd, by_rows, panel, tiles};
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;

/// Where rows lie: a slot for each tile of them in each segment, `[segments][tiles]`, of which each is
/// `[vectors][rows of the tile][16]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots {
    rows: usize,
    /// Rows of the largest tile there can be.
    most: usize,
    /// How many there are.
    tiles: usize,
    /// Vectors of one.
    slot: usize,
}

impl Slots {
    /// For so many rows of what is multiplied with such columns.
    pub(super) fn of(cpu: &CpuBackend, rows: usize, columns: &Columns) -> Self {
        let most = cpu.isa.run(TileRows);
        // The first tile is the largest.
        let largest = tiles(rows, most).next().map_or(0, |tile| tile.len());
        let segments = columns.segments().iter();
        let longest = segments.map(|segment| segment.padded.len()).max();
        Self {
            rows,
            most,
            tiles: tiles(rows, most).count(),
            slot: largest * longest.unwrap_or(0) / LANES,
        }
    }

    /// Vectors of all rows of a segment.
    pub(super) fn of_segment(&self) -> usize {
        self.tiles * self.slot
    }

    /// Copies the columns of `segments` of the rows of `x` from `first` on.
    pub(super) fn lay_out(
        &self,
        cpu: &CpuBackend,
        (x, first): (&CpuTensor, usize),
        (weight, segments): (&Packed, &[Segment]),
        to: &mut [[f32; LANES]],
    ) {
        let inputs = weight.columns().inputs();
        let cost = self.slot * LANES;
        cpu.threads.rows(to, self.slot, cost, |i, to| {
            let columns = segments[i / self.tiles].columns.clone();
            let tile = tiles(self.rows, self.most).nth(i % self.tiles);
            let tile = tile.expect("a slot for each tile");
            cpu.isa.run(LayOut {
                x,
                inputs,
                columns,
                rows: first + tile.start..first + tile.end,
                to,
            });
        });
    }
}

/// Rows of the largest tile of an instruction set.
struct TileRows;

impl Kernel for TileRows {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::TILE.0
    }
}

/// Copies a tile of rows into its slot.
struct LayOut<'a> {
    x: &'a CpuTensor,
    /// Which column of `x` each is, if they are not in order.
    inputs: Option<&'a [u32]>,
    columns: Range<usize>,
    rows: Range<usize>,
    to: &'a mut [[f32; LANES]],
}

impl Kernel for LayOut<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let mut to = self.to.iter_mut();
        for column in self.columns.clone().step_by(LANES) {
            for row in self.rows.clone() {
                let row = self.x.row(row);
                let to = to.next().expect("a slot is as long as its tile");
                if let Some(inputs) = self.inputs {
                    *to = [0.0; LANES];
                    for (to, input) in to.iter_mut().zip(&inputs[column..self.columns.end]) {
                        *to = row[*input as usize];
                    }
                } else if let Some(vector) = row[column..self.columns.end].first_chunk() {
                    *to = *vector;
                } else {
                    *to = [0.0; LANES];
                    to[..self.columns.end - column].copy_from_slice(&row[column..self.columns.end]);
                }
            }
        }
    }
}

/// Some rows of `x` times some columns of the weight, in the hands of one thread.
pub(super) struct Round<'a, E> {
    /// As [`Slots`] says.
    pub(super) x: &'a [[f32; LANES]],
    pub(super) slots: Slots,
    pub(super) weight: &'a Packed,
    pub(super) rows: Range<usize>,
    pub(super) segments: &'a [Segment],
    /// The thread's memory for a segment of a panel.
    pub(super) widened: &'a mut [[bf16; CELL]],
    pub(super) stored: PhantomData<E>,
}

/// A thread's part of a round.
pub(super) struct Turn<'a, 'p, E> {
    pub(super) round: Round<'a, E>,
    pub(super) claims: Claims<'a, 'p>,
}

impl<E: Stored> Kernel for Turn<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { round, claims } = self;
        claims.run(simd, || Thread { simd, round });
    }
}

/// A thread at work.
struct Thread<'a, S, E> {
    simd: S,
    round: Round<'a, E>,
}

impl<S: Simd, E: Stored> Multiplier for Thread<'_, S, E> {
    #[inline(always)]
    fn multiply(&mut self, groups: Range<usize>, _: usize, panel: &mut Panel<'_>) {
        for (i, group) in groups.enumerate() {
            self.round.group(self.simd, (group, i * PANEL_ROWS), panel);
        }
    }
}

impl<E: Stored> Round<'_, E> {
    /// 32 columns of `out`.
    #[inline(always)]
    fn group<S: Simd>(&mut self, simd: S, (group, column): (usize, usize), panel: &mut Panel<'_>) {
        let all = self.weight.cells::<E>();
        let start = group * self.weight.panel_cells();
        let scales = self.weight.scales(group);
        let rows = self.rows.len();
        let is_widened = size_of::<E>() == 1 && rows > S::TILE.0;
        let mut slots = self.x.chunks_exact(self.slots.slot.max(1));
        for segment in self.segments {
            let padded = segment.padded.clone();
            let cells = &all[start + padded.start..start + padded.end];
            if is_widened {
                widen(simd, cells, self.widened);
            }
            // What is read next: this panel's next segment, or the next panel where the round has one segment.
            let next = start
                + if self.segments.len() > 1 {
                    padded.end
                } else {
                    padded.start + self.weight.panel_cells()
                };
            let ahead = &all[next.min(all.len())..(next + padded.len()).min(all.len())];
            for (tile, x) in tiles(rows, S::TILE.0).zip(&mut slots) {
                // Each tile asks for as much as it has work.
                let asked = [tile.start, tile.end].map(|row| row * ahead.len() / rows);
                let work = Work {
                    x: &x[..tile.len() * padded.len() / LANES],
                    cells,
                    ahead: &ahead[asked[0]..asked[1]],
                    scales: scales.map(|scales| (scales, segment.group)),
                    unit: E::UNIT,
                    is_first: padded.start == 0,
                    row: self.rows.start + tile.start,
                    column,
                    out: panel,
                };
                if is_widened {
                    let ahead = &work.ahead[..work.ahead.len() / 2 * 2];
                    let ahead = bytemuck::cast_slice(ahead);
                    let cells = &self.widened[..padded.len()];
                    run(simd, tile.len(), work.with(cells, ahead));
                } else {
                    run(simd, tile.len(), work);
                }
            }
        }
    }
}

/// Vectors of a thread's memory for a widened segment, of which rows leave as much.
pub(super) const WIDENED: usize =
    BLOCK * PANEL_ROWS * size_of::<bf16>() / size_of::<[f32; LANES]>();

/// Widens floats of 8 bits to bfloat16, which loses nothing: for many rows once, instead of for each tile.
#[inline(always)]
fn widen<S: Simd, E: Stored>(simd: S, cells: &[[E; CELL]], to: &mut [[bf16; CELL]]) {
    for (to, cell) in to.iter_mut().zip(cells) {
        let first = simd.to_array(E::column::<S, false>(simd, cell));
        let second = simd.to_array(E::column::<S, true>(simd, cell));
        let mut pairs = [0; LANES];
        for (pair, (first, second)) in pairs.iter_mut().zip(first.into_iter().zip(second)) {
            *pair = first.to_bits() >> 16 | second.to_bits() & 0xffff_0000;
        }
        *to = bytemuck::cast(pairs);
    }
}

/// A tile of `rows` rows.
#[inline(always)]
fn run<S: Simd, E: Stored>(simd: S, rows: usize, work: Work<'_, '_, E>) {
    by_rows!(S, rows, M => simd.call(Tile::<E, M>(work)));
}

/// A few rows of `out` and 32 of its columns.
struct Work<'a, 'p, E> {
    /// `[vectors][rows][16]`
    x: &'a [[f32; LANES]],
    cells: &'a [[E; CELL]],
    ahead: &'a [[E; CELL]],
    /// What sums are multiplied with, and which group of it.
    scales: Option<(PanelScales<'a>, usize)>,
    /// What they, and not the elements, take into account.
    unit: f32,
    /// Whether the sums are the first for their places.
    is_first: bool,
    row: usize,
    /// In the panel.
    column: usize,
    out: &'a mut Panel<'p>,
}

impl<'a, 'p, E> Work<'a, 'p, E> {
    /// The same with other cells.
    fn with<T>(self, cells: &'a [[T; CELL]], ahead: &'a [[T; CELL]]) -> Work<'a, 'p, T> {
        Work {
            x: self.x,
            cells,
            ahead,
            scales: self.scales,
            unit: self.unit,
            is_first: self.is_first,
            row: self.row,
            column: self.column,
            out: self.out,
        }
    }
}

/// Of `M` rows.
struct Tile<'a, 'p, E, const M: usize>(Work<'a, 'p, E>);

impl<E: Stored, const M: usize> Kernel for Tile<'_, '_, E, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(work) = self;
        let (row, column, is_first) = (work.row, work.column, work.is_first);
        prefetch::<S, M>(simd, work.out, (row, column));
        let scales = work
            .scales
            .map(|(scales, group)| (scales, group, work.unit));
        if const { S::TILE.1 >= 2 } {
            let mut sums = panel::<S, E, M, 2, 0, 2>(simd, work.x, work.cells, work.ahead);
            scale(simd, &mut sums, scales, 0);
            put(simd, work.out, (row, column, is_first), &sums);
        } else {
            let mut sums = panel::<S, E, M, 1, 0, 2>(simd, work.x, work.cells, work.ahead);
            scale(simd, &mut sums, scales, 0);
            put(simd, work.out, (row, column, is_first), &sums);
            let mut sums = panel::<S, E, M, 1, 1, 2>(simd, work.x, work.cells, &[]);
            scale(simd, &mut sums, scales, 1);
            put(simd, work.out, (row, column + LANES, is_first), &sums);
        }
    }
}

/// Multiplies sums with the scales of a group and the unit, from the `first` vector of outputs on.
#[inline(always)]
fn scale<S: Simd, const M: usize, const N: usize>(
    simd: S,
    sums: &mut [[S::Vector; N]; M],
    scales: Option<(PanelScales<'_>, usize, f32)>,
    first: usize,
) {
    if let Some((scales, group, unit)) = scales {
        let (zero, unit) = (simd.splat(0.0), simd.splat(unit));
        let scales: [S::Vector; N] = scales.load(simd, group, first);
        for n in 0..N {
            let scale = simd.mul_add(scales[n], unit, zero);
            for sums in &mut *sums {
                sums[n] = simd.mul_add(sums[n], scale, zero);
            }
        }
    }
}

/// Asks for the places of the sums of `M` rows.
#[inline(always)]
pub(super) fn prefetch<S: Simd, const M: usize>(
    simd: S,
    panel: &mut Panel<'_>,
    (row, column): (usize, usize),
) {
    if let Some(mut block) = panel.block::<M, { PANEL_ROWS / LANES }>(row, column) {
        for m in 0..M {
            for vector in block.row(m) {
                simd.prefetch(vector);
            }
        }
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
    if let Some(mut block) = panel.block::<M, N>(row, column) {
        let one = simd.splat(1.0);
        for (m, sums) in sums.iter().enumerate() {
            let out = block.row(m);
            for n in 0..N {
                let sum = if is_first {
                    sums[n]
                } else {
                    simd.mul_add(one, sums[n], simd.load(&out[n]))
                };
                out[n] = simd.to_array(sum);
            }
        }
        return;
    }
    for (row, sums) in (row..).zip(sums) {
        let row = panel.row(row).get_mut(column..).unwrap_or_default();
        let sums = sums.iter().flat_map(|vector| simd.to_array(*vector));
        for (out, sum) in row.iter_mut().zip(sums) {
            *out = if is_first { sum } else { *out + sum };
        }
    }
}

/// Adds the panel's part of `bias` to each of `rows`.
pub(super) struct AddBias<'a, 'p> {
    pub(super) bias: &'a CpuWeight,
    pub(super) rows: Range<usize>,
    pub(super) panel: &'a mut Panel<'p>,
}

impl Kernel for AddBias<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        by_element!(self.bias.element(), E => {
            let bias = &self.bias.vector::<E>()[self.panel.columns()];
            for row in self.rows {
                for (value, bias) in self.panel.row(row).iter_mut().zip(bias) {
                    *value += bias.widen();
                }
            }
        });
    }
}
