//! Products of tiles in steps, between which vectors have time for other things.
//!
//! Sums stay in tiles from one step to the next. The compiler is not told: it puts nothing into tiles by itself, and keeps the
//! order of these blocks; the system saves what a thread has in them; and a thread has one [`Tiles`] at a time, which is borrowed.
//! Invariant: as that of one product, see [`Multiply::floats`](super::Multiply::floats).

use super::{CHUNK_CELLS, Floats, Tiles};
use crate::cpu::simd::LANES;
use std::arch::asm;

/// One product after the other, each begun, continued chunk by chunk, and ended.
pub(crate) trait Steps {
    /// The sums of one or two tiles of activations begin at zero, or at what was written before: `[tiles][2][rows]`.
    fn begin(&mut self, tiles: usize, sums: Option<&[[f32; LANES]]>);

    /// One chunk with each tile of activations: `[rows]` each, as many as have begun, and [`CHUNK_CELLS`].
    fn step(&mut self, rows: [&[Floats]; 2], cells: &[Floats]);

    /// Writes the sums: `[tiles][2][rows]`.
    fn end(&mut self, sums: &mut [[f32; LANES]]);
}

impl Steps for Tiles {
    #[inline(always)]
    fn begin(&mut self, tiles: usize, sums: Option<&[[f32; LANES]]>) {
        assert!(tiles == 1 || tiles == 2, "{tiles} tiles of activations");
        self.begun = tiles;
        let Some(sums) = sums else {
            // SAFETY: tiles are configured.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    options(nomem, nostack)
                );
            }
            return;
        };
        assert_eq!(sums.len(), tiles * 2 * self.rows, "sums of all tiles");
        let tile = 64 * self.rows;
        if tiles == 2 {
            // SAFETY: there are four tiles of sums.
            unsafe {
                asm!(
                    "tileloadd tmm0, [{at} + {line}]",
                    "add {at}, {tile}",
                    "tileloadd tmm1, [{at} + {line}]",
                    "add {at}, {tile}",
                    "tileloadd tmm2, [{at} + {line}]",
                    "add {at}, {tile}",
                    "tileloadd tmm3, [{at} + {line}]",
                    at = inout(reg) sums.as_ptr() => _,
                    tile = in(reg) tile,
                    line = in(reg) 64_usize,
                    options(nostack),
                );
            }
        } else {
            // SAFETY: there are two tiles of sums.
            unsafe {
                asm!(
                    "tileloadd tmm0, [{at} + {line}]",
                    "add {at}, {tile}",
                    "tileloadd tmm1, [{at} + {line}]",
                    at = inout(reg) sums.as_ptr() => _,
                    tile = in(reg) tile,
                    line = in(reg) 64_usize,
                    options(nostack),
                );
            }
        }
    }

    #[inline(always)]
    fn step(&mut self, [first, second]: [&[Floats]; 2], cells: &[Floats]) {
        assert!(
            first.len() == self.rows && cells.len() == CHUNK_CELLS,
            "a chunk"
        );
        if self.begun == 2 {
            assert_eq!(second.len(), self.rows, "activations of both tiles");
            // SAFETY: so many lines there are behind each address.
            unsafe {
                asm!(
                    "tileloadd tmm6, [{cells} + {pair}]",
                    "tileloaddt1 tmm4, [{first} + {line}]",
                    "tileloadd tmm7, [{cells} + {pair} + 64]",
                    "tileloaddt1 tmm5, [{second} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    cells = in(reg) cells.as_ptr(),
                    first = in(reg) first.as_ptr(),
                    second = in(reg) second.as_ptr(),
                    line = in(reg) 64_usize,
                    pair = in(reg) 128_usize,
                    options(nostack),
                );
            }
        } else {
            // SAFETY: so many lines there are behind each address.
            unsafe {
                asm!(
                    "tileloadd tmm6, [{cells} + {pair}]",
                    "tileloaddt1 tmm4, [{first} + {line}]",
                    "tileloadd tmm7, [{cells} + {pair} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    cells = in(reg) cells.as_ptr(),
                    first = in(reg) first.as_ptr(),
                    line = in(reg) 64_usize,
                    pair = in(reg) 128_usize,
                    options(nostack),
                );
            }
        }
    }

    #[inline(always)]
    fn end(&mut self, sums: &mut [[f32; LANES]]) {
        assert!(
            self.begun > 0 && sums.len() == self.begun * 2 * self.rows,
            "sums of all tiles"
        );
        let tile = 64 * self.rows;
        if self.begun == 2 {
            // SAFETY: there is room for four tiles of sums.
            unsafe {
                asm!(
                    "tilestored [{at} + {line}], tmm0",
                    "add {at}, {tile}",
                    "tilestored [{at} + {line}], tmm1",
                    "add {at}, {tile}",
                    "tilestored [{at} + {line}], tmm2",
                    "add {at}, {tile}",
                    "tilestored [{at} + {line}], tmm3",
                    at = inout(reg) sums.as_mut_ptr() => _,
                    tile = in(reg) tile,
                    line = in(reg) 64_usize,
                    options(nostack),
                );
            }
        } else {
            // SAFETY: there is room for two tiles of sums.
            unsafe {
                asm!(
                    "tilestored [{at} + {line}], tmm0",
                    "add {at}, {tile}",
                    "tilestored [{at} + {line}], tmm1",
                    at = inout(reg) sums.as_mut_ptr() => _,
                    tile = in(reg) tile,
                    line = in(reg) 64_usize,
                    options(nostack),
                );
            }
        }
    }
}
