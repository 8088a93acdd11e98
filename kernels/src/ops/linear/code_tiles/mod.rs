//! Products of quantised activations with a weight of integer codes, on matrix tiles.
//!
//! First all threads quantise the rows of `x` as tiles, once for all of them. Then each claims panels, takes a few at a
//! time, and goes through them block by block of columns, a block in steps of two segments. A step's codes are written
//! out once, as bytes less their zero, and meet all rows, two tiles of them at a time. Tiles multiply, vectors bring what
//! comes out into the sums: those of the products before, so that neither waits for the other.
//!
//! Where segments are no whole chunks of 64 columns, activations are padded with zeros, and what they meet does not
//! matter: groups of 32 columns take half a chunk's time for nothing, which is still less than vectors need.
//!
//! What stays where, for segments of 128 columns and 512 rows. First-level cache, 36 of 48 KiB: a step's codes, 8 KiB,
//! which all rows meet; two tiles of activations through it, 8 KiB, and their sums, 4 KiB, which come from the
//! second level (the sums go back there) while tiles multiply for 256 cycles; what comes out of two steps, 16 KiB.
//! Second-level cache, 1.1 of 2 MiB: rows through one block, 576 KiB, which all panels of a group meet; sums, 512 KiB; and
//! the next block of codes, which is asked for.
//!
//! Invariant: as said in `codes.rs`, to the bit: products are exact, and what is rounded is so in the same order. Which
//! of the two multiplies may thus depend on anything.

mod vectors;

use super::activations::{Factor, SEGMENT};
use super::tiles::put;
use super::{AddBias, equal_parts};
use crate::cpu::matrix::Panel;
use crate::cpu::packed::PANEL_ROWS;
use crate::cpu::quantized::{Codes, Columns, Segment};
use crate::cpu::scratch::{TILE_INPUTS, TILE_SPACE};
use crate::cpu::simd::amx::{CHUNK_CELLS, Kept, Multiply, Product, Signed, TILE_ROWS, TileUnit};
use crate::cpu::simd::{CODES, Isa, LANES};
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use std::ops::Range;
use vectors::{LayOut, Take, WriteOut};

/// Rows that are too few for tiles. With as many, vectors keep up with 8 bytes of codes in a cycle (128 products), which
/// is more than a core's share of memory gives; tiles would read the same bytes, and write them once more.
const FEW_ROWS: usize = 16;

/// Most rows that are multiplied at once.
const MAX_ROWS: usize = 512;

/// Lines that activations of a block may take, 576 KiB: more than that does not stay in the cache beside the sums.
const BLOCK_LINES: usize = MAX_ROWS * 18;

/// Lines that all sums and what they are made of may take, 512 KiB: the same is true of them.
const SUMS: usize = TILE_SPACE / 2;

/// Columns of a tile of activations.
const CHUNK: usize = 64;

/// Segments of a step.
const STEP: usize = 2;

/// Lines of a thread's memory for the codes of a step.
const WEIGHTS: usize = STEP * SEGMENT / CHUNK * CHUNK_CELLS;

/// Lines of a thread's memory for what comes out of a step with two tiles of rows.
const DOTS: usize = STEP * 4 * TILE_ROWS;

/// Chunks that a segment takes.
fn chunks(segment: &Segment) -> usize {
    segment.padded.len().div_ceil(CHUNK)
}

/// How rows and columns are cut.
#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    /// Tiles that the rows take, of `tile_rows` each; the last may have fewer.
    tiles: usize,
    tile_rows: usize,
    blocks: usize,
    /// Lines of a row through the block that takes most: its chunks, and room for factors.
    chunk_lines: usize,
    factor_lines: usize,
}

impl Shape {
    fn of(rows: usize, columns: &Columns) -> Self {
        let tiles = rows.div_ceil(TILE_ROWS);
        let segments = |block: Range<usize>| &columns.segments()[block];
        let chunks = columns
            .blocks()
            .map(|block| segments(block).iter().map(chunks).sum());
        let factors = columns.blocks().map(|block| block.len());
        Self {
            rows,
            tiles,
            tile_rows: rows.div_ceil(tiles),
            blocks: columns.blocks().count(),
            chunk_lines: chunks.max().unwrap_or(0),
            factor_lines: (factors.max().unwrap_or(0) * size_of::<Factor>())
                .div_ceil(size_of::<Signed>()),
        }
    }

    /// Most rows at once of such columns; none where there are too many columns.
    fn most_rows(&self) -> usize {
        let line = self.chunk_lines + self.factor_lines;
        let fit = (TILE_INPUTS / (self.blocks * line)).min(BLOCK_LINES / line);
        (fit / TILE_ROWS * TILE_ROWS).min(MAX_ROWS)
    }

    /// Lines of one tile of activations through one block: `[chunks][rows]`, then factors, `[segments][rows]`.
    fn run(&self) -> usize {
        (self.chunk_lines + self.factor_lines) * self.tile_rows
    }

    /// Those of all of them.
    fn inputs(&self) -> usize {
        self.blocks * self.tiles * self.run()
    }

    /// Lines of the sums of a panel.
    fn sums(&self) -> usize {
        self.tiles * 2 * self.tile_rows
    }

    /// Panels of a group.
    fn group(&self) -> usize {
        // Where activations of all blocks stay in the cache, each panel is read from its beginning to its end.
        if self.inputs() <= BLOCK_LINES {
            1
        } else {
            (SUMS - WEIGHTS - 2 * DOTS - 2 * MAX_ROWS) / self.sums()
        }
    }
}

/// Whether tiles multiply so many rows faster than vectors, and can.
pub(super) fn pays(rows: usize, columns: &Columns) -> bool {
    rows > FEW_ROWS && Shape::of(rows, columns).most_rows() > 0
}

/// The outputs of `weight`, which are the columns of `out` from `first` on, on the tiles of `unit`. It must pay.
pub(super) fn linear<U: TileUnit>(
    (cpu, unit): (&CpuBackend, U),
    x: &CpuTensor,
    (weight, first): (&Codes, usize),
    bias: Option<&CpuWeight>,
    out: &mut CpuTensor,
) {
    let (columns, width) = (weight.columns(), out.width());
    let most = Shape::of(x.rows(), columns).most_rows();
    let mut inputs = cpu.scratch.tile_inputs();
    for part in equal_parts(x.rows(), most, TILE_ROWS) {
        let shape = Shape::of(part.len(), columns);
        let inputs: &mut [Signed] = &mut inputs.as_mut_slice()[..shape.inputs()];
        lay_out(cpu, (x, columns), (part.start, shape), inputs);
        let cost = part.len() * columns.padded() * PANEL_ROWS;
        let within = first..first + weight.rows();
        let out = (out.values_mut(), width);
        cpu.threads
            .panels(out, within, (PANEL_ROWS, cost), |mut panels| {
                let mut memory = cpu.scratch.tile_space(panels.thread());
                let mut space = Some(Space::of(memory.as_bytes_mut()));
                let mut turn = None;
                while let Some((numbers, mut panel)) = panels.claim() {
                    let turn = turn.get_or_insert_with(|| Turn {
                        isa: cpu.isa,
                        tiles: unit.tiles(shape.tile_rows),
                        shape,
                        first_row: part.start,
                        inputs,
                        weight,
                        space: space.take().expect("it is taken once"),
                    });
                    turn.panels(numbers, &mut panel);
                    if let Some(bias) = bias {
                        let (rows, panel) = (part.clone(), &mut panel);
                        cpu.isa.run(AddBias { bias, rows, panel });
                    }
                }
            });
    }
}

/// Quantises the rows of `x` from `first` on: `[blocks][tiles]` runs. What is left of the last tile is zero.
fn lay_out(
    cpu: &CpuBackend,
    (x, columns): (&CpuTensor, &Columns),
    (first, shape): (usize, Shape),
    to: &mut [Signed],
) {
    let run = shape.run();
    cpu.threads.rows(to, run, run * CHUNK, |i, run| {
        let (block, tile) = (i / shape.tiles, i % shape.tiles);
        let start = tile * shape.tile_rows;
        cpu.isa.run(LayOut {
            x,
            columns,
            segments: &columns.segments()[columns.blocks().nth(block).unwrap_or_default()],
            rows: first + start..first + (start + shape.tile_rows).min(shape.rows),
            shape,
            run,
        });
    });
}

/// A thread's memory, in lines.
struct Space<'a> {
    /// Codes of a step. `[chunks][16][2]`
    weights: &'a mut [Signed],
    /// What comes out of products, and what came out before. `[segments][tiles][2][rows]`
    dots: &'a mut [[i32; LANES]],
    dots_before: &'a mut [[i32; LANES]],
    /// Sums of a panel over a block. `[tiles][2][rows]`
    block: &'a mut [[f32; LANES]],
    /// Those of each panel of a group over the blocks before.
    panels: &'a mut [[f32; LANES]],
}

impl<'a> Space<'a> {
    fn of(memory: &'a mut [u8]) -> Self {
        let (weights, memory) = memory.split_at_mut(WEIGHTS * size_of::<Signed>());
        let (dots, memory) = memory.split_at_mut(2 * DOTS * size_of::<[i32; LANES]>());
        let dots: &mut [[i32; LANES]] = bytemuck::cast_slice_mut(dots);
        let (dots, dots_before) = dots.split_at_mut(DOTS);
        let sums: &mut [[f32; LANES]] = bytemuck::cast_slice_mut(memory);
        let (block, panels) = sums.split_at_mut(2 * MAX_ROWS);
        Self {
            weights: bytemuck::cast_slice_mut(weights),
            dots,
            dots_before,
            block,
            panels,
        }
    }
}

/// Two segments, or the last one, of one panel, with two tiles of rows, or the last one.
#[derive(Clone, Copy)]
struct Step {
    block: usize,
    panel: usize,
    /// Of the panel in its group.
    place: usize,
    /// Of its first segment, in the block.
    segment: usize,
    /// The first tile.
    tile: usize,
}

/// One thread with its tiles.
struct Turn<'a, T> {
    isa: Isa,
    tiles: T,
    shape: Shape,
    first_row: usize,
    inputs: &'a [Signed],
    weight: &'a Codes,
    space: Space<'a>,
}

impl<T: Multiply> Turn<'_, T> {
    /// Claimed panels, by number: all rows with each.
    fn panels(&mut self, numbers: Range<usize>, out: &mut Panel<'_>) {
        for first in numbers.clone().step_by(self.shape.group()) {
            let group = first..(first + self.shape.group()).min(numbers.end);
            let visits = self.shape.blocks * group.len();
            let at = |visit| match visit {
                _ if visit == visits => (0, group.end),
                _ => (visit / group.len(), first + visit % group.len()),
            };
            for visit in 0..visits {
                let (block, panel) = at(visit);
                let step = Step {
                    block,
                    panel,
                    place: panel - first,
                    segment: 0,
                    tile: 0,
                };
                let column = (panel - numbers.start) * PANEL_ROWS;
                self.block(step, at(visit + 1), (column, out));
            }
        }
    }

    /// Adds the products of all rows with one block of a panel, which `first` is the beginning of, to the panel's sums; with
    /// the last block they go to `out`, from a column on.
    fn block(&mut self, first: Step, next: (usize, usize), (column, out): (usize, &mut Panel<'_>)) {
        let (segments, mut cells) = block_of(self.weight, (first.block, first.panel));
        let ahead: &[Signed] = bytemuck::cast_slice(block_of(self.weight, next).1);
        // Each product asks for its share of what comes next.
        let products = segments.len() * self.shape.tiles.div_ceil(2);
        let mut ahead = (0..products).map(|i| {
            let [from, to] = [i, i + 1].map(|i| i * ahead.len() / products);
            &ahead[from..to]
        });
        let (mut segment, mut chunk) = (0, 0);
        let mut before = None;
        for these in segments.chunks(STEP) {
            cells = self.write_out(these, cells);
            for tile in (0..self.shape.tiles).step_by(2) {
                let step = Step {
                    segment,
                    tile,
                    ..first
                };
                self.multiply((step, chunk), these, &mut ahead);
                if let Some(before) = before.replace(step) {
                    self.take(segments, before, (column, out));
                }
                let space = &mut self.space;
                std::mem::swap(&mut space.dots, &mut space.dots_before);
            }
            segment += these.len();
            chunk += these.iter().map(chunks).sum::<usize>();
        }
        if let Some(last) = before {
            self.take(segments, last, (column, out));
        }
    }

    /// Writes out the codes of some segments, which `cells` start with, and gives the cells after them.
    fn write_out<'c>(
        &mut self,
        segments: &[Segment],
        mut cells: &'c [[u8; CODES]],
    ) -> &'c [[u8; CODES]] {
        let mut to = &mut *self.space.weights;
        for segment in segments {
            let (own, rest) = cells.split_at(self.weight.cell_of(segment.padded.len()));
            let (bytes, behind) = to.split_at_mut(chunks(segment) * CHUNK_CELLS);
            self.isa.run(WriteOut {
                cells: own,
                code: self.weight.code(),
                zero: self.weight.zero().unwrap_or(0),
                to: bytes,
            });
            (cells, to) = (rest, behind);
        }
        cells
    }

    /// Two tiles of rows, or the last, times the codes that are written out, whose activations start at `chunk`.
    fn multiply<'a>(
        &mut self,
        (step, mut chunk): (Step, usize),
        segments: &[Segment],
        ahead: &mut impl Iterator<Item = &'a [Signed]>,
    ) {
        let rows = self.shape.tile_rows;
        let tiles = (self.shape.tiles - step.tile).min(2);
        let runs = [0, tiles - 1].map(|tile| {
            let run = self.shape.run();
            &self.inputs[(step.block * self.shape.tiles + step.tile + tile) * run..][..run]
        });
        let mut weights = &*self.space.weights;
        let dots = self.space.dots.chunks_exact_mut(tiles * 2 * rows);
        for (segment, sums) in segments.iter().zip(dots) {
            let count = chunks(segment);
            let parts = runs.map(|run| &run[chunk * rows..(chunk + count) * rows]);
            let (cells, rest) = weights.split_at(count * CHUNK_CELLS);
            self.tiles.codes(Product {
                rows: &parts[..tiles],
                cells,
                sums,
                ahead: ahead.next().unwrap_or_default(),
                kept: Kept::Cells,
            });
            (weights, chunk) = (rest, chunk + count);
        }
    }

    /// Brings what came out of a step's products, before those that came last, into the sums.
    fn take(&mut self, segments: &[Segment], step: Step, (column, out): (usize, &mut Panel<'_>)) {
        let (shape, space) = (self.shape, &mut self.space);
        let tiles = (shape.tiles - step.tile).min(2);
        let of_tiles = step.tile * 2 * shape.tile_rows..(step.tile + tiles) * 2 * shape.tile_rows;
        let after = segments.len().min(step.segment + STEP);
        let factors = [0, tiles - 1].map(|tile| {
            let run = (step.block * shape.tiles + step.tile + tile) * shape.run();
            let run = &self.inputs[run..][..shape.run()];
            let bytes: &[u8] = bytemuck::cast_slice(&run[shape.chunk_lines * shape.tile_rows..]);
            let (factors, _) = bytes.as_chunks::<{ size_of::<Factor>() }>();
            let factors: &[Factor] = bytemuck::cast_slice(factors);
            &factors[step.segment * shape.tile_rows..after * shape.tile_rows]
        });
        let start = step.tile * shape.tile_rows;
        let end = start + tiles * shape.tile_rows;
        let is_last = after == segments.len() && step.block + 1 == shape.blocks;
        let mut strip = None;
        if is_last && end <= shape.rows {
            strip = out.strip(self.first_row + start..self.first_row + end, column);
        }
        let is_put = is_last && strip.is_none();
        let of_panel = &mut space.panels[step.place * shape.sums()..][of_tiles.clone()];
        self.isa.run(Take {
            segments: &segments[step.segment..after],
            scales: self.weight.scales(step.panel),
            offsets: self.weight.offsets(step.panel),
            factors: &factors[..tiles],
            rows: shape.tile_rows,
            dots: space.dots_before,
            block: &mut space.block[of_tiles],
            is_first: step.segment == 0,
            panel: (after == segments.len()).then_some(&mut *of_panel),
            is_first_block: step.block == 0,
            out: strip,
        });
        if is_put {
            let rows = (self.first_row + start, shape.rows - start, shape.tile_rows);
            put(of_panel, rows, column, out);
        }
    }
}

/// The segments of a block, and its cells of a panel; none of a panel beyond the last.
fn block_of(weight: &Codes, (block, panel): (usize, usize)) -> (&[Segment], &[[u8; CODES]]) {
    let columns = weight.columns();
    let segments = &columns.segments()[columns.blocks().nth(block).unwrap_or_default()];
    let cell = |column| panel * weight.panel_cells() + weight.cell_of(column);
    let start = segments.first().map_or(0, |first| first.padded.start);
    let end = segments.last().map_or(0, |last| last.padded.end);
    let cells = weight.cells().get(cell(start)..cell(end));
    (segments, cells.unwrap_or_default())
}

#[cfg(test)]
mod tests;
