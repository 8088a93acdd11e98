//! A product on matrix tiles: `x` rounded to bfloat16, times a packed matrix of bfloat16.
//!
//! First all threads lay out the rows of `x` as tiles, once for all of them. Then each claims panels and adds up their sums
//! block by block of columns. The part of a panel in one block, at most 40 KiB, stays in the first-level cache: all rows meet
//! it, and pass by that cache on their way from the second one, of 2 MiB. Where 1 MiB holds all rows, a panel is computed
//! from its first block to its last; otherwise panels come in groups, whose sums, at most 1 MiB, wait while all of them
//! meet the rows of one block, at most 640 KiB. Where rows fill no more than two tiles, weights are what is read, and each
//! panel is one block from its beginning to its end.
//!
//! Invariant: as said in `mod.rs`, a sum depends on a row and a column alone. Sums wait in memory between blocks as they
//! are in tiles, so blocks do not change them.

mod feed_forward;

pub(super) use feed_forward::{LEAST_ROWS, feed_forward};

use super::claims::Visits;
use super::{AddBias, equal_parts};
use crate::cpu::element::to_bf16;
use crate::cpu::matrix::Panel;
use crate::cpu::packed::{PANEL_ROWS, Packed};
use crate::cpu::scratch::{TILE_INPUTS, TILE_SPACE};
use crate::cpu::simd::amx::{
    CHUNK_CELLS, Course, Floats, Kept, Multiply, Product, TILE_ROWS, TileUnit,
};
use crate::cpu::simd::{CELL, Isa, Kernel, LANES, Simd};
use crate::cpu::threads::Panels;
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use half::bf16;
use std::ops::Range;

/// Columns of a tile of activations.
pub(super) const CHUNK: usize = CELL;

/// Most chunks of a block: 640 columns, of which a panel takes 40 KiB.
const BLOCK_CHUNKS: usize = 20;

/// Most rows that are multiplied at once.
pub(super) const MAX_ROWS: usize = 512;

/// How far ahead weights are asked for where they are read only once: 32 KiB.
const AHEAD: usize = 16 * CHUNK_CELLS;

/// Lines of activations that stay in a second-level cache of 2 MiB beside a panel's sums and what comes next: 1 MiB.
pub(super) const CACHED: usize = 16 << 10;

/// How rows and columns are cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) rows: usize,
    /// Tiles that the rows take, of `tile_rows` each; the last may have fewer.
    pub(super) tiles: usize,
    pub(super) tile_rows: usize,
    /// Blocks of `block_chunks` chunks; the last may have fewer. Few rows meet all in one.
    pub(super) blocks: usize,
    pub(super) block_chunks: usize,
}

impl Shape {
    fn of(rows: usize, cols: usize) -> Self {
        let chunks = cols.div_ceil(CHUNK);
        Self::cut(rows, chunks, chunks.div_ceil(chunks.div_ceil(BLOCK_CHUNKS)))
    }

    /// Many rows meet `block_chunks` of the chunks at a time.
    pub(super) fn cut(rows: usize, chunks: usize, block_chunks: usize) -> Self {
        let tiles = rows.div_ceil(TILE_ROWS);
        let block_chunks = if tiles <= 2 { chunks } else { block_chunks };
        Self {
            rows,
            tiles,
            tile_rows: rows.div_ceil(tiles),
            blocks: chunks.div_ceil(block_chunks),
            block_chunks,
        }
    }

    /// Whether weights are what is waited for.
    pub(super) fn is_few(&self) -> bool {
        self.tiles <= 2
    }

    /// Lines of one tile of activations through one block.
    pub(super) fn run(&self) -> usize {
        self.block_chunks * self.tile_rows
    }

    /// Lines of the sums of a panel.
    pub(super) fn sums(&self) -> usize {
        self.tiles * 2 * self.tile_rows
    }

    /// Lines of all activations.
    pub(super) fn inputs(&self) -> usize {
        self.blocks * self.tiles * self.run()
    }

    /// Weights are what few rows wait for; activations that do not stay in the cache are read once for each claim.
    pub(super) fn claims<'p>(&self, panels: Panels<'p>) -> Panels<'p> {
        if self.inputs() <= CACHED {
            panels.for_rows(self.rows)
        } else {
            panels.in_large_claims()
        }
    }

    /// Panels of a group, for whose sums there are so many lines.
    pub(super) fn group(&self, lines: usize) -> usize {
        // Where activations of all blocks stay in the cache, each panel is read from its beginning to its end.
        if self.inputs() <= CACHED {
            1
        } else {
            lines / self.sums()
        }
    }
}

/// The product, on the tiles of `unit`.
pub(super) fn linear<U: TileUnit>(
    (cpu, unit): (&CpuBackend, U),
    x: &CpuTensor,
    weight: &Packed,
    bias: Option<&CpuWeight>,
    out: &mut CpuTensor,
) {
    let cols = x.width();
    let lines_of_row = cols.div_ceil(CHUNK).next_multiple_of(BLOCK_CHUNKS);
    let most = (TILE_INPUTS / lines_of_row / TILE_ROWS * TILE_ROWS).clamp(1, MAX_ROWS);
    let mut inputs = cpu.scratch.tile_inputs();
    for part in equal_parts(x.rows(), most, TILE_ROWS) {
        let shape = Shape::of(part.len(), cols);
        let inputs: &mut [Floats] = &mut inputs.as_mut_slice()[..shape.inputs()];
        lay_out(cpu, x, (part.start, shape), inputs);
        multiply((cpu, unit), (inputs, shape), (weight, bias), (part, out));
    }
}

/// The product of rows that are laid out, which are `part` of those of `out`.
fn multiply<U: TileUnit>(
    (cpu, unit): (&CpuBackend, U),
    (inputs, shape): (&[Floats], Shape),
    (weight, bias): (&Packed, Option<&CpuWeight>),
    (part, out): (Range<usize>, &mut CpuTensor),
) {
    let (width, cost) = (
        out.width(),
        part.len() * weight.columns().padded() * PANEL_ROWS,
    );
    let out = (out.values_mut(), width);
    cpu.threads
        .panels(out, 0..width, (PANEL_ROWS, cost), |panels| {
            let mut panels = shape.claims(panels);
            let mut sums = cpu.scratch.tile_space(panels.thread());
            let mut turn = None;
            while let Some((_, mut panel)) = panels.claim() {
                let turn = turn.get_or_insert_with(|| Turn {
                    tiles: unit.tiles(shape.tile_rows),
                    shape,
                    inputs,
                    weight,
                });
                turn.panels(sums.as_mut_slice(), (part.start, &mut panel));
                if let Some(bias) = bias {
                    let (rows, panel) = (part.clone(), &mut panel);
                    cpu.isa.run(AddBias { bias, rows, panel });
                }
            }
        });
}

/// Rounds the rows of `x` from `first` on: `[blocks][tiles][chunks][rows]`. What is left of the last tile is zero.
fn lay_out(cpu: &CpuBackend, x: &CpuTensor, (first, shape): (usize, Shape), to: &mut [Floats]) {
    let run = shape.run();
    cpu.threads.rows(to, run, run * CHUNK, |i, lines| {
        let (block, tile) = (i / shape.tiles, i % shape.tiles);
        let from = block * shape.block_chunks * CHUNK;
        let to = (from + shape.block_chunks * CHUNK).min(x.width());
        for place in 0..shape.tile_rows {
            let row = tile * shape.tile_rows + place;
            let values = if row < shape.rows {
                &x.row(first + row)[from..to]
            } else {
                &[]
            };
            let lines = lines.iter_mut().skip(place).step_by(shape.tile_rows);
            round_row(cpu.isa, values, lines);
        }
    });
}

/// Rounds one row, padded with zeros, to every one of `lines`.
fn round_row<'a>(isa: Isa, values: &[f32], lines: impl Iterator<Item = &'a mut Floats>) {
    struct Round<'v, L>(&'v [f32], L);
    impl<'a, L: Iterator<Item = &'a mut Floats>> Kernel for Round<'_, L> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, _: S) {
            let (whole, rest) = self.0.as_chunks::<CHUNK>();
            let mut last = [0.0; CHUNK];
            last[..rest.len()].copy_from_slice(rest);
            let mut whole = whole.iter();
            let mut last = Some(&last).into_iter();
            for line in self.1 {
                let values = whole
                    .next()
                    .or_else(|| last.next())
                    .unwrap_or(&[0.0; CHUNK]);
                for (to, from) in line.iter_mut().zip(values) {
                    *to = to_bf16(*from);
                }
            }
        }
    }
    isa.run(Round(values, lines));
}

/// One thread with its tiles.
struct Turn<'a, T> {
    tiles: T,
    shape: Shape,
    inputs: &'a [Floats],
    weight: &'a Packed,
}

impl<T: Multiply> Turn<'_, T> {
    /// The sums of a claimed panel, which may be many panels of the weight, from `row` of `out` on.
    fn panels(&mut self, sums: &mut [[f32; LANES]], (row, out): (usize, &mut Panel<'_>)) {
        let columns = out.columns();
        let claimed = columns.start / PANEL_ROWS..columns.end.div_ceil(PANEL_ROWS);
        let of_panel = self.shape.sums();
        let (behind, of_group) = (claimed.end, self.shape.group(TILE_SPACE));
        for (at, next) in Visits::of(claimed, behind, (of_group, self.shape.blocks)) {
            let sums = &mut sums[at.in_group * of_panel..][..of_panel];
            let to = Some(((row, at.column), &mut *out));
            self.block((at.block, at.panel), next, sums, to);
        }
    }

    /// Where in the weight the cells of a block of a panel are; nowhere for a panel beyond the last.
    fn cells(&self, (block, panel): (usize, usize)) -> Range<usize> {
        let (all, own) = (self.weight.cells::<bf16>().len(), self.weight.panel_cells());
        let start = (block * self.shape.block_chunks * CHUNK_CELLS).min(own);
        let end = ((block + 1) * self.shape.block_chunks * CHUNK_CELLS).min(own);
        (panel * own + start).min(all)..(panel * own + end).min(all)
    }

    /// Adds the products of all rows with one block of a panel to the panel's sums, which with the last block go where
    /// `out` says: from a row and a column on, if anywhere.
    fn block(
        &mut self,
        at: (usize, usize),
        next: (usize, usize),
        sums: &mut [[f32; LANES]],
        mut out: Option<((usize, usize), &mut Panel<'_>)>,
    ) {
        let all = self.weight.cells::<bf16>();
        let own = self.cells(at);
        let (next, kept) = if self.shape.is_few() {
            let ahead = (own.start + AHEAD).min(all.len())..(own.end + AHEAD).min(all.len());
            (ahead, Kept::Rows)
        } else {
            (self.cells(next), Kept::Cells)
        };
        let (cells, ahead) = (&all[own], &all[next]);
        let (run, rows) = (self.shape.run(), self.shape.tile_rows);
        let (whole, rest) = cells.split_at(cells.len() / CHUNK_CELLS * CHUNK_CELLS);
        let chunks = whole.len() / CHUNK_CELLS;
        let is_last = at.0 + 1 == self.shape.blocks;
        let inputs = &self.inputs[at.0 * self.shape.tiles * run..][..self.shape.tiles * run];
        let pairs = inputs.chunks(2 * run).zip(sums.chunks_mut(4 * rows));
        let count = self.shape.tiles.div_ceil(2);
        for (pair, (inputs, sums)) in pairs.enumerate() {
            // Each asks for its share of what comes next.
            let [from, to] = [pair, pair + 1].map(|pair| pair * ahead.len() / count);
            let tiles: [&[Floats]; 2] = [0, run].map(|start| inputs.get(start..).unwrap_or(&[]));
            let tiles = &tiles[..inputs.len() / run];
            let start = 2 * pair * rows;
            let these = start..start + tiles.len() * rows;
            let mut strip = None;
            if is_last
                && these.end <= self.shape.rows
                && let Some(((row, column), out)) = &mut out
            {
                strip = out.strip(*row + these.start..*row + these.end, *column);
            }
            let is_put = is_last && strip.is_none();
            if chunks > 0 {
                let parts = tiles_of(tiles, 0..chunks * rows);
                let product = Product {
                    rows: &parts[..tiles.len()],
                    cells: whole,
                    sums,
                    ahead: &ahead[from..to],
                    kept,
                };
                let out = strip.take_if(|_| rest.is_empty());
                let is_first = at.0 == 0;
                self.tiles.floats(product, Course { is_first, out });
            }
            if !rest.is_empty() {
                // Half a chunk is left, which the tiles of activations have zeros for.
                let mut last = Aligned([[bf16::ZERO; CELL]; CHUNK_CELLS]);
                last.0[..rest.len()].copy_from_slice(rest);
                let parts = tiles_of(tiles, chunks * rows..(chunks + 1) * rows);
                let product = Product {
                    rows: &parts[..tiles.len()],
                    cells: &last.0,
                    sums,
                    ahead: &[],
                    kept,
                };
                let course = Course {
                    is_first: at.0 == 0 && chunks == 0,
                    out: strip,
                };
                self.tiles.floats(product, course);
            }
            if is_put && let Some(((row, column), out)) = &mut out {
                let rows = (*row + start, self.shape.rows - start, rows);
                put(sums, rows, *column, out);
            }
        }
    }
}

/// Some lines of one or two tiles.
fn tiles_of<'a>(tiles: &[&'a [Floats]], lines: Range<usize>) -> [&'a [Floats]; 2] {
    let mut parts: [&[Floats]; 2] = [&[]; 2];
    for (part, tile) in parts.iter_mut().zip(tiles) {
        *part = &tile[lines.clone()];
    }
    parts
}

/// Copies a panel's sums, `[tiles][2][tile_rows]`, to `rows` rows from `first` on and the columns from `column` on; what is
/// beyond the end is the weight's padding.
pub(super) fn put(
    sums: &[[f32; LANES]],
    (first, rows, tile_rows): (usize, usize, usize),
    column: usize,
    out: &mut Panel<'_>,
) {
    for (tile, sums) in sums.chunks_exact(2 * tile_rows).enumerate() {
        let halves = sums.split_at(tile_rows);
        for (place, sums) in halves.0.iter().zip(halves.1).enumerate() {
            let row = tile * tile_rows + place;
            if row < rows {
                let to = &mut out.row(first + row)[column..];
                for (to, sums) in to.chunks_mut(LANES).zip([sums.0, sums.1]) {
                    if let Some(to) = to.first_chunk_mut() {
                        *to = *sums;
                    } else {
                        to.copy_from_slice(&sums[..to.len()]);
                    }
                }
            }
        }
    }
}

/// Lines that are each a line of the cache.
#[repr(align(64))]
struct Aligned([Floats; CHUNK_CELLS]);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Element, Precision};
    use crate::cpu::scratch::Scratch;
    use crate::cpu::simd::amx::tests::Model;
    use crate::cpu::weight::Values;
    use crate::testing::{Rng, bits, tensor, weight};

    /// One sum, as `mod.rs` says it: in plain Rust, without tiles or blocks.
    fn twin(x: &[f32], w: &[f32], bias: Option<f32>) -> f32 {
        let mut sum = 0.0;
        for (x, w) in x.chunks(CHUNK).zip(w.chunks(CHUNK)) {
            let mut halves = [0.0_f32; 2];
            for (i, (x, w)) in x.iter().zip(w).enumerate() {
                let x = bf16::from_f32(*x).to_f32();
                halves[i % 2] = x.mul_add(*w, halves[i % 2]);
            }
            sum += halves[0] + halves[1];
        }
        bias.map_or(sum, |bias| sum + bias)
    }

    fn check<U: TileUnit>(unit: U, seed: u64) {
        let mut rng = Rng::new(seed);
        // One row and one tile; two tiles; blocks with a rest; several panels; several parts of the rows; activations that
        // do not stay in the cache, which panels meet in groups.
        let shapes = [
            (1, 1200, 70),
            (16, 90, 33),
            (29, 640, 64),
            (70, 1111, 97),
            (131, 528, 900),
            (530, 48, 40),
            (300, 1800, 200),
        ];
        for (rows, inputs, outputs) in shapes {
            for threads in [1, 3] {
                let mut cpu = CpuBackend::new(threads, None).unwrap();
                cpu.scratch = Scratch::of(threads).with_tiles().unwrap();
                cpu.threads.inline_cost = 0;
                let inputs = inputs + rng.within(0..20);
                let (w, w_values) = weight(&mut rng, &cpu, (outputs, inputs), Element::Bf16);
                let (bias, bias_values) = weight(&mut rng, &cpu, (1, outputs), Element::Bf16);
                let biased = rng.pick(&[false, true]);
                println!("{rows} x {inputs} x {outputs} on {threads}, bias: {biased}");
                let x = tensor(&cpu, &rng.values(rows * inputs), inputs);
                let mut out = cpu.allocate(rows, outputs, Precision::Compute).unwrap();
                let Values::Matrix(packed) = w.values() else {
                    panic!("a matrix is packed")
                };
                linear((&cpu, unit), &x, packed, biased.then_some(&bias), &mut out);
                // All of a small product, some of a large one.
                let step = if rows * outputs < 5000 { 1 } else { 37 };
                for at in (0..rows * outputs).step_by(step) {
                    let (row, column) = (at / outputs, at % outputs);
                    let w = &w_values[column * inputs..][..inputs];
                    let bias = biased.then_some(bias_values[column]);
                    let expected = twin(x.row(row), w, bias);
                    let actual = out.row(row)[column];
                    assert_eq!(
                        bits(&[actual]),
                        bits(&[expected]),
                        "row {row}, column {column}"
                    );
                }
            }
        }
    }

    #[test]
    fn tiles_in_plain_rust_give_the_twins_bits() {
        check(Model, 11);
    }

    #[test]
    fn the_instructions_give_the_twins_bits() {
        let Some(amx) = Isa::detect().tiles() else {
            println!("skipped: this CPU has no tiles");
            return;
        };
        check(amx, 12);
    }
}
