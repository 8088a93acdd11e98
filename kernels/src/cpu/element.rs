//! The element types that weights and KV blocks are stored in, as Rust types.
//!
//! Arithmetic is f32 whatever the storage; this says only how an element becomes one and back. The
//! invariant: widening is exact, narrowing rounds to nearest even.

use super::simd::{LANES, Simd};
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
        }
    };
}
pub(crate) use by_element;
