//! `out = x · weightᵀ (+ bias)`.
//!
//! `x: [rows, in]`, `weight: [out, in]`, `bias: [out]`, `out: [rows, out]`, f32 sums whatever the weight is
//! stored as. Few rows of `x` are limited by how fast weights can be read, and then those of the next block are asked
//! for while this one is computed with; many rows by arithmetic, and then the blocks of `x` and of weights that are
//! multiplied stay in the caches.
//!
//! Invariant: `out[i][j]` is the sum over segments of at most [`BLOCK`] columns, from the first to the last, of the
//! segment's products summed one by one from the first to the last, times its scale if it has one (and then the bias).
//! On tiles (AMX, weights of bfloat16 or of floats of 8 bits) `x` is rounded to bfloat16, and segments have 32 columns: to the
//! sum so far comes what the products of even columns, one by one, and those of odd columns, one by one, make together; scales
//! come with groups of columns, see `float8_tiles`. Nothing else
//! about the shapes, and nothing about threads, changes a bit. Integer codes: `codes.rs`, whose bits `code_tiles` gives
//! too.

mod activations;
mod claims;
#[cfg(target_arch = "x86_64")]
mod code_tiles;
mod codes;
mod feed_forward;
#[cfg(target_arch = "x86_64")]
mod float8_tiles;
#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod gated_tests;
#[cfg(test)]
mod quantized_tests;
mod round;
#[cfg(target_arch = "x86_64")]
mod tiles;

#[cfg(target_arch = "x86_64")]
use crate::backend::Element;
use crate::cpu::element::{F8, Stored, by_element};
use crate::cpu::packed::{BLOCK, PANEL_ROWS, Packed};
use crate::cpu::quantized::{Part, Quantized};
use crate::cpu::simd::{Kernel, LANES, MAX_TILE, Simd, dot};
use crate::cpu::weight::Values;
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use claims::Claims;
pub(crate) use feed_forward::feed_forward;
use round::{AddBias, Round, Slots, Turn, WIDENED};
use std::marker::PhantomData;
use std::ops::Range;

/// Vectors of rows of one round, 416 KiB: with a panel of weights and the outputs they stay in a second-level cache of
/// 1 MiB.
const ROOM: usize = 13 << 9;

/// Rows of one segment that these are.
const MAX_ROWS: usize = ROOM / (BLOCK / LANES);

/// The fast path.
pub(crate) fn linear(
    cpu: &CpuBackend,
    x: &CpuTensor,
    weight: &CpuWeight,
    bias: Option<&CpuWeight>,
    out: &mut CpuTensor,
) {
    let (rows, width) = (x.rows(), weight.rows());
    assert_eq!(
        x.width(),
        weight.cols(),
        "x is as wide as the weight's rows"
    );
    assert_eq!(
        (out.rows(), out.width()),
        (rows, width),
        "out is [rows, out]"
    );
    match weight.values() {
        // For one row as for many, so that what else is in a batch changes nothing.
        #[cfg(target_arch = "x86_64")]
        Values::Matrix(packed) if weight.element() == Element::Bf16 && cpu.isa.has_tiles() => {
            let unit = cpu.isa.tiles().expect("it has tiles");
            tiles::linear((cpu, unit), x, packed, bias, out);
        }
        Values::Matrix(packed) => by_element!(weight.element(), E => {
            multiply::<E>(cpu, x, (packed, 0), bias, out);
        }),
        Values::Quantized(quantized) => linear_quantized(cpu, x, quantized, bias, out),
        Values::Vector(_) => narrow(cpu, x, weight, bias, out),
    }
}

/// The outputs of `packed`, which are the columns of `out` from `first` on.
fn multiply<E: Stored>(
    cpu: &CpuBackend,
    x: &CpuTensor,
    (packed, first): (&Packed, usize),
    bias: Option<&CpuWeight>,
    out: &mut CpuTensor,
) {
    let (width, within) = (out.width(), first..first + packed.rows());
    let segments = packed.columns().segments();
    let mut shared = cpu.scratch.shared();
    let (shared, _) = shared.as_chunks_mut::<LANES>();
    for part in equal_parts(x.rows(), MAX_ROWS, MAX_TILE) {
        let slots = Slots::of(cpu, part.len(), packed.columns());
        let mut left = segments.len();
        // All segments at once where caches allow: threads meet after each round.
        for these in segments.chunks((ROOM / slots.of_segment()).max(1)) {
            left -= these.len();
            let bias = bias.filter(|_| left == 0);
            let laid_out = &mut shared[..these.len() * slots.of_segment()];
            slots.lay_out(cpu, (x, part.start), (packed, these), laid_out);
            let columns = these.iter().map(|segment| segment.columns.len());
            let cost = part.len() * columns.sum::<usize>() * PANEL_ROWS;
            let out = (out.values_mut(), width);
            cpu.threads
                .panels(out, within.clone(), (PANEL_ROWS, cost), |panels| {
                    let mut space = cpu.scratch.of_thread(panels.thread());
                    let (rows, stored) = (part.clone(), PhantomData::<E>);
                    let round = Round {
                        x: laid_out,
                        slots,
                        weight: packed,
                        rows: rows.clone(),
                        segments: these,
                        widened: bytemuck::cast_slice_mut(&mut space[..WIDENED]),
                        stored,
                    };
                    let claims = Claims { panels, rows, bias };
                    cpu.isa.run(Turn { round, claims });
                });
        }
    }
}

/// Each part by itself: parts may differ in everything but their inputs' number.
fn linear_quantized(
    cpu: &CpuBackend,
    x: &CpuTensor,
    weight: &Quantized,
    bias: Option<&CpuWeight>,
    out: &mut CpuTensor,
) {
    let mut first = 0;
    for part in weight.parts() {
        match part {
            #[cfg(target_arch = "x86_64")]
            Part::Codes(codes)
                if cpu.isa.has_tiles() && code_tiles::pays(x.rows(), codes.columns()) =>
            {
                let unit = cpu.isa.tiles().expect("it has tiles");
                code_tiles::linear((cpu, unit), x, (codes, first), bias, out);
            }
            Part::Codes(codes) => codes::linear(cpu, x, (codes, first), bias, out),
            #[cfg(target_arch = "x86_64")]
            Part::Floats(packed) if cpu.isa.has_tiles() => {
                let unit = cpu.isa.tiles().expect("it has tiles");
                float8_tiles::linear((cpu, unit), x, (packed, first), bias, out);
            }
            Part::Floats(packed) => multiply::<F8<false>>(cpu, x, (packed, first), bias, out),
        }
        first += part.rows();
    }
}

/// A weight whose parts have one row or one column each, which no model has; it is not packed.
fn narrow(
    cpu: &CpuBackend,
    x: &CpuTensor,
    weight: &CpuWeight,
    bias: Option<&CpuWeight>,
    out: &mut CpuTensor,
) {
    struct Dot<'a, E>(&'a [f32], &'a [E]);
    impl<E: Stored> Kernel for Dot<'_, E> {
        type Output = f32;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> f32 {
            dot(simd, self.0, self.1)
        }
    }
    let (width, inputs) = (weight.rows(), weight.cols());
    let out = (out.values_mut(), width);
    cpu.threads
        .panels(out, 0..width, (1, inputs), |mut panels| {
            while let Some((_, mut panel)) = panels.claim() {
                by_element!(weight.element(), E => {
                    let vector = weight.vector::<E>();
                    for row in panel.rows() {
                        let columns = panel.columns();
                        for (value, column) in panel.row(row).iter_mut().zip(columns) {
                            let w = &vector[column * inputs..][..inputs];
                            *value = cpu.isa.run(Dot(x.row(row), w));
                        }
                    }
                });
                if let Some(bias) = bias {
                    let (rows, panel) = (0..x.rows(), &mut panel);
                    cpu.isa.run(AddBias { bias, rows, panel });
                }
            }
        });
}

/// `0..length` in as few parts of at most `most` as there can be, of whole `unit`s but for the end, which differ by one unit.
fn equal_parts(length: usize, most: usize, unit: usize) -> impl Iterator<Item = Range<usize>> {
    let unit = unit.min(most);
    let units = length.div_ceil(unit);
    let parts = units.div_ceil(most / unit);
    let start = move |part: usize| (part * units / parts * unit).min(length);
    (0..parts).map(move |part| start(part)..start(part + 1))
}

/// On the GPU: cuBLASLt's product, the bias added where the sums are; for quantised weights what is in `quantized`.
#[cfg(feature = "cuda")]
pub(crate) mod cuda {
    mod quantized;

    use crate::cuda::product::{Factors, Product};
    use crate::cuda::{CudaBackend, CudaTensor, CudaWeight};

    /// As the fast path; `out` may be f32 where the rest is narrower.
    pub(crate) fn linear(
        cuda: &CudaBackend,
        x: &CudaTensor,
        weight: &CudaWeight,
        bias: Option<&CudaWeight>,
        out: &mut CudaTensor,
    ) {
        assert_eq!(
            (x.width(), x.element()),
            (weight.cols(), weight.element()),
            "x is like the weight's rows"
        );
        assert_eq!(
            (out.rows(), out.width()),
            (x.rows(), weight.rows()),
            "out is [rows, out]"
        );
        if let Some(bias) = bias {
            let length = bias.rows() * bias.cols();
            assert_eq!(length, weight.rows(), "one bias for each output");
        }
        if x.rows() == 0 {
            return;
        }
        if let Some(sections) = weight.sections() {
            return quantized::linear(cuda, x, sections, bias, out);
        }
        cuda.multiply(&Product {
            rows: x.rows(),
            inputs: weight.cols(),
            outputs: weight.rows(),
            factors: Factors::Dense(x.element()),
            x: x.pointer(),
            weight: weight.pointer(),
            bias: bias.map(|bias| bias.pointer_as(out.element())),
            out: (out.pointer_mut(), out.element()),
            out_stride: weight.rows(),
        });
    }

    #[cfg(test)]
    mod tests {
        use crate::backend::{Backend, Element, Precision};
        use crate::cuda::testing::{each_element, read, tolerance, values};
        use crate::ops::linear::tests::reference;
        use crate::testing::{assert_close, host_matrix, rounded};

        #[test]
        fn is_the_reference_and_narrow_inputs_can_give_f32() {
            each_element(41, |cuda, rng| {
                for case in 0..24 {
                    let (rows, inputs) = (rng.within(1..40), rng.within(1..200));
                    let outputs = rng.within(1..70);
                    // 16 bytes in a row is what the fast algorithms want; the others must do as well.
                    let inputs = if case % 2 == 0 {
                        inputs.next_multiple_of(8)
                    } else {
                        inputs
                    };
                    let precision = rng.pick(&[Precision::Compute, Precision::F32]);
                    println!("case {case}: {rows} x {inputs} x {outputs} to {precision:?}");
                    let w = values(cuda, rng, outputs * inputs);
                    let matrix = host_matrix(rng, &w, inputs, Element::F32);
                    let weight = cuda.load(&[matrix], cuda.element(), &mut |_| ()).unwrap();
                    // A bias as checkpoints have it: in pieces, in f32.
                    let bias_values = values(cuda, rng, outputs);
                    let cut = rng.within(0..outputs);
                    let pieces = [&bias_values[..cut], &bias_values[cut..]];
                    let pieces: Vec<_> = pieces
                        .into_iter()
                        .filter(|piece| !piece.is_empty())
                        .map(|piece| host_matrix(rng, piece, piece.len(), Element::F32))
                        .collect();
                    let bias = cuda.load(&pieces, Element::F32, &mut |_| ()).unwrap();
                    let biased = precision == Precision::Compute && rng.pick(&[false, true]);
                    let x_values = values(cuda, rng, rows * inputs);
                    let mut x = cuda.allocate(rows + 3, inputs, Precision::Compute).unwrap();
                    cuda.write(&x_values, &mut x).unwrap();
                    let mut out = cuda.allocate(rows, outputs, precision).unwrap();
                    cuda.linear(&x, &weight, biased.then_some(&bias), &mut out);
                    let bias = biased.then_some(&*bias_values);
                    let expected = reference(&x_values, &w, inputs, bias);
                    let expected = rounded(&expected, out.element());
                    let (atol, rtol) = tolerance(out.element());
                    assert_close(&read(cuda, &out), &expected, atol * inputs as f32, rtol);
                }
            });
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use crate::backend::{Backend, Element, Precision};
    use crate::cpu::weight::Values;
    use crate::cpu::{CpuBackend, CpuWeight};
    use crate::testing::{
        ELEMENTS, Rng, assert_close, backends, bits, host_matrix, rounded, tensor, weight,
    };

    pub(super) fn reference(
        x: &[f32],
        weight: &[f32],
        inputs: usize,
        bias: Option<&[f32]>,
    ) -> Vec<f32> {
        let mut out = Vec::new();
        for x in x.chunks_exact(inputs) {
            for (column, w) in weight.chunks_exact(inputs).enumerate() {
                let mut sum = 0.0;
                for (x, w) in x.iter().zip(w) {
                    sum += x * w;
                }
                out.push(sum + bias.map_or(0.0, |bias| bias[column]));
            }
        }
        out
    }

    /// `x` as products with `weight` take it. With that the tolerance of all sets is the same: that of f32
    /// sums in another order.
    fn taken(cpu: &CpuBackend, x: &[f32], weight: &CpuWeight) -> Vec<f32> {
        let on_tiles = cpu.isa.has_tiles() && matches!(weight.values(), Values::Matrix(_));
        match weight.element() {
            Element::Bf16 if on_tiles => rounded(x, Element::Bf16),
            _ => x.to_vec(),
        }
    }

    #[test]
    fn is_the_reference_and_a_row_alone_gives_the_same_bits() {
        let mut rng = Rng::new(7);
        for cpu in backends() {
            for case in 0..30 {
                let element = rng.pick(&ELEMENTS);
                let (rows, inputs) = (rng.within(1..24), rng.within(1..300));
                let outputs = rng.within(1..70);
                println!("{} case {case}: {rows} x {inputs} x {outputs}", cpu.name());
                let (w, w_values) = weight(&mut rng, &cpu, (outputs, inputs), element);
                let (bias, bias_values) = weight(&mut rng, &cpu, (1, outputs), element);
                let biased = rng.pick(&[false, true]);
                let bias = biased.then_some(&bias);
                let x = tensor(&cpu, &rng.values(rows * inputs), inputs);
                let mut out = cpu.allocate(rows, outputs, Precision::Compute).unwrap();
                cpu.linear(&x, &w, bias, &mut out);
                let bias_values = biased.then_some(&*bias_values);
                let x_values = taken(&cpu, x.values(), &w);
                let expected = reference(&x_values, &w_values, inputs, bias_values);
                assert_close(out.values(), &expected, 1e-5 * inputs as f32, 1e-5);
                for row in 0..rows {
                    let one = tensor(&cpu, x.row(row), inputs);
                    let mut alone = cpu.allocate(1, outputs, Precision::Compute).unwrap();
                    cpu.linear(&one, &w, bias, &mut alone);
                    assert_eq!(bits(alone.values()), bits(out.row(row)));
                }
            }
        }
    }

    /// More rows than stay in the cache at once, so that the blocks of rows are met too.
    #[test]
    fn blocks_of_rows_and_instruction_sets_with_fused_products_agree_bit_for_bit() {
        let (rows, inputs, outputs) = (50, 9000, 37);
        let mut all: Vec<(String, Vec<u32>)> = Vec::new();
        for cpu in backends() {
            let mut rng = Rng::new(8);
            let (w, _) = weight(&mut rng, &cpu, (outputs, inputs), Element::Bf16);
            let x = tensor(&cpu, &rng.values(rows * inputs), inputs);
            let mut out = cpu.allocate(rows, outputs, Precision::Compute).unwrap();
            cpu.linear(&x, &w, None, &mut out);
            for row in [0, 13, 49] {
                let mut alone = cpu.allocate(1, outputs, Precision::Compute).unwrap();
                cpu.linear(&tensor(&cpu, x.row(row), inputs), &w, None, &mut alone);
                assert_eq!(bits(alone.values()), bits(out.row(row)));
            }
            all.push((cpu.name(), bits(out.values())));
        }
        let fused: Vec<_> = all
            .iter()
            .filter(|(name, _)| name.contains("AVX"))
            .collect();
        for (name, bits) in &fused {
            assert!(*bits == fused[0].1, "{name} differs from {}", fused[0].0);
        }
    }

    /// More rows than a thread's memory holds are multiplied in parts.
    #[test]
    fn every_part_of_the_rows_gets_its_bias_once() {
        let mut rng = Rng::new(10);
        for cpu in backends() {
            let (rows, inputs, outputs) = (rng.within(600..1200), 40, 35);
            let (w, w_values) = weight(&mut rng, &cpu, (outputs, inputs), Element::Bf16);
            let (bias, bias_values) = weight(&mut rng, &cpu, (1, outputs), Element::Bf16);
            let x = tensor(&cpu, &rng.values(rows * inputs), inputs);
            let mut out = cpu.allocate(rows, outputs, Precision::Compute).unwrap();
            cpu.linear(&x, &w, Some(&bias), &mut out);
            let x_values = taken(&cpu, x.values(), &w);
            let expected = reference(&x_values, &w_values, inputs, Some(&bias_values));
            assert_close(out.values(), &expected, 1e-4, 1e-5);
        }
    }

    /// Query, key and value projections become one: matrices and biases of several parts.
    #[test]
    fn stacked_parts_are_one_matrix() {
        let mut rng = Rng::new(9);
        let cpu = CpuBackend::new(1, None).unwrap();
        for stored in ELEMENTS {
            for store in ELEMENTS {
                let (inputs, sizes) = (rng.within(1..90), [5, 3, 3]);
                let mut values = Vec::new();
                let mut bias_values = Vec::new();
                let mut parts = Vec::new();
                let mut biases = Vec::new();
                for size in sizes {
                    let part = rng.values(size * inputs);
                    parts.push(host_matrix(&mut rng, &part, inputs, stored));
                    values.extend(rounded(&rounded(&part, stored), store));
                    let bias = rng.values(size);
                    biases.push(host_matrix(&mut rng, &bias, size, stored));
                    bias_values.extend(rounded(&rounded(&bias, stored), store));
                }
                let w = cpu.load(&parts, store, &mut |_| ()).unwrap();
                let bias = cpu.load(&biases, store, &mut |_| ()).unwrap();
                assert_eq!(
                    (w.rows(), w.cols(), bias.rows(), bias.cols()),
                    (11, inputs, 1, 11)
                );
                let x = tensor(&cpu, &rng.values(2 * inputs), inputs);
                let mut out = cpu.allocate(2, 11, Precision::Compute).unwrap();
                cpu.linear(&x, &w, Some(&bias), &mut out);
                let x_values = taken(&cpu, x.values(), &w);
                let expected = reference(&x_values, &values, inputs, Some(&bias_values));
                assert_close(out.values(), &expected, 1e-4, 1e-5);
            }
        }
    }
}
