//! Products of quantised weights whose epilogue is a gated activation, against the operations one after the other.

use super::{code_tiles, float8_tiles};
use crate::backend::{Activation, Backend, Element, FeedForward, Precision};
use crate::cpu::quantized::Part;
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::Isa;
use crate::cpu::simd::amx::TileUnit;
use crate::cpu::simd::amx::tests::Model;
use crate::cpu::weight::Values;
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use crate::quantized::Code;
use crate::testing::{Rng, bits, quantized, tensor, weight};

const CODES: [Code; 3] = [Code::Int8, Code::Int4, Code::Fp8];

fn backend(threads: usize) -> CpuBackend {
    let mut cpu = CpuBackend::new(threads, None).unwrap();
    cpu.scratch = Scratch::of(threads).with_tiles().unwrap();
    cpu.threads.inline_cost = 0;
    cpu
}

fn part(w: &CpuWeight) -> &Part {
    match w.values() {
        Values::Quantized(quantized) => &quantized.parts()[0],
        _ => panic!("it is quantised"),
    }
}

fn gated<U: TileUnit>(
    on: (&CpuBackend, U),
    x: &CpuTensor,
    w: &CpuWeight,
    epilogue: (Option<&CpuWeight>, Activation),
    out: &mut CpuTensor,
) -> bool {
    match part(w) {
        Part::Codes(codes) => code_tiles::gated(on, x, codes, epilogue, out),
        Part::Floats(packed) => float8_tiles::gated(on, x, packed, epilogue, out),
    }
}

fn check<U: TileUnit>(unit: U, seed: u64) {
    let mut rng = Rng::new(seed);
    let mut most_inputs = 0;
    // One block; several; rows with a rest; several parts of the rows, because there are many or activations do not stay in
    // the cache.
    for (rows, inputs, n) in [
        (128, 64, 32),
        (150, 700, 96),
        (570, 90, 64),
        (600, 1800, 160),
    ] {
        for code in CODES {
            let cpu = backend(rng.pick(&[1, 3]));
            let activation = rng.pick(&[Activation::Silu, Activation::GeluTanh]);
            let w = quantized(&mut rng, code, (2 * n, inputs));
            let w = cpu.load_quantized(&[w], &mut |_| ()).unwrap();
            let (bias, _) = weight(&mut rng, &cpu, (1, 2 * n), Element::Bf16);
            let bias = rng.pick(&[None, Some(&bias)]);
            println!(
                "{code:?}: {rows} x {inputs} x 2 * {n}, {activation:?}, bias: {}",
                bias.is_some()
            );
            let mut x = rng.values(rows * inputs);
            x[rng.within(0..rows * inputs)] = rng.pick(&[0.0, f32::INFINITY, f32::NAN]);
            let x = tensor(&cpu, &x, inputs);
            let allocate = |width| cpu.allocate(rows, width, Precision::Compute).unwrap();
            let [mut both, mut expected, mut actual] = [2 * n, n, n].map(allocate);
            match part(&w) {
                Part::Codes(w) => code_tiles::linear((&cpu, unit), &x, (w, 0), bias, &mut both),
                Part::Floats(w) => float8_tiles::linear((&cpu, unit), &x, (w, 0), bias, &mut both),
            }
            cpu.gated_activation(activation, &both, &mut expected);
            if !gated((&cpu, unit), &x, &w, (bias, activation), &mut actual) {
                // Small groups of so many columns do not stay in the cache.
                assert!(inputs > 1000);
                continue;
            }
            most_inputs = most_inputs.max(inputs);
            assert_eq!(bits(actual.values()), bits(expected.values()));
        }
    }
    assert!(most_inputs > 1000);
}

#[test]
fn tiles_in_plain_rust_give_the_bits_of_two_operations() {
    check(Model, 31);
}

#[test]
fn the_instructions_give_the_bits_of_two_operations() {
    match Isa::detect().tiles() {
        Some(amx) => check(amx, 32),
        None => println!("skipped: this CPU has no tiles"),
    }
}

/// The whole layer, as the backend is asked for it, whatever its instruction set.
#[test]
fn a_layer_has_the_bits_of_its_operations() {
    let mut rng = Rng::new(33);
    for cpu in crate::testing::backends() {
        for code in CODES {
            let (rows, inputs, n) = (rng.pick(&[3, 140]), 70, 64);
            let mut load = |shape| {
                let part = quantized(&mut rng, code, shape);
                cpu.load_quantized(&[part], &mut |_| ()).unwrap()
            };
            let (gate_up, down) = (load((2 * n, inputs)), load((50, n)));
            let x = tensor(&cpu, &rng.values(rows * inputs), inputs);
            let allocate = |width| cpu.allocate(rows, width, Precision::Compute).unwrap();
            let layer = FeedForward {
                gate_up: (&gate_up, None),
                activation: Activation::Silu,
                down: (&down, None),
            };
            let [mut both, mut activated, mut expected] = [2 * n, n, 50].map(allocate);
            cpu.linear(&x, &gate_up, None, &mut both);
            cpu.gated_activation(layer.activation, &both, &mut activated);
            cpu.linear(&activated, &down, None, &mut expected);
            let [mut both, mut activated, mut actual] = [2 * n, n, 50].map(allocate);
            cpu.feed_forward(&x, layer, (&mut both, &mut activated), &mut actual);
            assert_eq!(
                bits(actual.values()),
                bits(expected.values()),
                "{code:?} on {}",
                cpu.name()
            );
        }
    }
}

#[test]
fn what_has_no_pairs_of_panels_or_few_rows_is_left_to_others() {
    let mut rng = Rng::new(34);
    let cpu = backend(1);
    for (rows, n) in [(127, 64), (128, 48)] {
        for code in CODES {
            let w = quantized(&mut rng, code, (2 * n, 40));
            let w = cpu.load_quantized(&[w], &mut |_| ()).unwrap();
            let x = tensor(&cpu, &rng.values(rows * 40), 40);
            let mut out = cpu.allocate(rows, n, Precision::Compute).unwrap();
            let epilogue = (None, Activation::Silu);
            assert!(!gated((&cpu, Model), &x, &w, epilogue, &mut out));
            assert!(out.values().iter().all(|value| *value == 0.0));
        }
    }
}
