//! Tiles in plain Rust, and the instructions compared with plain Rust. What whole products of bfloat16 come to is tested
//! where they are made (`ops/linear/tiles`).

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
}

impl TileUnit for Model {
    type Tiles = ModelTiles;

    fn tiles(self, rows: usize) -> ModelTiles {
        ModelTiles {
            rows,
            sums: Vec::new(),
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
                out.put(tile * self.rows + row, half, *sums);
                *sums = before;
            }
        }
    }

    fn codes(&mut self, mut product: Product<'_, Signed, Signed, [i32; LANES]>) {
        let cells = product.cells;
        product.sums.fill([0; LANES]);
        each(self.rows, &mut product, |sums, x, first| {
            for (i, x) in x.iter().enumerate() {
                let cell = &cells[first + i / 4 * 2];
                for (lane, sum) in sums.iter_mut().enumerate() {
                    *sum += i32::from(*x) * i32::from(cell[4 * lane + i % 4]);
                }
            }
        });
    }
}

impl Steps for ModelTiles {
    fn begin(&mut self, tiles: usize, sums: Option<&[[f32; LANES]]>) {
        self.sums = vec![[0.0; LANES]; tiles * 2 * self.rows];
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
        let mut codes = |lines: usize| -> Vec<Signed> {
            let mut line = |_| std::array::from_fn(|_| (rng.next() as u8 & mask).cast_signed());
            (0..lines).map(&mut line).collect()
        };
        let x: Vec<_> = (0..tiles).map(|_| codes(chunks * rows)).collect();
        let x: Vec<&[Signed]> = x.iter().map(|tile| &tile[..]).collect();
        let cells = codes(chunks * CHUNK_CELLS);
        // Whatever was there is written over.
        let [mut sums, mut expected] = [7, -7].map(|any| vec![[any; LANES]; tiles * 2 * rows]);
        amx.tiles(rows).codes(product(&x, &cells, &mut sums));
        Model.tiles(rows).codes(product(&x, &cells, &mut expected));
        assert!(sums == expected);
    }
}

fn product<'a>(
    rows: &'a [&'a [Signed]],
    cells: &'a [Signed],
    sums: &'a mut [[i32; LANES]],
) -> Product<'a, Signed, Signed, [i32; LANES]> {
    Product {
        rows,
        cells,
        sums,
        ahead: cells,
        kept: Kept::Cells,
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
