//! Products of tiles in steps: one chunk after the other, with anything in between.
//!
//! Sums stay in tiles from one step to the next. The compiler is not told: it puts nothing into tiles by itself, and keeps the
//! order of these blocks; the system saves what a thread has in them; and a thread has one [`Tiles`] at a time, which is borrowed.

use super::{CHUNK_CELLS, Floats, Kept, LANES, Signed, Tiles};
use std::arch::asm;

/// One chunk of one tile of activations, or of two. The caller vouches for the memory: [`CHUNK_CELLS`] lines of cells, and
/// as many of each tile of activations as tiles have.
macro_rules! chunk {
    (one, $instruction:literal, $rows:literal, $cells:literal, $first:expr, $second:expr, $at:expr) => {{
        let _ = $second;
        asm!(
            concat!($cells, " tmm6, [{cells} + {pair}]"),
            concat!($rows, " tmm4, [{first} + {line}]"),
            concat!($cells, " tmm7, [{cells} + {pair} + 64]"),
            concat!($instruction, " tmm0, tmm4, tmm6"),
            concat!($instruction, " tmm1, tmm4, tmm7"),
            cells = in(reg) $at,
            first = in(reg) $first,
            line = in(reg) 64_usize,
            pair = in(reg) 128_usize,
            options(nostack),
        )
    }};
    (two, $instruction:literal, $rows:literal, $cells:literal, $first:expr, $second:expr, $at:expr) => {
        asm!(
            concat!($cells, " tmm6, [{cells} + {pair}]"),
            concat!($rows, " tmm4, [{first} + {line}]"),
            concat!($cells, " tmm7, [{cells} + {pair} + 64]"),
            concat!($rows, " tmm5, [{second} + {line}]"),
            concat!($instruction, " tmm0, tmm4, tmm6"),
            concat!($instruction, " tmm1, tmm4, tmm7"),
            concat!($instruction, " tmm2, tmm5, tmm6"),
            concat!($instruction, " tmm3, tmm5, tmm7"),
            cells = in(reg) $at,
            first = in(reg) $first,
            second = in(reg) $second,
            line = in(reg) 64_usize,
            pair = in(reg) 128_usize,
            options(nostack),
        )
    };
}

/// A chunk whose operands are loaded as [`Kept`] says.
macro_rules! step {
    ($tiles:ident, $instruction:literal, $kept:expr, $operands:expr) => {{
        let (first, second, cells) = $operands;
        match $kept {
            Kept::Rows => {
                // SAFETY: so many lines there are behind each address.
                unsafe {
                    chunk!(
                        $tiles,
                        $instruction,
                        "tileloadd",
                        "tileloaddt1",
                        first,
                        second,
                        cells
                    )
                }
            }
            Kept::Cells => {
                // SAFETY: so many lines there are behind each address.
                unsafe {
                    chunk!(
                        $tiles,
                        $instruction,
                        "tileloaddt1",
                        "tileloadd",
                        first,
                        second,
                        cells
                    )
                }
            }
            Kept::Both => {
                // SAFETY: so many lines there are behind each address.
                unsafe {
                    chunk!(
                        $tiles,
                        $instruction,
                        "tileloadd",
                        "tileloadd",
                        first,
                        second,
                        cells
                    )
                }
            }
        }
    }};
}

impl Tiles {
    /// See [`super::Multiply::begin`].
    #[inline(always)]
    pub(super) fn begin_sums(&mut self, tiles: usize, sums: Option<&[[f32; LANES]]>) {
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
        // SAFETY: there are two tiles of sums at least.
        unsafe {
            asm!(
                "tileloadd tmm0, [{at} + {line}]",
                "tileloadd tmm1, [{second} + {line}]",
                at = in(reg) sums.as_ptr(),
                second = in(reg) sums.as_ptr().wrapping_byte_add(tile),
                line = in(reg) 64_usize,
                options(nostack),
            );
        }
        if tiles == 2 {
            // SAFETY: there are four tiles of sums.
            unsafe {
                asm!(
                    "tileloadd tmm2, [{at} + {line}]",
                    "tileloadd tmm3, [{second} + {line}]",
                    at = in(reg) sums.as_ptr().wrapping_byte_add(2 * tile),
                    second = in(reg) sums.as_ptr().wrapping_byte_add(3 * tile),
                    line = in(reg) 64_usize,
                    options(nostack),
                );
            }
        }
    }

    /// See [`super::Multiply::step`].
    #[inline(always)]
    pub(super) fn step_floats(&mut self, rows: [&[Floats]; 2], cells: &[Floats]) {
        let operands = self.operands(rows, cells);
        if self.begun == 2 {
            step!(two, "tdpbf16ps", Kept::Cells, operands);
        } else {
            step!(one, "tdpbf16ps", Kept::Cells, operands);
        }
    }

    /// See [`super::Multiply::step_codes`].
    #[inline(always)]
    pub(super) fn step_bytes<const SIGN: bool>(
        &mut self,
        rows: [&[Signed]; 2],
        cells: &[[u8; 64]],
        kept: Kept,
    ) {
        let operands = self.operands(rows, cells);
        match (self.begun == 2, SIGN) {
            (true, true) => step!(two, "tdpbssd", kept, operands),
            (true, false) => step!(two, "tdpbsud", kept, operands),
            (false, true) => step!(one, "tdpbssd", kept, operands),
            (false, false) => step!(one, "tdpbsud", kept, operands),
        }
    }

    /// Checks a chunk's operands, lines of 64 bytes.
    #[inline(always)]
    fn operands<A, B>(
        &self,
        [first, second]: [&[A]; 2],
        cells: &[B],
    ) -> (*const A, *const A, *const B) {
        const { assert!(size_of::<A>() == 64 && size_of::<B>() == 64) }
        let are_two = self.begun < 2 || second.len() == self.rows;
        assert!(
            first.len() == self.rows && are_two && cells.len() == CHUNK_CELLS,
            "a chunk"
        );
        (first.as_ptr(), second.as_ptr(), cells.as_ptr())
    }

    /// See [`super::Multiply::end`].
    #[inline(always)]
    pub(super) fn write_sums<S>(&mut self, sums: &mut [[S; LANES]]) {
        const { assert!(size_of::<S>() == 4) }
        assert!(
            self.begun > 0 && sums.len() == self.begun * 2 * self.rows,
            "sums of all tiles"
        );
        let tile = 64 * self.rows;
        // SAFETY: there is room for two tiles of sums at least.
        unsafe {
            asm!(
                "tilestored [{at} + {line}], tmm0",
                "tilestored [{second} + {line}], tmm1",
                at = in(reg) sums.as_mut_ptr(),
                second = in(reg) sums.as_mut_ptr().wrapping_byte_add(tile),
                line = in(reg) 64_usize,
                options(nostack),
            );
        }
        if self.begun == 2 {
            // SAFETY: there is room for four tiles of sums.
            unsafe {
                asm!(
                    "tilestored [{at} + {line}], tmm2",
                    "tilestored [{second} + {line}], tmm3",
                    at = in(reg) sums.as_mut_ptr().wrapping_byte_add(2 * tile),
                    second = in(reg) sums.as_mut_ptr().wrapping_byte_add(3 * tile),
                    line = in(reg) 64_usize,
                    options(nostack),
                );
            }
        }
    }
}
