//! `out = silu(gate) * up`, `silu(x) = x / (1 + e^-x)`.
//!
//! `gate_up: [rows, 2 * n]` holds gate and then up; `out: [rows, n]`.

use crate::cpu::exp::exp;
use crate::cpu::simd::{Kernel, Simd};
use crate::cpu::{CpuBackend, CpuTensor};

struct Row<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for ((out, gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            *out = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

/// The fast path.
pub(crate) fn silu_mul(cpu: &CpuBackend, gate_up: &CpuTensor, out: &mut CpuTensor) {
    let n = out.width();
    assert_eq!(gate_up.width(), 2 * n, "gate and up side by side");
    assert_eq!(gate_up.rows(), out.rows(), "a row for each row");
    cpu.threads.rows(out.values_mut(), n, 4 * n, |i, out| {
        let (gate, up) = gate_up.row(i).split_at(n);
        cpu.isa.run(Row { gate, up, out });
    });
}
