//! The operations of a step take no memory: everything was taken at start.

use bytes::Bytes;
use kernels::backend::{
    Activation, Attention, Backend, Element, Heads, HostMatrix, KvLayout, Norm, Precision,
};
use kernels::batch::Batch;
use kernels::cpu::CpuBackend;
use kernels::quantized::{Code, HostQuantized};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, counting for each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

#[expect(unsafe_code, reason = "counting allocations means being the allocator")]
// SAFETY: both calls are passed on unchanged to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: `at` came from `alloc` above, which is the system's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const NORM: Norm = Norm {
    eps: 1e-5,
    weight_offset: 0.0,
};
const HEADS: Heads = Heads {
    local_heads: 4,
    local_kv_heads: 2,
    head_dim: 16,
};
const WIDTH: usize = 64;

fn weight(cpu: &CpuBackend, rows: usize, cols: usize) -> kernels::cpu::CpuWeight {
    let data = Bytes::from(vec![0x3c; rows * cols * 2]);
    let part = HostMatrix {
        data,
        element: Element::Bf16,
        rows,
        cols,
        row_stride: cols,
    };
    cpu.load(&[part], Element::Bf16, &mut |_| ())
        .expect("it is well formed")
}

fn quantized(
    cpu: &CpuBackend,
    code: Code,
    (rows, cols): (usize, usize),
) -> kernels::cpu::CpuWeight {
    let part = HostQuantized {
        code,
        data: Bytes::from(vec![9; rows * cols]),
        rows,
        cols,
        row_stride: cols,
        inputs: Some((0..16).rev().chain(16..48).collect()),
        group_ends: vec![32, cols],
        scales: vec![0.5; 2 * rows],
        zeros: if code == Code::Int4 {
            vec![8; 2 * rows]
        } else {
            Vec::new()
        },
    };
    cpu.load_quantized(&[part], &mut |_| ())
        .expect("it is well formed")
}

/// Six tokens of one sequence and two of another.
fn two_sequences() -> Batch {
    Batch {
        token_ids: vec![1, 2, 3, 4, 5, 6, 7, 8],
        left: Vec::new(),
        positions: vec![0, 1, 2, 3, 4, 5, 0, 1],
        slots: vec![8, 9, 10, 11, 0, 1, 4, 5],
        row_starts: vec![0, 6, 8],
        context_lens: vec![6, 2],
        blocks: vec![2, 0, 1],
        block_starts: vec![0, 2, 3],
        logit_tokens: vec![5, 7],
    }
}

#[test]
fn a_step_takes_no_memory() {
    let cpu = CpuBackend::new(1, None).expect("it starts");
    let tensor = |width| cpu.allocate(8, width, Precision::Compute).expect("it fits");
    let (mut x, mut residual, mut qkv) = (tensor(WIDTH), tensor(WIDTH), tensor(HEADS.qkv_width()));
    let (mut normed, mut attended, mut gate_up) = (tensor(WIDTH), tensor(WIDTH), tensor(96));
    let (mut hidden, mut rotary) = (tensor(48), tensor(16));
    let norm = weight(&cpu, 1, WIDTH);
    let head_norm = weight(&cpu, 1, 16);
    let (table, qkv_weight) = (
        weight(&cpu, 50, WIDTH),
        weight(&cpu, HEADS.qkv_width(), WIDTH),
    );
    let (gate_weight, down) = (weight(&cpu, 96, WIDTH), weight(&cpu, WIDTH, 48));
    let codes = [Code::Int4, Code::Int8, Code::Fp8];
    let quantized_downs = codes.map(|code| quantized(&cpu, code, (WIDTH, 48)));
    let bias = weight(&cpu, 1, WIDTH);
    let layout = KvLayout {
        layers: 1,
        blocks: 4,
        block_size: 4,
        local_kv_heads: 2,
        head_dim: 16,
        element: Element::Bf16,
    };
    let mut cache = cpu.kv_cache(layout).expect("it fits");
    let mut batch = cpu.batch(8, 4, 8).expect("it fits");
    let attention = Attention {
        layer: 0,
        local_heads: 4,
        scale: 0.25,
        sliding_window: Some(5),
        logit_soft_cap: Some(9.0),
    };
    let table_values = vec![0.5; 8 * 16];
    let host = two_sequences();

    let before = ALLOCATIONS.get();
    cpu.upload(&host, &mut batch).expect("it is well formed");
    cpu.write(&table_values, &mut rotary)
        .expect("the shapes agree");
    cpu.embed(&batch, &table, 0, 2.0, &mut residual);
    cpu.rms_norm(&residual, &norm, NORM, &mut normed);
    cpu.linear(&normed, &qkv_weight, None, &mut qkv);
    cpu.head_norm(&mut qkv, HEADS, (&head_norm, &head_norm), NORM);
    cpu.rope(&batch, &rotary, HEADS, &mut qkv);
    cpu.write_kv(&batch, 0, &qkv, HEADS, &mut cache);
    cpu.attend(&batch, &attention, &qkv, &cache, &mut attended);
    cpu.add_rms_norm(&attended, &mut residual, &norm, NORM, &mut normed);
    cpu.linear(&normed, &gate_weight, None, &mut gate_up);
    cpu.gated_activation(Activation::GeluTanh, &gate_up, &mut hidden);
    for down in quantized_downs.iter().chain([&down]) {
        cpu.linear(&hidden, down, Some(&bias), &mut x);
    }
    cpu.set_rows(&mut normed, 2);
    cpu.gather_logit_rows(&batch, &x, &mut normed);
    cpu.soft_cap(30.0, &mut normed);
    let taken = ALLOCATIONS.get() - before;

    assert_eq!(taken, 0, "allocations in a step");
    assert!(
        normed
            .values()
            .iter()
            .all(|value| value.is_finite() && *value != 0.0)
    );
    // The counter counts.
    assert!(
        ALLOCATIONS.get() < {
            drop(vec![0; 9]);
            ALLOCATIONS.get()
        }
    );
}
