//! Sixteen i32 as an array, for the compiler to vectorise with what the target guarantees.

use super::{CODES, IntKernel, IntSimd};
use crate::cpu::simd::LANES;
use crate::cpu::simd::portable::Portable;

impl IntSimd for Portable {
    type Floats = Self;
    type Sums = [i32; LANES];
    type Codes = [u8; CODES];
    type Quad = [i16; 4];

    const TILE: (usize, usize) = (2, 1);

    #[inline(always)]
    fn floats(self) -> Self {
        self
    }

    #[inline(always)]
    fn quad(self, values: [i8; 4]) -> [i16; 4] {
        values.map(i16::from)
    }

    #[inline(always)]
    fn splat(self, value: i32) -> [i32; LANES] {
        [value; LANES]
    }

    #[inline(always)]
    fn bytes(self, cell: &[u8; CODES]) -> [u8; CODES] {
        *cell
    }

    #[inline(always)]
    fn nibbles(self, cell: &[u8; CODES]) -> [[u8; CODES]; 2] {
        [cell.map(|code| code & 15), cell.map(|code| code >> 4)]
    }

    #[inline(always)]
    fn dot(self, codes: [u8; CODES], x: [i16; 4], sums: [i32; LANES]) -> [i32; LANES] {
        std::array::from_fn(|lane| {
            let product = |i: usize| i32::from(codes[4 * lane + i]) * i32::from(x[i]);
            sums[lane] + product(0) + product(1) + product(2) + product(3)
        })
    }

    #[inline(always)]
    fn to_floats(self, sums: [i32; LANES]) -> [f32; LANES] {
        sums.map(|sum| sum as f32)
    }

    #[inline(never)]
    fn call<K: IntKernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
}
