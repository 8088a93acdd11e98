//! What the operations' tests share: seeded shapes and values, backends of every kind, comparisons.
//!
//! Not compiled into the library.

use crate::backend::{Backend, Element, HostMatrix, Precision};
use crate::batch::Batch;
use crate::cpu::CpuBackend;
use crate::cpu::element::{Stored, by_element};
use crate::cpu::simd::Isa;
use crate::quantized::e4m3;
use std::cmp::Ordering;
use std::ops::Range;

/// All element types.
pub(crate) const ELEMENTS: [Element; 3] = [Element::F32, Element::Bf16, Element::F16];

/// `SplitMix64`, for test data.
pub(crate) struct Rng(u64);

impl Rng {
    /// Says which seed, for the output of a failed test.
    pub(crate) fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Any of a range.
    pub(crate) fn within(&mut self, range: Range<usize>) -> usize {
        range.start + (self.next() % range.len() as u64) as usize
    }

    /// Any of several.
    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.within(0..choices.len())]
    }

    /// Between -1 and 1.
    pub(crate) fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }

    pub(crate) fn shuffle<T>(&mut self, values: &mut [T]) {
        for i in (1..values.len()).rev() {
            values.swap(i, self.within(0..i + 1));
        }
    }
}

/// A backend for each instruction set, with one thread and with three, dividing the smallest work.
pub(crate) fn backends() -> Vec<CpuBackend> {
    let kinds = Isa::available()
        .into_iter()
        .flat_map(|isa| [(isa, 1), (isa, 3)]);
    let backend = |(isa, threads)| {
        let mut cpu = CpuBackend::new(threads, None).expect("threads start");
        cpu.isa = isa;
        cpu.threads.inline_cost = 0;
        cpu
    };
    kinds.map(backend).collect()
}

/// The CUDA backend: emulated, or on a device where there is one; otherwise says so.
#[cfg(feature = "cuda")]
pub(crate) fn cuda_backend() -> Option<crate::cuda::CudaBackend> {
    match crate::cuda::CudaBackend::new(0) {
        Ok(backend) => Some(backend),
        Err(error) if cfg!(not(feature = "cuda-emulation")) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("the emulated device failed: {error}"),
    }
}

/// A tensor holding `values: [_, width]`.
pub(crate) fn tensor<B: Backend>(backend: &B, values: &[f32], width: usize) -> B::Tensor {
    let mut tensor = backend
        .allocate(values.len() / width, width, Precision::Compute)
        .expect("it fits");
    backend
        .write(values, &mut tensor)
        .expect("the shapes agree");
    tensor
}

/// `batch` in memory that just suffices.
pub(crate) fn upload<B: Backend>(backend: &B, batch: &Batch) -> B::DeviceBatch {
    let sizes = (batch.num_tokens(), batch.num_rows(), batch.blocks.len());
    let mut device = backend.batch(sizes.0, sizes.1, sizes.2).expect("it fits");
    backend
        .upload(batch, &mut device)
        .expect("the arrays agree");
    device
}

/// A batch of tokens with nothing but ids and positions, one row each.
pub(crate) fn tokens(token_ids: Vec<u32>, positions: Vec<u32>) -> Batch {
    let count = u32::try_from(token_ids.len()).expect("few tokens");
    Batch {
        token_ids,
        slots: positions.clone(),
        context_lens: positions.iter().map(|position| position + 1).collect(),
        positions,
        row_starts: (0..=count).collect(),
        block_starts: vec![0; count as usize + 1],
        ..Batch::default()
    }
}

/// `values` rounded to `element`, and widened again.
pub(crate) fn rounded(values: &[f32], element: Element) -> Vec<f32> {
    if element == Element::Fp8 {
        return values.iter().map(|x| e4m3(nearest_e4m3(*x))).collect();
    }
    by_element!(element, E => values.iter().map(|&value| E::narrow(value).widen()).collect())
}

/// The nearest code of an 8-bit float, the even one of two; the largest for whatever is larger.
pub(crate) fn nearest_e4m3(value: f32) -> u8 {
    let (sign, size) = (u8::from(value.is_sign_negative()) << 7, value.abs());
    // Codes of one sign are in the order of their values, up to the one that is no number.
    let codes: Vec<u8> = (0..0x7f).collect();
    let above = codes.partition_point(|code| e4m3(*code) < size);
    let Some(&above) = codes.get(above) else {
        return sign | if value.is_nan() { 0x7f } else { 0x7e };
    };
    let below = above.saturating_sub(1);
    let distance = |code: u8| (f64::from(e4m3(code)) - f64::from(size)).abs();
    let is_below = match distance(below).total_cmp(&distance(above)) {
        Ordering::Less => true,
        Ordering::Equal => below % 2 == 0,
        Ordering::Greater => false,
    };
    sign | if is_below { below } else { above }
}

/// `values: [rows, cols]` stored as `element`, with gaps of any values between rows.
pub(crate) fn host_matrix(
    rng: &mut Rng,
    values: &[f32],
    cols: usize,
    element: Element,
) -> HostMatrix {
    let gap = rng.pick(&[0, 0, 1, 16]);
    let mut all = Vec::new();
    for row in values.chunks_exact(cols) {
        all.extend_from_slice(row);
        all.extend(rng.values(gap));
    }
    all.truncate(all.len() - gap);
    let bytes: Vec<u8> = by_element!(element, E => {
        all.iter().flat_map(|&value| bytemuck::bytes_of(&E::narrow(value)).to_vec()).collect()
    });
    // Checkpoints align nothing: begin anywhere.
    let start = rng.pick(&[0, 1, 2, 8]);
    let mut padded = vec![0; start];
    padded.extend(bytes);
    HostMatrix {
        data: bytes::Bytes::from(padded).slice(start..),
        element,
        rows: values.len() / cols,
        cols,
        row_stride: cols + gap,
    }
}

/// A random weight, and its exact values.
pub(crate) fn weight<B: Backend>(
    rng: &mut Rng,
    backend: &B,
    (rows, cols): (usize, usize),
    element: Element,
) -> (B::Weight, Vec<f32>) {
    let values = rng.values(rows * cols);
    let matrix = host_matrix(rng, &values, cols, element);
    (
        backend
            .load(&[matrix], element, &mut |_| ())
            .expect("it is well formed"),
        rounded(&values, element),
    )
}

/// Bits, for exact comparison.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// `|actual - expected| <= atol + rtol * |expected|` for all.
pub(crate) fn assert_close(actual: &[f32], expected: &[f32], atol: f32, rtol: f32) {
    assert_eq!(actual.len(), expected.len());
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(
            (a - e).abs() <= atol + rtol * e.abs(),
            "element {i}: {a} instead of {e}"
        );
    }
}
