//! Products of codes widened to 16 bits, in pairs of 256-bit registers.
//!
//! Not by the instruction that multiplies bytes: it saturates the sum of two products.
//! Unsafe code here rests on one fact: an [`Avx2`] exists only where the CPU has the instructions.
#![expect(
    unsafe_code,
    reason = "intrinsics need a CPU that has them; the type is the proof"
)]

use super::{CODES, IntKernel, IntSimd};
use crate::cpu::simd::avx2::Avx2;
use std::arch::x86_64::{
    __m256, __m256i, _mm256_add_epi32, _mm256_and_si256, _mm256_cvtepi32_ps, _mm256_madd_epi16,
    _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_srli_epi16,
};

/// Of eight lanes: the first and third code as 16 bits each, and the second and fourth.
type Wide = [__m256i; 2];

#[inline]
#[target_feature(enable = "avx2")]
fn widen(codes: __m256i) -> Wide {
    [
        _mm256_and_si256(codes, _mm256_set1_epi16(0xff)),
        _mm256_srli_epi16::<8>(codes),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn widen_both(halves: [__m256i; 2]) -> [Wide; 2] {
    [widen(halves[0]), widen(halves[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
fn widen_nibbles(halves: [__m256i; 2]) -> [[Wide; 2]; 2] {
    let mask = _mm256_set1_epi8(15);
    let low = |codes| _mm256_and_si256(codes, mask);
    let high = |codes| _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask);
    [
        [widen(low(halves[0])), widen(low(halves[1]))],
        [widen(high(halves[0])), widen(high(halves[1]))],
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn dot(codes: [Wide; 2], x: [i32; 2], sums: [__m256i; 2]) -> [__m256i; 2] {
    let (even, odd) = (_mm256_set1_epi32(x[0]), _mm256_set1_epi32(x[1]));
    let half = |codes: Wide, sums| {
        let sums = _mm256_add_epi32(sums, _mm256_madd_epi16(codes[0], even));
        _mm256_add_epi32(sums, _mm256_madd_epi16(codes[1], odd))
    };
    [half(codes[0], sums[0]), half(codes[1], sums[1])]
}

#[inline]
#[target_feature(enable = "avx2")]
fn to_floats(sums: [__m256i; 2]) -> [__m256; 2] {
    [_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1])]
}

impl IntSimd for Avx2 {
    type Floats = Self;
    type Sums = [__m256i; 2];
    type Codes = [Wide; 2];
    /// The first and third, then the second and fourth.
    type Quad = [i16; 4];

    // 8 registers of sums, 4 of codes, 2 of activations, 2 of products: 16 of 16.
    const TILE: (usize, usize) = (4, 1);

    #[inline(always)]
    fn floats(self) -> Self {
        self
    }

    #[inline(always)]
    fn quad(self, [a, b, c, d]: [i8; 4]) -> [i16; 4] {
        [a, c, b, d].map(i16::from)
    }

    #[inline(always)]
    fn splat(self, value: i32) -> [__m256i; 2] {
        // SAFETY: `self` proves that the CPU has AVX2.
        [unsafe { _mm256_set1_epi32(value) }; 2]
    }

    #[inline(always)]
    fn bytes(self, cell: &[u8; CODES]) -> [Wide; 2] {
        // SAFETY: `self` proves that the CPU has AVX2.
        unsafe { widen_both(bytemuck::cast(*cell)) }
    }

    #[inline(always)]
    fn nibbles(self, cell: &[u8; CODES]) -> [[Wide; 2]; 2] {
        // SAFETY: `self` proves that the CPU has AVX2.
        unsafe { widen_nibbles(bytemuck::cast(*cell)) }
    }

    #[inline(always)]
    fn dot(self, codes: [Wide; 2], x: [i16; 4], sums: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: `self` proves that the CPU has AVX2.
        unsafe { dot(codes, bytemuck::cast(x), sums) }
    }

    #[inline(always)]
    fn to_floats(self, sums: [__m256i; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves that the CPU has AVX2.
        unsafe { to_floats(sums) }
    }

    #[inline(always)]
    fn call<K: IntKernel>(self, kernel: K) -> K::Output {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<K: IntKernel>(kernel: K, simd: Avx2) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves that the CPU has all of the features enabled above.
        unsafe { compiled(kernel, self) }
    }
}
