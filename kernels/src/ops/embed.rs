//! `out[t] = table[token_ids[t] - first_token]`, or zero where the token is not in this part of the table.
//!
//! `table: [part of the vocabulary, width]`, `out: [tokens, width]`. With the vocabulary divided among
//! ranks every token is in one rank's part, and the sum over ranks is the whole embedding.

use crate::cpu::element::{Stored, by_element};
use crate::cpu::{CpuBackend, CpuBatch, CpuTensor, CpuWeight};

/// The fast path.
pub(crate) fn embed(
    cpu: &CpuBackend,
    batch: &CpuBatch,
    table: &CpuWeight,
    first_token: u32,
    out: &mut CpuTensor,
) {
    let tokens = &batch.host.token_ids;
    let width = out.width();
    assert_eq!(
        (out.rows(), width),
        (tokens.len(), table.cols()),
        "out is [tokens, width]"
    );
    by_element!(table.element(), E => {
        cpu.threads.rows(out.values_mut(), width, width, |t, row| {
            let index = tokens[t].checked_sub(first_token).map(|index| index as usize);
            match index.filter(|&index| index < table.rows()) {
                Some(index) => {
                    for (to, from) in row.iter_mut().zip(table.row::<E>(index)) {
                        *to = from.widen();
                    }
                }
                None => row.fill(0.0),
            }
        });
    });
}
