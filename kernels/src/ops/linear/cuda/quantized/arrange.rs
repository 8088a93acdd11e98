//! Rows of x for a quantised weight, and results of sums, by `arrange.cu`:
//!
//! - `out[r][c] = x[r][inputs[c]]`, zero where no input belongs to column c;
//! - the same as `e4m3` codes: `scale[r] = max |x[r]| / 448`, `code[r][c]` nearest to `out[r][c] / scale[r]`;
//! - `out[r][o] = sum over parts of sums[part][r][o]`, times `row_scale[r] * output_scale[o]`, plus `bias[o]`.
//!
//! Invariant: parts are added from the first to the last.

#![expect(unsafe_code, reason = "the launchers are C")]

use super::Call;
use crate::cuda::device::Memory;
use crate::cuda::element_code;
use crate::cuda::launch::{int, long};
use std::ffi::{c_int, c_void};
use std::ptr;

unsafe extern "C" {
    fn cluster_arrange(
        stream: *mut c_void,
        element: c_int,
        x: *const c_void,
        inputs: *const u32,
        out: *mut c_void,
        rows: i64,
        width: i32,
        columns: i32,
    ) -> c_int;
    fn cluster_quantize_rows(
        stream: *mut c_void,
        element: c_int,
        x: *const c_void,
        inputs: *const u32,
        codes: *mut c_void,
        scales: *mut f32,
        rows: i64,
        width: i32,
        columns: i32,
    ) -> c_int;
    fn cluster_finish_sums(
        stream: *mut c_void,
        sums: *const f32,
        parts: i32,
        row_scales: *const f32,
        output_scales: *const f32,
        bias: *const c_void,
        out: *mut c_void,
        out_element: c_int,
        rows: i64,
        outputs: i64,
        out_stride: i64,
    ) -> c_int;
}

/// Queues the call's rows in the order of `inputs`, one for each of its section's columns.
pub(super) fn arrange(call: &Call<'_>, inputs: *const u32, out: &mut Memory) {
    let columns = call.section.plan().columns;
    assert!(call.rows * columns * call.element.bytes() <= out.bytes());
    // SAFETY: the list is the section's and names inputs that x has; out was checked.
    let code = unsafe {
        cluster_arrange(
            call.cuda.stream(),
            element_code(call.element),
            call.x,
            inputs,
            out.pointer_mut(),
            long(call.rows),
            int(call.width),
            int(columns),
        )
    };
    call.cuda.launched("arrange", code);
}

/// Queues the call's rows as `codes: [rows, columns]` and `scales: [rows]`, for which there is room.
pub(super) fn quantize_rows(call: &Call<'_>, codes: *mut c_void, scales: *mut f32) {
    let inputs = call.section.inputs();
    // SAFETY: as above; the caller's memory has room.
    let code = unsafe {
        cluster_quantize_rows(
            call.cuda.stream(),
            element_code(call.element),
            call.x,
            inputs.unwrap_or(ptr::null()),
            codes,
            scales,
            long(call.rows),
            int(call.width),
            int(call.section.plan().columns),
        )
    };
    call.cuda.launched("quantize_rows", code);
}

/// Queues the call's results from sums of so many parts, perhaps with scales of rows and of outputs.
pub(super) fn finish(
    call: &Call<'_>,
    (sums, parts): (&Memory, usize),
    scales: Option<(*const f32, *const f32)>,
) {
    let outputs = call.section.plan().outputs;
    assert!(parts * call.rows * outputs * size_of::<f32>() <= sums.bytes());
    let (row_scales, output_scales) = scales.unwrap_or((ptr::null(), ptr::null()));
    // SAFETY: the sums were checked; scales are one for each row and one for each output.
    let code = unsafe {
        cluster_finish_sums(
            call.cuda.stream(),
            sums.pointer().cast(),
            int(parts),
            row_scales,
            output_scales,
            call.bias.unwrap_or(ptr::null()),
            call.out,
            element_code(call.out_element),
            long(call.rows),
            long(outputs),
            long(call.out_stride),
        )
    };
    call.cuda.launched("finish_sums", code);
}
