//! One thread's part: panels of codes, and all rows with each.
//!
//! Few rows wait for codes to be read, so tiles take 8-bit codes as they come, and 4-bit ones are written out chunk by
//! chunk, each before tiles multiply the one that is. Many rows meet a step that is written out, two tiles of them
//! at a time. Either way vectors bring what came out before into the sums while tiles multiply.

use super::vectors::{Close, Fold, Offsets, write_out};
use super::{DOTS, Line, MAX_ROWS, Shape, WEIGHTS, block_of, chunks};
use crate::cpu::CpuBackend;
use crate::cpu::matrix::Panel;
use crate::cpu::packed::PANEL_ROWS;
use crate::cpu::quantized::{Codes, Segment};
use crate::cpu::simd::amx::{CHUNK_CELLS, Kept, Multiply, Signed, TileUnit};
use crate::cpu::simd::{CODES, Kernel, LANES, Simd};
use crate::ops::linear::activations::Factor;
use crate::ops::linear::claims::{Claimed, Multiplier, Visit, Visits};
use crate::ops::linear::tiles::put;
use crate::quantized::Code;
use std::ops::Range;

/// How far behind what is read codes are asked for, in cells: 16 KiB.
const AHEAD: usize = 256;

/// What threads share.
#[derive(Clone, Copy)]
pub(super) struct Work<'a, U> {
    pub(super) unit: U,
    pub(super) shape: Shape,
    /// The first of `out`.
    pub(super) first_row: usize,
    /// `[blocks][tiles]` runs
    pub(super) inputs: &'a [Signed],
    pub(super) weight: &'a Codes,
}

impl<'a, U> Work<'a, U> {
    /// Activations of a tile of rows through a block.
    #[inline(always)]
    fn run(&self, block: usize, tile: usize) -> &'a [Signed] {
        let run = self.shape.run();
        &self.inputs[(block * self.shape.tiles + tile) * run..][..run]
    }

    /// Those of two tiles from `tile` on, or of the last.
    #[inline(always)]
    fn runs(&self, block: usize, tile: usize) -> [&'a [Signed]; 2] {
        let second = (tile + 1).min(self.shape.tiles - 1);
        [self.run(block, tile), self.run(block, second)]
    }

    /// Their lines of one chunk.
    #[inline(always)]
    fn lines(&self, runs: [&'a [Signed]; 2], chunk: usize) -> [&'a [Signed]; 2] {
        let rows = self.shape.tile_rows;
        [
            &runs[0][chunk * rows..][..rows],
            &runs[1][chunk * rows..][..rows],
        ]
    }

    /// What stands for zero, where that is the same everywhere.
    fn zero(&self) -> u8 {
        self.weight.zero().unwrap_or(0)
    }

    /// What is to be added to the codes of a panel. Those of many rows come less zeros that are alike.
    #[inline(always)]
    fn offsets(&self, panel: usize) -> Offsets<'a> {
        match self.weight.offsets(panel) {
            Some(offsets) => Offsets::Each(offsets),
            None if self.shape.is_few() && self.zero() > 0 => {
                Offsets::Same(-f32::from(self.zero()))
            }
            None => Offsets::Nothing,
        }
    }
}

/// A thread's memory, in lines.
struct Space<'a> {
    /// Codes that are written out. `[chunks][16][2]`
    weights: &'a mut [Line],
    /// What comes out of products, and what came out before. `[segments][tiles][2][rows]`
    dots: &'a mut [[i32; LANES]],
    before: &'a mut [[i32; LANES]],
    /// Sums of a panel over a block. `[tiles][2][rows]`
    block: &'a mut [[f32; LANES]],
    /// Those of each panel of a group over the blocks before.
    panels: &'a mut [[f32; LANES]],
}

impl<'a> Space<'a> {
    fn of(memory: &'a mut [u8], shape: Shape) -> Self {
        let (weights, memory) = memory.split_at_mut(WEIGHTS * CODES);
        let (dots, memory) = memory.split_at_mut(2 * DOTS * size_of::<[i32; LANES]>());
        let dots: &mut [[i32; LANES]] = bytemuck::cast_slice_mut(dots);
        let (dots, before) = dots.split_at_mut(DOTS);
        let sums: &mut [[f32; LANES]] = bytemuck::cast_slice_mut(memory);
        let (block, panels) = sums.split_at_mut(2 * MAX_ROWS);
        block[..shape.sums()].fill([0.0; LANES]);
        Self {
            weights: bytemuck::cast_slice_mut(weights),
            dots,
            before,
            block,
            panels,
        }
    }
}

/// Products that lie in [`Space::before`]: of one or two segments with one or two tiles.
#[derive(Clone, Copy)]
struct Waiting<'a> {
    at: Visit,
    segments: &'a [Segment],
    /// The first of them, in the block.
    first: usize,
    /// Whether the block ends in them.
    ends: bool,
    tile: usize,
    tiles: usize,
    /// Tiles that are done.
    done: usize,
}

impl<U: TileUnit> Work<'_, U> {
    /// One thread's part of it.
    pub(super) fn claim(self, cpu: &CpuBackend, claims: impl Claimed) {
        let mut memory = cpu.scratch.tile_space(claims.thread());
        cpu.isa.run(Turn {
            work: self,
            claims,
            memory: memory.as_bytes_mut(),
        });
    }
}

/// A thread and what it claims.
struct Turn<'a, 'm, U, C> {
    work: Work<'a, U>,
    claims: C,
    memory: &'m mut [u8],
}

impl<U: TileUnit, C: Claimed> Kernel for Turn<'_, '_, U, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            work,
            claims,
            memory,
        } = self;
        claims.run(simd, || Thread {
            simd,
            work,
            tiles: work.unit.tiles(work.shape.tile_rows),
            space: Space::of(memory, work.shape),
            waiting: None,
        });
    }
}

/// A thread with its tiles.
struct Thread<'a, 'm, S, U: TileUnit> {
    simd: S,
    work: Work<'a, U>,
    tiles: U::Tiles,
    space: Space<'m>,
    waiting: Option<Waiting<'a>>,
}

impl<S: Simd, U: TileUnit> Multiplier for Thread<'_, '_, S, U> {
    #[inline(always)]
    fn multiply(&mut self, numbers: Range<usize>, behind: usize, out: &mut Panel<'_>) {
        let shape = self.work.shape;
        if !shape.is_few() {
            for (at, next) in Visits::of(numbers, behind, (shape.group(), shape.blocks)) {
                self.many(at, next, out);
            }
        } else if self.work.weight.code() == Code::Int4 {
            self.few::<true>(numbers, out);
        } else {
            self.few::<false>(numbers, out);
        }
        self.bring(out);
        self.bring(out);
    }
}

impl<'a, S: Simd, U: TileUnit> Thread<'a, '_, S, U> {
    /// All rows with one block of a panel.
    #[inline(always)]
    fn many(&mut self, at: Visit, next: (usize, usize), out: &mut Panel<'_>) {
        let (work, shape) = (self.work, self.work.shape);
        let (segments, mut cells) = block_of(work.weight, (at.block, at.panel));
        let mut ahead = block_of(work.weight, next).1;
        // Each product asks for its share of what comes next.
        let share = ahead
            .len()
            .div_ceil(segments.len() * shape.tiles.div_ceil(2));
        let mut chunk = 0;
        for (i, these) in segments.chunks(shape.step).enumerate() {
            cells = self.write_out(these, cells);
            for tile in (0..shape.tiles).step_by(2) {
                let runs = work.runs(at.block, tile);
                let tiles = (shape.tiles - tile).min(2);
                let (mut chunk, mut written) = (chunk, 0);
                for (n, segment) in these.iter().enumerate() {
                    let (asked, rest) = ahead.split_at(share.min(ahead.len()));
                    ahead = rest;
                    for cell in asked {
                        self.simd.prefetch(cell);
                    }
                    self.tiles.begin(tiles, None);
                    for _ in 0..chunks(segment) {
                        let cells = &self.space.weights[written..][..CHUNK_CELLS];
                        let rows = work.lines(runs, chunk);
                        self.tiles.step_codes::<true>(rows, cells, Kept::Cells);
                        (chunk, written) = (chunk + 1, written + CHUNK_CELLS);
                    }
                    self.bring(out);
                    self.end(n, tiles);
                }
                self.bring(out);
                self.wait((at, tile), (segments, i * shape.step));
            }
            chunk += these.iter().map(chunks).sum::<usize>();
        }
    }

    /// Writes out the codes of some segments, which `cells` start with, and gives the cells after them.
    #[inline(always)]
    fn write_out<'c>(&mut self, segments: &[Segment], mut cells: &'c [Line]) -> &'c [Line] {
        let weight = self.work.weight;
        let mut to = &mut *self.space.weights;
        for segment in segments {
            let (own, rest) = cells.split_at(weight.cell_of(segment.padded.len()));
            let (bytes, behind) = to.split_at_mut(chunks(segment) * CHUNK_CELLS);
            write_out(weight.code(), self.work.zero(), own, bytes);
            (cells, to) = (rest, behind);
        }
        cells
    }

    /// All rows, which are no more than two tiles, with claimed panels. Codes have 4 bits if `HALF`, or else 8.
    #[inline(always)]
    fn few<const HALF: bool>(&mut self, numbers: Range<usize>, out: &mut Panel<'_>) {
        let (work, shape) = (self.work, self.work.shape);
        let columns = work.weight.columns();
        let mut cells = Chunks::<HALF>::of(work.weight, numbers.clone());
        let mut place = 0;
        self.next(&mut cells, place);
        for panel in numbers.clone() {
            for (block, of_block) in columns.blocks().enumerate() {
                let segments = &columns.segments()[of_block];
                let runs = work.runs(block, 0);
                let at = Visit {
                    block,
                    panel,
                    in_group: 0,
                    column: (panel - numbers.start) * PANEL_ROWS,
                };
                let mut chunk = 0;
                for (i, these) in segments.chunks(shape.step).enumerate() {
                    for (n, segment) in these.iter().enumerate() {
                        self.tiles.begin(shape.tiles, None);
                        for _ in 0..chunks(segment) {
                            let rows = work.lines(runs, chunk);
                            self.chunk(&mut cells, rows, &mut place);
                            chunk += 1;
                        }
                        self.bring(out);
                        self.end(n, shape.tiles);
                    }
                    self.bring(out);
                    self.wait((at, 0), (segments, i * shape.step));
                }
            }
        }
    }

    /// The next chunk of codes with its activations.
    #[inline(always)]
    fn chunk<const HALF: bool>(
        &mut self,
        cells: &mut Chunks<'_, HALF>,
        rows: [&[Signed]; 2],
        place: &mut usize,
    ) {
        if HALF {
            let now = *place;
            *place = CHUNK_CELLS - now;
            self.next(cells, *place);
            let now = &self.space.weights[now..][..CHUNK_CELLS];
            self.tiles.step_codes::<false>(rows, now, Kept::Both);
            return;
        }
        let Some(cells) = cells.next(self.simd) else {
            return;
        };
        if cells.len() == CHUNK_CELLS {
            self.tiles.step_codes::<false>(rows, cells, Kept::Rows);
        } else {
            // What lies behind them meets zeros.
            self.space.weights[..cells.len()].copy_from_slice(cells);
            let cells = &self.space.weights[..CHUNK_CELLS];
            self.tiles.step_codes::<false>(rows, cells, Kept::Both);
        }
    }

    /// Writes out the next chunk of codes of 4 bits, if there is one.
    #[inline(always)]
    fn next<const HALF: bool>(&mut self, cells: &mut Chunks<'_, HALF>, place: usize) {
        if HALF && let Some(cells) = cells.next(self.simd) {
            let to = &mut self.space.weights[place..][..CHUNK_CELLS];
            write_out(Code::Int4, 0, cells, to);
        }
    }

    /// Ends the products of the `n`th segment of a step.
    #[inline(always)]
    fn end(&mut self, n: usize, tiles: usize) {
        let lines = tiles * 2 * self.work.shape.tile_rows;
        let dots = &mut self.space.dots[n * lines..][..lines];
        self.tiles.end_codes(dots);
    }

    /// Leaves the products of a step, of a block's segments from `first` on, for the next one to bring into the sums.
    #[inline(always)]
    fn wait(&mut self, (at, tile): (Visit, usize), (segments, first): (&'a [Segment], usize)) {
        let after = segments.len().min(first + self.work.shape.step);
        self.waiting = Some(Waiting {
            at,
            segments: &segments[first..after],
            first,
            ends: after == segments.len(),
            tile,
            tiles: (self.work.shape.tiles - tile).min(2),
            done: 0,
        });
        let space = &mut self.space;
        std::mem::swap(&mut space.dots, &mut space.before);
    }

    /// Brings one tile of what waits into the sums, if there is one.
    #[inline(always)]
    fn bring(&mut self, out: &mut Panel<'_>) {
        let Some(waiting) = &mut self.waiting else {
            return;
        };
        let (work, shape) = (self.work, self.work.shape);
        let rows = shape.tile_rows;
        let (at, tile) = (waiting.at, waiting.tile + waiting.done);
        let run = &work.run(at.block, tile)[shape.chunk_lines * rows..];
        let bytes: &[u8] = bytemuck::cast_slice(run);
        let (factors, _) = bytes.as_chunks::<{ size_of::<Factor>() }>();
        let factors: &[Factor] = bytemuck::cast_slice(factors);
        let sums = &mut self.space.block[tile * 2 * rows..][..2 * rows];
        self.simd.call(Fold {
            segments: waiting.segments,
            scales: work.weight.scales(at.panel),
            offsets: work.offsets(at.panel),
            factors: &factors[waiting.first * rows..][..waiting.segments.len() * rows],
            dots: &self.space.before[waiting.done * 2 * rows..],
            apart: waiting.tiles * 2 * rows,
            sums,
        });
        let ends = waiting.ends;
        waiting.done += 1;
        if waiting.done == waiting.tiles {
            self.waiting = None;
        }
        if ends {
            self.close(at, tile, out);
        }
    }

    /// Ends a tile's sums over a block.
    fn close(&mut self, at: Visit, tile: usize, out: &mut Panel<'_>) {
        let (work, shape) = (self.work, self.work.shape);
        let rows = shape.tile_rows;
        let start = tile * rows;
        let first = work.first_row + start;
        let is_last = at.block + 1 == shape.blocks;
        let mut strip = None;
        if is_last && start + rows <= shape.rows {
            strip = out.strip(first..first + rows, at.column);
        }
        let is_put = is_last && strip.is_none();
        let panel = at.in_group * shape.sums() + 2 * start;
        let panel = &mut self.space.panels[panel..][..2 * rows];
        self.simd.call(Close {
            block: &mut self.space.block[2 * start..][..2 * rows],
            panel,
            is_first: at.block == 0,
            out: strip,
        });
        if is_put {
            put(panel, (first, shape.rows - start, rows), at.column, out);
        }
    }
}

/// The codes of some panels, chunk by chunk; a chunk at the end of a segment may have fewer.
struct Chunks<'a, const HALF: bool> {
    weight: &'a Codes,
    /// Those of the panels and all behind them.
    cells: &'a [Line],
    /// Panels that are left, the present one included.
    panels: usize,
    segments: std::slice::Iter<'a, Segment>,
    /// Cells of the present segment that are left.
    left: usize,
}

impl<'a, const HALF: bool> Chunks<'a, HALF> {
    /// Cells of a chunk.
    const CELLS: usize = if HALF { CHUNK_CELLS / 2 } else { CHUNK_CELLS };

    fn of(weight: &'a Codes, panels: Range<usize>) -> Self {
        Self {
            weight,
            cells: &weight.cells()[panels.start * weight.panel_cells()..],
            panels: panels.len(),
            segments: weight.columns().segments().iter(),
            left: 0,
        }
    }

    /// The next one; what comes some time later is asked for.
    #[inline(always)]
    fn next<S: Simd>(&mut self, simd: S) -> Option<&'a [Line]> {
        while self.left == 0 {
            if let Some(segment) = self.segments.next() {
                self.left = self.weight.cell_of(segment.padded.len());
            } else if self.panels > 1 {
                self.panels -= 1;
                self.segments = self.weight.columns().segments().iter();
            } else {
                return None;
            }
        }
        let count = self.left.min(Self::CELLS);
        self.left -= count;
        if let Some(ahead) = self.cells.get(AHEAD..AHEAD + count) {
            for cell in ahead {
                simd.prefetch(cell);
            }
        }
        let (cells, rest) = self.cells.split_at(count);
        self.cells = rest;
        Some(cells)
    }
}
