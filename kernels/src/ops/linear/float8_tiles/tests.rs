//! Products on tiles compared with one sum after the other in plain Rust, to the bit.

use super::*;
use crate::backend::{Backend, Element, Precision};
use crate::cpu::quantized::Part;
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::Isa;
use crate::cpu::simd::amx::tests::Model;
use crate::cpu::weight::Values;
use crate::quantized::{Code, HostQuantized, e4m3};
use crate::testing::{Rng, bits, quantized, tensor, weight};
use half::bf16;

/// One output of one row, as `mod.rs` says it.
fn twin(x: &[f32], part: &HostQuantized, output: usize) -> f32 {
    let codes = &part.data[output * part.row_stride..][..part.cols];
    let scales = &part.scales[output * part.group_ends.len()..];
    let (mut sum, mut start) = (0.0_f32, 0);
    for (end, scale) in part.group_ends.iter().zip(scales) {
        let columns: Vec<usize> = (start..*end).collect();
        let mut dot = 0.0;
        for chunk in columns.chunks(CHUNK) {
            let mut halves = [0.0_f32; 2];
            for (i, column) in chunk.iter().enumerate() {
                let input = part
                    .inputs
                    .as_ref()
                    .map_or(*column, |inputs| inputs[*column] as usize);
                let x = bf16::from_f32(x[input]).to_f32();
                halves[i % 2] = x.mul_add(e4m3(codes[*column]), halves[i % 2]);
            }
            dot += halves[0] + halves[1];
        }
        sum = scale.mul_add(dot, sum);
        start = *end;
    }
    sum
}

fn backend(threads: usize) -> CpuBackend {
    let mut cpu = CpuBackend::new(threads, None).unwrap();
    cpu.scratch = Scratch::of(threads).with_tiles().unwrap();
    cpu.threads.inline_cost = 0;
    cpu
}

/// Some columns of a wider output, of which the others stay what they are.
fn check<U: TileUnit>(unit: U, seed: u64) {
    let mut rng = Rng::new(seed);
    println!("seed {seed}");
    // One row and few; two tiles; three, of which the last has fewer; several blocks, and a last tile that is half full;
    // activations that do not stay in the cache, which panels meet in groups, 13 and some; several parts of the rows.
    let shapes = [
        (1, 70, 33),
        (5, 1500, 64),
        (29, 300, 70),
        (35, 1500, 70),
        (136, 1100, 97),
        (300, 2100, 500),
        (530, 200, 40),
    ];
    for ((rows, cols, outputs), threads) in shapes.into_iter().zip([3, 1].into_iter().cycle()) {
        let cpu = backend(threads);
        let cols = cols + rng.within(0..70);
        let part = quantized(&mut rng, Code::Fp8, (outputs, cols));
        let (groups, in_order) = (part.group_ends.len(), part.inputs.is_none());
        println!("{rows} x {cols} x {outputs}, {groups} groups, in order: {in_order}");
        let w = cpu
            .load_quantized(std::slice::from_ref(&part), &mut |_| ())
            .unwrap();
        let Values::Quantized(loaded) = w.values() else {
            panic!("it is quantised")
        };
        let [Part::Floats(packed)] = loaded.parts() else {
            panic!("they are floats")
        };
        let (first, behind) = (rng.within(0..40), rng.within(0..3));
        let width = first + outputs + behind;
        let (bias, bias_values) = weight(&mut rng, &cpu, (1, width), Element::Bf16);
        let biased = rng.pick(&[false, true]);
        let x = tensor(&cpu, &rng.values(rows * cols), cols);
        let mut out = cpu.allocate(rows, width, Precision::Compute).unwrap();
        out.values_mut().fill(-7.0);
        linear(
            (&cpu, unit),
            &x,
            (packed, first),
            biased.then_some(&bias),
            &mut out,
        );
        // All of a small product, some of a large one.
        let step = if rows * width < 3000 { 1 } else { 37 };
        for at in (0..rows * width).step_by(step) {
            let (row, column) = (at / width, at % width);
            let mut expected = -7.0;
            if (first..first + outputs).contains(&column) {
                expected = twin(x.row(row), &part, column - first);
                if biased {
                    expected += bias_values[column];
                }
            }
            let actual = out.row(row)[column];
            assert_eq!(bits(&[actual]), bits(&[expected]), "[{row}, {column}]");
        }
    }
}

#[test]
fn tiles_in_plain_rust_give_the_twins_bits() {
    for seed in 81..84 {
        check(Model, seed);
    }
}

#[test]
fn the_instructions_give_the_twins_bits() {
    match Isa::detect().tiles() {
        Some(amx) => (91..95).for_each(|seed| check(amx, seed)),
        None => println!("skipped: this CPU has no tiles"),
    }
}

/// Denormal ones, zeros of both signs and what is no number among them.
#[test]
fn every_code_is_widened_to_what_it_stands_for() {
    let Some(amx) = Isa::detect().tiles() else {
        println!("skipped: this CPU has no tiles");
        return;
    };
    let mut codes = (0..=255).map(crate::cpu::element::F8::<true>);
    let cells: [[_; 32]; 8] = [(); 8].map(|()| std::array::from_fn(|_| codes.next().unwrap()));
    let mut lines = [Floats::default(); 8];
    amx.widen(&cells, &mut lines);
    for (code, found) in (0..=255_u8).zip(lines.as_flattened()) {
        let expected = e4m3(code);
        let same = found.to_f32().to_bits() == expected.to_bits();
        assert!(
            same || found.is_nan() && expected.is_nan(),
            "{code:#x}: {found}"
        );
    }
}
