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

/// The kernel of `silu_mul.cu`.
#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "the launcher is C")]
pub(crate) mod cuda {
    use crate::cuda::launch::long;
    use crate::cuda::{CudaBackend, CudaTensor, element_code};
    use std::ffi::{c_int, c_void};

    unsafe extern "C" {
        fn cluster_silu_mul(
            stream: *mut c_void,
            element: c_int,
            gate_up: *const c_void,
            out: *mut c_void,
            rows: i64,
            n: i64,
        ) -> c_int;
    }

    /// Queues it. Both are of one element.
    pub(crate) fn silu_mul(cuda: &CudaBackend, gate_up: &CudaTensor, out: &mut CudaTensor) {
        let (rows, n) = (out.rows(), out.width());
        assert_eq!(
            (gate_up.rows(), gate_up.width(), gate_up.element()),
            (rows, 2 * n, out.element()),
            "gate and up side by side, of out's element"
        );
        // SAFETY: the sizes are those of the tensors' memory.
        let code = unsafe {
            cluster_silu_mul(
                cuda.stream(),
                element_code(out.element()),
                gate_up.pointer(),
                out.pointer_mut(),
                long(rows),
                long(n),
            )
        };
        cuda.launched("silu_mul", code);
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::{Backend, Precision};
    use crate::testing::{Rng, assert_close, backends, bits, tensor};

    fn reference(gate_up: &[f32]) -> Vec<f32> {
        let (gate, up) = gate_up.split_at(gate_up.len() / 2);
        gate.iter()
            .zip(up)
            .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            .collect()
    }

    #[test]
    fn is_the_reference_and_a_row_alone_gives_the_same_bits() {
        let mut rng = Rng::new(6);
        for cpu in backends() {
            let (rows, n) = (rng.within(1..20), rng.within(1..200));
            let before: Vec<f32> = rng.values(rows * 2 * n).iter().map(|x| x * 30.0).collect();
            let gate_up = tensor(&cpu, &before, 2 * n);
            let mut out = cpu.allocate(rows, n, Precision::Compute).unwrap();
            cpu.silu_mul(&gate_up, &mut out);
            for row in 0..rows {
                assert_close(out.row(row), &reference(gate_up.row(row)), 1e-9, 1e-6);
                let mut alone = cpu.allocate(1, n, Precision::Compute).unwrap();
                cpu.silu_mul(&tensor(&cpu, gate_up.row(row), 2 * n), &mut alone);
                assert_eq!(bits(alone.values()), bits(out.row(row)));
            }
        }
    }

    #[test]
    fn has_the_right_limits() {
        for cpu in backends() {
            let gate_up = tensor(&cpu, &[-1e30, -200.0, 0.0, 200.0, 1.0, 1.0, 1.0, 1.0], 8);
            let mut out = cpu.allocate(1, 4, Precision::Compute).unwrap();
            cpu.silu_mul(&gate_up, &mut out);
            assert_close(&out.values()[1..], &[0.0, 0.0, 200.0], 1e-30, 0.0);
            assert!(out.values()[0].abs() < 1e-7, "{:?}", out.values());
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernel_gives_the_same() {
        use crate::cuda::testing::{assert_twin, each_element, read};
        use crate::testing::rounded;
        each_element(103, |cuda, rng| {
            for n in [1, 5, 8, 64, 100, 2048, 2056, rng.within(1..3000)] {
                let rows = rng.within(1..12);
                let mut before: Vec<f32> =
                    rng.values(rows * 2 * n).iter().map(|x| x * 30.0).collect();
                before[0] = [-6e4, -200.0, 0.0, 200.0][rng.within(0..4)];
                let before = rounded(&before, cuda.element());
                let gate_up = tensor(cuda, &before, 2 * n);
                let mut out = cuda.allocate(rows, n, Precision::Compute).unwrap();
                cuda.silu_mul(&gate_up, &mut out);
                let expected: Vec<f32> = before.chunks_exact(2 * n).flat_map(reference).collect();
                assert_twin(cuda, &read(cuda, &out), &expected);
            }
        });
    }
}
