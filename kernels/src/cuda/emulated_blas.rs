//! The twin of `blas.rs` for machines without a GPU: plain products with f32 sums, rounded once when stored.
//!
//! Invariant: the same interface as `blas.rs`.

#![expect(
    unsafe_code,
    reason = "emulated device memory is read through its pointers"
)]
#![expect(
    clippy::unnecessary_wraps,
    clippy::unused_self,
    reason = "the interface is blas.rs's"
)]

use super::device::Device;
use super::{CudaTensor, CudaWeight, graph};
use crate::backend::{DeviceError, Element};
use crate::cpu::element::{Stored, by_element};
use std::ffi::c_void;

/// Products on the host.
#[derive(Debug)]
pub(crate) struct Blas;

impl Blas {
    /// Nothing is needed.
    pub(crate) fn new(_: &Device) -> Result<Self, DeviceError> {
        Ok(Self)
    }

    /// There is one algorithm.
    pub(crate) fn set_tries(&self, _: bool) {}

    /// There is nothing to keep.
    pub(crate) fn settle(&self) {}

    /// There is nothing to choose.
    pub(crate) fn has_chosen(&self, _: usize) -> bool {
        true
    }

    /// `out = x · weightᵀ (+ bias)`. The shapes agree.
    pub(crate) fn linear(
        &self,
        _: &Device,
        (x, weight): (&CudaTensor, &CudaWeight),
        bias: Option<&CudaWeight>,
        out: &mut CudaTensor,
    ) -> Result<(), String> {
        let product = Product {
            rows: x.rows(),
            inputs: weight.cols(),
            outputs: weight.rows(),
            x: (x.pointer(), x.element()),
            weight: (weight.pointer(), weight.element()),
            bias: bias.map(|bias| (bias.pointer_as(out.element()), out.element())),
            out: (out.pointer_mut(), out.element()),
        };
        graph::queue(move || product.run());
        Ok(())
    }
}

/// A product as a launch has it: sizes and addresses.
struct Product {
    rows: usize,
    inputs: usize,
    outputs: usize,
    x: (*const c_void, Element),
    weight: (*const c_void, Element),
    bias: Option<(*const c_void, Element)>,
    out: (*mut c_void, Element),
}

impl Product {
    fn run(&self) {
        let (inputs, outputs, rows) = (self.inputs, self.outputs, self.rows);
        let bias = self.bias.map(|bias| widened(bias, outputs));
        let x = widened(self.x, rows * inputs);
        let weight = widened(self.weight, outputs * inputs);
        let mut products = Vec::with_capacity(rows * outputs);
        for x in x.chunks_exact(inputs) {
            for (column, w) in weight.chunks_exact(inputs).enumerate() {
                let sum: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                products.push(sum + bias.as_ref().map_or(0.0, |bias| bias[column]));
            }
        }
        let (at, element) = self.out;
        by_element!(element, E => {
            // SAFETY: emulated device memory is the host's, and the tensor holds `rows * outputs` elements.
            let all = unsafe { std::slice::from_raw_parts_mut(at.cast::<E>(), products.len()) };
            for (to, from) in all.iter_mut().zip(products) {
                *to = E::narrow(from);
            }
        });
    }
}

/// `count` elements of emulated device memory.
fn widened((at, element): (*const c_void, Element), count: usize) -> Vec<f32> {
    by_element!(element, E => {
        // SAFETY: emulated device memory is the host's; the caller's matrix has `count` elements.
        let all = unsafe { std::slice::from_raw_parts(at.cast::<E>(), count) };
        all.iter().map(|value| value.widen()).collect()
    })
}
