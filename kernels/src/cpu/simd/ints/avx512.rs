//! Products of codes widened to 16 bits, in 512-bit registers, for CPUs without VNNI.
//!
//! Unsafe code here rests on one fact: an [`Avx512`] exists only where the CPU has the instructions.
#![expect(
    unsafe_code,
    reason = "intrinsics need a CPU that has them; the type is the proof"
)]

use super::{CODES, IntKernel, IntSimd};
use crate::cpu::simd::avx512::{Avx512, load_codes, nibbles};
use std::arch::x86_64::{
    __m512, __m512i, _mm512_add_epi32, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_madd_epi16,
    _mm512_set1_epi16, _mm512_set1_epi32, _mm512_srli_epi16,
};

/// The first and third code of each lane as 16 bits each, and the second and fourth.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn widen(codes: __m512i) -> [__m512i; 2] {
    [
        _mm512_and_si512(codes, _mm512_set1_epi16(0xff)),
        _mm512_srli_epi16::<8>(codes),
    ]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn dot(codes: [__m512i; 2], x: [i32; 2], sums: __m512i) -> __m512i {
    let even = _mm512_madd_epi16(codes[0], _mm512_set1_epi32(x[0]));
    let odd = _mm512_madd_epi16(codes[1], _mm512_set1_epi32(x[1]));
    _mm512_add_epi32(_mm512_add_epi32(sums, even), odd)
}

impl IntSimd for Avx512 {
    type Floats = Self;
    type Sums = __m512i;
    type Codes = [__m512i; 2];
    /// The first and third, then the second and fourth.
    type Quad = [i16; 4];

    // 16 sums, 4 registers of codes, 2 of activations, 2 of products.
    const TILE: (usize, usize) = (8, 2);

    #[inline(always)]
    fn floats(self) -> Self {
        self
    }

    #[inline(always)]
    fn quad(self, [a, b, c, d]: [i8; 4]) -> [i16; 4] {
        [a, c, b, d].map(i16::from)
    }

    #[inline(always)]
    fn splat(self, value: i32) -> __m512i {
        // SAFETY: `self` proves that the CPU has AVX-512.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    fn bytes(self, cell: &[u8; CODES]) -> [__m512i; 2] {
        // SAFETY: `self` proves that the CPU has AVX-512.
        let codes = unsafe { load_codes(cell) };
        // SAFETY: as above.
        unsafe { widen(codes) }
    }

    #[inline(always)]
    fn nibbles(self, cell: &[u8; CODES]) -> [[__m512i; 2]; 2] {
        // SAFETY: `self` proves that the CPU has AVX-512.
        let [low, high] = unsafe { nibbles(cell) };
        // SAFETY: as above.
        let low = unsafe { widen(low) };
        // SAFETY: as above.
        [low, unsafe { widen(high) }]
    }

    #[inline(always)]
    fn dot(self, codes: [__m512i; 2], x: [i16; 4], sums: __m512i) -> __m512i {
        // SAFETY: `self` proves that the CPU has AVX-512.
        unsafe { dot(codes, bytemuck::cast(x), sums) }
    }

    #[inline(always)]
    fn to_floats(self, sums: __m512i) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512.
        unsafe { _mm512_cvtepi32_ps(sums) }
    }

    #[inline(always)]
    fn call<K: IntKernel>(self, kernel: K) -> K::Output {
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        fn compiled<K: IntKernel>(kernel: K, simd: Avx512) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves that the CPU has all of the features enabled above.
        unsafe { compiled(kernel, self) }
    }
}
