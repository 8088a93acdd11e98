//! The operations, with the shapes of Qwen2.5-0.5B: what each reads, writes and computes.
//!
//! Weights and KV blocks come from memory, as in a model, whose other layers have filled the caches meanwhile; what a step
//! hands from one operation to the next does not.

use crate::measure::{Bench, Work, weight};
use kernels::backend::{
    Activation, Attention, Backend, DeviceError, Element, Heads, KvLayout, Norm, Precision,
};
use kernels::batch::Batch;
use kernels::cpu::CpuTensor;
use kernels::sampling::{Choice, SampleParams, SampleRequest};

const HIDDEN: usize = 896;
const INTERMEDIATE: usize = 4864;
const VOCAB: usize = 151_936;
const HEADS: Heads = Heads {
    local_heads: 14,
    local_kv_heads: 2,
    head_dim: 64,
};
const BLOCK_SIZE: usize = 16;
/// Copies of a weight are used in turn until they are more than a cache holds.
const UNCACHED_BYTES: usize = 256 << 20;
const F32: f64 = 4.0;
const NORM: Norm = Norm {
    eps: 1e-6,
    weight_offset: 0.0,
};

fn narrow(value: usize) -> u32 {
    u32::try_from(value).expect("sizes here are small")
}

/// Work on data that is in the cache where it fits.
fn cached(bytes: f64, flops: f64) -> Work {
    Work {
        bytes,
        from_memory: false,
        flops,
        is_bf16: false,
    }
}

/// An activation matrix of small values.
fn tensor(bench: &Bench<'_>, rows: usize, width: usize) -> Result<CpuTensor, DeviceError> {
    let mut tensor = bench.cpu.allocate(rows, width, Precision::Compute)?;
    let values: Vec<f32> = (0..rows * width)
        .map(|i| (i % 37) as f32 * 0.01 - 0.2)
        .collect();
    bench.cpu.write(&values, &mut tensor)?;
    Ok(tensor)
}

pub(crate) fn products(bench: &Bench<'_>) -> Result<(), DeviceError> {
    let shapes = [
        ("qkv", HEADS.qkv_width(), HIDDEN),
        ("o", HIDDEN, HIDDEN),
        ("gate_up", 2 * INTERMEDIATE, HIDDEN),
        ("down", HIDDEN, INTERMEDIATE),
        ("head", VOCAB, HIDDEN),
    ];
    if !bench.wants("linear") {
        return Ok(());
    }
    for (name, outputs, inputs) in shapes {
        let bytes = 2 * outputs * inputs;
        let copies =
            (0..UNCACHED_BYTES.div_ceil(bytes)).map(|_| weight(bench.cpu, (outputs, inputs)));
        let copies = copies.collect::<Result<Vec<_>, _>>()?;
        for rows in [1, 8, 16, 512] {
            // A prompt needs the head for its last token only.
            if rows > 16 && outputs == VOCAB {
                continue;
            }
            let x = tensor(bench, rows, inputs)?;
            let mut out = tensor(bench, rows, outputs)?;
            let mut turn = copies.iter().cycle();
            let work = Work {
                bytes: bytes as f64 + F32 * (rows * (inputs + outputs)) as f64,
                from_memory: true,
                flops: 2.0 * (rows * inputs * outputs) as f64,
                is_bf16: true,
            };
            let shape = format!("{name} [{rows}, {inputs}] {outputs}");
            bench.measure("linear", &shape, work, || {
                let weight = turn.next().expect("a cycle has no end");
                bench.cpu.linear(&x, weight, None, &mut out);
            });
        }
    }
    Ok(())
}

/// `sequences` rows of `new` tokens each at the end of a context.
fn batch_of(sequences: usize, new: usize, context: usize) -> Batch {
    let blocks = context.div_ceil(BLOCK_SIZE);
    let tokens = sequences * new;
    let position = |t: usize| context - new + t % new;
    Batch {
        token_ids: (0..tokens).map(|t| narrow(t * 7919 % VOCAB)).collect(),
        left: Vec::new(),
        positions: (0..tokens).map(|t| narrow(position(t))).collect(),
        slots: (0..tokens)
            .map(|t| narrow(t / new * blocks * BLOCK_SIZE + position(t)))
            .collect(),
        row_starts: (0..=sequences).map(|row| narrow(row * new)).collect(),
        context_lens: vec![narrow(context); sequences],
        blocks: (0..sequences * blocks).map(narrow).collect(),
        block_starts: (0..=sequences).map(|row| narrow(row * blocks)).collect(),
        logit_tokens: (1..=sequences).map(|row| narrow(row * new - 1)).collect(),
    }
}

pub(crate) fn attention(bench: &Bench<'_>) -> Result<(), DeviceError> {
    for (sequences, new, context) in [
        (1, 1, 512),
        (1, 1, 8192),
        (1, 1, 32_768),
        (16, 1, 512),
        (16, 1, 4096),
        (1, 512, 512),
        (1, 512, 4096),
    ] {
        attend(bench, sequences, new, context)?;
    }
    Ok(())
}

fn attend(
    bench: &Bench<'_>,
    sequences: usize,
    new: usize,
    context: usize,
) -> Result<(), DeviceError> {
    if !bench.wants("attend") && !bench.wants("write_kv") {
        return Ok(());
    }
    let cpu = bench.cpu;
    let batch = batch_of(sequences, new, context);
    let layout = KvLayout {
        // Layers are used in turn until they are more than a cache holds.
        layers: 1,
        blocks: batch.blocks.len(),
        block_size: BLOCK_SIZE,
        local_kv_heads: HEADS.local_kv_heads,
        head_dim: HEADS.head_dim,
        element: Element::F32,
    };
    let layers = (UNCACHED_BYTES / (layout.blocks * layout.block_bytes())).clamp(1, 24);
    let layout = KvLayout { layers, ..layout };
    let mut cache = cpu.kv_cache(layout)?;
    // Pages that were never written would all be the same page of zeros, read from the cache.
    let every = batch_of(1, layout.blocks * BLOCK_SIZE, layout.blocks * BLOCK_SIZE);
    let filled = tensor(bench, every.num_tokens(), HEADS.qkv_width())?;
    let mut device = cpu.batch(every.num_tokens(), sequences, layout.blocks)?;
    cpu.upload(&every, &mut device)?;
    for layer in 0..layers {
        cpu.write_kv(&device, layer, &filled, HEADS, &mut cache);
    }

    cpu.upload(&batch, &mut device)?;
    let tokens = batch.num_tokens();
    let qkv = tensor(bench, tokens, HEADS.qkv_width())?;
    let width = HEADS.local_heads * HEADS.head_dim;
    let mut out = tensor(bench, tokens, width)?;
    let seen: usize = batch.positions.iter().map(|p| *p as usize + 1).sum();
    let shape = format!("{sequences} x {new} of {context}");
    let work = Work {
        bytes: (layout.blocks * layout.block_bytes() / layers) as f64,
        from_memory: true,
        flops: 4.0 * (seen * width) as f64,
        is_bf16: false,
    };
    let mut layer = 0;
    bench.measure("attend", &shape, work, || {
        let attention = Attention {
            layer,
            local_heads: HEADS.local_heads,
            scale: 0.125,
            sliding_window: None,
            logit_soft_cap: None,
        };
        cpu.attend(&device, &attention, &qkv, &cache, &mut out);
        layer = (layer + 1) % layers;
    });
    let moved = 4.0 * F32 * (tokens * HEADS.local_kv_heads * HEADS.head_dim) as f64;
    bench.measure("write_kv", &shape, cached(moved, 0.0), || {
        cpu.write_kv(&device, 0, &qkv, HEADS, &mut cache);
    });
    Ok(())
}

/// Norms, activation and soft cap: elements of one row after the other.
pub(crate) fn by_element(bench: &Bench<'_>) -> Result<(), DeviceError> {
    let cpu = bench.cpu;
    let norm = weight(cpu, (1, HIDDEN))?;
    let head = weight(cpu, (1, HEADS.head_dim))?;
    for rows in [1, 16, 512] {
        let x = tensor(bench, rows, HIDDEN)?;
        let (mut residual, mut out) = (tensor(bench, rows, HIDDEN)?, tensor(bench, rows, HIDDEN)?);
        let elements = (rows * HIDDEN) as f64;
        let shape = format!("[{rows}, {HIDDEN}]");
        let work = cached(2.0 * F32 * elements, 4.0 * elements);
        bench.measure("rms_norm", &shape, work, || {
            cpu.rms_norm(&x, &norm, NORM, &mut out);
        });
        let work = cached(4.0 * F32 * elements, 5.0 * elements);
        bench.measure("add_rms_norm", &shape, work, || {
            cpu.add_rms_norm(&x, &mut residual, &norm, NORM, &mut out);
            // Sums that grow call after call would become infinite, which is slow.
            cpu.soft_cap(1.0, &mut residual);
        });
        let mut qkv = tensor(bench, rows, HEADS.qkv_width())?;
        let width = (HEADS.local_heads + HEADS.local_kv_heads) * HEADS.head_dim;
        let elements = (rows * width) as f64;
        let shape = format!("[{rows}, {width}]");
        let work = cached(2.0 * F32 * elements, 4.0 * elements);
        bench.measure("head_norm", &shape, work, || {
            cpu.head_norm(&mut qkv, HEADS, (&head, &head), NORM);
        });
        let gate_up = tensor(bench, rows, 2 * INTERMEDIATE)?;
        let mut out = tensor(bench, rows, INTERMEDIATE)?;
        let elements = (rows * INTERMEDIATE) as f64;
        let shape = format!("[{rows}, 2 x {INTERMEDIATE}]");
        for (name, activation) in [("silu", Activation::Silu), ("gelu", Activation::GeluTanh)] {
            // An exponential is some ten multiply-adds.
            let work = cached(3.0 * F32 * elements, 24.0 * elements);
            bench.measure(&format!("gated {name}"), &shape, work, || {
                cpu.gated_activation(activation, &gate_up, &mut out);
            });
        }
        let work = cached(2.0 * F32 * elements, 20.0 * elements);
        let shape = format!("[{rows}, {INTERMEDIATE}]");
        bench.measure("soft_cap", &shape, work, || cpu.soft_cap(30.0, &mut out));
    }
    Ok(())
}

/// Operations that follow a batch's index arrays.
pub(crate) fn positions(bench: &Bench<'_>) -> Result<(), DeviceError> {
    let cpu = bench.cpu;
    let table = weight(cpu, (VOCAB, HIDDEN))?;
    let angles = tensor(bench, 4096, HEADS.head_dim)?;
    for rows in [1, 16, 512] {
        let batch = batch_of(1, rows, rows.max(1024));
        let mut device = cpu.batch(rows, 1, batch.blocks.len())?;
        cpu.upload(&batch, &mut device)?;
        let shape = format!("[{rows}, {HIDDEN}]");
        let elements = (rows * HIDDEN) as f64;
        let mut x = tensor(bench, rows, HIDDEN)?;
        // Rows of the table lie far apart and come from memory, the result does not leave the cache.
        let work = Work {
            bytes: 2.0 * elements,
            from_memory: true,
            flops: elements,
            is_bf16: false,
        };
        bench.measure("embed", &shape, work, || {
            cpu.embed(&device, &table, 0, 1.0, &mut x);
        });
        let mut qkv = tensor(bench, rows, HEADS.qkv_width())?;
        let width = (HEADS.local_heads + HEADS.local_kv_heads) * HEADS.head_dim;
        let elements = (rows * width) as f64;
        let work = cached(2.0 * F32 * elements, 3.0 * elements);
        bench.measure("rope", &format!("[{rows}, {width}]"), work, || {
            cpu.rope(&device, &angles, HEADS, &mut qkv);
        });
    }
    for rows in [1, 16] {
        let batch = batch_of(rows, 32, 32);
        let mut device = cpu.batch(batch.num_tokens(), rows, batch.blocks.len())?;
        cpu.upload(&batch, &mut device)?;
        let x = tensor(bench, batch.num_tokens(), HIDDEN)?;
        let mut out = tensor(bench, rows, HIDDEN)?;
        let work = cached(2.0 * F32 * (rows * HIDDEN) as f64, 0.0);
        bench.measure(
            "gather_logit_rows",
            &format!("{rows} of {}", rows * 32),
            work,
            || {
                cpu.gather_logit_rows(&device, &x, &mut out);
            },
        );
    }
    Ok(())
}

pub(crate) fn sampling(bench: &Bench<'_>) -> Result<(), DeviceError> {
    let ways = [
        ("sample greedy", 0.0, 1.0, None),
        ("sample top-p 0.9", 1.0, 0.9, None),
        ("sample logprobs 5", 1.0, 1.0, Some(5)),
    ];
    for (name, temperature, top_p, logprobs) in ways {
        if !bench.wants(name) {
            continue;
        }
        for rows in [1, 16] {
            let request = |row: usize| SampleRequest {
                row,
                choice: Choice::Sample(Box::new(SampleParams {
                    temperature,
                    top_k: 0,
                    top_p,
                    min_p: 0.0,
                    presence_penalty: 0.0,
                    frequency_penalty: 0.0,
                    repetition_penalty: 1.0,
                    seed: 1,
                    position: narrow(row),
                    logit_bias: Vec::new(),
                    banned: Vec::new(),
                    allowed: Vec::new(),
                    prompt: Vec::new(),
                    generated: Vec::new(),
                    last: None,
                })),
                logprobs,
            };
            let requests: Vec<_> = (0..rows).map(request).collect();
            let mut logits = bench.cpu.allocate(rows, VOCAB, Precision::F32)?;
            // Spread as a model's are: a few likely tokens, many that are not.
            let value = |i: usize| ((i * 7919 % 10_007) as f32 / 10_007.0).powi(8) * 20.0;
            let values: Vec<f32> = (0..rows * VOCAB).map(value).collect();
            bench.cpu.write(&values, &mut logits)?;
            let bytes = F32 * (rows * VOCAB) as f64;
            let mut failed = None;
            bench.measure(
                name,
                &format!("[{rows}, {VOCAB}]"),
                cached(bytes, 0.0),
                || {
                    let result = bench.cpu.sample(&mut logits, VOCAB, &requests);
                    failed = result.err().or(failed.take());
                },
            );
            if let Some(error) = failed {
                return Err(error);
            }
        }
    }
    Ok(())
}
