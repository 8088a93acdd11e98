//! `out = activation(gate) * up` (`SwiGLU`, `GeGLU`).
//!
//! `silu(x) = x / (1 + e^-x)`. GELU's tanh form is the same with another exponent:
//! `x / 2 * (1 + tanh(u)) = x / (1 + e^-2u)`, `u = sqrt(2 / pi) * (x + 0.044715 x^3)`.
//! `gate_up: [rows, 2 * n]` holds gate and then up; `out: [rows, n]`.

use crate::backend::Activation;
use crate::cpu::exp::exp;
use crate::cpu::simd::{Kernel, Simd};
use crate::cpu::{CpuBackend, CpuTensor};

/// `2 sqrt(2 / pi)`.
const GELU_SCALE: f32 = 1.595_769_2;
/// The part of the cube in GELU's exponent.
const GELU_CUBE: f32 = 0.044_715;

/// One element.
#[inline(always)]
pub(super) fn silu_gated(gate: f32, up: f32) -> f32 {
    gate / (1.0 + exp(-gate)) * up
}

/// One element.
#[inline(always)]
pub(super) fn gelu_gated(gate: f32, up: f32) -> f32 {
    let exponent = GELU_SCALE * (gate + GELU_CUBE * gate * gate * gate);
    gate / (1.0 + exp(-exponent)) * up
}

struct Row<'a> {
    activation: Activation,
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Row<'_> {
    #[inline(always)]
    fn with(self, gated: impl Fn(f32, f32) -> f32) {
        for ((out, gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            *out = gated(*gate, *up);
        }
    }
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        match self.activation {
            Activation::Silu => self.with(silu_gated),
            Activation::GeluTanh => self.with(gelu_gated),
        }
    }
}

/// The fast path.
pub(crate) fn gated_activation(
    cpu: &CpuBackend,
    activation: Activation,
    gate_up: &CpuTensor,
    out: &mut CpuTensor,
) {
    let n = out.width();
    assert_eq!(gate_up.width(), 2 * n, "gate and up side by side");
    assert_eq!(gate_up.rows(), out.rows(), "a row for each row");
    cpu.threads.rows(out.values_mut(), n, 4 * n, |i, out| {
        let (gate, up) = gate_up.row(i).split_at(n);
        cpu.isa.run(Row {
            activation,
            gate,
            up,
            out,
        });
    });
}

/// The kernel of `gated_activation.cu`.
#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "the launcher is C")]
pub(crate) mod cuda {
    use crate::backend::Activation;
    use crate::cuda::launch::long;
    use crate::cuda::{CudaBackend, CudaTensor, element_code};
    use std::ffi::{c_int, c_void};

    unsafe extern "C" {
        fn cluster_gated_activation(
            stream: *mut c_void,
            element: c_int,
            activation: c_int,
            gate_up: *const c_void,
            out: *mut c_void,
            rows: i64,
            n: i64,
        ) -> c_int;
    }

    /// Queues it. Both are of one element.
    pub(crate) fn gated_activation(
        cuda: &CudaBackend,
        activation: Activation,
        gate_up: &CudaTensor,
        out: &mut CudaTensor,
    ) {
        let (rows, n) = (out.rows(), out.width());
        assert_eq!(
            (gate_up.rows(), gate_up.width(), gate_up.element()),
            (rows, 2 * n, out.element()),
            "gate and up side by side, of out's element"
        );
        // SAFETY: the sizes are those of the tensors' memory.
        let code = unsafe {
            cluster_gated_activation(
                cuda.stream(),
                element_code(out.element()),
                code_of(activation),
                gate_up.pointer(),
                out.pointer_mut(),
                long(rows),
                long(n),
            )
        };
        cuda.launched("gated_activation", code);
    }

    /// What `gated_activation.cu` calls it.
    fn code_of(activation: Activation) -> c_int {
        match activation {
            Activation::Silu => 0,
            Activation::GeluTanh => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::{Activation, Backend, Precision};
    use crate::testing::{Rng, assert_close, backends, bits, tensor};

    const BOTH: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

    /// The definitions, in f64: the fast forms are other ones.
    fn reference(activation: Activation, gate_up: &[f32]) -> Vec<f32> {
        let (gate, up) = gate_up.split_at(gate_up.len() / 2);
        let activated = |x: f64| match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                x / 2.0 * (1.0 + u.tanh())
            }
        };
        let pairs = gate.iter().zip(up);
        pairs
            .map(|(gate, up)| (activated(f64::from(*gate)) * f64::from(*up)) as f32)
            .collect()
    }

    #[test]
    fn is_the_reference_and_a_row_alone_gives_the_same_bits() {
        let mut rng = Rng::new(6);
        for (cpu, activation) in backends().into_iter().zip(BOTH.into_iter().cycle()) {
            let (rows, n) = (rng.within(1..20), rng.within(1..200));
            let before: Vec<f32> = rng.values(rows * 2 * n).iter().map(|x| x * 30.0).collect();
            let gate_up = tensor(&cpu, &before, 2 * n);
            let mut out = cpu.allocate(rows, n, Precision::Compute).unwrap();
            cpu.gated_activation(activation, &gate_up, &mut out);
            for row in 0..rows {
                let expected = reference(activation, gate_up.row(row));
                // Where e^-2u is large its exponent's rounding counts.
                assert_close(out.row(row), &expected, 1e-6, 2e-6);
                let mut alone = cpu.allocate(1, n, Precision::Compute).unwrap();
                let one = tensor(&cpu, gate_up.row(row), 2 * n);
                cpu.gated_activation(activation, &one, &mut alone);
                assert_eq!(bits(alone.values()), bits(out.row(row)));
            }
        }
    }

    #[test]
    fn has_the_right_limits() {
        for (cpu, activation) in backends().into_iter().zip(BOTH.into_iter().cycle()) {
            let gate_up = tensor(&cpu, &[-1e30, -200.0, 0.0, 200.0, 1.0, 1.0, 1.0, 1.0], 8);
            let mut out = cpu.allocate(1, 4, Precision::Compute).unwrap();
            cpu.gated_activation(activation, &gate_up, &mut out);
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
                let activation = rng.pick(&BOTH);
                cuda.gated_activation(activation, &gate_up, &mut out);
                let one_row = |row| reference(activation, row);
                let expected: Vec<f32> = before.chunks_exact(2 * n).flat_map(one_row).collect();
                assert_twin(cuda, &read(cuda, &out), &expected);
            }
        });
    }
}
