//! Prints how fast the CPU backend multiplies and attends, next to what this machine can do at most.
//!
//! `cargo run --release -p kernels --example cpu_speed [-- THREADS [ISA]]`. Each line gives the best wall time, what one second
//! of CPU time does, which holds on a busy machine too, and its share of the bound: the weights or keys and values at
//! the speed of memory, or the products at the speed of the arithmetic units, whichever takes longer, both
//! measured here. It judges nothing: the tests decide what is right.
#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "it measures and prints"
)]

use bytes::Bytes;
use kernels::backend::{
    Attention, Backend, DeviceError, Element, Heads, HostMatrix, KvLayout, Precision,
};
use kernels::batch::Batch;
use kernels::cpu::{CpuBackend, CpuWeight};
use rustix::time::{ClockId, clock_gettime};
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = std::env::args()
        .nth(1)
        .map_or(Ok(1), |count| count.parse())?;
    let isa = std::env::args().nth(2);
    let cpu = CpuBackend::with_isa(threads, None, isa.as_deref().unwrap_or("auto"))?;
    println!("{}", cpu.name());
    let bounds = Bounds::measure(&cpu)?;
    for element in [Element::Bf16, Element::F16, Element::F32] {
        println!("linear, {element:?} weights [8192, 4096]");
        for rows in [1, 4, 8, 16, 32, 256] {
            linear(&cpu, &bounds, element, (rows, 4096, 8192))?;
        }
    }
    println!("linear, Bf16 weights [896, 4864]");
    for rows in [1, 8, 16, 512] {
        linear(&cpu, &bounds, Element::Bf16, (rows, 4864, 896))?;
    }
    println!("linear, the size of the built-in model, Bf16 weights [768, 256], from the cache");
    for rows in [1, 16, 64] {
        linear(&cpu, &bounds, Element::Bf16, (rows, 256, 768))?;
    }
    for element in [Element::F32, Element::Bf16, Element::F16, Element::Fp8] {
        println!("attention, 32 heads of 128 over 8 key heads, {element:?}");
        for sizes in [(1, 1, 4096), (16, 1, 512), (1, 256, 256), (1, 256, 2048)] {
            attend(&cpu, &bounds, element, sizes)?;
        }
    }
    Ok(())
}

/// What one core can do in a second of CPU time.
struct Bounds {
    bytes: f64,
    flops: f64,
    /// The same with weights of bfloat16.
    bf16_flops: f64,
}

impl Bounds {
    fn measure(cpu: &CpuBackend) -> Result<Self, DeviceError> {
        let weight = weight(cpu, Element::Bf16, (16384, 8192))?;
        let mut bytes = 0;
        let (_, seconds) = time(|| bytes = cpu.read_weight(&weight));
        let bytes = bytes as f64 / seconds;
        let mut products = 0;
        let (_, seconds) = time(|| products = cpu.multiply_in_registers(1 << 20));
        let flops = 2.0 * products as f64 / seconds;
        println!(
            "bounds of a core: {:.1} GB/s from memory, {:.1} GFLOP/s in registers",
            bytes / 1e9,
            flops / 1e9
        );
        let (_, seconds) = time(|| products = cpu.multiply_on_tiles(1 << 10));
        let bf16_flops = if products > 0 {
            let on_tiles = 2.0 * products as f64 / seconds;
            println!("  {:.1} GFLOP/s on tiles", on_tiles / 1e9);
            on_tiles
        } else {
            flops
        };
        Ok(Self {
            bytes,
            flops,
            bf16_flops,
        })
    }

    /// Prints a line: wall time, and rates of one core over `seconds` of CPU time.
    fn report(
        &self,
        what: &str,
        (wall, seconds): (f64, f64),
        (bytes, flops, most): (f64, f64, f64),
    ) {
        let (reading, computing) = (bytes / self.bytes, flops / most);
        let (bound, least) = if reading > computing {
            ("memory", reading)
        } else {
            ("arithmetic", computing)
        };
        println!(
            "  {what}: {:9.1} us, a core: {:5.1} GB/s, {:6.1} GFLOP/s, {:3.0} % of {bound}",
            wall * 1e6,
            bytes / seconds / 1e9,
            flops / seconds / 1e9,
            100.0 * least / seconds
        );
    }
}

/// `[outputs, inputs]` of small values.
fn weight(
    cpu: &CpuBackend,
    element: Element,
    (outputs, inputs): (usize, usize),
) -> Result<CpuWeight, DeviceError> {
    let weight = HostMatrix {
        data: Bytes::from(vec![0x3c; outputs * inputs * element.bytes()]),
        element,
        rows: outputs,
        cols: inputs,
        row_stride: inputs,
    };
    cpu.load(&[weight], element, &mut |_| ())
}

fn linear(
    cpu: &CpuBackend,
    bounds: &Bounds,
    element: Element,
    (rows, inputs, outputs): (usize, usize, usize),
) -> Result<(), DeviceError> {
    let weight = weight(cpu, element, (outputs, inputs))?;
    let x = cpu.allocate(rows, inputs, Precision::Compute)?;
    let mut out = cpu.allocate(rows, outputs, Precision::Compute)?;
    let times = time(|| cpu.linear(&x, &weight, None, &mut out));
    let bytes = (outputs * inputs * element.bytes()) as f64;
    let flops = 2.0 * (rows * inputs * outputs) as f64;
    let most = match element {
        Element::Bf16 => bounds.bf16_flops,
        _ => bounds.flops,
    };
    bounds.report(&format!("{rows:4} rows"), times, (bytes, flops, most));
    Ok(())
}

/// `sequences` rows of `new` tokens at the end of `context`.
fn attend(
    cpu: &CpuBackend,
    bounds: &Bounds,
    element: Element,
    (sequences, new, context): (usize, usize, usize),
) -> Result<(), DeviceError> {
    let heads = Heads {
        local_heads: 32,
        local_kv_heads: 8,
        head_dim: 128,
    };
    let blocks = context / 16;
    let layout = KvLayout {
        layers: 1,
        blocks: sequences * blocks,
        block_size: 16,
        local_kv_heads: 8,
        head_dim: 128,
        element,
    };
    let narrow = |value: usize| u32::try_from(value).expect("small sizes");
    let tokens = sequences * new;
    let batch = Batch {
        token_ids: vec![0; tokens],
        positions: (0..tokens)
            .map(|t| narrow(context - new + t % new))
            .collect(),
        slots: (0..tokens)
            .map(|t| narrow(t / new * context + context - new + t % new))
            .collect(),
        row_starts: (0..=sequences).map(|row| narrow(row * new)).collect(),
        context_lens: vec![narrow(context); sequences],
        blocks: (0..sequences * blocks).map(narrow).collect(),
        block_starts: (0..=sequences).map(|row| narrow(row * blocks)).collect(),
        logit_tokens: Vec::new(),
    };
    let mut device = cpu.batch(tokens, sequences, sequences * blocks)?;
    cpu.upload(&batch, &mut device)?;
    let mut cache = cpu.kv_cache(layout)?;
    let qkv = cpu.allocate(tokens, heads.qkv_width(), Precision::Compute)?;
    // The system's page of zeros would be read from the cache: write every block once.
    let mut every = cpu.batch(layout.blocks * 16, layout.blocks * 16, 0)?;
    let all = narrow(layout.blocks * 16);
    let fill = Batch {
        token_ids: vec![0; all as usize],
        positions: vec![0; all as usize],
        slots: (0..all).collect(),
        row_starts: (0..=all).collect(),
        context_lens: vec![1; all as usize],
        block_starts: vec![0; all as usize + 1],
        ..Batch::default()
    };
    cpu.upload(&fill, &mut every)?;
    let zeros = cpu.allocate(all as usize, heads.qkv_width(), Precision::Compute)?;
    cpu.write_kv(&every, 0, &zeros, heads, &mut cache);

    let attention = Attention {
        layer: 0,
        local_heads: 32,
        scale: 0.1,
        sliding_window: None,
        logit_soft_cap: None,
    };
    let mut out = cpu.allocate(tokens, 32 * 128, Precision::Compute)?;
    let times = time(|| cpu.attend(&device, &attention, &qkv, &cache, &mut out));
    let seen: usize = batch
        .positions
        .iter()
        .map(|&position| position as usize + 1)
        .sum();
    let bytes = (sequences * blocks * layout.block_bytes()) as f64;
    let flops = 4.0 * (seen * 32 * 128) as f64;
    let what = format!("{sequences:2} x {new:3} of {context:4}");
    bounds.report(&what, times, (bytes, flops, bounds.flops));
    Ok(())
}

/// Best wall time and best CPU time of one call over about a second, in seconds.
fn time(mut f: impl FnMut()) -> (f64, f64) {
    let cpu_now = || {
        let now = clock_gettime(ClockId::ProcessCPUTime);
        now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
    };
    let begin = Instant::now();
    let (mut wall, mut cpu) = (f64::INFINITY, f64::INFINITY);
    f();
    while wall.is_infinite() || begin.elapsed().as_secs_f64() < 0.5 {
        // Several calls at a time where one is too short for the clock.
        let (start, cpu_start) = (Instant::now(), cpu_now());
        let mut calls = 0;
        while calls < 1 || start.elapsed().as_secs_f64() < 1e-3 {
            f();
            calls += 1;
        }
        wall = wall.min(start.elapsed().as_secs_f64() / f64::from(calls));
        cpu = cpu.min((cpu_now() - cpu_start) / f64::from(calls));
    }
    (wall, cpu)
}
