//! `out[i] = x[logit_tokens[i]]`: the rows whose logits are wanted, so that the head is applied to them alone.
//!
//! `x: [tokens, width]`, `out: [logit rows, width]`.

use crate::cpu::{CpuBackend, CpuBatch, CpuTensor};

/// The fast path, which is as simple as a reference would be.
pub(crate) fn gather(cpu: &CpuBackend, batch: &CpuBatch, x: &CpuTensor, out: &mut CpuTensor) {
    let wanted = &batch.host.logit_tokens;
    let width = x.width();
    assert_eq!(
        (out.rows(), out.width()),
        (wanted.len(), width),
        "out is [logit rows, width]"
    );
    cpu.threads.rows(out.values_mut(), width, width, |i, row| {
        row.copy_from_slice(x.row(wanted[i] as usize));
    });
}
