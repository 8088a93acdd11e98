//! One round of attention: some rows and up to [`ROUND`] keys at consecutive positions.
//!
//! Scores are a product of the rows with panels of sixteen keys, weighted values one of the weights with the values.
//! Keys and values are used where they are, or, where blocks or heads are no multiples of sixteen, from a
//! padded copy, with the same bits.

use crate::cpu::CpuTensor;
use crate::cpu::element::Stored;
use crate::cpu::exp::exp;
use crate::cpu::kv_cache::LayerBlocks;
use crate::cpu::scratch::Space;
use crate::cpu::simd::{CELL, Kernel, LANES, Simd, by_rows, panel, tiles};
use crate::cpu::tanh::soft_capped;
use std::ops::Range;

/// Positions of a round.
pub(super) const ROUND: usize = GROUPS * LANES;

/// Vectors of a row's scores in a round.
pub(super) const GROUPS: usize = 4;

/// Most rows at a time: enough that reading keys and values costs nothing beside the products with them.
pub(super) const MOST_ROWS: usize = 56;

/// What all rows of a sequence have in common.
#[derive(Clone, Copy)]
pub(super) struct Sequence<'a, E> {
    pub(super) qkv: &'a CpuTensor,
    /// The position of every token in `qkv`.
    pub(super) positions: &'a [u32],
    pub(super) table: &'a [u32],
    pub(super) blocks: LayerBlocks<'a, E>,
    pub(super) kv_head: usize,
    pub(super) scale: f32,
    pub(super) soft_cap: Option<f32>,
    pub(super) window: Option<u32>,
}

/// Positions that the token at `position` sees.
pub(super) fn visible(position: u32, window: Option<u32>) -> Range<usize> {
    let end = position as usize + 1;
    end - window.map_or(end, |window| end.min(window as usize))..end
}

impl<E> Sequence<'_, E> {
    /// Positions that any of some tokens sees.
    pub(super) fn seen_by(&self, tokens: Range<usize>) -> Range<usize> {
        let seen = tokens.map(|token| visible(self.positions[token], self.window));
        let any = seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
        any.unwrap_or(0..0)
    }
}

/// A softmax so far.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub(super) max: f32,
    pub(super) sum: f32,
}

impl State {
    pub(super) const NOTHING: Self = Self {
        max: f32::NEG_INFINITY,
        sum: 0.0,
    };
}

/// A thread's memory, divided.
pub(super) struct Places<'a> {
    /// `[tiles][vectors][rows of the tile]`
    pub(super) queries: &'a mut Space,
    /// Weighted values of this part of the keys. `[rows][vectors]`
    pub(super) sums: &'a mut Space,
    /// The same of all parts so far. `[rows][vectors]`
    pub(super) totals: &'a mut Space,
    /// Scores, then weights. `[rows]`
    pub(super) scores: &'a mut [[[f32; LANES]; GROUPS]],
    /// Copied keys, `[GROUPS][head_dim / 2]` cells, and values, `[ROUND][vectors]`
    pub(super) keys: &'a mut [[f32; CELL]],
    pub(super) values: &'a mut Space,
}

/// Sixteen keys and those of their values that are seen by any row.
#[derive(Clone, Copy)]
pub(super) struct Run<'a, E> {
    pub(super) cells: &'a [[E; CELL]],
    pub(super) values: &'a [[E; LANES]],
    /// Which of the sixteen the first value belongs to.
    pub(super) first: usize,
}

/// One round of some rows.
pub(super) struct Round<'a, 'b, E> {
    pub(super) sequence: &'a Sequence<'b, E>,
    pub(super) tokens: Range<usize>,
    /// Rows of a token.
    pub(super) heads: usize,
    /// Its first position.
    pub(super) start: usize,
    /// Positions of it that any row sees.
    pub(super) keys: Range<usize>,
    pub(super) vectors: usize,
}

impl<E: Stored> Round<'_, '_, E> {
    #[inline(always)]
    pub(super) fn run<S: Simd>(&self, simd: S, places: &mut Places<'_>, states: &mut [State]) {
        if self.sequence.blocks.is_packed() {
            let runs = self.runs();
            self.attend(simd, &runs, places, states);
        } else {
            self.copy_keys_and_values(places.keys, places.values);
            let Places {
                queries,
                sums,
                totals,
                scores,
                keys,
                values,
            } = places;
            let runs = self.copied_runs(keys, values);
            let mut places = Places {
                queries,
                sums,
                totals,
                scores,
                keys: &mut [],
                values: &mut [],
            };
            self.attend(simd, &runs, &mut places, states);
        }
    }

    /// Keys and values where they are.
    #[inline(always)]
    pub(super) fn runs(&self) -> [Run<'_, E>; GROUPS] {
        let Sequence {
            table,
            blocks,
            kv_head,
            ..
        } = self.sequence;
        let block_size = blocks.layout().block_size;
        let mut runs = [Run::NOTHING; GROUPS];
        for (group, run) in runs.iter_mut().enumerate() {
            let start = self.start + group * LANES;
            let keys = intersection(&self.keys, &(start..start + LANES));
            if !keys.is_empty() {
                let (block, offset) = (table[start / block_size] as usize, start % block_size);
                let first = keys.start - start;
                let values = blocks.values((block, *kv_head), offset + first, keys.len());
                *run = Run {
                    cells: blocks.key_cells(block, *kv_head, offset),
                    values: values.as_chunks().0,
                    first,
                };
            }
        }
        runs
    }

    /// Widens the round's keys and values into cells and padded vectors.
    #[inline(always)]
    pub(super) fn copy_keys_and_values(&self, keys: &mut [[f32; CELL]], values: &mut Space) {
        let blocks = &self.sequence.blocks;
        let (block_size, head_dim) = (blocks.layout().block_size, blocks.layout().head_dim);
        keys.fill([0.0; CELL]);
        for position in self.keys.clone() {
            let block = self.sequence.table[position / block_size] as usize;
            let (at, offset) = ((block, self.sequence.kv_head), position % block_size);
            let index = position - self.start;
            let cells = &mut keys[index / LANES * self.vectors * (LANES / 2)..];
            for d in 0..head_dim {
                let place = <f32 as Stored>::place(d % 2, index % LANES);
                cells[d / 2][place] = blocks.key(at, offset, d).widen();
            }
            let to = &mut values[index * self.vectors..][..self.vectors];
            to.fill([0.0; LANES]);
            let from = blocks.values(at, offset, 1);
            for (to, from) in to.as_flattened_mut().iter_mut().zip(from) {
                *to = from.widen();
            }
        }
    }

    #[inline(always)]
    pub(super) fn copied_runs<'s>(
        &self,
        keys: &'s [[f32; CELL]],
        values: &'s Space,
    ) -> [Run<'s, f32>; GROUPS] {
        let mut runs = [Run::NOTHING; GROUPS];
        for (group, run) in runs.iter_mut().enumerate() {
            let start = self.start + group * LANES;
            let seen = intersection(&self.keys, &(start..start + LANES));
            if !seen.is_empty() {
                let cells = self.vectors * LANES / 2;
                let first = seen.start - start;
                *run = Run {
                    cells: &keys[group * cells..][..cells],
                    values: &values[(group * LANES + first) * self.vectors..]
                        [..seen.len() * self.vectors],
                    first,
                };
            }
        }
        runs
    }

    #[inline(always)]
    fn attend<S: Simd, V: Stored>(
        &self,
        simd: S,
        runs: &[Run<'_, V>; GROUPS],
        places: &mut Places<'_>,
        states: &mut [State],
    ) {
        let (rows, vectors) = (states.len(), self.vectors);
        for tile in tiles(rows, S::TILE.0) {
            let queries = &places.queries[tile.start * vectors..tile.end * vectors];
            let out = &mut places.scores[tile.clone()];
            by_rows!(S, tile.len(), M => simd.call(Scores::<V, M> { queries, runs, out }));
        }
        // Keys come in units of their elements.
        let scale = self.sequence.scale * V::UNIT;
        let mut factors = [1.0; MOST_ROWS];
        for row in 0..rows {
            let token = self.tokens.start + row / self.heads;
            let seen = visible(self.sequence.positions[token], self.sequence.window);
            let seen = intersection(&seen, &self.keys);
            let seen = seen.start.saturating_sub(self.start)..seen.end.saturating_sub(self.start);
            let scores = &mut places.scores[row];
            let scaling = (scale, self.sequence.soft_cap);
            factors[row] = states[row].step(simd, scores, &seen, scaling);
        }
        for tile in tiles(rows, S::TILE.0) {
            let weights = &places.scores[tile.clone()];
            let factors = &factors[tile.clone()];
            let sums = &mut places.sums[tile.start * vectors..tile.end * vectors];
            by_rows!(S, tile.len(), M => {
                simd.call(Weighted::<V, M> { runs, weights, factors, sums, vectors });
            });
        }
    }
}

impl<E> Run<'_, E> {
    const NOTHING: Self = Self {
        cells: &[],
        values: &[],
        first: 0,
    };
}

/// `q·k` of `M` rows with all keys of a round. Meanwhile their values are asked for.
struct Scores<'a, 'r, E, const M: usize> {
    queries: &'a Space,
    runs: &'a [Run<'r, E>; GROUPS],
    out: &'a mut [[[f32; LANES]; GROUPS]],
}

impl<E: Stored, const M: usize> Kernel for Scores<'_, '_, E, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (group, run) in self.runs.iter().enumerate() {
            if !run.cells.is_empty() {
                let values = run.values.as_flattened().as_chunks().0;
                let sums = panel::<S, E, M, 1, 0, 1>(simd, self.queries, run.cells, values);
                for (scores, sums) in self.out.iter_mut().zip(sums) {
                    scores[group] = simd.to_array(sums[0]);
                }
            }
        }
    }
}

/// `sums[m] = factors[m] * sums[m] + Σ_j weights[m][j] * values[j]` of `M` rows, in the order of `j`.
struct Weighted<'a, 'r, E, const M: usize> {
    runs: &'a [Run<'r, E>; GROUPS],
    weights: &'a [[[f32; LANES]; GROUPS]],
    factors: &'a [f32],
    /// `[M][vectors]`
    sums: &'a mut Space,
    vectors: usize,
}

impl<E: Stored, const M: usize> Kernel for Weighted<'_, '_, E, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let mut d = 0;
        while const { S::TILE.1 >= 2 } && d + 2 <= self.vectors {
            self.vectors::<S, 2>(simd, d);
            d += 2;
        }
        while d < self.vectors {
            self.vectors::<S, 1>(simd, d);
            d += 1;
        }
    }
}

impl<E: Stored, const M: usize> Weighted<'_, '_, E, M> {
    /// `N` vectors of a head, from `d` on.
    #[inline(always)]
    fn vectors<S: Simd, const N: usize>(&mut self, simd: S, d: usize) {
        let vectors = self.vectors;
        let (Some(weights), Some(factors)) = (
            self.weights.first_chunk::<M>(),
            self.factors.first_chunk::<M>(),
        ) else {
            unreachable!("a tile of {M} rows")
        };
        let sums = &mut *self.sums;
        let mut added = [[simd.splat(0.0); N]; M];
        for m in 0..M {
            for n in 0..N {
                let sum = simd.load(&sums[m * vectors + d + n]);
                added[m][n] = simd.mul_add(simd.splat(factors[m]), sum, simd.splat(0.0));
            }
        }
        for (group, run) in self.runs.iter().enumerate() {
            for (j, value) in run.values.chunks_exact(vectors).enumerate() {
                // Never taken; a panic in its place would make the sums live in memory.
                let Some(value) = value.get(d..).and_then(<[_]>::first_chunk::<N>) else {
                    continue;
                };
                let mut v = [simd.splat(0.0); N];
                for n in 0..N {
                    v[n] = E::load(simd, &value[n]);
                }
                for m in 0..M {
                    let weight = simd.splat(weights[m][group][(run.first + j) % LANES]);
                    for n in 0..N {
                        added[m][n] = simd.mul_add(weight, v[n], added[m][n]);
                    }
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                sums[m * vectors + d + n] = simd.to_array(added[m][n]);
            }
        }
    }
}

impl State {
    /// Turns a round's scores into weights relative to the maximum so far, zero for what is not `seen`.
    /// Answers what to multiply everything before by.
    #[inline(always)]
    fn step<S: Simd>(
        &mut self,
        simd: S,
        scores: &mut [[f32; LANES]; GROUPS],
        seen: &Range<usize>,
        (scale, soft_cap): (f32, Option<f32>),
    ) -> f32 {
        if seen.is_empty() {
            *scores = [[0.0; LANES]; GROUPS];
            return 1.0;
        }
        let all = scores.as_flattened_mut();
        for score in &mut *all {
            *score *= scale;
        }
        if let Some(cap) = soft_cap {
            for score in &mut *all {
                *score = soft_capped(*score, cap);
            }
        }
        // Filled rather than asked for lane by lane, which does not become vector code.
        all[..seen.start].fill(f32::NEG_INFINITY);
        all[seen.end..].fill(f32::NEG_INFINITY);
        let mut most = [f32::NEG_INFINITY; LANES];
        for scores in scores.iter() {
            for lane in 0..LANES {
                most[lane] = larger(scores[lane], most[lane]);
            }
        }
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                most[lane] = larger(most[lane], most[lane + half]);
            }
        }
        let max = larger(most[0], self.max);
        let factor = if max > self.max {
            exp(self.max - max)
        } else {
            1.0
        };
        let mut sums = [0.0; LANES];
        for scores in scores.iter_mut() {
            for lane in 0..LANES {
                scores[lane] = exp(scores[lane] - max);
                sums[lane] += scores[lane];
            }
        }
        self.max = max;
        self.sum = self.sum * factor + simd.sum(simd.load(&sums));
        factor
    }
}

/// The larger one; `b` where they cannot be compared. One instruction, which the standard library's is not.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

pub(super) fn intersection(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    a.start.max(b.start)..a.end.min(b.end)
}
