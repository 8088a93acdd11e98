//! Tiles in plain Rust, and the instructions compared with plain Rust. What whole products of bfloat16 come to is tested
//! where they are made (`ops/linear/tiles`).

use super::products::chunks;
use super::*;
use crate::cpu::element::Stored;
use crate::cpu::simd::Isa;
use crate::testing::Rng;

/// Tiles in plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Model;

pub(crate) struct ModelTiles {
    rows: usize,
    /// Those that have begun. `[tiles][2][rows]`
    sums: Vec<[f32; LANES]>,
    /// The same of codes.
    dots: Vec<[i32; LANES]>,
}

impl TileUnit for Model {
    type Tiles = ModelTiles;

    fn tiles(self, rows: usize) -> ModelTiles {
        ModelTiles {
            rows,
            sums: Vec::new(),
            dots: Vec::new(),
        }
    }

    fn widen(self, cells: &[[F8; CELL]], to: &mut [Floats]) {
        assert_eq!(cells.len(), to.len());
        for (to, cell) in to.iter_mut().zip(cells) {
            *to = cell.map(|code| bf16::from_f32(code.widen()));
        }
    }
}

/// Calls `f(sum, line of activations, index of the first cell)` for each line of sums and each chunk.
fn each<A, B, S>(
    rows: usize,
    product: &mut Product<'_, A, B, S>,
    mut f: impl FnMut(&mut S, &A, usize),
) {
    let chunks = chunks(rows, product);
    for (i, sums) in product.sums.iter_mut().enumerate() {
        let (tile, half, row) = (i / (2 * rows), i / rows % 2, i % rows);
        for chunk in 0..chunks {
            f(
                sums,
                &product.rows[tile][chunk * rows + row],
                chunk * CHUNK_CELLS + half,
            );
        }
    }
}

impl Multiply for ModelTiles {
    fn floats(
        &mut self,
        mut product: Product<'_, Floats, Floats, [f32; LANES]>,
        Course { is_first, out }: Course<'_>,
    ) {
        let cells = product.cells;
        let before = product.sums.to_vec();
        if is_first {
            product.sums.fill([0.0; LANES]);
        }
        each(self.rows, &mut product, |sums, x, first| {
            for (lane, sum) in sums.iter_mut().enumerate() {
                let mut halves = [0.0_f32; 2];
                for (i, x) in x.iter().enumerate() {
                    let w = cells[first + i / 2 * 2][2 * lane + i % 2];
                    halves[i % 2] = x.to_f32().mul_add(w.to_f32(), halves[i % 2]);
                }
                *sum += halves[0] + halves[1];
            }
        });
        if let Some(mut out) = out {
            for (i, (sums, before)) in product.sums.iter_mut().zip(before).enumerate() {
                let (tile, half, row) = (i / (2 * self.rows), i / self.rows % 2, i % self.rows);
                out.row(tile * self.rows + row)[half] = *sums;
                *sums = before;
            }
        }
    }

    fn begin(&mut self, tiles: usize, sums: Option<&[[f32; LANES]]>) {
        self.sums = vec![[0.0; LANES]; tiles * 2 * self.rows];
        self.dots = vec![[0; LANES]; tiles * 2 * self.rows];
        if let Some(sums) = sums {
            self.sums.copy_from_slice(sums);
        }
    }

    fn step(&mut self, rows: [&[Floats]; 2], cells: &[Floats]) {
        let mut sums = std::mem::take(&mut self.sums);
        let product = Product {
            rows: &rows[..sums.len() / (2 * self.rows)],
            cells,
            sums: &mut sums,
            ahead: &[],
            kept: Kept::Cells,
        };
        let course = Course {
            is_first: false,
            out: None,
        };
        self.floats(product, course);
        self.sums = sums;
    }

    fn end(&mut self, sums: &mut [[f32; LANES]]) {
        sums.copy_from_slice(&self.sums);
    }

    fn step_codes<const SIGN: bool>(
        &mut self,
        rows: [&[Signed]; 2],
        cells: &[[u8; 64]],
        kept: Kept,
    ) {
        let mut sums = std::mem::take(&mut self.dots);
        let mut product = Product {
            rows: &rows[..sums.len() / (2 * self.rows)],
            cells,
            sums: &mut sums,
            ahead: &[],
            kept,
        };
        each(
            self.rows,
            &mut product,
            |sums: &mut [i32; LANES], x, first| {
                for (i, x) in x.iter().enumerate() {
                    let cell = &cells[first + i / 4 * 2];
                    for (lane, sum) in sums.iter_mut().enumerate() {
                        let code = cell[4 * lane + i % 4];
                        let code = if SIGN {
                            i32::from(code.cast_signed())
                        } else {
                            i32::from(code)
                        };
                        *sum += i32::from(*x) * code;
                    }
                }
            },
        );
        self.dots = sums;
    }

    fn end_codes(&mut self, sums: &mut [[i32; LANES]]) {
        sums.copy_from_slice(&self.dots);
    }
}

/// Chunks of codes in steps, each with some tiles of rows.
fn multiply<const SIGN: bool>(
    mut tiles: impl Multiply,
    (x, rows): (&[Vec<Signed>], usize),
    cells: &[[u8; 64]],
) -> Vec<[i32; LANES]> {
    // Whatever was there is written over.
    let mut sums = vec![[7; LANES]; x.len() * 2 * rows];
    tiles.begin(x.len(), None);
    for (i, cells) in cells.chunks(CHUNK_CELLS).enumerate() {
        let lines = [0, x.len() - 1].map(|tile| &x[tile][i * rows..][..rows]);
        let kept = [Kept::Rows, Kept::Cells, Kept::Both][i % 3];
        tiles.step_codes::<SIGN>(lines, cells, kept);
    }
    tiles.end_codes(&mut sums);
    sums
}

/// Products of codes that have no more bits than `mask` compared with tiles in plain Rust.
fn check_codes(mask: u8) {
    let Some(amx) = Isa::detect().tiles() else {
        println!("skipped: this CPU has no tiles");
        return;
    };
    let mut rng = Rng::new(14);
    for case in 0..40 {
        let (rows, tiles, chunks) = (rng.within(1..17), rng.within(1..3), rng.within(1..5));
        println!("case {case}: {tiles} tiles of {rows} rows, {chunks} chunks");
        let mut codes = |lines: usize| -> Vec<[u8; 64]> {
            let mut line = |_| std::array::from_fn(|_| rng.next() as u8 & mask);
            (0..lines).map(&mut line).collect()
        };
        let cells = codes(chunks * CHUNK_CELLS);
        let x: Vec<Vec<Signed>> = (0..tiles)
            .map(|_| {
                codes(chunks * rows)
                    .into_iter()
                    .map(bytemuck::cast)
                    .collect()
            })
            .collect();
        let x = (&x[..], rows);
        let signed = multiply::<true>(amx.tiles(rows), x, &cells);
        assert!(signed == multiply::<true>(Model.tiles(rows), x, &cells));
        let unsigned = multiply::<false>(amx.tiles(rows), x, &cells);
        assert!(unsigned == multiply::<false>(Model.tiles(rows), x, &cells));
    }
}

#[test]
fn codes_of_seven_bits_are_multiplied_and_summed_exactly() {
    check_codes(0x7f);
}

#[test]
fn codes_with_a_sign_are_multiplied_and_summed_exactly() {
    check_codes(0xff);
}

#[test]
fn a_thread_has_one_set_of_tiles_until_it_drops_it() {
    let Some(amx) = Isa::detect().tiles() else {
        println!("skipped: this CPU has no tiles");
        return;
    };
    let first = amx.tiles(1);
    let second = std::panic::catch_unwind(|| amx.tiles(2).rows);
    assert!(second.is_err());
    drop(first);
    assert_eq!(amx.tiles(2).rows, 2);
}
