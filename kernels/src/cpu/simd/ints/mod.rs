//! Products of 8-bit codes, summed in i32, and the choice of the instructions that compute them.
//!
//! Weights are codes without a sign, activations have one: the pair that hardware multiplies. What is not here: what
//! codes stand for, which whoever sums them corrects (`ops/linear/codes.rs`).
//!
//! Invariant: sums are exact, so that no instruction set differs from another in anything.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
#[cfg(target_arch = "x86_64")]
mod vnni;

#[cfg(target_arch = "x86_64")]
pub(crate) use vnni::Vnni;

use super::{Isa, Simd};
use bytemuck::Pod;

/// Bytes of a cell of codes: sixteen rows of four columns of one byte each, or of eight columns of half a byte.
pub(crate) const CODES: usize = 64;

/// Integer arithmetic of one instruction set, for sixteen rows of weights at a time.
///
/// A value is the proof that the CPU has the instructions.
pub(crate) trait IntSimd: Copy + Send + Sync {
    /// Arithmetic with what comes out.
    type Floats: Simd;

    /// Sixteen i32.
    type Sums: Copy;

    /// Codes of four columns of sixteen rows, as products take them.
    type Codes: Copy;

    /// Four activations, as products take them.
    type Quad: Pod + Send;

    /// Rows of activations, and vectors of sixteen outputs, whose sums registers can hold at once.
    const TILE: (usize, usize);

    /// What comes with these instructions.
    fn floats(self) -> Self::Floats;

    /// Brings activations into the form that products take, once for all products.
    fn quad(self, values: [i8; 4]) -> Self::Quad;

    /// The same value in all lanes.
    fn splat(self, value: i32) -> Self::Sums;

    /// Reads codes of a byte each, `[16][4]`.
    fn bytes(self, cell: &[u8; CODES]) -> Self::Codes;

    /// Reads codes of half a byte each, `[16][4]` in the low halves of the bytes, and `[16][4]` in the high ones.
    fn nibbles(self, cell: &[u8; CODES]) -> [Self::Codes; 2];

    /// Adds to each lane the products of its four codes with the four activations.
    fn dot(self, codes: Self::Codes, x: Self::Quad, sums: Self::Sums) -> Self::Sums;

    /// To nearest even; exact below 2^24.
    fn to_floats(self, sums: Self::Sums) -> <Self::Floats as Simd>::Vector;

    /// Runs `kernel` as a function of its own.
    fn call<K: IntKernel>(self, kernel: K) -> K::Output;
}

/// As [`super::Kernel`], for integers.
pub(crate) trait IntKernel {
    /// What comes out.
    type Output;

    /// Does the work.
    fn run<S: IntSimd>(self, simd: S) -> Self::Output;
}

impl Isa {
    /// Runs the copy of `kernel` made for this instruction set.
    #[inline]
    pub(crate) fn run_ints<K: IntKernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(simd) => simd.ints().call(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(simd) => simd.call(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => IntSimd::call(simd, kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => IntSimd::call(simd, kernel),
            Self::Portable(simd) => IntSimd::call(simd, kernel),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    /// Codes and activations at the ends of their ranges, where instructions that saturate would show it.
    struct Extremes<'a> {
        rng: &'a mut Rng,
        name: &'a str,
    }

    impl IntKernel for Extremes<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: IntSimd>(self, simd: S) {
            for _ in 0..500 {
                let cell: [u8; CODES] = std::array::from_fn(|_| {
                    let any = self.rng.next().to_le_bytes()[0];
                    self.rng.pick(&[0, 255, 127, 128, 240, 15, any])
                });
                let x: [i8; 4] = std::array::from_fn(|_| {
                    let any = (self.rng.next().to_le_bytes()[0] % 127).cast_signed();
                    self.rng.pick(&[-127, 127, 0, 1, any])
                });
                let (quad, start) = (simd.quad(x), simd.splat(-1_000_000));
                let lanes = |sums| {
                    let sums = simd.floats().to_array(simd.to_floats(sums));
                    sums.map(|sum| sum as i64)
                };
                let whole = lanes(simd.dot(simd.bytes(&cell), quad, start));
                let [low, high] = simd.nibbles(&cell);
                let (low, high) = (
                    lanes(simd.dot(low, quad, start)),
                    lanes(simd.dot(high, quad, start)),
                );
                for (lane, codes) in cell.as_chunks::<4>().0.iter().enumerate() {
                    let sum = |code: fn(u8) -> u8| -> i64 {
                        let products = codes.iter().zip(x);
                        let products = products.map(|(w, x)| i32::from(code(*w)) * i32::from(x));
                        i64::from(products.sum::<i32>() - 1_000_000)
                    };
                    assert_eq!(whole[lane], sum(|code| code), "{}", self.name);
                    assert_eq!(low[lane], sum(|code| code & 15), "{}", self.name);
                    assert_eq!(high[lane], sum(|code| code >> 4), "{}", self.name);
                }
            }
        }
    }

    #[test]
    fn products_are_exact_on_every_instruction_set() {
        let mut rng = Rng::new(61);
        for isa in Isa::available() {
            let rng = &mut rng;
            isa.run_ints(Extremes {
                rng,
                name: isa.name(),
            });
        }
    }
}
