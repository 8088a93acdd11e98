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

/// The kernel of `gather.cu`.
#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "the launcher is C")]
pub(crate) mod cuda {
    use crate::cuda::launch::long;
    use crate::cuda::{CudaBackend, CudaBatch, CudaTensor, element_code};
    use std::ffi::{c_int, c_void};

    unsafe extern "C" {
        fn cluster_gather_rows(
            stream: *mut c_void,
            element: c_int,
            rows: *const u32,
            x: *const c_void,
            out: *mut c_void,
            count: i64,
            width: i64,
        ) -> c_int;
    }

    /// Queues it. `x` and `out` are of one element.
    pub(crate) fn gather(
        cuda: &CudaBackend,
        batch: &CudaBatch,
        x: &CudaTensor,
        out: &mut CudaTensor,
    ) {
        let (count, width) = (batch.num_logit_rows(), x.width());
        assert_eq!(
            (out.rows(), out.width(), out.element()),
            (count, width, x.element()),
            "out is [logit rows, width] of x's element"
        );
        assert_eq!(x.rows(), batch.num_tokens(), "a row of x for each token");
        // SAFETY: the sizes are those of the tensors' memory; the upload checked that the rows are tokens of the step.
        let code = unsafe {
            cluster_gather_rows(
                cuda.stream(),
                element_code(out.element()),
                batch.logit_tokens(),
                x.pointer(),
                out.pointer_mut(),
                long(count),
                long(width),
            )
        };
        cuda.launched("gather", code);
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::{Backend, Precision};
    use crate::testing::{Rng, backends, tensor, tokens, upload};

    #[test]
    fn copies_the_rows_named() {
        let mut rng = Rng::new(2);
        for cpu in backends() {
            let (count, width) = (rng.within(1..30), rng.within(1..40));
            let mut batch = tokens(vec![0; count], vec![0; count]);
            batch.logit_tokens = (0..count as u32)
                .filter(|_| rng.within(0..2) == 1)
                .collect();
            let wanted = batch.logit_tokens.clone();
            let x = tensor(&cpu, &rng.values(count * width), width);
            let mut out = cpu.allocate(count, width, Precision::Compute).unwrap();
            cpu.set_rows(&mut out, wanted.len());
            cpu.gather_logit_rows(&upload(&cpu, &batch), &x, &mut out);
            let expected: Vec<f32> = wanted
                .iter()
                .flat_map(|&t| x.row(t as usize).to_vec())
                .collect();
            assert_eq!(out.values(), expected);
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernel_gives_the_same() {
        use crate::cuda::testing::{each_element, read, values};
        each_element(102, |cuda, rng| {
            for width in [1, 8, 64, 99, 250, 2056, rng.within(1..3000)] {
                let count = rng.within(1..30);
                let mut batch = tokens(vec![0; count], vec![0; count]);
                batch.logit_tokens = (0..count as u32)
                    .filter(|_| rng.within(0..2) == 1)
                    .collect();
                let before = values(cuda, rng, count * width);
                let x = tensor(cuda, &before, width);
                let mut out = tensor(cuda, &values(cuda, rng, count * width), width);
                cuda.set_rows(&mut out, batch.logit_tokens.len());
                cuda.gather_logit_rows(&upload(cuda, &batch), &x, &mut out);
                let row = |&token: &u32| &before[token as usize * width..][..width];
                let expected: Vec<f32> = batch.logit_tokens.iter().flat_map(row).copied().collect();
                assert_eq!(read(cuda, &out), expected, "{count} of {width}");
            }
        });
    }
}
