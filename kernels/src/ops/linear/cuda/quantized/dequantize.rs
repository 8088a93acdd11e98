//! `out[o][c] = scale[g(c)][o] * (code[o][c] - zero[g(c)][o])`, rounded to the element, by `dequantize.cu`.
//!
//! `g(c)` is the group of column c; `out: [outputs, columns]` in the section's order of columns. Invariant: columns that
//! no input belongs to hold numbers, since they are multiplied with zero.

#![expect(unsafe_code, reason = "the launcher is C")]

use super::Call;
use crate::cuda::device::Memory;
use crate::cuda::element_code;
use crate::cuda::launch::int;
use crate::cuda::section::code_number;
use std::ffi::{c_int, c_void};
use std::ops::Range;

unsafe extern "C" {
    fn cluster_dequantize(
        stream: *mut c_void,
        element: c_int,
        code: c_int,
        codes: *const c_void,
        scales: *const c_void,
        scale_element: c_int,
        zeros: *const u8,
        chunk_groups: *const u32,
        out: *mut c_void,
        outputs: i32,
        columns: i32,
        first: i32,
        count: i32,
    ) -> c_int;
}

/// Queues it for some outputs of the call's section, as the call's element.
pub(super) fn dequantize(call: &Call<'_>, outputs: Range<usize>, out: &mut Memory) {
    let (section, plan) = (call.section, call.section.plan());
    let bytes = outputs.len() * plan.columns * call.element.bytes();
    assert!(bytes <= out.bytes() && outputs.end <= plan.outputs);
    // SAFETY: the sizes are those of the section's memory, and out was checked.
    let code = unsafe {
        cluster_dequantize(
            call.cuda.stream(),
            element_code(call.element),
            code_number(plan.code),
            section.codes(),
            section.scales(),
            element_code(plan.scale_element),
            section.zeros(),
            section.chunk_groups(),
            out.pointer_mut(),
            int(plan.outputs),
            int(plan.columns),
            int(outputs.start),
            int(outputs.len()),
        )
    };
    call.cuda.launched("dequantize", code);
}
