//! Queries, keys and values as tiles: rounded to bfloat16 and put where products read them.
//!
//! Invariant: what is laid out of a position follows from that position alone.

use super::{CHUNK, PART_CHUNKS, Places, Shape};
use crate::cpu::element::{Stored, rounded_bits, to_bf16};
use crate::cpu::simd::amx::{CHUNK_CELLS, Floats};
use crate::cpu::simd::{CELL, Kernel, LANES, Simd};
use crate::ops::paged_attention::round::{GROUPS, ROUND, Round, Run, Sequence, intersection};
use half::bf16;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// A line of pairs, of the upper halves of both.
#[inline(always)]
fn pairs(first: [u32; LANES], second: [u32; LANES]) -> Floats {
    let mut line = [0; LANES];
    for lane in 0..LANES {
        line[lane] = first[lane] >> 16 | second[lane] & 0xffff_0000;
    }
    bytemuck::cast(line)
}

#[inline(always)]
fn round(values: [f32; LANES]) -> [u32; LANES] {
    let mut rounded = [0; LANES];
    for lane in 0..LANES {
        rounded[lane] = rounded_bits(values[lane]);
    }
    rounded
}

/// Lays out queries as tiles, such that scores are exponents of two.
pub(super) struct Queries<'a, 'b, E> {
    pub(super) sequence: &'a Sequence<'b, E>,
    pub(super) tokens: Range<usize>,
    pub(super) heads: Range<usize>,
    pub(super) shape: Shape,
    pub(super) to: &'a mut [Floats],
}

impl<E: Stored> Kernel for Queries<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Shape {
            rows, tile_rows, ..
        } = self.shape;
        let blocks = &self.sequence.blocks;
        let head_dim = blocks.layout().head_dim;
        let scale = self.sequence.scale * LOG2_E * blocks.unit();
        for row in 0..rows.next_multiple_of(tile_rows) {
            let to = &mut self.to[row / tile_rows * self.shape.queries() + row % tile_rows..];
            let lines = to.iter_mut().step_by(tile_rows).take(self.shape.chunks);
            for (chunk, line) in lines.enumerate() {
                let mut values = [0.0; CHUNK];
                if row < rows {
                    let (token, head) = (row / self.heads.len(), row % self.heads.len());
                    let query = self.sequence.qkv.row(self.tokens.start + token);
                    let query = &query[(self.heads.start + head) * head_dim..][..head_dim];
                    let query = &query[chunk * CHUNK..((chunk + 1) * CHUNK).min(head_dim)];
                    values[..query.len()].copy_from_slice(query);
                }
                for (to, value) in line.iter_mut().zip(values) {
                    *to = to_bf16(value * scale);
                }
            }
        }
    }
}

/// Lays out keys and values as tiles. Values outside of `keys` are zeros, as far as there is a key in their chunk.
pub(super) struct LayOut<'a, 'b, 'p, E> {
    pub(super) sequence: &'a Sequence<'b, E>,
    /// Some of a part's positions.
    pub(super) keys: Range<usize>,
    /// The part's first position.
    pub(super) first: usize,
    pub(super) shape: Shape,
    pub(super) places: &'a mut Places<'p>,
}

impl<E: Stored> Kernel for LayOut<'_, '_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            sequence,
            keys,
            first,
            shape,
            places,
        } = self;
        for start in (keys.start / ROUND * ROUND..keys.end).step_by(ROUND) {
            let round = Round {
                sequence,
                tokens: 0..0,
                heads: 0,
                start,
                keys: intersection(&keys, &(start..start + ROUND)),
                vectors: shape.vectors,
            };
            let chunk = (start - first) / CHUNK;
            let to = (&mut *places.keys, &mut *places.values);
            if sequence.blocks.is_packed() {
                lay_out(simd, shape, &round.runs(), (chunk, to));
            } else {
                let (keys, values) = places.rest.split_at_mut(ROUND * shape.vectors);
                let keys = bytemuck::cast_slice_mut(keys);
                round.copy_keys_and_values(keys, values);
                lay_out(simd, shape, &round.copied_runs(keys, values), (chunk, to));
            }
        }
    }
}

/// Lays out a round, from chunk `chunk` of the part on.
#[inline(always)]
fn lay_out<S: Simd, V: Stored>(
    simd: S,
    shape: Shape,
    runs: &[Run<'_, V>; GROUPS],
    (chunk, (keys, values)): (usize, (&mut [Floats], &mut [Floats])),
) {
    for (runs, chunk) in runs.as_chunks::<2>().0.iter().zip(chunk..) {
        let keys = &mut keys[chunk * shape.keys()..][..shape.keys()];
        for (half, run) in runs.iter().enumerate() {
            let mut lines = keys[half..].iter_mut().step_by(2);
            for (cell, line) in run.cells.iter().zip(&mut lines) {
                let even = simd.to_array(V::column::<S, false>(simd, cell));
                let odd = simd.to_array(V::column::<S, true>(simd, cell));
                *line = pairs(round(even), round(odd));
            }
            lines.for_each(|line| *line = [bf16::ZERO; CELL]);
        }
        if runs.iter().all(|run| run.values.is_empty()) {
            continue;
        }
        for i in 0..LANES {
            let [first, second] = runs.each_ref().map(|run| run.value(i, shape.vectors));
            for v in 0..shape.vectors {
                let at = (v / 2 * PART_CHUNKS + chunk) * CHUNK_CELLS + 2 * i + v % 2;
                values[at] = pairs(rounded(simd, first, v), rounded(simd, second, v));
            }
        }
    }
}

/// A vector of a value, zeros where there is none.
#[inline(always)]
fn rounded<S: Simd, V: Stored>(simd: S, value: Option<&[[V; LANES]]>, v: usize) -> [u32; LANES] {
    match value {
        Some(value) => round(simd.to_array(V::load(simd, &value[v]))),
        None => [0; LANES],
    }
}

impl<'a, V> Run<'a, V> {
    /// The value of the `i`th of the sixteen, where it is there.
    #[inline(always)]
    fn value(&self, i: usize, vectors: usize) -> Option<&'a [[V; LANES]]> {
        let start = i.checked_sub(self.first)? * vectors;
        self.values.get(start..start + vectors)
    }
}
