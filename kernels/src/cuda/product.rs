//! A matrix product as `blas` and its twin get it: sizes, addresses, and what the factors are stored as.
//!
//! Nothing is computed here. Invariant: a `Product` holds addresses of memory that outlives the queued work.

use crate::backend::Element;
use std::ffi::c_void;

/// `out = x · weightᵀ (+ bias)`: `x: [rows, inputs]` and `weight: [outputs, inputs]` without gaps, `bias: [outputs]` of
/// out's element, `out: [rows, outputs]` with `out_stride` elements from one row to the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) rows: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) factors: Factors,
    pub(crate) x: *const c_void,
    pub(crate) weight: *const c_void,
    pub(crate) bias: Option<*const c_void>,
    pub(crate) out: (*mut c_void, Element),
    pub(crate) out_stride: usize,
}

/// What `x` and `weight` are stored as.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Factors {
    /// Both as such elements.
    Dense(Element),
    /// Both as `e4m3` codes. Sums are multiplied with a scale for each row of `x` and one for each of `weight`, both
    /// f32, where there are any.
    Fp8 {
        scales: Option<(*const c_void, *const c_void)>,
    },
}
