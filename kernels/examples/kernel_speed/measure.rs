//! Bounds, timing, and the lines that are printed.
//!
//! Invariant: what an operation is compared with was measured by the same threads in the same run.

use bytes::Bytes;
use kernels::backend::{Backend, DeviceError, Element, HostMatrix};
use kernels::cpu::{CpuBackend, CpuWeight};
use std::time::{Duration, Instant};

/// How long each operation is measured.
const SPAN: Duration = Duration::from_millis(400);
/// Fewer samples say nothing about spread.
const MIN_SAMPLES: usize = 7;
/// Shorter than this is measured as several calls.
const SHORTEST: Duration = Duration::from_micros(100);
/// A matrix that no cache holds.
const LARGE: (usize, usize) = (16_384, 16_384);
/// A matrix that stays in the caches of its cores: half a MiB for each thread.
const SMALL_BYTES_PER_THREAD: usize = 512 << 10;
/// Data of at most this size for each thread counts as cached.
const CACHED_BYTES_PER_THREAD: f64 = 1.5 * (1 << 20) as f64;

/// What the machine does at most with these threads, per second.
pub(crate) struct Bounds {
    memory: f64,
    cache: f64,
    flops: f64,
    /// Of products of bfloat16 matrices.
    bf16_flops: f64,
}

/// Seconds of one call: the middle of all samples, and how far the middle half of them is apart.
#[derive(Clone, Copy)]
pub(crate) struct Time {
    median: f64,
    spread: f64,
    least: f64,
}

/// What an operation moves and computes.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    /// Bytes read and written.
    pub(crate) bytes: f64,
    /// Of them, those that come from memory at each call however small they are.
    pub(crate) from_memory: bool,
    /// Multiplications and additions.
    pub(crate) flops: f64,
    /// Whether these are products with a matrix of bfloat16.
    pub(crate) is_bf16: bool,
}

/// A device with its bounds, and how results are shown.
pub(crate) struct Bench<'a> {
    pub(crate) cpu: &'a CpuBackend,
    threads: f64,
    bounds: Bounds,
    only: String,
    json: bool,
}

impl<'a> Bench<'a> {
    /// Of a backend with so many threads.
    pub(crate) fn new(
        (cpu, threads): (&'a CpuBackend, usize),
        only: String,
        json: bool,
    ) -> Result<Self, DeviceError> {
        let mut per_round = 0;
        let time_of_one = time(|| per_round = cpu.multiply_in_registers(1 << 18));
        let flops = 2.0 * per_round as f64 / time_of_one.least;
        let time_on_tiles = time(|| per_round = cpu.multiply_on_tiles(1 << 10));
        let bf16_flops = (2.0 * per_round as f64 / time_on_tiles.least).max(flops);
        let rate = |shape: (usize, usize)| -> Result<f64, DeviceError> {
            let matrix = weight(cpu, shape)?;
            let mut bytes = 0;
            let time = time(|| bytes = cpu.read_weight(&matrix));
            Ok(bytes as f64 / time.least)
        };
        let small_rows = threads * SMALL_BYTES_PER_THREAD / (2 * 1024);
        let bounds = Bounds {
            memory: rate(LARGE)?,
            cache: rate((small_rows, 1024))?,
            flops,
            bf16_flops,
        };
        Ok(Self {
            cpu,
            threads: threads as f64,
            bounds,
            only,
            json,
        })
    }

    pub(crate) fn bounds_line(&self, device: &str) -> String {
        let Bounds {
            memory,
            cache,
            flops,
            bf16_flops,
        } = &self.bounds;
        let (memory, cache) = (memory / 1e9, cache / 1e9);
        let (flops, bf16_flops) = (flops / 1e9, bf16_flops / 1e9);
        if self.json {
            return format!(
                "{{\"what\": \"bounds\", \"device\": \"{device}\", \"read_gb_per_s\": {memory:.2}, \
                 \"cache_gb_per_s\": {cache:.2}, \"gflop_per_s\": {flops:.1}, \
                 \"bf16_gflop_per_s\": {bf16_flops:.1}}}"
            );
        }
        format!(
            "{device}: {memory:.1} GB/s from memory, {cache:.0} GB/s from the cores' caches, \
             {flops:.0} GFLOP/s of f32 multiply-adds in registers, {bf16_flops:.0} of bfloat16\n"
        )
    }

    pub(crate) fn head(&self) {
        if !self.json {
            println!(
                "{:<18}{:<26}{:>11}{:>8}{:>9}{:>10}  of the bound",
                "operation", "shape", "median us", "spread", "GB/s", "GFLOP/s"
            );
        }
    }

    /// Whether an operation was asked for.
    pub(crate) fn wants(&self, operation: &str) -> bool {
        operation.contains(&self.only)
    }

    /// Times `call` and prints a line.
    pub(crate) fn measure(&self, operation: &str, shape: &str, work: Work, call: impl FnMut()) {
        if !self.wants(operation) {
            return;
        }
        let time = time(call);
        let cached = !work.from_memory && work.bytes <= CACHED_BYTES_PER_THREAD * self.threads;
        let (place, bandwidth) = if cached {
            ("cache", self.bounds.cache)
        } else {
            ("memory", self.bounds.memory)
        };
        let flops = if work.is_bf16 {
            self.bounds.bf16_flops
        } else {
            self.bounds.flops
        };
        let (moving, computing) = (work.bytes / bandwidth, work.flops / flops);
        let (bound, least) = if moving > computing {
            (place, moving)
        } else {
            ("arithmetic", computing)
        };
        let Time { median, spread, .. } = time;
        let (us, share) = (median * 1e6, 100.0 * least / median);
        let (gb, gflop) = (work.bytes / median / 1e9, work.flops / median / 1e9);
        if self.json {
            println!(
                "{{\"what\": \"kernel\", \"operation\": \"{operation}\", \"shape\": \"{shape}\", \
                 \"median_us\": {us:.2}, \"spread_us\": {:.2}, \"gb_per_s\": {gb:.2}, \
                 \"gflop_per_s\": {gflop:.2}, \"bound\": \"{bound}\", \"percent\": {share:.1}}}",
                spread * 1e6
            );
            return;
        }
        let spread = format!("±{:.0} %", 50.0 * spread / median);
        println!(
            "{operation:<18}{shape:<26}{us:>11.1}{spread:>8}{gb:>9.1}{gflop:>10.1}{share:>6.0} % of {bound}"
        );
    }
}

/// `[outputs, inputs]` of small normal values in bf16.
pub(crate) fn weight(
    cpu: &CpuBackend,
    (outputs, inputs): (usize, usize),
) -> Result<CpuWeight, DeviceError> {
    let weight = HostMatrix {
        data: Bytes::from(vec![0x3c; outputs * inputs * 2]),
        element: Element::Bf16,
        rows: outputs,
        cols: inputs,
        row_stride: inputs,
    };
    cpu.load(&[weight], Element::Bf16, &mut |_| ())
}

/// Calls for a while, and sums up what a call took.
pub(crate) fn time(mut call: impl FnMut()) -> Time {
    call();
    let begun = Instant::now();
    call();
    let calls = SHORTEST.as_secs_f64() / begun.elapsed().as_secs_f64().max(1e-9);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a small count above 0"
    )]
    let calls = calls.ceil().clamp(1.0, 1e6) as u32;
    let begun = Instant::now();
    let mut samples = Vec::new();
    while samples.len() < MIN_SAMPLES || begun.elapsed() < SPAN {
        let sample = Instant::now();
        for _ in 0..calls {
            call();
        }
        samples.push(sample.elapsed().as_secs_f64() / f64::from(calls));
    }
    samples.sort_by(f64::total_cmp);
    let quarter = |quarters: usize| samples[quarters * (samples.len() - 1) / 4];
    Time {
        median: quarter(2),
        spread: quarter(3) - quarter(1),
        least: samples[0],
    }
}
