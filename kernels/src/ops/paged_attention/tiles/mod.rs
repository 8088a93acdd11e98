//! Attention of some rows on matrix tiles, with the softmax and the parts of `rows.rs`.
//!
//! Queries, keys, weights and values are rounded to bfloat16, sums are f32. The keys and values of a part are laid out as
//! tiles once for all rows. Then come the rows, two tiles at a time: all their scores with the part, the weights, which
//! with the scores stay in the second-level cache, and the weighted values. As the part's scores are all there before the
//! first weight is made, nothing is ever rescaled within a part. What is not here: products (`cpu/simd/amx`), how
//! tiles are laid out (`lay_out.rs`), and how scores become weights (`softmax.rs`).
//!
//! Invariant: as said in `rows.rs`. What a row does not see weighs zero, and chunks that no row of its tiles sees are left
//! out, which comes to the same: adding zeros changes no sum but for making -0 of what was so small that tiles took
//! it for zero, and that sign is cleared when sums are taken. The values that weigh zero were written, since another row
//! sees them, or are zeros.

mod lay_out;
mod softmax;

use super::round::{ROUND, Sequence, State, intersection, visible};
use super::rows::{Rows, SPLIT, Target, head_vectors, merge, part, put_all, put_part};
use crate::cpu::element::Stored;
use crate::cpu::matrix::Panel;
use crate::cpu::scratch::{Space, TILE_SPACE};
use crate::cpu::simd::amx::{
    CHUNK_CELLS, Course, Floats, Kept, Multiply, Product, TILE_ROWS, TileUnit,
};
use crate::cpu::simd::{CELL, Isa, Kernel, LANES, Simd};
use lay_out::{LayOut, Queries};
use softmax::Softmax;
use std::ops::Range;

/// What a line of queries has of a head's elements, and a line of weights of the positions.
const CHUNK: usize = CELL;

/// Chunks of positions of a part.
const PART_CHUNKS: usize = SPLIT / CHUNK;

/// Most rows at a time: enough that laying out keys and values costs little beside all else.
pub(super) const MOST_ROWS: usize = 7 * 2 * TILE_ROWS;

/// The widest head that memory is enough for.
const MOST_HEAD_DIM: usize = 256;

/// All sums of a product are there when it ends.
const WRITTEN: Course<'static> = Course {
    is_first: true,
    out: None,
};

const MOST_VECTORS: usize = MOST_HEAD_DIM / LANES;

/// Whether there is memory for heads of this size.
pub(super) fn takes(head_dim: usize) -> bool {
    head_dim <= MOST_HEAD_DIM
}

/// How rows and heads are cut.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    /// Rows of a tile; the last may have fewer.
    tile_rows: usize,
    /// Chunks of a head.
    chunks: usize,
    /// Vectors of a head.
    vectors: usize,
}

impl Shape {
    fn of(rows: usize, head_dim: usize) -> Self {
        assert!(
            rows <= MOST_ROWS && takes(head_dim),
            "{rows} rows of {head_dim}"
        );
        Self {
            rows,
            tile_rows: rows.div_ceil(rows.div_ceil(TILE_ROWS)),
            chunks: head_dim.div_ceil(CHUNK),
            vectors: head_vectors(head_dim),
        }
    }

    /// Lines of a tile of queries.
    fn queries(&self) -> usize {
        self.chunks * self.tile_rows
    }

    /// Cells of the keys of a chunk of positions.
    fn keys(&self) -> usize {
        self.chunks * CHUNK_CELLS
    }
}

/// A thread's memory, divided.
struct Places<'a> {
    /// `[tiles][chunks of a head][rows of a tile]`
    queries: &'a mut [Floats],
    /// `[PART_CHUNKS][chunks of a head][16][2]`: pairs of elements of sixteen keys, twice.
    keys: &'a mut [Floats],
    /// `[pairs of a head's vectors][PART_CHUNKS][16][2]`: pairs of positions, sixteen apart, of two vectors.
    values: &'a mut [Floats],
    /// Weighted values of all parts so far. `[rows][vectors]`
    totals: &'a mut Space,
    /// For copies of keys and values first, then for [`Turn`]s.
    rest: &'a mut Space,
}

impl<'a> Places<'a> {
    fn divide(shape: Shape, space: &'a mut Space) -> Self {
        let (queries, space) = space.split_at_mut(MOST_ROWS * shape.chunks);
        let (keys, space) = space.split_at_mut(PART_CHUNKS * shape.keys());
        let (values, space) = space.split_at_mut(PART_CHUNKS * shape.keys());
        let (totals, rest) = space.split_at_mut(shape.rows * shape.vectors);
        Self {
            queries: bytemuck::cast_slice_mut(queries),
            keys: bytemuck::cast_slice_mut(keys),
            values: bytemuck::cast_slice_mut(values),
            totals,
            rest,
        }
    }
}

/// Lines that a turn needs: scores, weights and sums of two full tiles.
const fn turn_lines(vectors: usize) -> usize {
    let rows = 2 * TILE_ROWS;
    PART_CHUNKS * (2 * rows + 1) + PART_CHUNKS * rows + rows * vectors.next_multiple_of(2)
}

const _: () = {
    let (chunks, vectors) = (MOST_HEAD_DIM / CHUNK, MOST_VECTORS);
    let laid_out = MOST_ROWS * (chunks + vectors) + 2 * PART_CHUNKS * chunks * CHUNK_CELLS;
    assert!(laid_out + turn_lines(vectors) <= TILE_SPACE);
    assert!(2 * ROUND * vectors <= turn_lines(vectors));
};

/// The work of `rows` on the tiles of `unit`; their space is [`TILE_SPACE`] lines.
pub(super) fn attend<E: Stored, U: TileUnit>((isa, unit): (Isa, U), rows: Rows<'_, '_, E>) {
    let Rows {
        sequence,
        tokens,
        heads,
        space,
        mut target,
    } = rows;
    let head_dim = sequence.blocks.layout().head_dim;
    let shape = Shape::of(tokens.len() * heads.len(), head_dim);
    let mut places = Places::divide(shape, space);
    isa.run(Queries {
        sequence: &sequence,
        tokens: tokens.clone(),
        heads: heads.clone(),
        shape,
        to: places.queries,
    });
    let keys = sequence.seen_by(tokens.clone());
    let mut totals = [State::NOTHING; MOST_ROWS];
    places.totals.fill([0.0; LANES]);
    let mut tiles = unit.tiles(shape.tile_rows);
    for index in target.parts(&keys) {
        isa.run(LayOut {
            sequence: &sequence,
            keys: intersection(&keys, &part(index)),
            first: part(index).start,
            shape,
            places: &mut places,
        });
        for first in (0..shape.rows).step_by(2 * shape.tile_rows) {
            let rows = first..(first + 2 * shape.tile_rows).min(shape.rows);
            let token = |row: usize| tokens.start + row / heads.len();
            let own = sequence.seen_by(token(rows.start)..token(rows.end - 1) + 1);
            let own = intersection(&own, &part(index));
            // Where `Target::Part` is wanted there is one token, which sees some of it.
            if own.is_empty() {
                continue;
            }
            let mut turn = Turn::divide(shape, rows.clone(), &own, &mut *places.rest);
            turn.score(&mut tiles, places.queries, places.keys);
            isa.run(Softmax {
                turn: &mut turn,
                soft_cap: sequence.soft_cap,
                seen: |row| visible(sequence.positions[token(row)], sequence.window),
            });
            turn.weigh(&mut tiles, places.values);
            isa.run(Take {
                turn: &turn,
                totals: (&mut *places.totals, &mut totals),
                target: &mut target,
            });
        }
    }
    drop(tiles);
    if let Target::Out(panel, column) = target {
        isa.run(Put {
            sequence: &sequence,
            rows: (tokens, heads.len()),
            totals: (places.totals, &totals),
            to: (panel, column),
        });
    }
}

/// Rows of one or two tiles and the chunks of a part that they see.
struct Turn<'a> {
    shape: Shape,
    rows: Range<usize>,
    tiles: usize,
    /// Of the part.
    chunks: Range<usize>,
    /// The first position of the first chunk.
    start: usize,
    /// `[chunks]`, each [`Self::stride`] lines: `[tiles][2][rows of a tile]`, and one that keeps a row's lines from
    /// falling into the same set of the first-level cache.
    scores: &'a mut Space,
    /// `[tiles][chunks][rows of a tile]`, in pairs of positions sixteen apart, as values are.
    weights: &'a mut [Floats],
    /// `[pairs of a head's vectors][tiles][2][rows of a tile]`
    sums: &'a mut Space,
    /// `[rows]`
    states: [State; 2 * TILE_ROWS],
}

impl<'a> Turn<'a> {
    fn divide(shape: Shape, rows: Range<usize>, keys: &Range<usize>, space: &'a mut Space) -> Self {
        let tiles = rows.len().div_ceil(shape.tile_rows);
        let first = keys.start / SPLIT * SPLIT;
        let chunks = (keys.start - first) / CHUNK..(keys.end - first).div_ceil(CHUNK);
        let lines = tiles * shape.tile_rows;
        let (scores, space) = space.split_at_mut(chunks.len() * (2 * lines + 1));
        let (weights, space) = space.split_at_mut(chunks.len() * lines);
        let sums = &mut space[..shape.vectors.next_multiple_of(2) * lines];
        Self {
            start: first + chunks.start * CHUNK,
            shape,
            rows,
            tiles,
            chunks,
            scores,
            weights: bytemuck::cast_slice_mut(weights),
            sums,
            states: [State::NOTHING; 2 * TILE_ROWS],
        }
    }

    /// Lines of a chunk's scores.
    #[inline(always)]
    fn stride(&self) -> usize {
        2 * self.tiles * self.shape.tile_rows + 1
    }

    fn score(&mut self, tiles: &mut impl Multiply, queries: &[Floats], keys: &[Floats]) {
        let run = self.shape.queries();
        let first = self.rows.start / self.shape.tile_rows;
        let queries = [0, 1].map(|tile| queries[(first + tile) * run..].get(..run).unwrap_or(&[]));
        let stride = self.stride();
        let chunks = keys.chunks_exact(self.shape.keys()).skip(self.chunks.start);
        for (scores, cells) in self.scores.chunks_exact_mut(stride).zip(chunks) {
            let product = Product {
                rows: &queries[..self.tiles],
                cells,
                sums: &mut scores[..stride - 1],
                ahead: &[],
                kept: Kept::Rows,
            };
            tiles.floats(product, WRITTEN);
        }
    }

    fn weigh(&mut self, tiles: &mut impl Multiply, values: &[Floats]) {
        let lines = self.tiles * self.shape.tile_rows;
        let run = self.chunks.len() * self.shape.tile_rows;
        let weights = [0, 1].map(|tile| {
            self.weights
                .get(tile * run..(tile + 1) * run)
                .unwrap_or(&[])
        });
        let cells = self.chunks.start * CHUNK_CELLS..self.chunks.end * CHUNK_CELLS;
        let values = values.chunks_exact(PART_CHUNKS * CHUNK_CELLS);
        for (sums, values) in self.sums.chunks_exact_mut(2 * lines).zip(values) {
            let product = Product {
                rows: &weights[..self.tiles],
                cells: &values[cells.clone()],
                sums,
                ahead: &[],
                kept: Kept::Rows,
            };
            tiles.floats(product, WRITTEN);
        }
    }
}

/// Merges a turn's sums into the totals, or puts them where the part is wanted.
struct Take<'a, 'b, 'o, 'p> {
    turn: &'a Turn<'b>,
    totals: (&'a mut Space, &'a mut [State; MOST_ROWS]),
    target: &'a mut Target<'o, 'p>,
}

impl Kernel for Take<'_, '_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let turn = self.turn;
        let Shape {
            tile_rows, vectors, ..
        } = turn.shape;
        for (i, row) in turn.rows.clone().enumerate() {
            let (tile, place) = (i / tile_rows, i % tile_rows);
            let mut sums = [[0.0; LANES]; MOST_VECTORS];
            for (v, sums) in sums[..vectors].iter_mut().enumerate() {
                let at = (v / 2 * turn.tiles + tile) * 2 + v % 2;
                for (sum, from) in sums.iter_mut().zip(turn.sums[at * tile_rows + place]) {
                    // Clears the sign of zero.
                    *sum = from + 0.0;
                }
            }
            let (sums, state) = (&sums[..vectors], turn.states[i]);
            match self.target {
                Target::Out(..) => {
                    let total = &mut self.totals.0[row * vectors..][..vectors];
                    merge((total, &mut self.totals.1[row]), (sums, state));
                }
                Target::Part(out, _) => {
                    let out = &mut out[row * (vectors + 1) * LANES..];
                    put_part(out, sums, &[state], vectors);
                }
            }
        }
    }
}

/// See [`put_all`].
struct Put<'a, 'b, 'p, E> {
    sequence: &'a Sequence<'b, E>,
    rows: (Range<usize>, usize),
    totals: (&'a Space, &'a [State]),
    to: (&'a mut Panel<'p>, usize),
}

impl<E: Stored> Kernel for Put<'_, '_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        put_all(self.sequence, self.rows, self.totals, self.to);
    }
}
