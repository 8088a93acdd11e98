//! Quantises a matrix of numbers while it is loaded (`--quantization`).
//!
//! int8 and fp8 have a scale for each output, from the largest of the weights *on this rank*: of a row-parallel layer,
//! whose ranks each hold a part of an output's inputs, every rank has a scale of its own. So no rank reads what is not
//! its own, and the more ranks, the finer the scales; ranks of a column-parallel layer have what one rank would have.
//! int4 has a scale and a zero for each 128 inputs, counted from the first input of the whole weight, so that any number
//! of ranks has the same ones, unless a rank's range ends within a group.
//!
//! What is not here: the codes of a group's numbers, which `kernels::quantized` finds.

use super::{Workers, over_threads, to_u32};
use anyhow::{Result, ensure};
use bytes::Bytes;
use kernels::backend::HostMatrix;
use kernels::quantized::{self, HostQuantized, Quantiser, RowOfCodes};
use topology::quantization::{Code, Grouping};

/// `matrix` in codes. Its first column is input `first_input` of the whole weight.
///
/// # Errors
/// If a weight is not finite.
pub(super) fn quantise(
    workers: Workers<'_>,
    matrix: &HostMatrix,
    code: Code,
    first_input: u32,
) -> Result<HostQuantized> {
    let HostMatrix { rows, cols, .. } = *matrix;
    let group_ends = group_ends(Grouping::at_load(code), first_input, cols);
    let groups = group_ends.len();
    let mut data = vec![0; rows * cols];
    let mut scales = vec![0.0; rows * groups];
    let mut zeros = vec![0; rows * groups];
    let outputs = scales.chunks_mut(groups).zip(zeros.chunks_mut(groups));
    let outputs = data
        .chunks_mut(cols.max(1))
        .zip(outputs)
        .enumerate()
        .collect();
    let (code, quantiser) = (super::code(code), Quantiser::detect());
    over_threads(workers, outputs, cols, |(row, (codes, (scales, zeros)))| {
        let to = RowOfCodes {
            group_ends: &group_ends,
            codes,
            scales,
            zeros,
        };
        quantiser.row(code, matrix, row, to);
    });
    ensure!(
        scales.iter().all(|scale| scale.is_finite()),
        "a weight is not finite, so that it cannot be quantized; load it without --quantization"
    );
    Ok(HostQuantized {
        code,
        data: Bytes::from(data),
        rows,
        cols,
        row_stride: cols,
        inputs: None,
        group_ends,
        scales,
        zeros: if code == quantized::Code::Int4 {
            zeros
        } else {
            Vec::new()
        },
    })
}

/// Where each group of the columns ends.
fn group_ends(grouping: Grouping, first_input: u32, cols: usize) -> Vec<usize> {
    let group = |column: usize| grouping.group_of(first_input + to_u32(column));
    let ends = (1..cols).filter(|column| group(*column) != group(column - 1));
    ends.chain([cols]).collect()
}
