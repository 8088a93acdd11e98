//! Products of quantised activations with a weight of integer codes, on matrix tiles.
//!
//! First all threads quantise the rows of `x` as tiles, once for all of them. Then each claims panels and goes through them
//! block by block of columns, a block in steps of one segment or two (`turn.rs`). Tiles multiply, vectors bring what comes out
//! into the sums: those of the products before, so that neither waits for the other.
//!
//! Up to two tiles of rows cost less than memory needs for the codes, so these pass by: 8-bit ones go to tiles as they
//! come, without a sign, and the zero is taken off what comes out, which is exact. More rows meet a step's codes that are
//! written out once, as bytes less their zero, and panels are taken a few at a time.
//!
//! Where segments are no whole chunks of 64 columns, activations are padded with zeros, and what they meet does not
//! matter: groups of 32 columns take half a chunk's time for nothing, which is still less than vectors need.
//!
//! What stays where with 512 rows. First-level cache, 36 to 44 of 48 KiB: a step's codes, 8 KiB where segments have 128
//! columns and 16 KiB where they have 512, which all rows meet; two tiles of activations through it, as much, and their
//! sums, 4 KiB, which come from the second level (the sums go back there) while tiles multiply for 256 or 512 cycles; what
//! comes out of two steps, 16 or 8 KiB.
//! Second-level cache, 1.1 of 2 MiB: rows through one block, 544 or 576 KiB, which all panels of a group meet; sums, 512 KiB,
//! or those of two panels and what they gate, 256 KiB; and the next block of codes, which is asked for.
//!
//! Invariant: as said in `codes.rs`, to the bit: products are exact, and what is rounded is so in the same order. Which
//! of the two multiplies may thus depend on anything.

mod turn;
mod vectors;

use super::activations::Factor;
use super::claims::{Claims, LEAST_GATED_ROWS, claim_pairs};
use super::equal_parts;
use super::tiles::LEAST_ROWS;
use crate::backend::Activation;
use crate::cpu::packed::PANEL_ROWS;
use crate::cpu::quantized::{Codes, Columns, SEGMENT, Segment};
use crate::cpu::scratch::{TILE_INPUTS, TILE_SPACE};
use crate::cpu::simd::CODES;
use crate::cpu::simd::amx::{CHUNK_CELLS, Signed, TILE_ROWS, TileUnit};
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use std::ops::Range;
use turn::Work;
use vectors::LayOut;

/// Rows that are too few for tiles: with one, vectors are as fast as memory.
const FEW_ROWS: usize = 1;

/// Most rows that are multiplied at once.
const MAX_ROWS: usize = 512;

/// Lines that activations of a block may take, 576 KiB: more than that does not stay in the cache beside the sums.
const BLOCK_LINES: usize = MAX_ROWS * 18;

/// Lines that all sums and what they are made of may take, 512 KiB: the same is true of them.
const SUMS: usize = TILE_SPACE / 2;

/// Codes of a byte, or halves of them that lie side by side: a cell of a weight.
type Line = [u8; CODES];

/// Columns of a tile of activations.
const CHUNK: usize = 64;

/// Most segments of a step; where one has more than half of the most columns, a step is one segment.
const STEP: usize = 2;

/// Lines of a thread's memory for the codes of a step.
const WEIGHTS: usize = SEGMENT / CHUNK * CHUNK_CELLS;

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
    /// Segments of a step.
    step: usize,
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
        let is_short = |segment: &Segment| segment.columns.len() <= SEGMENT / STEP;
        let are_short = columns.segments().iter().all(is_short);
        Self {
            rows,
            tiles,
            tile_rows: rows.div_ceil(tiles),
            blocks: columns.blocks().count(),
            step: if are_short { STEP } else { 1 },
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

    /// The same of rows whose activations stay in the cache through all blocks.
    fn most_cached_rows(&self) -> usize {
        let line = self.blocks * (self.chunk_lines + self.factor_lines);
        let fit = BLOCK_LINES / line / TILE_ROWS * TILE_ROWS;
        fit.min(self.most_rows())
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

    /// Whether there are no more than two tiles.
    fn is_few(&self) -> bool {
        self.tiles <= 2
    }

    /// Panels of a group.
    fn group(&self) -> usize {
        // Where activations of all blocks stay in the cache, each panel is read from its beginning to its end.
        if self.is_few() || self.inputs() <= BLOCK_LINES {
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
    let (within, width) = (first..first + weight.rows(), out.width());
    let most = Shape::of(x.rows(), weight.columns()).most_rows();
    in_parts((cpu, unit), x, weight, most, |work, part, cost| {
        let work = Work {
            first_row: part.start,
            ..work
        };
        let out = (out.values_mut(), width);
        cpu.threads
            .panels(out, within.clone(), (PANEL_ROWS, cost), |panels| {
                let claims = Claims {
                    panels: panels.for_rows(part.len()),
                    rows: part.clone(),
                    bias,
                };
                work.claim(cpu, claims);
            });
    });
}

/// What comes of gates and what they gate, which `weight` has one after the other. `out: [rows, n]`. Does nothing and answers
/// `false` where it would not pay.
pub(super) fn gated<U: TileUnit>(
    (cpu, unit): (&CpuBackend, U),
    x: &CpuTensor,
    weight: &Codes,
    epilogue: (Option<&CpuWeight>, Activation),
    out: &mut CpuTensor,
) -> bool {
    let most = Shape::of(x.rows(), weight.columns()).most_cached_rows();
    let has_pairs = weight.rows().is_multiple_of(2 * PANEL_ROWS);
    if x.rows() < LEAST_ROWS || most < LEAST_GATED_ROWS || !has_pairs {
        return false;
    }
    in_parts((cpu, unit), x, weight, most, |work, part, cost| {
        claim_pairs(cpu, (part, cost), epilogue, out, |claims| {
            work.claim(cpu, claims);
        });
    });
    true
}

/// Lays out at most `most` rows of `x` at a time, and hands over the work with them, which they are, and what a panel costs.
fn in_parts<U: TileUnit>(
    (cpu, unit): (&CpuBackend, U),
    x: &CpuTensor,
    weight: &Codes,
    most: usize,
    mut multiply: impl FnMut(Work<'_, U>, Range<usize>, usize),
) {
    let columns = weight.columns();
    let mut inputs = cpu.scratch.tile_inputs();
    for part in equal_parts(x.rows(), most, TILE_ROWS) {
        let shape = Shape::of(part.len(), columns);
        let inputs: &mut [Signed] = &mut inputs.as_mut_slice()[..shape.inputs()];
        lay_out(cpu, (x, columns), (part.start, shape), inputs);
        let cost = part.len() * columns.padded() * PANEL_ROWS;
        let work = Work {
            unit,
            shape,
            first_row: 0,
            inputs,
            weight,
        };
        multiply(work, part, cost);
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
