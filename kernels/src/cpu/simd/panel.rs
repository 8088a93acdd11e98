//! Products of a few rows with a packed panel, the core of `linear` and attention.
//!
//! A panel is a matrix whose rows lie side by side: cells of two columns of sixteen rows, `W` cells next to each
//! other for `16 * W` rows, from the first pair of columns to the last. One lane belongs to one row of
//! the panel, so nothing is summed across lanes. (A cell of bfloat16 is a row of a matrix-extension tile, too.)
//!
//! Invariant: a product is summed from the first column to the last, one by one, whatever the size of the
//! tile it is part of. Columns are padded with zeros to whole chunks, which adds zeros and changes nothing.

use super::{CELL, LANES, Simd};
use crate::cpu::element::Stored;
use std::ops::Range;

/// Cells of a chunk of sixteen columns, for one vector of rows.
const CELLS: usize = LANES / 2;

/// `out[m][n]`: products of row `m` of `x` with rows `16 * (F + n)..` of a panel.
///
/// `x: [chunks][M][16]`, `cells: [chunks][8][W]` of which the `N` from `F` on of each `W` are used. Meanwhile the cache
/// lines of `ahead` are asked for.
#[inline(always)]
pub(crate) fn panel<
    S: Simd,
    E: Stored,
    const M: usize,
    const N: usize,
    const F: usize,
    const W: usize,
>(
    simd: S,
    x: &[[f32; LANES]],
    cells: &[[E; CELL]],
    ahead: &[[E; CELL]],
) -> [[S::Vector; N]; M] {
    const { assert!(F + N <= W) }
    let mut sums = [[simd.splat(0.0); N]; M];
    let chunks = x.len() / M;
    let per_chunk = ahead.len().div_ceil(chunks.max(1)).max(1);
    let mut ahead = ahead.chunks(per_chunk);
    for (x, cells) in x.chunks_exact(M).zip(cells.chunks_exact(CELLS * W)) {
        for cell in ahead.next().unwrap_or_default() {
            // A cell of f32 is two lines.
            simd.prefetch(&cell[0]);
            if size_of::<E>() > 2 {
                simd.prefetch(&cell[LANES]);
            }
        }
        for (pair, cells) in cells.chunks_exact(W).enumerate() {
            let cells = &cells[F..F + N];
            add_column::<S, E, M, N, false>(simd, x, pair, cells, &mut sums);
            add_column::<S, E, M, N, true>(simd, x, pair, cells, &mut sums);
        }
    }
    sums
}

/// Adds the products with one column of a pair, whose weights are in registers no longer than for that.
#[inline(always)]
fn add_column<S: Simd, E: Stored, const M: usize, const N: usize, const SECOND: bool>(
    simd: S,
    x: &[[f32; LANES]],
    pair: usize,
    cells: &[[E; CELL]],
    sums: &mut [[S::Vector; N]; M],
) {
    let mut w = [simd.splat(0.0); N];
    for n in 0..N {
        w[n] = E::column::<S, SECOND>(simd, &cells[n]);
    }
    for m in 0..M {
        let x = simd.splat(x[m][2 * pair + usize::from(SECOND)]);
        for n in 0..N {
            sums[m][n] = simd.mul_add(x, w[n], sums[m][n]);
        }
    }
}

/// Divides `0..rows` into tiles of sizes that [`by_rows`] has, none larger than `most`.
///
/// As large ones as there can be, but two of like size rather than a large and a small one: one row's sums
/// alone do not keep the arithmetic units busy.
pub(crate) fn tiles(rows: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let left = rows - start;
        let size = match left {
            _ if left <= most && (left <= HALF || left == MAX_TILE) => left,
            _ if left <= 2 * HALF => left.div_ceil(2).min(most),
            _ => most,
        };
        start += size;
        (size > 0).then(|| start - size..start)
    })
}

/// Sizes of tiles: any up to this,
const HALF: usize = 8;

/// and this, the largest.
pub(crate) const MAX_TILE: usize = 14;

/// Evaluates an expression with `$M` standing for the run-time size of one of [`tiles`]' for `S::TILE.0`.
macro_rules! by_rows {
    ($S:ident, $rows:expr, $M:ident => $body:expr) => {
        by_rows!(@ $S, $rows, $M => $body, 1 2 3 4 5 6 7 8 14)
    };
    (@ $S:ident, $rows:expr, $M:ident => $body:expr, $($count:literal)*) => {{
        let rows = $rows;
        $(
            // A constant condition: what an instruction set has no registers for is not compiled for it.
            if const { $count <= $S::TILE.0 } && rows == $count {
                const $M: usize = $count;
                $body
            } else
        )* {
            unreachable!("{rows} rows in a tile of {}", $S::TILE.0)
        }
    }};
}
pub(crate) use by_rows;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_all_rows_once_and_of_the_sizes_there_are() {
        for most in [2, 6, MAX_TILE] {
            for rows in 0..300 {
                let mut end = 0;
                for tile in tiles(rows, most) {
                    assert_eq!(tile.start, end);
                    end = tile.end;
                    let size = tile.len();
                    assert!(size <= most && (size <= HALF || size == MAX_TILE), "{size}");
                }
                assert_eq!(end, rows);
            }
        }
        let sizes = |rows| {
            tiles(rows, MAX_TILE)
                .map(|tile| tile.len())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            [sizes(16), sizes(9), sizes(32)],
            [vec![8, 8], vec![5, 4], vec![14, 14, 4]]
        );
    }
}
