//! Products of tiles over all their chunks at once.

use super::{CHUNK_CELLS, Course, Floats, Kept, LANES, Product, Tiles};
use std::arch::asm;
use std::mem::offset_of;

/// Addresses of a product's operands, and distances in bytes.
#[repr(C)]
struct Operands {
    rows: [*const u8; 2],
    cells: *const u8,
    chunks: usize,
    /// Of a tile of activations or of sums in lines.
    tile: usize,
    ahead: *const u8,
    /// Lines that are asked for with each chunk.
    lines: usize,
    /// Where sums begin: `[tiles][2]` tiles.
    sums: *const u8,
    /// Where they go: rows, the second half of outputs, and the second tile of activations are so far apart.
    to: *mut u8,
    row: usize,
    half: usize,
    second: usize,
}

/// How a tile of sums begins: as it is in memory, or at zero.
macro_rules! begin {
    (add, $tile:literal) => {
        concat!("tileloadd ", $tile, ", [{at} + {line}]")
    };
    (zero, $tile:literal) => {
        concat!("tilezero ", $tile)
    };
}

/// How operands that are read again, and those that are not, are loaded: the latter stay out of the first-level cache.
macro_rules! load {
    (rows, cells) => {
        "tileloaddt1 "
    };
    (cells, rows) => {
        "tileloaddt1 "
    };
    ($operand:ident, $kept:ident) => {
        "tileloadd "
    };
}

/// With two tiles of activations: four sums, for each of which half a tile is read, so that the cache keeps up.
///
/// The caller vouches that the memory behind each address is as large as tiles and chunks say. A prefetch may go beyond.
macro_rules! run_two {
    ($instruction:literal, $begin:ident, $kept:ident, $operands:ident) => {
        asm!(
            "mov {at}, [{operands} + {sums}]",
            begin!($begin, "tmm0"),
            "add {at}, {tile}",
            begin!($begin, "tmm1"),
            "add {at}, {tile}",
            begin!($begin, "tmm2"),
            "add {at}, {tile}",
            begin!($begin, "tmm3"),
            "2:",
            concat!(load!(cells, $kept), "tmm6, [{cells} + {pair}]"),
            concat!(load!(rows, $kept), "tmm4, [{rows} + {line}]"),
            concat!(load!(cells, $kept), "tmm7, [{cells} + {pair} + 64]"),
            concat!(load!(rows, $kept), "tmm5, [{others} + {line}]"),
            concat!($instruction, " tmm0, tmm4, tmm6"),
            concat!($instruction, " tmm1, tmm4, tmm7"),
            concat!($instruction, " tmm2, tmm5, tmm6"),
            concat!($instruction, " tmm3, tmm5, tmm7"),
            "add {cells}, 2048",
            "add {rows}, {tile}",
            "add {others}, {tile}",
            "mov {at}, {lines}",
            "test {at}, {at}",
            "jz 4f",
            "3:",
            "prefetcht1 [{ahead}]",
            "add {ahead}, 64",
            "dec {at}",
            "jnz 3b",
            "4:",
            "dec {chunks}",
            "jnz 2b",
            "mov {at}, [{operands} + {to}]",
            "mov {rows}, [{operands} + {row}]",
            "mov {others}, [{operands} + {half}]",
            "mov {cells}, [{operands} + {second}]",
            "tilestored [{at} + {rows}], tmm0",
            "add {cells}, {at}",
            "add {at}, {others}",
            "tilestored [{at} + {rows}], tmm1",
            "tilestored [{cells} + {rows}], tmm2",
            "add {cells}, {others}",
            "tilestored [{cells} + {rows}], tmm3",
            operands = in(reg) &raw const $operands,
            rows = inout(reg) $operands.rows[0] => _,
            others = inout(reg) $operands.rows[1] => _,
            cells = inout(reg) $operands.cells => _,
            ahead = inout(reg) $operands.ahead => _,
            chunks = inout(reg) $operands.chunks => _,
            lines = in(reg) $operands.lines,
            tile = in(reg) $operands.tile,
            line = in(reg) 64_usize,
            pair = in(reg) 128_usize,
            at = out(reg) _,
            sums = const offset_of!(Operands, sums),
            to = const offset_of!(Operands, to),
            row = const offset_of!(Operands, row),
            half = const offset_of!(Operands, half),
            second = const offset_of!(Operands, second),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// With one tile of activations: what is left of them, or the few rows of a decode step, which wait for memory anyway.
///
/// The caller vouches for the same as with two.
macro_rules! run_one {
    ($instruction:literal, $begin:ident, $kept:ident, $operands:ident) => {
        asm!(
            "mov {at}, [{operands} + {sums}]",
            begin!($begin, "tmm0"),
            "add {at}, {tile}",
            begin!($begin, "tmm1"),
            "2:",
            concat!(load!(cells, $kept), "tmm6, [{cells} + {pair}]"),
            concat!(load!(rows, $kept), "tmm4, [{rows} + {line}]"),
            concat!(load!(cells, $kept), "tmm7, [{cells} + {pair} + 64]"),
            concat!($instruction, " tmm0, tmm4, tmm6"),
            concat!($instruction, " tmm1, tmm4, tmm7"),
            "add {cells}, 2048",
            "add {rows}, {tile}",
            "mov {at}, {lines}",
            "test {at}, {at}",
            "jz 4f",
            "3:",
            "prefetcht1 [{ahead}]",
            "add {ahead}, 64",
            "dec {at}",
            "jnz 3b",
            "4:",
            "dec {chunks}",
            "jnz 2b",
            "mov {at}, [{operands} + {to}]",
            "mov {rows}, [{operands} + {row}]",
            "tilestored [{at} + {rows}], tmm0",
            "add {at}, [{operands} + {half}]",
            "tilestored [{at} + {rows}], tmm1",
            operands = in(reg) &raw const $operands,
            rows = inout(reg) $operands.rows[0] => _,
            cells = inout(reg) $operands.cells => _,
            ahead = inout(reg) $operands.ahead => _,
            chunks = inout(reg) $operands.chunks => _,
            lines = in(reg) $operands.lines,
            tile = in(reg) $operands.tile,
            line = in(reg) 64_usize,
            pair = in(reg) 128_usize,
            at = out(reg) _,
            sums = const offset_of!(Operands, sums),
            to = const offset_of!(Operands, to),
            row = const offset_of!(Operands, row),
            half = const offset_of!(Operands, half),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// One product: the sums begin, go through all chunks, and go to memory. One instruction adds the product of two tiles
/// to a third.
macro_rules! multiply {
    ($instruction:literal, $begin:ident, $kept:ident, $operands:ident, $is_two:expr) => {
        if $is_two {
            // SAFETY: see `run_two!`; `operands()` has checked the sizes.
            unsafe { run_two!($instruction, $begin, $kept, $operands) }
        } else {
            // SAFETY: see `run_one!`; `operands()` has checked the sizes.
            unsafe { run_one!($instruction, $begin, $kept, $operands) }
        }
    };
}

impl Tiles {
    /// See [`super::Multiply::floats`].
    pub(super) fn multiply_floats(
        &mut self,
        mut product: Product<'_, Floats, Floats, [f32; LANES]>,
        Course { is_first, out }: Course<'_>,
    ) {
        let (is_two, kept) = (product.rows.len() == 2, product.kept);
        let mut operands = operands(self.rows, &mut product);
        if let Some(mut out) = out {
            let tiles = 1 + usize::from(is_two);
            assert_eq!(out.rows(), tiles * self.rows, "a row of `out` for each");
            let row = out.width() * size_of::<f32>();
            operands.to = out.as_mut_ptr().cast();
            (operands.row, operands.half) = (row, size_of::<[f32; LANES]>());
            operands.second = self.rows * row;
        }
        match (is_first, kept) {
            (false, Kept::Cells | Kept::Both) => {
                multiply!("tdpbf16ps", add, cells, operands, is_two);
            }
            (false, Kept::Rows) => multiply!("tdpbf16ps", add, rows, operands, is_two),
            (true, Kept::Cells | Kept::Both) => {
                multiply!("tdpbf16ps", zero, cells, operands, is_two);
            }
            (true, Kept::Rows) => multiply!("tdpbf16ps", zero, rows, operands, is_two),
        }
    }
}

/// Checks the operands' sizes. Sums go where they come from.
fn operands<A, B, S>(rows: usize, product: &mut Product<'_, A, B, S>) -> Operands {
    let chunks = chunks(rows, product);
    let (first, second) = (product.rows[0], product.rows.get(1));
    let tile = 64 * rows;
    let to = product.sums.as_mut_ptr().cast();
    Operands {
        rows: [
            first.as_ptr().cast(),
            second.unwrap_or(&first).as_ptr().cast(),
        ],
        cells: product.cells.as_ptr().cast(),
        chunks,
        tile,
        ahead: product.ahead.as_ptr().cast(),
        lines: product.ahead.len().div_ceil(chunks),
        sums: to,
        to,
        row: 64,
        half: tile,
        second: 2 * tile,
    }
}

/// Checks the operands' sizes and gives the number of chunks.
pub(super) fn chunks<A, B, S>(rows: usize, product: &Product<'_, A, B, S>) -> usize {
    const { assert!(size_of::<A>() == 64 && size_of::<B>() == 64 && size_of::<S>() == 64) }
    let tiles = product.rows.len();
    assert!(tiles == 1 || tiles == 2, "{tiles} tiles of activations");
    let chunks = product.cells.len() / CHUNK_CELLS;
    // The loops above run once at least.
    assert!(
        chunks > 0 && product.cells.len() == chunks * CHUNK_CELLS,
        "whole chunks of cells, and one at least"
    );
    for tile in product.rows {
        assert_eq!(tile.len(), chunks * rows, "activations for each chunk");
    }
    assert_eq!(product.sums.len(), tiles * 2 * rows, "sums of all tiles");
    chunks
}
