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
use super::{CudaTensor, CudaWeight};
use crate::backend::DeviceError;
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

    /// `out = x · weightᵀ (+ bias)`. The shapes agree.
    pub(crate) fn linear(
        &self,
        _: &Device,
        (x, weight): (&CudaTensor, &CudaWeight),
        bias: Option<&CudaWeight>,
        out: &mut CudaTensor,
    ) -> Result<(), String> {
        let (inputs, outputs, rows) = (weight.cols(), weight.rows(), x.rows());
        let bias =
            bias.map(|bias| widened((bias.pointer_as(out.element()), out.element()), outputs));
        let x = widened((x.pointer(), x.element()), rows * inputs);
        let weight = widened((weight.pointer(), weight.element()), outputs * inputs);
        let mut products = Vec::with_capacity(rows * outputs);
        for x in x.chunks_exact(inputs) {
            for (column, w) in weight.chunks_exact(inputs).enumerate() {
                let sum: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                products.push(sum + bias.as_ref().map_or(0.0, |bias| bias[column]));
            }
        }
        by_element!(out.element(), E => {
            let at = out.pointer_mut().cast::<E>();
            // SAFETY: emulated device memory is the host's, and the tensor holds `rows * outputs` elements.
            let all = unsafe { std::slice::from_raw_parts_mut(at, products.len()) };
            for (to, from) in all.iter_mut().zip(products) {
                *to = E::narrow(from);
            }
        });
        Ok(())
    }
}

/// `count` elements of emulated device memory.
fn widened((at, element): (*const c_void, crate::backend::Element), count: usize) -> Vec<f32> {
    by_element!(element, E => {
        // SAFETY: emulated device memory is the host's; the caller's matrix has `count` elements.
        let all = unsafe { std::slice::from_raw_parts(at.cast::<E>(), count) };
        all.iter().map(|value| value.widen()).collect()
    })
}
