//! One thread's part: panels of codes, and all rows with each.
//!
//! Few rows wait for codes to be read, so those are written out chunk by chunk, each while tiles multiply the one before.
//! Many rows meet a block of a panel that is written out, two tiles of them at a time, and while tiles multiply a group,
//! vectors bring the one before into the sums, a tile with each chunk. In the first-level cache are then the block, 32 KiB,
//! sums and what comes out of two groups, 12 KiB; activations pass by. Where activations of all blocks do not stay in the
//! second-level cache, panels come in groups, whose sums wait while all of them meet the rows of one block.

use super::{CELLS, CHUNK_CELLS, Chunk, DOTS, Shape, panels};
use crate::cpu::CpuBackend;
use crate::cpu::element::F8;
use crate::cpu::matrix::Panel;
use crate::cpu::packed::Packed;
use crate::cpu::quantized::PanelScales;
use crate::cpu::simd::amx::{Floats, Multiply, TILE_ROWS, TileUnit};
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::ops::linear::claims::{Claimed, Multiplier, Visit, Visits};
use std::ops::Range;

/// What threads share.
#[derive(Clone, Copy)]
pub(super) struct Work<'a, U> {
    pub(super) unit: U,
    pub(super) shape: Shape,
    /// Of `out`.
    pub(super) first_row: usize,
    /// `[blocks][tiles][chunks][rows]`
    pub(super) inputs: &'a [Floats],
    pub(super) chunks: &'a [Chunk],
    pub(super) weight: &'a Packed,
}

impl<'a, U: TileUnit> Work<'a, U> {
    /// Chunks of a block.
    #[inline(always)]
    fn chunks(&self, block: usize) -> &'a [Chunk] {
        let start = block * self.shape.block_chunks;
        &self.chunks[start..(start + self.shape.block_chunks).min(self.chunks.len())]
    }

    /// Activations of two tiles from `tile` on, or of the last, in one chunk of a block.
    #[inline(always)]
    fn lines(&self, (block, tile): (usize, usize), chunk: usize) -> [&'a [Floats]; 2] {
        let (rows, run) = (self.shape.tile_rows, self.shape.run());
        let first = (block * self.shape.tiles + tile) * run + chunk * rows;
        let has_two = tile + 1 < self.shape.tiles;
        let second = first + if has_two { run } else { 0 };
        [
            &self.inputs[first..first + rows],
            &self.inputs[second..second + rows],
        ]
    }

    /// Writes out a chunk of a panel.
    #[inline(always)]
    fn write_out(&self, panel: usize, chunk: &Chunk, to: &mut [Floats]) {
        let own = self.weight.panel_cells();
        let cells = &self.weight.cells::<F8>()[panel * own..][chunk.padded.clone()];
        let (to, padding) = to.split_at_mut(cells.len());
        self.unit.widen(cells, to);
        padding.fill(Floats::default());
    }
}

/// A thread's memory, in lines.
struct Space<'a> {
    /// What is written out.
    cells: &'a mut [Floats],
    /// What two tiles of rows made of a group. `[tiles][2][rows]`
    before: &'a mut [[f32; LANES]],
    /// Of each panel: what is made of a group that does not end in a block, and sums. `[panels][tiles][2][rows]`
    open: &'a mut [[f32; LANES]],
    sums: &'a mut [[f32; LANES]],
}

impl<'a> Space<'a> {
    fn of(memory: &'a mut [Floats], shape: Shape) -> Self {
        let (cells, memory) = memory.split_at_mut(CELLS);
        let memory: &mut [[f32; LANES]] = bytemuck::cast_slice_mut(memory);
        let (before, memory) = memory.split_at_mut(DOTS);
        let (open, sums) = memory.split_at_mut(panels(shape) * shape.sums());
        Self {
            cells,
            before,
            open,
            sums,
        }
    }
}

/// A group whose products lie in [`Space::before`].
#[derive(Clone, Copy)]
struct Waiting<'a> {
    group: usize,
    scales: Option<PanelScales<'a>>,
    at: Visit,
    /// The first tile of rows, and how many there are.
    tile: usize,
    tiles: usize,
    /// Parts that are in the sums.
    done: usize,
}

impl<U: TileUnit> Work<'_, U> {
    /// One thread's part of it.
    pub(super) fn claim(self, cpu: &CpuBackend, claims: impl Claimed) {
        let mut memory = cpu.scratch.tile_space(claims.thread());
        cpu.isa.run(Turn {
            work: self,
            claims,
            memory: memory.as_mut_slice(),
        });
    }
}

/// A thread and what it claims.
struct Turn<'a, 'm, U, C> {
    work: Work<'a, U>,
    claims: C,
    memory: &'m mut [Floats],
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
        for (at, _) in Visits::of(numbers, behind, (panels(shape), shape.blocks)) {
            if shape.is_few() {
                self.few(at, out);
            } else {
                self.many(at, out);
            }
        }
        self.bring(4, out);
    }
}

impl<S: Simd, U: TileUnit> Thread<'_, '_, S, U> {
    /// All of a panel with no more than two tiles of rows.
    #[inline(always)]
    fn few(&mut self, at: Visit, out: &mut Panel<'_>) {
        let (work, shape) = (self.work, self.work.shape);
        let scales = work.weight.scales(at.panel);
        let [mut cells, mut next] = [0, CHUNK_CELLS];
        work.write_out(
            at.panel,
            &work.chunks[0],
            &mut self.space.cells[..CHUNK_CELLS],
        );
        for (i, chunk) in work.chunks.iter().enumerate() {
            if chunk.starts {
                self.tiles.begin(shape.tiles, None);
            }
            if let Some(chunk) = work.chunks.get(i + 1) {
                let next = &mut self.space.cells[next..][..CHUNK_CELLS];
                work.write_out(at.panel, chunk, next);
            }
            let cell = &self.space.cells[cells..][..CHUNK_CELLS];
            self.tiles.step(work.lines((0, 0), i), cell);
            std::mem::swap(&mut cells, &mut next);
            if chunk.ends {
                self.bring(4, out);
                self.tiles.end(&mut self.space.before[..shape.sums()]);
                self.waiting = Some(Waiting {
                    group: chunk.group,
                    scales,
                    at,
                    tile: 0,
                    tiles: shape.tiles,
                    done: 0,
                });
            }
        }
    }

    /// One block of a panel, which is at some place among those whose sums are kept, with all rows.
    #[inline(always)]
    fn many(&mut self, at: Visit, out: &mut Panel<'_>) {
        let (work, shape) = (self.work, self.work.shape);
        let (rows, chunks) = (shape.tile_rows, work.chunks(at.block));
        let scales = work.weight.scales(at.panel);
        for (chunk, cells) in chunks.iter().zip(self.space.cells.chunks_mut(CHUNK_CELLS)) {
            work.write_out(at.panel, chunk, cells);
        }
        for tile in (0..shape.tiles).step_by(2) {
            let tiles = (shape.tiles - tile).min(2);
            let start = at.in_group * shape.sums() + tile * 2 * rows;
            let of_tiles = start..start + tiles * 2 * rows;
            for (i, chunk) in chunks.iter().enumerate() {
                if chunk.starts || i == 0 {
                    let open = &self.space.open[of_tiles.clone()];
                    self.tiles.begin(tiles, (!chunk.starts).then_some(open));
                }
                let cells = &self.space.cells[i * CHUNK_CELLS..][..CHUNK_CELLS];
                self.tiles.step(work.lines((at.block, tile), i), cells);
                self.bring(1, out);
                if chunk.ends {
                    self.bring(4, out);
                    self.tiles.end(&mut self.space.before[..tiles * 2 * rows]);
                    self.waiting = Some(Waiting {
                        group: chunk.group,
                        scales,
                        at,
                        tile,
                        tiles,
                        done: 0,
                    });
                } else if i + 1 == chunks.len() {
                    self.tiles.end(&mut self.space.open[of_tiles.clone()]);
                }
            }
        }
    }

    /// Brings up to `most` parts of what waits into the sums; with the last group they go to `out`. There are four parts, of each
    /// tile of rows the upper half and then the lower one.
    #[inline(always)]
    fn bring(&mut self, most: usize, out: &mut Panel<'_>) {
        let Some(waiting) = &mut self.waiting else {
            return;
        };
        let (simd, shape) = (self.simd, self.work.shape);
        let rows = shape.tile_rows;
        let mut scales = [simd.splat(1.0); 2];
        if let Some(all) = waiting.scales {
            scales = all.load(simd, waiting.group, 0);
        }
        let (from, parts) = (waiting.done, 2 * waiting.tiles);
        waiting.done = (from + most).min(parts);
        for part in from..waiting.done {
            let tile = waiting.tile + part / 2;
            let (start, end) = if part % 2 == 0 {
                (0, rows / 2)
            } else {
                (rows / 2, rows)
            };
            let dots = &self.space.before[part / 2 * 2 * rows..][..2 * rows];
            let sums = waiting.at.in_group * shape.sums() + 2 * tile * rows;
            let (left, right) = self.space.sums[sums..][..2 * rows].split_at_mut(rows);
            let part = Part {
                dots: [&dots[start..end], &dots[rows + start..rows + end]],
                sums: [&mut left[start..end], &mut right[start..end]],
                are_first: waiting.group == 0,
            };
            if waiting.group + 1 < self.work.weight.columns().groups() {
                part.add(simd, scales);
            } else {
                let first = tile * rows + start;
                let count = (end - start).min(shape.rows.saturating_sub(first));
                let first = self.work.first_row + first;
                if count > 0 {
                    part.put(simd, scales, (first..first + count, waiting.at.column, out));
                }
            }
        }
        if waiting.done == parts {
            self.waiting = None;
        }
    }
}

/// Some rows of what came out of tiles, for both halves of a panel's columns, and their sums.
struct Part<'a> {
    dots: [&'a [[f32; LANES]]; 2],
    sums: [&'a mut [[f32; LANES]]; 2],
    /// They begin at zero, whatever is there.
    are_first: bool,
}

impl Part<'_> {
    #[inline(always)]
    fn add<S: Simd>(self, simd: S, scales: [S::Vector; 2]) {
        for ((dots, sums), scale) in self.dots.iter().zip(self.sums).zip(scales) {
            for (dot, sum) in dots.iter().zip(sums) {
                let before = if self.are_first {
                    simd.splat(0.0)
                } else {
                    simd.load(sum)
                };
                *sum = simd.to_array(simd.mul_add(simd.load(dot), scale, before));
            }
        }
    }

    /// Puts sums to some rows of `out`, from a column on; what is beyond its end is the weight's padding.
    #[inline(always)]
    fn put<S: Simd>(
        self,
        simd: S,
        scales: [S::Vector; 2],
        (rows, column, out): (Range<usize>, usize, &mut Panel<'_>),
    ) {
        let halves = self.dots[0].iter().zip(self.dots[1]);
        let sums = self.sums[0].iter().zip(self.sums[1].iter());
        let mut strip = out.strip(rows.clone(), column);
        let mut edge = [[[0.0; LANES]; 2]; TILE_ROWS];
        for (row, (dots, sums)) in halves.zip(sums).take(rows.len()).enumerate() {
            let mut before = [simd.splat(0.0); 2];
            if !self.are_first {
                before = [simd.load(sums.0), simd.load(sums.1)];
            }
            let left = simd.mul_add(simd.load(dots.0), scales[0], before[0]);
            let right = simd.mul_add(simd.load(dots.1), scales[1], before[1]);
            let both = [simd.to_array(left), simd.to_array(right)];
            if let Some(strip) = &mut strip {
                *strip.row(row) = both;
            } else {
                edge[row] = both;
            }
        }
        if strip.is_none() {
            for (row, both) in rows.zip(edge) {
                let to = &mut out.row(row)[column..];
                for (to, sum) in to.iter_mut().zip(both.as_flattened()) {
                    *to = *sum;
                }
            }
        }
    }
}
