//! The twin of `blas` for machines without a GPU: plain products with f32 sums, rounded once when stored.
//!
//! Invariant: the same interface as `blas`.

#![expect(
    unsafe_code,
    reason = "emulated device memory is read through its pointers"
)]
#![expect(
    clippy::unnecessary_wraps,
    clippy::unused_self,
    reason = "the interface is that of `blas`"
)]

use super::device::Device;
use super::graph;
use super::product::{Factors, Product};
use crate::backend::{DeviceError, Element};
use crate::cpu::element::{Stored, by_element};
use crate::quantized::e4m3;
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

    /// There is nothing to forget.
    pub(crate) fn forget(&self) {}

    /// There is nothing to choose.
    pub(crate) fn has_chosen(&self, _: usize) -> bool {
        true
    }

    /// The product at once, or recorded.
    pub(crate) fn multiply(&self, _: &Device, product: &Product) -> Result<bool, String> {
        if matches!(product.factors, Factors::Fp8 { .. }) {
            // What the library asks of 8-bit factors.
            let fits = product.inputs.is_multiple_of(16)
                && product.outputs.is_multiple_of(16)
                && (product.out.0 as usize).is_multiple_of(16);
            if !fits {
                return Ok(false);
            }
        }
        let product = *product;
        graph::queue(move || run(&product));
        Ok(true)
    }
}

fn run(product: &Product) {
    let &Product {
        rows,
        inputs,
        outputs,
        factors,
        out: (out, element),
        ..
    } = product;
    let bias = product.bias.map(|bias| widened(bias, element, outputs));
    let (x, weight) = match factors {
        Factors::Dense(element) => (
            widened(product.x, element, rows * inputs),
            widened(product.weight, element, outputs * inputs),
        ),
        Factors::Fp8 { .. } => (
            decoded(product.x, rows * inputs),
            decoded(product.weight, outputs * inputs),
        ),
    };
    let scales = match factors {
        Factors::Fp8 {
            scales: Some((x, weight)),
        } => Some((
            widened(x, Element::F32, rows),
            widened(weight, Element::F32, outputs),
        )),
        Factors::Fp8 { scales: None } | Factors::Dense(_) => None,
    };
    for (row, x) in x.chunks_exact(inputs).enumerate() {
        let sums = weight.chunks_exact(inputs).enumerate().map(|(column, w)| {
            let sum: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            let scale = scales.as_ref().map_or(1.0, |(x, w)| x[row] * w[column]);
            sum * scale + bias.as_ref().map_or(0.0, |bias| bias[column])
        });
        by_element!(element, E => {
            let start = out.cast::<E>().wrapping_add(row * product.out_stride);
            // SAFETY: emulated device memory is the host's, and there are `outputs` elements in each row of out.
            let all = unsafe { std::slice::from_raw_parts_mut(start, outputs) };
            for (to, from) in all.iter_mut().zip(sums) {
                *to = E::narrow(from);
            }
        });
    }
}

/// `count` elements of emulated device memory.
fn widened(at: *const c_void, element: Element, count: usize) -> Vec<f32> {
    by_element!(element, E => {
        // SAFETY: emulated device memory is the host's; the caller's matrix has `count` elements.
        let all = unsafe { std::slice::from_raw_parts(at.cast::<E>(), count) };
        all.iter().map(|value| value.widen()).collect()
    })
}

/// `count` codes of emulated device memory.
fn decoded(at: *const c_void, count: usize) -> Vec<f32> {
    // SAFETY: as above.
    let all = unsafe { std::slice::from_raw_parts(at.cast::<u8>(), count) };
    all.iter().map(|code| e4m3(*code)).collect()
}
