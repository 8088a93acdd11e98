//! `out = x · weightᵀ (+ bias)` for up to [`MOST_ROWS`] rows of half-precision x, by `multiply.cu`.
//!
//! `x: [rows, columns]` in the section's order of columns, `weight[o][c] = scale[g(c)][o] * (code[o][c] - zero[g(c)][o])`
//! with `g(c)` the group of column c, `out: [rows, outputs]`. Codes less zeros are exact in half precision; sums, and
//! their products with scales, are f32.
//!
//! Invariant: a result depends on the number of rows only by how sums are cut, never on the order of threads.

#![expect(unsafe_code, reason = "the launcher is C")]

use super::{Call, arrange};
use crate::cuda::device::Memory;
use crate::cuda::element_code;
use crate::cuda::launch::{int, long};
use crate::cuda::section::{code_number, stretch_columns};
use std::ffi::{c_int, c_void};

unsafe extern "C" {
    fn cluster_quantized_multiply(
        stream: *mut c_void,
        element: c_int,
        code: c_int,
        x: *const c_void,
        codes: *const c_void,
        scales: *const c_void,
        scale_element: c_int,
        zeros: *const u8,
        chunk_groups: *const u32,
        bias: *const c_void,
        out: *mut c_void,
        out_element: c_int,
        out_stride: i64,
        partials: *mut f32,
        rows: i32,
        outputs: i32,
        columns: i32,
        splits: i32,
    ) -> c_int;
}

/// Rows of one launch.
pub(super) const MOST_ROWS: usize = 32;

/// Outputs and warps of a block of threads, as in `multiply.cu`.
const TILE: usize = 16;
const WARPS: usize = 8;
/// Blocks that a multiprocessor should have, so that enough loads are on their way.
const BLOCKS_EACH: usize = 2;
/// Stretches that a warp should have at least: the next one is loaded while one is computed with.
const STRETCHES_EACH: usize = 2;

/// How many blocks of threads share the columns.
fn splits(rows: usize, outputs: usize, stretches: usize, multiprocessors: usize) -> usize {
    let tiles = outputs.div_ceil(if rows <= 8 { TILE } else { 2 * TILE });
    let wanted = (BLOCKS_EACH * multiprocessors).div_ceil(tiles);
    wanted.min(stretches / (WARPS * STRETCHES_EACH)).max(1)
}

/// Queues it. x is arranged; `sums` holds at least [`MOST_ROWS`] sums of each output.
pub(super) fn multiply(call: &Call<'_>, sums: &mut Memory) {
    let (section, plan) = (call.section, call.section.plan());
    assert!(call.rows <= MOST_ROWS && call.width == plan.columns);
    let stretches = plan.columns / stretch_columns(plan.code);
    let room = sums.bytes() / (call.rows * plan.outputs * size_of::<f32>());
    let processors = call.cuda.device.multiprocessors();
    let splits = splits(call.rows, plan.outputs, stretches, processors).min(room);
    // SAFETY: the sizes are those of the section's memory, of x and of out; the sums have room for all splits.
    let code = unsafe {
        cluster_quantized_multiply(
            call.cuda.stream(),
            element_code(call.element),
            code_number(plan.code),
            call.x,
            section.codes(),
            section.scales(),
            element_code(plan.scale_element),
            section.zeros(),
            section.chunk_groups(),
            call.bias.unwrap_or(std::ptr::null()),
            call.out,
            element_code(call.out_element),
            long(call.out_stride),
            sums.pointer_mut().cast(),
            int(call.rows),
            int(plan.outputs),
            int(plan.columns),
            int(splits),
        )
    };
    call.cuda.launched("quantized_multiply", code);
    if splits > 1 {
        arrange::finish(call, (sums, splits), None);
    }
}
