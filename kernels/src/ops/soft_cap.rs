//! `x = cap * tanh(x / cap)`, element by element, in place: no value ends beyond `cap`, small ones stay as they are.
//!
//! `x: [rows, width]`. For logits (Gemma 2); attention scores are capped where they are computed.

use crate::cpu::simd::{Kernel, Simd};
use crate::cpu::tanh::soft_capped;
use crate::cpu::{CpuBackend, CpuTensor};

struct Row<'a> {
    x: &'a mut [f32],
    cap: f32,
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for value in self.x {
            *value = soft_capped(*value, self.cap);
        }
    }
}

/// The fast path.
pub(crate) fn soft_cap(cpu: &CpuBackend, cap: f32, x: &mut CpuTensor) {
    let width = x.width();
    cpu.threads.rows(x.values_mut(), width, 4 * width, |_, x| {
        cpu.isa.run(Row { x, cap });
    });
}

/// The kernel of `soft_cap.cu`.
#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "the launcher is C")]
pub(crate) mod cuda {
    use crate::cuda::launch::long;
    use crate::cuda::{CudaBackend, CudaTensor, element_code};
    use std::ffi::{c_int, c_void};

    unsafe extern "C" {
        fn cluster_soft_cap(
            stream: *mut c_void,
            element: c_int,
            x: *mut c_void,
            count: i64,
            cap: f32,
        ) -> c_int;
    }

    /// Queues it.
    pub(crate) fn soft_cap(cuda: &CudaBackend, cap: f32, x: &mut CudaTensor) {
        let count = x.rows() * x.width();
        // SAFETY: the size is that of the tensor's memory.
        let code = unsafe {
            cluster_soft_cap(
                cuda.stream(),
                element_code(x.element()),
                x.pointer_mut(),
                long(count),
                cap,
            )
        };
        cuda.launched("soft_cap", code);
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::Backend;
    use crate::testing::{Rng, assert_close, backends, bits, tensor};

    fn reference(x: &[f32], cap: f32) -> Vec<f32> {
        let capped = |x: &f32| f64::from(cap) * (f64::from(*x) / f64::from(cap)).tanh();
        x.iter().map(|x| capped(x) as f32).collect()
    }

    #[test]
    fn is_the_reference_and_a_row_alone_gives_the_same_bits() {
        let mut rng = Rng::new(14);
        for cpu in backends() {
            let (rows, width) = (rng.within(1..9), rng.within(1..300));
            let cap = rng.pick(&[0.5, 30.0, 50.0]);
            let before: Vec<f32> = (rng.values(rows * width).iter())
                .map(|x| x.powi(3) * 200.0)
                .collect();
            let mut x = tensor(&cpu, &before, width);
            cpu.soft_cap(cap, &mut x);
            assert_close(x.values(), &reference(&before, cap), 0.0, 1e-6);
            assert!(x.values().iter().all(|value| value.abs() <= cap));
            for (row, before) in before.chunks_exact(width).enumerate() {
                let mut alone = tensor(&cpu, before, width);
                cpu.soft_cap(cap, &mut alone);
                assert_eq!(bits(alone.values()), bits(x.row(row)));
            }
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernel_gives_the_same() {
        use crate::backend::Precision;
        use crate::cuda::testing::{each_element, read, tolerance};
        use crate::testing::rounded;
        each_element(114, |cuda, rng| {
            for width in [1, 3, 256, 1000, rng.within(1..3000)] {
                let (rows, cap) = (rng.within(1..9), rng.pick(&[0.5, 30.0]));
                let before: Vec<f32> = (rng.values(rows * width).iter())
                    .map(|x| x.powi(3) * 200.0)
                    .collect();
                let before = rounded(&before, cuda.element());
                // As activations are stored, and in f32 as logits are.
                for precision in [Precision::Compute, Precision::F32] {
                    let mut x = cuda.allocate(rows, width, precision).unwrap();
                    cuda.write(&before, &mut x).unwrap();
                    cuda.soft_cap(cap, &mut x);
                    let (atol, rtol) = tolerance(x.element());
                    assert_close(&read(cuda, &x), &reference(&before, cap), atol, rtol);
                }
            }
        });
    }
}
