//! A product on matrix tiles: `x` rounded to bfloat16, times a packed matrix of floats of 8 bits.
//!
//! First all threads lay out the rows of `x` as tiles, once for all of them. Then each claims panels (`turn.rs`). Codes are
//! written out as lines of bfloat16, which stay in the first-level cache until all rows have met them. A group of columns is
//! summed from zero, multiplied with its scale and added to the sums, by vectors while tiles go on.
//!
//! Invariant: `out[i][j]` is the sum over groups of columns, from the first to the last, of `dot * scale`, fused; `dot` is
//! what tiles make of the group, see `ops/linear`, in chunks of 32 columns. Nothing else about the shapes, and nothing about
//! threads, changes a bit.

mod turn;

use super::claims::{Claims, LEAST_GATED_ROWS, claim_pairs};
use super::equal_parts;
use super::tiles::{CACHED, CHUNK, LEAST_ROWS, MAX_ROWS, Shape};
use crate::backend::Activation;
use crate::cpu::element::to_bf16;
use crate::cpu::packed::{PANEL_ROWS, Packed};
use crate::cpu::quantized::{Chunk, Columns};
use crate::cpu::scratch::{TILE_INPUTS, TILE_SPACE};
use crate::cpu::simd::amx::{CHUNK_CELLS, Floats, TILE_ROWS, TileUnit};
use crate::cpu::simd::{Kernel, Simd};
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use std::ops::Range;
use turn::Work;

/// Most chunks of a block that many rows meet: 512 columns, whose lines take 32 KiB.
const BLOCK_CHUNKS: usize = 16;

/// Lines of a thread's memory for what is written out of one block.
const CELLS: usize = BLOCK_CHUNKS * CHUNK_CELLS;

/// Lines of a thread's memory for what two tiles of rows make of one group.
const DOTS: usize = 4 * TILE_ROWS;

/// How rows and chunks are cut: at whole groups where they fit, supposing that all are like the first.
fn shape(rows: usize, chunks: &[Chunk]) -> Shape {
    let count = chunks.len();
    let equal = count.div_ceil(count.div_ceil(BLOCK_CHUNKS));
    let first = chunks.iter().position(|chunk| chunk.ends).unwrap_or(0) + 1;
    let whole = equal.next_multiple_of(first);
    let block_chunks = if whole <= BLOCK_CHUNKS { whole } else { equal };
    Shape::cut(rows, count, block_chunks)
}

/// Panels that meet the rows of one block after each other: each has sums, and a group that may be open.
fn panels(shape: Shape) -> usize {
    shape.group((TILE_SPACE - CELLS - DOTS) / 2)
}

/// The outputs of `weight`, which are the columns of `out` from `first` on, on the tiles of `unit`.
pub(super) fn linear<U: TileUnit>(
    (cpu, unit): (&CpuBackend, U),
    x: &CpuTensor,
    (weight, first): (&Packed, usize),
    bias: Option<&CpuWeight>,
    out: &mut CpuTensor,
) {
    let (within, width) = (first..first + weight.rows(), out.width());
    let most = TILE_INPUTS / (weight.chunks().len() + BLOCK_CHUNKS);
    in_parts((cpu, unit), x, weight, most, |work, part, cost| {
        let shape = work.shape;
        let work = Work {
            first_row: part.start,
            ..work
        };
        let out = (out.values_mut(), width);
        cpu.threads
            .panels(out, within.clone(), (PANEL_ROWS, cost), |panels| {
                let claims = Claims {
                    panels: shape.claims(panels),
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
    weight: &Packed,
    epilogue: (Option<&CpuWeight>, Activation),
    out: &mut CpuTensor,
) -> bool {
    let of_row = shape(MAX_ROWS, weight.chunks());
    let most = CACHED / (of_row.blocks * of_row.block_chunks);
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

/// Lays out about `most` rows of `x` at a time, and hands over the work with them, which they are, and what a panel costs.
fn in_parts<U: TileUnit>(
    (cpu, unit): (&CpuBackend, U),
    x: &CpuTensor,
    weight: &Packed,
    most: usize,
    mut multiply: impl FnMut(Work<'_, U>, Range<usize>, usize),
) {
    let (columns, chunks) = (weight.columns(), weight.chunks());
    let most = (most / TILE_ROWS * TILE_ROWS).clamp(1, MAX_ROWS);
    let mut memory = cpu.scratch.tile_inputs();
    for part in equal_parts(x.rows(), most, TILE_ROWS) {
        let shape = shape(part.len(), chunks);
        let inputs: &mut [Floats] = &mut memory.as_mut_slice()[..shape.inputs()];
        let run = shape.run();
        cpu.threads.rows(inputs, run, run * CHUNK, |i, lines| {
            let (block, tile) = (i / shape.tiles, i % shape.tiles);
            let start = tile * shape.tile_rows;
            let end = (start + shape.tile_rows).min(shape.rows);
            let from = block * shape.block_chunks;
            cpu.isa.run(LayOut {
                x,
                columns,
                chunks: &chunks[from..(from + shape.block_chunks).min(chunks.len())],
                rows: part.start + start..part.start + end,
                lines,
                tile_rows: shape.tile_rows,
            });
        });
        let cost = part.len() * columns.padded() * PANEL_ROWS;
        let work = Work {
            unit,
            shape,
            first_row: 0,
            inputs,
            chunks,
            weight,
        };
        multiply(work, part, cost);
    }
}

/// Rounds one tile of rows through one block: `[chunks][rows]`, columns as the weight has them. What is left of the tile, and of
/// chunks, is zero.
struct LayOut<'a> {
    x: &'a CpuTensor,
    columns: &'a Columns,
    chunks: &'a [Chunk],
    rows: Range<usize>,
    lines: &'a mut [Floats],
    tile_rows: usize,
}

impl Kernel for LayOut<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (chunk, lines) in self
            .chunks
            .iter()
            .zip(self.lines.chunks_exact_mut(self.tile_rows))
        {
            let (known, padding) = lines.split_at_mut(self.rows.len());
            for (line, row) in known.iter_mut().zip(self.rows.clone()) {
                let mut values = [0.0; CHUNK];
                let to = &mut values[..chunk.columns.len()];
                self.columns
                    .gather(chunk.columns.clone(), self.x.row(row), to);
                for (to, from) in line.iter_mut().zip(values) {
                    *to = to_bf16(from);
                }
            }
            padding.fill(Floats::default());
        }
    }
}

#[cfg(test)]
mod tests;
