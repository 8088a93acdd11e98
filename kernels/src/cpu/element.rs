//! The element types that weights and KV blocks are stored in, as Rust types.
//!
//! Arithmetic is f32 whatever the storage; this says only how an element becomes one and back. The
//! invariant: widening is exact, narrowing rounds to nearest even.

use super::simd::{CELL, LANES, Simd};
use crate::backend::Element;
use bytemuck::Pod;
use half::{bf16, f16};

/// A stored element.
pub(crate) trait Stored: Pod + Send + Sync + std::fmt::Debug {
    /// The element's name at the seam.
    const ELEMENT: Element;

    /// Exact.
    fn widen(self) -> f32;

    /// To nearest even.
    fn narrow(value: f32) -> Self;

    /// Widens one vector of elements.
    fn load<S: Simd>(simd: S, values: &[Self; LANES]) -> S::Vector;

    /// Where in a cell column `column` (0 or 1) of row `row` lies.
    ///
    /// One column after the other; bfloat16 in pairs, which two cheap instructions widen and which is
    /// what dot-product and matrix instructions for it read.
    #[inline]
    fn place(column: usize, row: usize) -> usize {
        column * LANES + row
    }

    /// Widens both columns of a cell.
    #[inline(always)]
    fn cell<S: Simd>(simd: S, values: &[Self; CELL]) -> [S::Vector; 2] {
        let (first, second) = values.split_at(LANES);
        let half = |half: &[Self]| *half.first_chunk::<LANES>().expect("half of a cell");
        [
            Self::load(simd, &half(first)),
            Self::load(simd, &half(second)),
        ]
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

    #[inline]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
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
    fn cell<S: Simd>(simd: S, values: &[Self; CELL]) -> [S::Vector; 2] {
        simd.cell_bf16(values)
    }
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

/// Evaluates an expression with `$E` standing for the Rust type of a run-time [`Element`].
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
            $crate::backend::Element::Fp8 => panic!("8-bit floats are elements of a GPU's caches"),
        }
    };
}
pub(crate) use by_element;
