//! `out = x / rms(x) * (weight + weight_offset)` by row, `rms(x) = sqrt(mean(x^2) + eps)`.
//!
//! `x, out: [rows, width]`, `weight: [width]`. The variant for a residual stream first adds:
//! `residual += x`, then `out = rms_norm(residual)`.

use crate::backend::Norm;
use crate::cpu::element::{Stored, by_element};
use crate::cpu::simd::{Kernel, Simd, dot};
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};

/// One vector, in place.
pub(crate) struct Normalise<'a, E> {
    pub(crate) x: &'a mut [f32],
    pub(crate) weight: &'a [E],
    pub(crate) norm: Norm,
}

impl<E: Stored> Kernel for Normalise<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mean = dot(simd, self.x, self.x) / self.x.len() as f32;
        let factor = 1.0 / (mean + self.norm.eps).sqrt();
        for (value, weight) in self.x.iter_mut().zip(self.weight) {
            *value = *value * factor * (weight.widen() + self.norm.weight_offset);
        }
    }
}

/// Adds `x` to the residual, and normalises a copy of it.
struct AddNormalise<'a, E> {
    x: &'a [f32],
    residual: &'a mut [f32],
    weight: &'a [E],
    norm: Norm,
    out: &'a mut [f32],
}

impl<E: Stored> Kernel for AddNormalise<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (residual, x) in self.residual.iter_mut().zip(self.x) {
            *residual += x;
        }
        self.out.copy_from_slice(self.residual);
        let (x, weight, norm) = (self.out, self.weight, self.norm);
        Normalise { x, weight, norm }.run(simd);
    }
}

/// The fast path.
pub(crate) fn rms_norm(
    cpu: &CpuBackend,
    x: &CpuTensor,
    (weight, norm): (&CpuWeight, Norm),
    out: &mut CpuTensor,
) {
    let width = x.width();
    assert_eq!(
        (out.rows(), out.width()),
        (x.rows(), width),
        "out has the shape of x"
    );
    by_element!(weight.element(), E => {
        let weight = weight.vector::<E>();
        assert_eq!(weight.len(), width, "one weight for each column");
        cpu.threads.rows(out.values_mut(), width, 2 * width, |i, row| {
            row.copy_from_slice(x.row(i));
            cpu.isa.run(Normalise { x: row, weight, norm });
        });
    });
}

/// The fast path with the addition.
pub(crate) fn add_rms_norm(
    cpu: &CpuBackend,
    x: &CpuTensor,
    residual: &mut CpuTensor,
    (weight, norm): (&CpuWeight, Norm),
    out: &mut CpuTensor,
) {
    let width = x.width();
    let shape = (x.rows(), width);
    assert_eq!((out.rows(), out.width()), shape, "out has the shape of x");
    assert_eq!(
        (residual.rows(), residual.width()),
        shape,
        "the residual has the shape of x"
    );
    by_element!(weight.element(), E => {
        let weight = weight.vector::<E>();
        assert_eq!(weight.len(), width, "one weight for each column");
        let pairs = (residual.values_mut(), out.values_mut());
        cpu.threads.row_pairs(pairs, width, 3 * width, |i, residual, out| {
            let x = x.row(i);
            cpu.isa.run(AddNormalise { x, residual, weight, norm, out });
        });
    });
}

/// The kernels of `rms_norm.cu`.
#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "the launcher is C")]
pub(crate) mod cuda {
    use crate::backend::Norm;
    use crate::cuda::launch::long;
    use crate::cuda::{CudaBackend, CudaTensor, CudaWeight, element_code};
    use std::ffi::{c_int, c_void};

    unsafe extern "C" {
        fn cluster_rms_norm(
            stream: *mut c_void,
            element: c_int,
            x: *const c_void,
            weight: *const c_void,
            out: *mut c_void,
            rows: i64,
            width: i64,
            eps: f32,
            weight_offset: f32,
        ) -> c_int;
        fn cluster_add_rms_norm(
            stream: *mut c_void,
            element: c_int,
            x: *const c_void,
            residual: *mut c_void,
            weight: *const c_void,
            out: *mut c_void,
            rows: i64,
            width: i64,
            eps: f32,
            weight_offset: f32,
        ) -> c_int;
    }

    /// Queues it. All are of one element.
    pub(crate) fn rms_norm(
        cuda: &CudaBackend,
        x: &CudaTensor,
        (weight, norm): (&CudaWeight, Norm),
        out: &mut CudaTensor,
    ) {
        check(x, weight, out);
        // SAFETY: the sizes are those of the tensors' memory.
        let code = unsafe {
            cluster_rms_norm(
                cuda.stream(),
                element_code(x.element()),
                x.pointer(),
                weight.pointer_as(x.element()),
                out.pointer_mut(),
                long(x.rows()),
                long(x.width()),
                norm.eps,
                norm.weight_offset,
            )
        };
        cuda.launched("rms_norm", code);
    }

    /// Queues it with the addition. All are of one element.
    pub(crate) fn add_rms_norm(
        cuda: &CudaBackend,
        x: &CudaTensor,
        residual: &mut CudaTensor,
        (weight, norm): (&CudaWeight, Norm),
        out: &mut CudaTensor,
    ) {
        check(x, weight, out);
        assert_eq!(
            (residual.rows(), residual.width(), residual.element()),
            (x.rows(), x.width(), x.element()),
            "the residual has the shape and the element of x"
        );
        // SAFETY: the sizes are those of the tensors' memory.
        let code = unsafe {
            cluster_add_rms_norm(
                cuda.stream(),
                element_code(x.element()),
                x.pointer(),
                residual.pointer_mut(),
                weight.pointer_as(x.element()),
                out.pointer_mut(),
                long(x.rows()),
                long(x.width()),
                norm.eps,
                norm.weight_offset,
            )
        };
        cuda.launched("add_rms_norm", code);
    }

    fn check(x: &CudaTensor, weight: &CudaWeight, out: &CudaTensor) {
        assert_eq!(
            (out.rows(), out.width(), out.element()),
            (x.rows(), x.width(), x.element()),
            "out has the shape and the element of x"
        );
        assert_eq!(
            (weight.rows(), weight.cols()),
            (1, x.width()),
            "one weight for each column"
        );
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use crate::backend::{Backend, Norm, Precision};
    use crate::testing::{ELEMENTS, Rng, assert_close, backends, bits, tensor, weight};

    /// Weights as they are, and as their distance from 1.
    pub(crate) const NORMS: [Norm; 2] = [
        Norm {
            eps: 1e-5,
            weight_offset: 0.0,
        },
        Norm {
            eps: 1e-6,
            weight_offset: 1.0,
        },
    ];

    /// `[rows, width]` from `x: [rows, width]`.
    pub(crate) fn reference(x: &[f32], weight: &[f32], norm: Norm) -> Vec<f32> {
        let mut out = Vec::new();
        for row in x.chunks_exact(weight.len()) {
            let squares: f32 = row.iter().map(|x| x * x).sum();
            let rms = (squares / row.len() as f32 + norm.eps).sqrt();
            let weights = weight.iter().map(|w| w + norm.weight_offset);
            out.extend(row.iter().zip(weights).map(|(x, w)| x / rms * w));
        }
        out
    }

    #[test]
    fn is_the_reference_and_a_row_alone_gives_the_same_bits() {
        let mut rng = Rng::new(3);
        for cpu in backends() {
            for (element, norm) in ELEMENTS.into_iter().flat_map(|e| NORMS.map(|n| (e, n))) {
                let (rows, width) = (rng.within(1..20), rng.within(1..200));
                let (w, w_values) = weight(&mut rng, &cpu, (1, width), element);
                let x = tensor(&cpu, &rng.values(rows * width), width);
                let added = tensor(&cpu, &rng.values(rows * width), width);
                let sums: Vec<f32> = x
                    .values()
                    .iter()
                    .zip(added.values())
                    .map(|(a, b)| a + b)
                    .collect();
                let mut out = cpu.allocate(rows, width, Precision::Compute).unwrap();
                cpu.rms_norm(&x, &w, norm, &mut out);
                assert_close(
                    out.values(),
                    &reference(x.values(), &w_values, norm),
                    1e-6,
                    1e-5,
                );

                let mut residual = tensor(&cpu, x.values(), width);
                cpu.add_rms_norm(&added, &mut residual, &w, norm, &mut out);
                assert_eq!(bits(residual.values()), bits(&sums));
                assert_close(out.values(), &reference(&sums, &w_values, norm), 1e-6, 1e-5);

                for row in 0..rows {
                    let mut alone = cpu.allocate(1, width, Precision::Compute).unwrap();
                    let one = tensor(&cpu, residual.row(row), width);
                    cpu.rms_norm(&one, &w, norm, &mut alone);
                    assert_eq!(bits(alone.values()), bits(out.row(row)));
                }
            }
        }
    }

    /// Widths: odd ones, each number of vectors for a thread, and more than registers hold.
    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernels_give_the_same() {
        use crate::cuda::testing::{assert_twin, each_element, read, values};
        use crate::testing::rounded;
        each_element(104, |cuda, rng| {
            let widths = [
                1, 3, 8, 100, 1000, 1001, 4096, 5120, 8200, 16_384, 16_392, 32_776,
            ];
            for width in widths.into_iter().chain([rng.within(1..5000)]) {
                let rows = if width > 5000 { 2 } else { rng.within(1..9) };
                let norm = rng.pick(&NORMS);
                let (w, known) = weight(rng, cuda, (1, width), cuda.element());
                let [x, added] = [(); 2].map(|()| values(cuda, rng, rows * width));
                let (x_device, added_device) =
                    (tensor(cuda, &x, width), tensor(cuda, &added, width));
                let mut out = cuda.allocate(rows, width, Precision::Compute).unwrap();
                cuda.rms_norm(&x_device, &w, norm, &mut out);
                assert_twin(cuda, &read(cuda, &out), &reference(&x, &known, norm));

                let sums: Vec<f32> = x.iter().zip(&added).map(|(a, b)| a + b).collect();
                let sums = rounded(&sums, cuda.element());
                let mut residual = x_device;
                cuda.add_rms_norm(&added_device, &mut residual, &w, norm, &mut out);
                assert_eq!(
                    bits(&read(cuda, &residual)),
                    bits(&sums),
                    "{rows} of {width}"
                );
                assert_twin(cuda, &read(cuda, &out), &reference(&sums, &known, norm));
            }
        });
    }
}
