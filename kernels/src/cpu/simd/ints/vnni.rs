//! Products of bytes by one instruction: four of them and their sum in each lane.
//!
//! Unsafe code here rests on one fact: a [`Vnni`] exists only where the CPU has the instructions.
#![expect(
    unsafe_code,
    reason = "intrinsics need a CPU that has them; the type is the proof"
)]

use super::{CODES, IntKernel, IntSimd};
use crate::cpu::simd::Kernel;
use crate::cpu::simd::avx512::{Avx512, load_codes, nibbles};
use std::arch::x86_64::{
    __m512, __m512i, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_set1_epi32,
};

/// Proof of AVX-512 with VNNI, and all that [`Avx512`] proves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vnni(Avx512);

impl Vnni {
    /// Asks the CPU.
    pub(crate) fn detect() -> Option<Self> {
        let floats = Avx512::detect()?;
        is_x86_feature_detected!("avx512vnni").then_some(Self(floats))
    }

    /// Vectors of floats.
    #[inline(always)]
    pub(crate) fn vectors(self) -> Avx512 {
        self.0
    }

    /// Runs `kernel` compiled for 512-bit vectors.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        self.0.run(kernel)
    }
}

impl IntSimd for Vnni {
    type Floats = Avx512;
    type Sums = __m512i;
    type Codes = __m512i;
    type Quad = [i8; 4];

    // 16 sums, 4 vectors of codes, 1 of activations, and room for the order that the compiler finds best: it keeps
    // more sums in memory. 16 are enough to hide what one takes.
    const TILE: (usize, usize) = (8, 2);

    #[inline(always)]
    fn floats(self) -> Avx512 {
        self.0
    }

    #[inline(always)]
    fn quad(self, values: [i8; 4]) -> [i8; 4] {
        values
    }

    #[inline(always)]
    fn splat(self, value: i32) -> __m512i {
        // SAFETY: `self` proves that the CPU has AVX-512.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    fn bytes(self, cell: &[u8; CODES]) -> __m512i {
        // SAFETY: `self` proves that the CPU has AVX-512.
        unsafe { load_codes(cell) }
    }

    #[inline(always)]
    fn nibbles(self, cell: &[u8; CODES]) -> [__m512i; 2] {
        // SAFETY: `self` proves that the CPU has AVX-512.
        unsafe { nibbles(cell) }
    }

    #[inline(always)]
    fn dot(self, codes: __m512i, x: [i8; 4], sums: __m512i) -> __m512i {
        // SAFETY: `self` proves that the CPU has AVX-512.
        let x = unsafe { _mm512_set1_epi32(bytemuck::cast(x)) };
        // SAFETY: `self` proves that the CPU has VNNI.
        unsafe { _mm512_dpbusd_epi32(sums, codes, x) }
    }

    #[inline(always)]
    fn to_floats(self, sums: __m512i) -> __m512 {
        // SAFETY: `self` proves that the CPU has AVX-512.
        unsafe { _mm512_cvtepi32_ps(sums) }
    }

    #[inline(always)]
    fn call<K: IntKernel>(self, kernel: K) -> K::Output {
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
        fn compiled<K: IntKernel>(kernel: K, simd: Vnni) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` proves that the CPU has all of the features enabled above.
        unsafe { compiled(kernel, self) }
    }
}
