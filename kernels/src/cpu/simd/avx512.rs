//! Sixteen lanes in one 512-bit register.
//!
//! Unsafe code here rests on one fact: an [`Avx512`] exists only where the CPU has the instructions.
#![expect(
    unsafe_code,
    reason = "intrinsics need a CPU that has them; the type is the proof"
)]

use super::{CELL, CODES, Kernel, LANES, Simd, avx2};
use crate::cpu::element::F8;
use half::{bf16, f16};
use std::arch::x86_64::{
    __m256i, __m512, __m512i, _MM_HINT_T1, _mm_prefetch, _mm256_and_si256, _mm256_cmpeq_epi16_mask,
    _mm256_cvtepu8_epi16, _mm256_mask_mov_epi16, _mm256_set1_epi16, _mm256_slli_epi16,
    _mm256_srai_epi16, _mm512_and_si512, _mm512_castps512_ps256, _mm512_castsi512_ps,
    _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_extractf32x8_ps,
    _mm512_fmadd_ps, _mm512_loadu_epi32, _mm512_loadu_ps, _mm512_set1_epi8, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_slli_epi32, _mm512_srli_epi16, _mm512_storeu_ps,
};

/// Proof of AVX-512 F, BW and VL, AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// Asks the CPU.
    pub(super) fn detect() -> Option<Self> {
        let present = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        present.then_some(Self(()))
    }

    /// Runs `kernel` compiled for these instructions.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        fn compiled<K: Kernel>(kernel: K, simd: Avx512) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves that the CPU has all of the features enabled above.
        unsafe { compiled(kernel, self) }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn widen_bf16(values: &[bf16; LANES]) -> __m512 {
    let bits: __m256i = bytemuck::cast(*values);
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn column_bf16<const SECOND: bool>(cell: &[bf16; CELL]) -> __m512 {
    /// What may lie anywhere.
    #[repr(C, packed)]
    struct Line(__m512i);
    let line: *const Line = std::ptr::from_ref(cell).cast();
    // SAFETY: the cell is 64 bytes, as a line is, and a line needs no alignment. Volatile, so that the second column is
    // read again: kept in a register under the first one's products it takes two from the sums of a tile, which then
    // are moved around (measured: 14 rows, one core, all in its first-level cache: 163 instead of 119 GFLOP/s).
    let pairs = unsafe { line.read_volatile() }.0;
    _mm512_castsi512_ps(if SECOND {
        _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()))
    } else {
        _mm512_slli_epi32::<16>(pairs)
    })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn widen_f16(values: &[f16; LANES]) -> __m512 {
    _mm512_cvtph_ps(bytemuck::cast(*values))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2")]
fn sum(lanes: __m512) -> f32 {
    avx2::sum([
        _mm512_castps512_ps256(lanes),
        _mm512_extractf32x8_ps::<1>(lanes),
    ])
}

/// Widens floats of 8 bits, each in the upper half of 16 bits whose lower half is anything.
///
/// With the sign's bit doubled and one of the two cleared they are halves, see [`F8`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn widen_f8<const NAN: bool>(upper: __m256i) -> __m512 {
    let mask = _mm256_set1_epi16(0xbf80_u16.cast_signed());
    let mut halves = _mm256_and_si256(_mm256_srai_epi16::<1>(upper), mask);
    if NAN {
        let all = _mm256_set1_epi16(0x3f80);
        let is_nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(halves, all), all);
        halves = _mm256_mask_mov_epi16(halves, is_nan, _mm256_set1_epi16(0x7e00));
    }
    _mm512_cvtph_ps(halves)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn load_f8<const NAN: bool>(values: &[F8<NAN>; LANES]) -> __m512 {
    let wide = _mm256_cvtepu8_epi16(bytemuck::cast(*values));
    widen_f8::<NAN>(_mm256_slli_epi16::<8>(wide))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn column_f8<const NAN: bool, const SECOND: bool>(cell: &[F8<NAN>; CELL]) -> __m512 {
    let pairs: __m256i = bytemuck::cast(*cell);
    widen_f8::<NAN>(if SECOND {
        pairs
    } else {
        _mm256_slli_epi16::<8>(pairs)
    })
}

/// Reads a cell of codes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_codes(cell: &[u8; CODES]) -> __m512i {
    let words: [i32; LANES] = bytemuck::cast(*cell);
    // SAFETY: the array covers 16 words.
    unsafe { _mm512_loadu_epi32(words.as_ptr()) }
}

/// The low and the high halves of a cell's bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn nibbles(cell: &[u8; CODES]) -> [__m512i; 2] {
    let (codes, mask) = (load_codes(cell), _mm512_set1_epi8(15));
    [
        _mm512_and_si512(codes, mask),
        _mm512_and_si512(_mm512_srli_epi16::<4>(codes), mask),
    ]
}

impl Simd for Avx512 {
    type Vector = __m512;

    // 28 sums, 2 vectors of weights, 1 of inputs: 31 of 32 registers.
    const TILE: (usize, usize) = (14, 2);

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512, and the reference covers 16 f32.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn load_bf16(self, values: &[bf16; LANES]) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512.
        unsafe { widen_bf16(values) }
    }

    #[inline(always)]
    fn load_f16(self, values: &[f16; LANES]) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512.
        unsafe { widen_f16(values) }
    }

    #[inline(always)]
    fn load_i32(self, values: &[i32; LANES]) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512, and the reference covers 16 i32.
        let values = unsafe { _mm512_loadu_epi32(values.as_ptr()) };
        // SAFETY: as above.
        unsafe { _mm512_cvtepi32_ps(values) }
    }

    #[inline(always)]
    fn column_bf16<const SECOND: bool>(self, cell: &[bf16; CELL]) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512.
        unsafe { column_bf16::<SECOND>(cell) }
    }

    #[inline(always)]
    fn load_f8<const NAN: bool>(self, values: &[F8<NAN>; LANES]) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512 and AVX2.
        unsafe { load_f8(values) }
    }

    #[inline(always)]
    fn column_f8<const NAN: bool, const SECOND: bool>(self, cell: &[F8<NAN>; CELL]) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512 and AVX2.
        unsafe { column_f8::<NAN, SECOND>(cell) }
    }

    #[inline(always)]
    fn prefetch<T>(self, at: &T) {
        // SAFETY: a prefetch reads nothing, and every CPU with AVX-512 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(at).cast()) }
    }

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        self.run(kernel)
    }

    #[inline(always)]
    fn to_array(self, vector: __m512) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: `self` proves that the CPU has AVX-512, and the array covers 16 f32.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), vector) };
        lanes
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(self, vector: __m512) -> f32 {
        // SAFETY: `self` proves that the CPU has AVX-512 and AVX2.
        unsafe { sum(vector) }
    }
}
