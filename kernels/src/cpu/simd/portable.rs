//! Sixteen lanes as an array, for the compiler to vectorise with what the target guarantees.
//!
//! No intrinsics, no unsafe code. Compiles everywhere; on aarch64 it becomes NEON.

use super::{CELL, Kernel, LANES, Simd};
use crate::cpu::element::{F8, Stored};
use half::{bf16, f16};

/// Arrays of f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

impl Simd for Portable {
    type Vector = [f32; LANES];

    // Sixteen lanes take four of the (at least sixteen) 128-bit registers.
    const TILE: (usize, usize) = (2, 1);

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Vector {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::Vector {
        *values
    }

    #[inline(always)]
    fn load_bf16(self, values: &[bf16; LANES]) -> Self::Vector {
        values.map(Stored::widen)
    }

    #[inline(always)]
    fn load_f16(self, values: &[f16; LANES]) -> Self::Vector {
        values.map(Stored::widen)
    }

    #[inline(always)]
    fn load_i32(self, values: &[i32; LANES]) -> Self::Vector {
        values.map(|value| value as f32)
    }

    #[inline(always)]
    fn column_bf16<const SECOND: bool>(self, cell: &[bf16; CELL]) -> Self::Vector {
        std::array::from_fn(|i| cell[2 * i + usize::from(SECOND)].widen())
    }

    #[inline(always)]
    fn load_f8<const NAN: bool>(self, values: &[F8<NAN>; LANES]) -> Self::Vector {
        values.map(F8::in_units)
    }

    #[inline(always)]
    fn column_f8<const NAN: bool, const SECOND: bool>(
        self,
        cell: &[F8<NAN>; CELL],
    ) -> Self::Vector {
        std::array::from_fn(|i| cell[2 * i + usize::from(SECOND)].in_units())
    }

    #[inline(always)]
    fn prefetch<T>(self, _at: &T) {
        // The language has no portable one, and the CPU sees the stream by itself.
    }

    #[inline(never)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn to_array(self, vector: Self::Vector) -> [f32; LANES] {
        vector
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| {
            // Without the instruction a fused multiply-add is a library call for each lane.
            if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                a[i].mul_add(b[i], c[i])
            } else {
                a[i] * b[i] + c[i]
            }
        })
    }

    #[inline(always)]
    fn sum(self, mut lanes: Self::Vector) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }
}
