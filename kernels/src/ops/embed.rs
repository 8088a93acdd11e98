//! `out[t] = scale * table[token_ids[t] - first_token]`, or zero where the token is not in this part of the table.
//!
//! `scale` is 1 in most families; where it is not it is rounded to the table's element first, as the models were trained.
//! `table: [part of the vocabulary, width]`, `out: [tokens, width]`. With the vocabulary divided among
//! ranks every token is in one rank's part, and the sum over ranks is the whole embedding.

use crate::cpu::element::{Stored, by_element};
use crate::cpu::{CpuBackend, CpuBatch, CpuTensor, CpuWeight};

/// The fast path.
pub(crate) fn embed(
    cpu: &CpuBackend,
    batch: &CpuBatch,
    (table, first_token): (&CpuWeight, u32),
    scale: f32,
    out: &mut CpuTensor,
) {
    let tokens = &batch.host.token_ids;
    let width = out.width();
    assert_eq!(
        (out.rows(), width),
        (tokens.len(), table.cols()),
        "out is [tokens, width]"
    );
    let scale = by_element!(table.element(), E => E::narrow(scale).widen());
    cpu.threads.rows(out.values_mut(), width, width, |t, row| {
        let index = tokens[t]
            .checked_sub(first_token)
            .map(|index| index as usize);
        match index.filter(|&index| index < table.rows()) {
            Some(index) => {
                table.read_row(index, row);
                for value in row {
                    *value *= scale;
                }
            }
            None => row.fill(0.0),
        }
    });
}

/// The kernel of `embed.cu`.
#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "the launcher is C")]
pub(crate) mod cuda {
    use crate::cpu::element::{Stored, by_element};
    use crate::cuda::launch::{long, unsigned};
    use crate::cuda::{CudaBackend, CudaBatch, CudaTensor, CudaWeight, element_code};
    use std::ffi::{c_int, c_void};

    unsafe extern "C" {
        fn cluster_embed(
            stream: *mut c_void,
            element: c_int,
            token_ids: *const u32,
            sampled: *const u32,
            table: *const c_void,
            out: *mut c_void,
            tokens: i64,
            width: i64,
            first_token: u32,
            table_rows: u32,
            scale: f32,
        ) -> c_int;
    }

    /// Queues it. `table` and `out` are of one element.
    pub(crate) fn embed(
        cuda: &CudaBackend,
        batch: &CudaBatch,
        (table, first_token): (&CudaWeight, u32),
        scale: f32,
        out: &mut CudaTensor,
    ) {
        let (tokens, width) = (batch.num_tokens(), table.cols());
        assert_eq!(
            (out.rows(), out.width(), out.element()),
            (tokens, width, table.element()),
            "out is [tokens, width] of the table's element"
        );
        let scale = by_element!(table.element(), E => E::narrow(scale).widen());
        // SAFETY: the sizes are those of the tensors' memory, and no row of the table is read from outside it.
        let code = unsafe {
            cluster_embed(
                cuda.stream(),
                element_code(out.element()),
                batch.token_ids(),
                cuda.sampler().results(),
                table.pointer(),
                out.pointer_mut(),
                long(tokens),
                long(width),
                first_token,
                unsigned(table.rows()),
                scale,
            )
        };
        cuda.launched("embed", code);
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::{Backend, Element};
    use crate::testing::{
        ELEMENTS, Rng, backends, host_matrix, rounded, tensor, tokens, upload, weight,
    };

    /// What the embeddings are multiplied by: nothing, as most families, and a number that 16 bits round.
    const SCALES: [f32; 2] = [1.0, 55.425_625];

    fn reference(
        token_ids: &[u32],
        (table, scale): (&[f32], f32),
        width: usize,
        first: u32,
    ) -> Vec<f32> {
        let vocab = table.len() / width;
        let value = |token: u32, column: usize| {
            let inside = token >= first && ((token - first) as usize) < vocab;
            if inside {
                scale * table[(token - first) as usize * width + column]
            } else {
                0.0
            }
        };
        let elements = token_ids
            .iter()
            .flat_map(|&token| (0..width).map(move |c| (token, c)));
        elements
            .map(|(token, column)| value(token, column))
            .collect()
    }

    #[test]
    fn is_the_reference() {
        let mut rng = Rng::new(1);
        for cpu in backends() {
            for (element, scale) in ELEMENTS.into_iter().flat_map(|e| SCALES.map(|s| (e, s))) {
                let (vocab, width, count) =
                    (rng.within(1..20), rng.within(1..40), rng.within(1..30));
                let first = rng.within(0..10);
                let ids: Vec<u32> = (0..count).map(|_| rng.within(0..40) as u32).collect();
                let (table, values) = weight(&mut rng, &cpu, (vocab, width), element);
                let batch = upload(&cpu, &tokens(ids.clone(), vec![0; count]));
                let mut out = tensor(&cpu, &rng.values(count * width), width);
                cpu.embed(&batch, &table, first as u32, scale, &mut out);
                let known = (&values[..], rounded(&[scale], element)[0]);
                assert_eq!(out.values(), reference(&ids, known, width, first as u32));
            }
        }
    }

    #[test]
    fn the_scale_is_rounded_as_the_table_is() {
        let mut rng = Rng::new(2);
        let cpu = &backends()[0];
        // The root of 3072, and what bf16 makes of it.
        for (element, rounded) in [(Element::F32, SCALES[1]), (Element::Bf16, 55.5)] {
            let one = host_matrix(&mut rng, &[1.0], 1, element);
            let table = cpu.load(&[one], element, &mut |_| ()).unwrap();
            let batch = upload(cpu, &tokens(vec![0], vec![0]));
            let mut out = tensor(cpu, &[0.0], 1);
            cpu.embed(&batch, &table, 0, SCALES[1], &mut out);
            assert_eq!(out.values(), [rounded]);
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernel_gives_the_same() {
        use crate::cuda::testing::{each_element, read, values};
        each_element(101, |cuda, rng| {
            for width in [1, 7, 8, 30, 64, 250, 256, 2056, rng.within(1..3000)] {
                let scale = rng.pick(&SCALES);
                let (vocab, count, first) =
                    (rng.within(1..20), rng.within(1..30), rng.within(0..10));
                let mut ids: Vec<u32> = (0..count).map(|_| rng.within(0..40) as u32).collect();
                ids[0] = [
                    first + vocab - 1,
                    first + vocab,
                    first.saturating_sub(1),
                    (1 << 31) - 1,
                ][rng.within(0..4)] as u32;
                let (table, known) = weight(rng, cuda, (vocab, width), cuda.element());
                let batch = upload(cuda, &tokens(ids.clone(), vec![0; count]));
                let mut out = tensor(cuda, &values(cuda, rng, count * width), width);
                cuda.embed(&batch, &table, first as u32, scale, &mut out);
                let known = (&known[..], rounded(&[scale], cuda.element())[0]);
                let expected = reference(&ids, known, width, first as u32);
                let expected = rounded(&expected, cuda.element());
                assert_eq!(read(cuda, &out), expected, "{count} of {width}");
            }
        });
    }
}
