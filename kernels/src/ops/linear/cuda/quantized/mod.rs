//! Products with quantised weights on the GPU. Which of three ways a product goes depends on its rows and codes:
//!
//! - few rows are limited by how fast codes can be read: [`multiply`] widens them in registers;
//! - more rows times `e4m3` codes with one scale for each output: rows become codes as well, with a scale for each
//!   ([`arrange`]), where the device multiplies such codes and cuBLASLt has an algorithm for the shape. It scales the
//!   sums where it knows how; elsewhere that is done after it;
//! - all others: pieces of the weight become elements ([`dequantize`]), which cuBLASLt multiplies.
//!
//! Activations are rounded to 8 bits on the second way alone: `scale * code` is what a weight stands for on the others.
//! Invariant: all memory is the workspace's, so that a step can be recorded.

mod arrange;
mod dequantize;
mod multiply;
#[cfg(test)]
mod tests;

use crate::backend::Element;
use crate::cuda::device::Memory;
use crate::cuda::product::{Factors, Product};
use crate::cuda::section::Section;
use crate::cuda::workspace::{PIECE, Workspace};
use crate::cuda::{CudaBackend, CudaTensor, CudaWeight};
use crate::quantized::Code;
use std::ffi::c_void;
use std::ops::Range;

/// Rows up to which a weight's codes are read once for each [`multiply::MOST_ROWS`] of them: writing and reading its
/// elements takes as long as reading 4-bit codes nine times.
const FEW_ROWS: usize = 64;
/// The same where rows can become codes: the library's product reads codes once, too.
const FEW_ROWS_OF_CODES: usize = 16;
/// Compute capability from which on tensor cores multiply 8-bit floats, times 10.
const MULTIPLIES_FP8: i32 = 89;

/// Rows of a product with one section.
#[derive(Clone, Copy)]
struct Call<'a> {
    cuda: &'a CudaBackend,
    section: &'a Section,
    x: *const c_void,
    element: Element,
    rows: usize,
    /// Elements of a row of x.
    width: usize,
    /// Of the section's outputs, as out's element.
    bias: Option<*const c_void>,
    /// The section's first output of the first row.
    out: *mut c_void,
    out_element: Element,
    out_stride: usize,
}

/// Queues `out = x · weightᵀ (+ bias)`. The shapes agree and there is at least one row.
pub(super) fn linear(
    cuda: &CudaBackend,
    x: &CudaTensor,
    sections: &[Section],
    bias: Option<&CudaWeight>,
    out: &mut CudaTensor,
) {
    let out_element = out.element();
    let bias = bias.map(|bias| bias.pointer_as(out_element));
    for section in sections {
        let first = section.plan().first * out_element.bytes();
        let call = Call {
            cuda,
            section,
            x: x.pointer(),
            element: x.element(),
            rows: x.rows(),
            width: x.width(),
            bias: bias.map(|bias| bias.wrapping_byte_add(first)),
            out: out.pointer_mut().wrapping_byte_add(first),
            out_element,
            out_stride: out.width(),
        };
        call.run(&mut cuda.workspace());
    }
}

impl Call<'_> {
    fn run(self, workspace: &mut Workspace) {
        let plan = self.section.plan();
        let as_codes = plan.code == Code::Fp8
            && plan.groups == 1
            && self.element != Element::F32
            && self.cuda.device.capability() >= MULTIPLIES_FP8;
        let few = if as_codes {
            FEW_ROWS_OF_CODES
        } else {
            FEW_ROWS
        };
        if self.rows <= few && self.element != Element::F32 {
            self.multiply_codes(workspace);
        } else if as_codes {
            let each = workspace.inputs.pieces_of(plan.columns * 2);
            for call in self.pieces(each) {
                if !call.multiply_fp8(workspace) {
                    call.multiply_elements(workspace);
                }
            }
        } else {
            self.multiply_elements(workspace);
        }
    }

    /// The product of some of the rows.
    fn rows(self, rows: Range<usize>) -> Self {
        let x = rows.start * self.width * self.element.bytes();
        let out = rows.start * self.out_stride * self.out_element.bytes();
        Self {
            x: self.x.wrapping_byte_add(x),
            out: self.out.wrapping_byte_add(out),
            rows: rows.len(),
            ..self
        }
    }

    /// The same in pieces of up to `each` rows.
    fn pieces(self, each: usize) -> impl Iterator<Item = Self> {
        let starts = (0..self.rows).step_by(each);
        starts.map(move |start| self.rows(start..(start + each).min(self.rows)))
    }

    /// The rows of x in the order of the section's columns, where that is another one.
    fn arranged(self, inputs: &mut Memory) -> Self {
        let Some(list) = self.section.inputs() else {
            return self;
        };
        arrange::arrange(&self, list, inputs);
        Self {
            x: inputs.pointer(),
            width: self.section.plan().columns,
            ..self
        }
    }

    /// By codes that are widened on the way to the multiplication.
    fn multiply_codes(self, workspace: &mut Workspace) {
        let arranged = self.arranged(workspace.inputs.memory());
        for call in arranged.pieces(multiply::MOST_ROWS) {
            multiply::multiply(&call, workspace.sums.memory());
        }
    }

    /// By the weight's elements, a piece of it at a time.
    fn multiply_elements(self, workspace: &mut Workspace) {
        let plan = self.section.plan();
        let row_bytes = plan.columns * self.element.bytes();
        let rows = match self.section.inputs() {
            Some(_) => workspace.inputs.pieces_of(row_bytes),
            None => self.rows,
        };
        let outputs = workspace.weights.pieces_of(row_bytes);
        for call in self.pieces(rows) {
            let call = call.arranged(workspace.inputs.memory());
            for first in (0..plan.outputs).step_by(outputs) {
                let outputs = first..(first + outputs).min(plan.outputs);
                let weights = workspace.weights.memory();
                dequantize::dequantize(&call, outputs.clone(), weights);
                let first = first * self.out_element.bytes();
                self.cuda.multiply(&Product {
                    rows: call.rows,
                    inputs: plan.columns,
                    outputs: outputs.len(),
                    factors: Factors::Dense(self.element),
                    x: call.x,
                    weight: weights.pointer(),
                    bias: call.bias.map(|bias| bias.wrapping_byte_add(first)),
                    out: (call.out.wrapping_byte_add(first), self.out_element),
                    out_stride: self.out_stride,
                });
            }
        }
    }

    /// By codes of both factors. `false`, and out untouched, where the library has no algorithm for that.
    fn multiply_fp8(self, workspace: &mut Workspace) -> bool {
        let plan = self.section.plan();
        let inputs = workspace.inputs.memory();
        let scales = inputs.pointer_mut();
        let codes = inputs.at_mut((self.rows * size_of::<f32>()).next_multiple_of(256));
        arrange::quantize_rows(&self, codes, scales.cast());
        let product = Product {
            rows: self.rows,
            inputs: plan.columns,
            outputs: plan.outputs,
            factors: Factors::Fp8 {
                scales: Some((scales, self.section.scales())),
            },
            x: codes,
            weight: self.section.codes(),
            bias: self.bias,
            out: (self.out, self.out_element),
            out_stride: self.out_stride,
        };
        if self.cuda.multiply(&product) {
            return true;
        }
        let each = workspace.sums.pieces_of(plan.outputs * size_of::<f32>());
        let sums = workspace.sums.memory();
        for (index, call) in self.pieces(each).enumerate() {
            let first = index * each;
            let product = Product {
                rows: call.rows,
                factors: Factors::Fp8 { scales: None },
                x: codes.wrapping_byte_add(first * plan.columns),
                bias: None,
                out: (sums.pointer_mut(), Element::F32),
                out_stride: plan.outputs,
                ..product
            };
            if !self.cuda.multiply(&product) {
                return false;
            }
            let row_scales = scales.cast::<f32>().wrapping_add(first);
            let scales = (row_scales.cast_const(), self.section.scales().cast());
            arrange::finish(&call, (sums, 1), Some(scales));
        }
        true
    }
}

const _: () = assert!(FEW_ROWS <= PIECE, "few rows fit into the workspace");
