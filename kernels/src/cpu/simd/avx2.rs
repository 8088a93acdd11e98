//! Sixteen lanes in two 256-bit registers.
//!
//! Unsafe code here rests on one fact: an [`Avx2`] exists only where the CPU has the instructions.
#![expect(
    unsafe_code,
    reason = "intrinsics need a CPU that has them; the type is the proof"
)]

use super::{CELL, Kernel, LANES, Simd};
use crate::cpu::element::F8;
use half::{bf16, f16};
use std::arch::x86_64::{
    __m128i, __m256, __m256i, _MM_HINT_T1, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_movehdup_ps,
    _mm_movehl_ps, _mm_prefetch, _mm256_add_ps, _mm256_and_si256, _mm256_castps256_ps128,
    _mm256_castsi256_ps, _mm256_cmpeq_epi16, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi16,
    _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_extractf128_ps, _mm256_fmadd_ps,
    _mm256_or_si256, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi16,
    _mm256_slli_epi32, _mm256_srai_epi16,
};

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// Asks the CPU.
    pub(super) fn detect() -> Option<Self> {
        let present = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        present.then_some(Self(()))
    }

    /// Runs `kernel` compiled for these instructions.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<K: Kernel>(kernel: K, simd: Avx2) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves that the CPU has all of the features enabled above.
        unsafe { compiled(kernel, self) }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn widen_bf16(values: &[bf16; LANES]) -> [__m256; 2] {
    let halves: [__m128i; 2] = bytemuck::cast(*values);
    let low = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves[0]));
    let high = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves[1]));
    [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn column_bf16<const SECOND: bool>(cell: &[bf16; CELL]) -> [__m256; 2] {
    let pairs: [__m256i; 2] = bytemuck::cast(*cell);
    let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
    let widen = |pairs| {
        _mm256_castsi256_ps(if SECOND {
            _mm256_and_si256(pairs, high)
        } else {
            _mm256_slli_epi32::<16>(pairs)
        })
    };
    [widen(pairs[0]), widen(pairs[1])]
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widen_f16(values: &[f16; LANES]) -> [__m256; 2] {
    let halves: [__m128i; 2] = bytemuck::cast(*values);
    [_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])]
}

/// Widens floats of 8 bits, each in the upper half of 16 bits whose lower half is anything.
///
/// With the sign's bit doubled and one of the two cleared they are halves, see [`F8`].
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widen_f8<const NAN: bool>(upper: __m256i) -> [__m256; 2] {
    let mask = _mm256_set1_epi16(0xbf80_u16.cast_signed());
    let mut halves = _mm256_and_si256(_mm256_srai_epi16::<1>(upper), mask);
    if NAN {
        let all = _mm256_set1_epi16(0x3f80);
        let is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(halves, all), all);
        halves = _mm256_or_si256(halves, _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00)));
    }
    let halves: [__m128i; 2] = bytemuck::cast(halves);
    [_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])]
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_f8<const NAN: bool>(values: &[F8<NAN>; LANES]) -> [__m256; 2] {
    let wide = _mm256_cvtepu8_epi16(bytemuck::cast(*values));
    widen_f8::<NAN>(_mm256_slli_epi16::<8>(wide))
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn column_f8<const NAN: bool, const SECOND: bool>(cell: &[F8<NAN>; CELL]) -> [__m256; 2] {
    let pairs: __m256i = bytemuck::cast(*cell);
    widen_f8::<NAN>(if SECOND {
        pairs
    } else {
        _mm256_slli_epi16::<8>(pairs)
    })
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn fused(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
    [
        _mm256_fmadd_ps(a[0], b[0], c[0]),
        _mm256_fmadd_ps(a[1], b[1], c[1]),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sum(halves: [__m256; 2]) -> f32 {
    let eight = _mm256_add_ps(halves[0], halves[1]);
    let four = _mm_add_ps(
        _mm256_castps256_ps128(eight),
        _mm256_extractf128_ps::<1>(eight),
    );
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

impl Simd for Avx2 {
    type Vector = [__m256; 2];

    // 12 registers of sums, 2 of weights, 1 of inputs: 15 of 16.
    const TILE: (usize, usize) = (6, 1);

    #[inline(always)]
    fn splat(self, value: f32) -> [__m256; 2] {
        // SAFETY: `self` proves that the CPU has AVX2.
        [unsafe { _mm256_set1_ps(value) }; 2]
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> [__m256; 2] {
        bytemuck::cast(*values)
    }

    #[inline(always)]
    fn load_bf16(self, values: &[bf16; LANES]) -> [__m256; 2] {
        // SAFETY: `self` proves that the CPU has AVX2.
        unsafe { widen_bf16(values) }
    }

    #[inline(always)]
    fn load_f16(self, values: &[f16; LANES]) -> [__m256; 2] {
        // SAFETY: `self` proves that the CPU has AVX2 and F16C.
        unsafe { widen_f16(values) }
    }

    #[inline(always)]
    fn load_i32(self, values: &[i32; LANES]) -> [__m256; 2] {
        let halves: [__m256i; 2] = bytemuck::cast(*values);
        // SAFETY: `self` proves that the CPU has AVX2.
        halves.map(|half| unsafe { _mm256_cvtepi32_ps(half) })
    }

    #[inline(always)]
    fn column_bf16<const SECOND: bool>(self, cell: &[bf16; CELL]) -> [__m256; 2] {
        // SAFETY: `self` proves that the CPU has AVX2.
        unsafe { column_bf16::<SECOND>(cell) }
    }

    #[inline(always)]
    fn load_f8<const NAN: bool>(self, values: &[F8<NAN>; LANES]) -> [__m256; 2] {
        // SAFETY: `self` proves that the CPU has AVX2 and F16C.
        unsafe { load_f8(values) }
    }

    #[inline(always)]
    fn column_f8<const NAN: bool, const SECOND: bool>(self, cell: &[F8<NAN>; CELL]) -> [__m256; 2] {
        // SAFETY: `self` proves that the CPU has AVX2 and F16C.
        unsafe { column_f8::<NAN, SECOND>(cell) }
    }

    #[inline(always)]
    fn prefetch<T>(self, at: &T) {
        // SAFETY: a prefetch reads nothing, and every CPU with AVX2 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(at).cast()) }
    }

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        self.run(kernel)
    }

    #[inline(always)]
    fn to_array(self, vector: [__m256; 2]) -> [f32; LANES] {
        bytemuck::cast(vector)
    }

    #[inline(always)]
    fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves that the CPU has FMA.
        unsafe { fused(a, b, c) }
    }

    #[inline(always)]
    fn sum(self, vector: [__m256; 2]) -> f32 {
        // SAFETY: `self` proves that the CPU has AVX2.
        unsafe { sum(vector) }
    }
}
