//! The element types that weights and KV blocks are stored in, as Rust types.
//!
//! Arithmetic is f32 whatever the storage; this says only how an element becomes one and back. The
//! invariant: widening is exact, narrowing rounds to nearest even.

use super::simd::{CELL, LANES, Simd};
use crate::backend::Element;
use crate::quantized::{e4m3, to_e4m3};
use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

/// A stored element.
pub(crate) trait Stored: Pod + Send + Sync + std::fmt::Debug {
    /// The element's name at the seam.
    const ELEMENT: Element;

    /// A power of two: what widened vectors have to be multiplied with, at any time, to be what they stand for.
    const UNIT: f32 = 1.0;

    /// Exact.
    fn widen(self) -> f32;

    /// To nearest even.
    fn narrow(value: f32) -> Self;

    /// Widens one vector of elements, in [`Self::UNIT`]s.
    fn load<S: Simd>(simd: S, values: &[Self; LANES]) -> S::Vector;

    /// Where in a cell column `column` (0 or 1) of row `row` lies.
    ///
    /// One column after the other; bfloat16 in pairs, which two cheap instructions widen and which is
    /// what dot-product and matrix instructions for it read.
    #[inline]
    fn place(column: usize, row: usize) -> usize {
        column * LANES + row
    }

    /// Reads and widens one column of a cell, in [`Self::UNIT`]s.
    #[inline(always)]
    fn column<S: Simd, const SECOND: bool>(simd: S, cell: &[Self; CELL]) -> S::Vector {
        let (columns, _) = cell.as_chunks();
        Self::load(simd, &columns[usize::from(SECOND)])
    }
}

impl Stored for f32 {
    const ELEMENT: Element = Element::F32;

    #[inline]
    fn widen(self) -> f32 {
        self
    }

    #[inline]
    fn narrow(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, values: &[Self; LANES]) -> S::Vector {
        simd.load(values)
    }
}

impl Stored for bf16 {
    const ELEMENT: Element = Element::Bf16;

    #[inline]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        to_bf16(value)
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, values: &[Self; LANES]) -> S::Vector {
        simd.load_bf16(values)
    }

    #[inline]
    fn place(column: usize, row: usize) -> usize {
        2 * row + column
    }

    #[inline(always)]
    fn column<S: Simd, const SECOND: bool>(simd: S, cell: &[Self; CELL]) -> S::Vector {
        simd.column_bf16::<SECOND>(cell)
    }
}

/// The bits of a number rounded to bfloat16, to nearest even, in their upper half; anything in the lower. In a form that
/// compilers turn into vector code.
#[inline(always)]
pub(crate) fn rounded_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    let even = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // A bit that survives says that it is not a number.
    if value.is_nan() { bits | 1 << 22 } else { even }
}

/// To nearest even.
#[inline(always)]
pub(crate) fn to_bf16(value: f32) -> bf16 {
    let [_, _, low, high] = rounded_bits(value).to_le_bytes();
    bf16::from_le_bytes([low, high])
}

impl Stored for f16 {
    const ELEMENT: Element = Element::F16;

    #[inline]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, values: &[Self; LANES]) -> S::Vector {
        simd.load_f16(values)
    }
}

/// A float of 8 bits, e4m3: 4 of exponent and 3 of mantissa.
///
/// As the upper half of a half-precision number, which has one bit of exponent more, it is 2^8 times too small;
/// vectors stay like that, for nothing but a multiplication would make them larger. `NAN` says whether what is no number
/// is looked out for; if not, it is taken for 480.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(transparent)]
pub(crate) struct F8<const NAN: bool = true>(pub(crate) u8);

impl<const NAN: bool> F8<NAN> {
    /// Widens in [`Stored::UNIT`]s.
    #[inline(always)]
    pub(crate) fn in_units(self) -> f32 {
        let bits = u16::from(self.0 & 0x80) << 8 | u16::from(self.0 & 0x7f) << 7;
        let is_nan = NAN && self.0 & 0x7f == 0x7f;
        if is_nan {
            f32::NAN
        } else {
            f16::from_bits(bits).to_f32()
        }
    }
}

impl<const NAN: bool> Stored for F8<NAN> {
    const ELEMENT: Element = Element::Fp8;
    const UNIT: f32 = 256.0;

    #[inline]
    fn widen(self) -> f32 {
        e4m3(self.0)
    }

    /// To the largest number at most. What is no number stays none.
    #[inline]
    fn narrow(value: f32) -> Self {
        Self(to_e4m3(value))
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, values: &[Self; LANES]) -> S::Vector {
        simd.load_f8(values)
    }

    #[inline]
    fn place(column: usize, row: usize) -> usize {
        2 * row + column
    }

    #[inline(always)]
    fn column<S: Simd, const SECOND: bool>(simd: S, cell: &[Self; CELL]) -> S::Vector {
        simd.column_f8::<NAN, SECOND>(cell)
    }
}

/// Evaluates an expression with `$E` standing for the Rust type of a run-time [`Element`] of weights.
macro_rules! by_element {
    ($element:expr, $E:ident => $body:expr) => {
        match $element {
            $crate::backend::Element::F32 => {
                type $E = f32;
                $body
            }
            $crate::backend::Element::Bf16 => {
                type $E = half::bf16;
                $body
            }
            $crate::backend::Element::F16 => {
                type $E = half::f16;
                $body
            }
            $crate::backend::Element::Fp8 => {
                unreachable!("floats of 8 bits without a scale, which no weight is stored as")
            }
        }
    };
}
pub(crate) use by_element;

/// As [`by_element`], of KV blocks: floats of 8 bits, too.
macro_rules! by_kv_element {
    ($element:expr, $E:ident => $body:expr) => {
        match $element {
            $crate::backend::Element::Fp8 => {
                type $E = $crate::cpu::element::F8;
                $body
            }
            element => $crate::cpu::element::by_element!(element, $E => $body),
        }
    };
}
pub(crate) use by_kv_element;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Isa, Kernel};
    use crate::testing::Rng;

    #[test]
    fn floats_of_eight_bits_round_to_the_nearest_even_and_saturate() {
        let numbers: Vec<(f32, u8)> = (0..0x7f).map(|code| (e4m3(code), code)).collect();
        let mut rng = Rng::new(64);
        let mut values: Vec<f32> = numbers
            .windows(2)
            .map(|w| f32::midpoint(w[0].0, w[1].0))
            .collect();
        values.extend(numbers.iter().map(|number| number.0));
        values.extend((0..2000).map(|_| rng.value().powi(5) * 460.0));
        for value in values {
            let off = |(number, code): &&(f32, u8)| ((value.abs() - number).abs(), code & 1);
            let nearest = numbers
                .iter()
                .min_by(|a, b| off(a).partial_cmp(&off(b)).unwrap());
            let sign = if value.is_sign_negative() { 0x80 } else { 0 };
            assert_eq!(<F8>::narrow(value).0, nearest.unwrap().1 | sign, "{value}");
        }
        for (value, code) in [
            (449.0, 0x7e),
            (f32::INFINITY, 0x7e),
            (-1e9, 0xfe),
            (f32::NAN, 0x7f),
        ] {
            assert_eq!(<F8>::narrow(value).0 & 0x7f, code & 0x7f, "{value}");
        }
    }

    /// All codes through the vectors of an instruction set.
    struct All<const NAN: bool>;

    impl<const NAN: bool> Kernel for All<NAN> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let check = |code: u8, found: f32| {
                let known = match code & 0x7f {
                    0x7f if NAN => f32::NAN,
                    0x7f => 480.0_f32.copysign(-f32::from(code >> 7) + 0.5),
                    _ => e4m3(code),
                };
                let found = found * F8::<NAN>::UNIT;
                assert!(found.to_bits() == known.to_bits() || found.is_nan() && known.is_nan());
            };
            for first in (0..=u8::MAX).step_by(CELL) {
                let codes: [F8<NAN>; CELL] = std::array::from_fn(|i| F8(first + i as u8));
                let columns = [
                    simd.to_array(F8::column::<S, false>(simd, &codes)),
                    simd.to_array(F8::column::<S, true>(simd, &codes)),
                ];
                let (row, _) = codes.split_first_chunk::<LANES>().unwrap();
                let row = simd.to_array(F8::load(simd, row));
                for lane in 0..LANES {
                    check(codes[lane].0, row[lane]);
                    for column in 0..2 {
                        check(
                            codes[F8::<NAN>::place(column, lane)].0,
                            columns[column][lane],
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_widens_all_floats_of_eight_bits() {
        for isa in Isa::available() {
            isa.run(All::<true>);
            isa.run(All::<false>);
        }
    }

    #[test]
    fn numbers_become_bfloat16_to_the_nearest_even() {
        let mut rng = Rng::new(13);
        let special = [
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::MAX,
            f32::MIN_POSITIVE,
        ];
        let any = (0..100_000).map(|_| f32::from_bits(rng.next() as u32));
        // Halves between two neighbours, which go to the even one.
        let halves = (0..1000_u32).map(|i| f32::from_bits(0x3f80_8000 + (i << 16)));
        for value in special.into_iter().chain(any).chain(halves) {
            let (ours, theirs) = (to_bf16(value), bf16::from_f32(value));
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{value}");
        }
    }
}
