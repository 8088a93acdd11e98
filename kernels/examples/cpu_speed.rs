//! Prints how fast the CPU backend multiplies and attends, next to how fast this machine reads memory.
//!
//! `cargo run --release -p kernels --example cpu_speed [-- THREADS]`. Each line gives the best wall time and what one second
//! of CPU time does, which holds on a busy machine too. It judges nothing: the tests decide what is right.
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
use kernels::cpu::CpuBackend;
use rustix::time::{ClockId, clock_gettime};
use std::hint::black_box;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = std::env::args()
        .nth(1)
        .map_or(Ok(1), |count| count.parse())?;
    let cpu = CpuBackend::new(threads, None)?;
    println!("{}", cpu.name());
    read_memory();
    for element in [Element::Bf16, Element::F16, Element::F32] {
        println!("linear, {element:?} weights [8192, 4096]");
        for rows in [1, 2, 4, 8, 32, 256] {
            linear(&cpu, element, (rows, 4096, 8192))?;
        }
    }
    println!("linear, the size of the built-in model, Bf16 weights [768, 256]");
    for rows in [1, 16, 64] {
        linear(&cpu, Element::Bf16, (rows, 256, 768))?;
    }
    println!("attention, 32 heads of 128 over 8 key heads, Bf16");
    for (sequences, new, context) in [(1, 1, 4096), (16, 1, 512), (1, 256, 256), (1, 256, 2048)] {
        attend(&cpu, sequences, new, context)?;
    }
    Ok(())
}

/// Reads a quarter of a GiB on one thread, for comparison.
fn read_memory() {
    let words = vec![1_u64; 32 << 20];
    let (_, cpu) = time(|| {
        let mut sums = [0_u64; 16];
        for block in words.as_chunks::<16>().0 {
            for (sum, word) in sums.iter_mut().zip(block) {
                *sum ^= word;
            }
        }
        black_box(sums);
    });
    println!(
        "reading memory: {:.1} GB/s a core",
        size_of_val(&*words) as f64 / cpu / 1e9
    );
}

fn linear(
    cpu: &CpuBackend,
    element: Element,
    (rows, inputs, outputs): (usize, usize, usize),
) -> Result<(), DeviceError> {
    let bytes = outputs * inputs * element.bytes();
    let weight = HostMatrix {
        data: Bytes::from(vec![0x3c; bytes]),
        element,
        rows: outputs,
        cols: inputs,
        row_stride: inputs,
    };
    let weight = cpu.load(&[weight], element, &mut |_| ())?;
    let x = cpu.allocate(rows, inputs, Precision::Compute)?;
    let mut out = cpu.allocate(rows, outputs, Precision::Compute)?;
    let (wall, seconds) = time(|| cpu.linear(&x, &weight, None, &mut out));
    println!(
        "  {rows:4} rows: {:9.1} us, a core: {:6.1} GB/s of weights, {:6.1} GFLOP/s",
        wall * 1e6,
        bytes as f64 / seconds / 1e9,
        2.0 * (rows * inputs * outputs) as f64 / seconds / 1e9
    );
    Ok(())
}

/// `sequences` rows of `new` tokens at the end of `context`.
fn attend(
    cpu: &CpuBackend,
    sequences: usize,
    new: usize,
    context: usize,
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
        element: Element::Bf16,
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
    let (wall, seconds) = time(|| cpu.attend(&device, &attention, &qkv, &cache, &mut out));
    let seen: usize = batch
        .positions
        .iter()
        .map(|&position| position as usize + 1)
        .sum();
    println!(
        "  {sequences:2} x {new:3} of {context:4}: {:9.1} us, a core: {:6.1} GFLOP/s, {:5.1} GB/s of keys and values",
        wall * 1e6,
        4.0 * (seen * 32 * 128) as f64 / seconds / 1e9,
        (sequences * blocks * layout.block_bytes()) as f64 / seconds / 1e9
    );
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
