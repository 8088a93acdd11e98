//! Attention of some rows, query heads of one key head for a few tokens of one sequence, on one thread.
//!
//! Keys are gone through in rounds of [`ROUND`] positions with a running maximum (the "online" softmax): the scores of
//! all rows are one product with the keys, and what they weigh is another with the values, so keys and values are
//! read once for all rows. Rounds are cut at multiples of [`SPLIT`] positions into parts that know nothing of
//! each other, which may be computed on different threads.
//!
//! Invariant: a row's arithmetic follows from its position, the window and its own queries, keys and values. Where it
//! does not see a key that another row sees, it adds zero times that key's value.

use super::round::{
    GROUPS, MOST_ROWS, Places, ROUND, Round, Sequence, State, intersection, larger,
};
use crate::cpu::element::Stored;
use crate::cpu::exp::exp;
use crate::cpu::matrix::Panel;
use crate::cpu::scratch::{Space, VECTORS};
use crate::cpu::simd::{Kernel, LANES, Simd, tiles};
use std::ops::Range;

/// Positions of a part; a multiple of [`ROUND`].
pub(super) const SPLIT: usize = 512;

/// Where results go.
pub(super) enum Target<'a, 'p> {
    /// The heads' columns, from `column` on, of the tokens' rows.
    Out(&'a mut Panel<'p>, usize),
    /// One part of the keys, to be merged later. `[rows][vectors of a head + 1]` vectors
    Part(&'a mut [f32], usize),
}

impl Target<'_, '_> {
    /// The parts of `keys` that are wanted.
    pub(super) fn parts(&self, keys: &Range<usize>) -> Range<usize> {
        match self {
            Self::Out(..) => parts(keys),
            Self::Part(_, index) => *index..*index + 1,
        }
    }
}

/// Some rows and where they work.
pub(super) struct Rows<'a, 'p, E> {
    pub(super) sequence: Sequence<'a, E>,
    pub(super) tokens: Range<usize>,
    /// Query heads of `sequence.kv_head`.
    pub(super) heads: Range<usize>,
    pub(super) space: &'a mut Space,
    pub(super) target: Target<'a, 'p>,
}

/// The part numbered `index` of all positions.
pub(super) fn part(index: usize) -> Range<usize> {
    index * SPLIT..(index + 1) * SPLIT
}

/// The parts that `keys` lie in.
pub(super) fn parts(keys: &Range<usize>) -> Range<usize> {
    keys.start / SPLIT..keys.end.div_ceil(SPLIT)
}

/// Vectors of a head, the last padded with zeros.
pub(super) fn head_vectors(head_dim: usize) -> usize {
    head_dim.div_ceil(LANES)
}

/// How many rows a thread's memory is enough for.
///
/// # Panics
/// If not for one: heads of more than 800 elements.
pub(super) fn most_rows(head_dim: usize) -> usize {
    let vectors = head_vectors(head_dim);
    // Queries, sums and totals, and scores; a round's keys and values where they have to be copied.
    let rows = VECTORS.saturating_sub(2 * ROUND * vectors) / (3 * vectors + GROUPS);
    assert!(
        rows > 0,
        "a head of {head_dim} is too wide for the CPU backend"
    );
    rows.min(MOST_ROWS)
}

impl<E: Stored> Kernel for Rows<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            sequence,
            tokens,
            heads,
            space,
            mut target,
        } = self;
        let head_dim = sequence.blocks.layout().head_dim;
        let (count, vectors) = (tokens.len() * heads.len(), head_vectors(head_dim));
        let mut places = divide(space, count, vectors);
        let rows = (tokens.clone(), heads.clone());
        lay_out_queries::<S>(&sequence, rows, head_dim, places.queries);
        let keys = sequence.seen_by(tokens.clone());
        let wanted = target.parts(&keys);

        let mut totals = [State::NOTHING; MOST_ROWS];
        places.totals.fill([0.0; LANES]);
        for index in wanted {
            let keys = intersection(&keys, &part(index));
            let mut states = [State::NOTHING; MOST_ROWS];
            places.sums.fill([0.0; LANES]);
            for round in (keys.start / ROUND * ROUND..keys.end).step_by(ROUND) {
                let keys = intersection(&keys, &(round..round + ROUND));
                let attention = Round {
                    sequence: &sequence,
                    tokens: tokens.clone(),
                    heads: heads.len(),
                    start: round,
                    keys,
                    vectors,
                };
                attention.run(simd, &mut places, &mut states[..count]);
            }
            if let Target::Part(out, _) = &mut target {
                put_part(out, places.sums, &states[..count], vectors);
                return;
            }
            let merged = places.totals.chunks_exact_mut(vectors);
            let merged = merged.zip(places.sums.chunks_exact(vectors));
            for ((total, sums), (at, state)) in merged.zip(totals.iter_mut().zip(states)) {
                merge((total, at), (sums, state));
            }
        }
        if let Target::Out(panel, column) = target {
            let rows = (tokens, heads.len());
            put_all(&sequence, rows, (places.totals, &totals), (panel, column));
        }
    }
}

#[inline(always)]
fn divide(space: &mut Space, rows: usize, vectors: usize) -> Places<'_> {
    let (queries, space) = space.split_at_mut(rows * vectors);
    let (sums, space) = space.split_at_mut(rows * vectors);
    let (totals, space) = space.split_at_mut(rows * vectors);
    let (scores, space) = space.split_at_mut(rows * GROUPS);
    // What is left is enough for copies of keys and values, or not needed.
    let (keys, values) = space.split_at_mut((ROUND * vectors).min(space.len()));
    Places {
        queries,
        sums,
        totals,
        scores: scores.as_chunks_mut().0,
        keys: bytemuck::cast_slice_mut(&mut keys[..]),
        values,
    }
}

/// Copies the queries into the order in which products read them.
#[inline(always)]
fn lay_out_queries<S: Simd>(
    sequence: &Sequence<'_, impl Stored>,
    (tokens, heads): (Range<usize>, Range<usize>),
    head_dim: usize,
    space: &mut Space,
) {
    let rows = tokens.len() * heads.len();
    let mut space = space.iter_mut();
    for tile in tiles(rows, S::TILE.0) {
        for start in (0..head_dim).step_by(LANES) {
            for row in tile.clone() {
                let (token, head) = (row / heads.len(), row % heads.len());
                let query = sequence.qkv.row(tokens.start + token);
                let query = &query[(heads.start + head) * head_dim..][..head_dim][start..];
                let to = space.next().expect("a vector for each of each row");
                if let Some(vector) = query.first_chunk() {
                    *to = *vector;
                } else {
                    *to = [0.0; LANES];
                    to[..query.len()].copy_from_slice(query);
                }
            }
        }
    }
}

/// Adds a part's weighted values to the total of those before it.
#[inline(always)]
pub(super) fn merge((total, at): (&mut Space, &mut State), (sums, state): (&Space, State)) {
    if state.sum == 0.0 {
        return;
    }
    let max = larger(state.max, at.max);
    let (before, now) = (exp(at.max - max), exp(state.max - max));
    for (total, sums) in total.iter_mut().zip(sums) {
        for lane in 0..LANES {
            total[lane] = total[lane] * before + sums[lane] * now;
        }
    }
    *at = State {
        max,
        sum: at.sum * before + state.sum * now,
    };
}

/// Puts what is wanted of all rows, `totals: [rows][vectors]`, into the columns of `heads` heads from `column` on.
#[inline(always)]
pub(super) fn put_all(
    sequence: &Sequence<'_, impl Stored>,
    (tokens, heads): (Range<usize>, usize),
    (totals, states): (&Space, &[State]),
    (panel, column): (&mut Panel<'_>, usize),
) {
    let head_dim = sequence.blocks.layout().head_dim;
    let totals = totals.chunks_exact(head_vectors(head_dim)).zip(states);
    let at = tokens.flat_map(|token| (0..heads).map(move |head| (token, head)));
    for ((token, head), (total, state)) in at.zip(totals) {
        let out = &mut panel.row(token)[column + head * head_dim..][..head_dim];
        finish(total, *state, sequence.blocks.unit(), out);
    }
}

#[inline(always)]
fn finish(total: &Space, state: State, unit: f32, out: &mut [f32]) {
    for (out, total) in out.chunks_mut(LANES).zip(total) {
        for (out, total) in out.iter_mut().zip(total) {
            *out = total / state.sum * unit;
        }
    }
}

/// `[rows][vectors + 1]`: the weighted values, then maximum and sum.
#[inline(always)]
pub(super) fn put_part(out: &mut [f32], sums: &Space, states: &[State], vectors: usize) {
    let out = out.as_chunks_mut::<LANES>().0.chunks_exact_mut(vectors + 1);
    for ((out, sums), state) in out.zip(sums.chunks_exact(vectors)).zip(states) {
        out[..vectors].copy_from_slice(sums);
        out[vectors][..2].copy_from_slice(&[state.max, state.sum]);
    }
}

/// The parts of the rows of one token, to be merged.
pub(super) struct Merge<'a> {
    /// Each as [`Target::Part`] says.
    pub(super) parts: std::slice::ChunksExact<'a, f32>,
    pub(super) head_dim: usize,
    /// Of the values, which was left out of the parts.
    pub(super) unit: f32,
    pub(super) space: &'a mut Space,
    /// `[rows][head_dim]`
    pub(super) out: &'a mut [f32],
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let vectors = head_vectors(self.head_dim);
        for (row, out) in self.out.chunks_exact_mut(self.head_dim).enumerate() {
            let total = &mut self.space[..vectors];
            total.fill([0.0; LANES]);
            let mut at = State::NOTHING;
            for part in self.parts.clone() {
                let part = &part.as_chunks::<LANES>().0[row * (vectors + 1)..][..=vectors];
                let [max, sum] = [part[vectors][0], part[vectors][1]];
                merge((total, &mut at), (&part[..vectors], State { max, sum }));
            }
            finish(total, at, self.unit, out);
        }
    }
}
