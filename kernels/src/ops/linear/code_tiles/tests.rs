//! Tiles against vectors, whose products are the same to the bit. What those come to is tested in `quantized_tests.rs`.

use super::*;
use crate::backend::{Backend, Element, Precision};
use crate::cpu::quantized::{Cut, Part};
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::Isa;
use crate::cpu::simd::amx::tests::Model;
use crate::cpu::weight::Values;
use crate::ops::linear::codes;
use crate::quantized::{Code, HostQuantized};
use crate::testing::{Rng, bits, quantized, tensor, weight};

const CODES: [Code; 2] = [Code::Int8, Code::Int4];

fn codes_of(w: &CpuWeight) -> &Codes {
    match w.values() {
        Values::Quantized(quantized) => match &quantized.parts()[0] {
            Part::Codes(codes) => codes,
            Part::Floats(_) => panic!("they are integers"),
        },
        _ => panic!("it is quantised"),
    }
}

/// One product on tiles and on vectors. It is some columns of a wider matrix.
fn compare<U: TileUnit>(
    (cpu, unit): (&CpuBackend, U),
    rng: &mut Rng,
    x: &CpuTensor,
    part: &HostQuantized,
) {
    let w = cpu
        .load_quantized(std::slice::from_ref(part), &mut |_| ())
        .unwrap();
    let (first, behind) = (rng.within(0..40), rng.within(0..3));
    let width = first + part.rows + behind;
    let (bias, _) = weight(rng, cpu, (1, width), Element::Bf16);
    let bias = rng.pick(&[false, true]).then_some(&bias);
    let [mut expected, mut actual] = [(); 2].map(|()| {
        let mut out = cpu.allocate(x.rows(), width, Precision::Compute).unwrap();
        out.values_mut().fill(-7.0);
        out
    });
    let codes = (codes_of(&w), first);
    codes::linear(cpu, x, codes, bias, &mut expected);
    linear((cpu, unit), x, codes, bias, &mut actual);
    for row in 0..x.rows() {
        assert_eq!(bits(actual.row(row)), bits(expected.row(row)), "row {row}");
    }
    if bias.is_none() {
        // Whatever the backend's own choice is.
        let mut out = cpu
            .allocate(x.rows(), part.rows, Precision::Compute)
            .unwrap();
        cpu.linear(x, &w, None, &mut out);
        for row in 0..x.rows() {
            let expected = &expected.row(row)[first..first + part.rows];
            assert_eq!(bits(out.row(row)), bits(expected), "row {row}");
        }
    }
}

fn backend(threads: usize) -> CpuBackend {
    let mut cpu = CpuBackend::new(threads, None).unwrap();
    cpu.scratch = Scratch::of(threads).with_tiles().unwrap();
    cpu.threads.inline_cost = 0;
    cpu
}

/// Any codes, in any groups, in order or not, zeros alike or not. Without signs, activations and codes less their zeros are
/// positive, and what they are as bytes does not matter.
fn check<U: TileUnit>(unit: U, seed: u64, signs: bool) {
    let mut rng = Rng::new(seed);
    println!("seed {seed}");
    // One tile; two; three, of which the last has fewer; several blocks and groups, of columns and of panels; several parts of
    // the rows.
    let shapes = [
        (1, 70, 33),
        (17, 300, 64),
        (35, 1500, 70),
        (16, 2500, 31),
        (100, 1100, 97),
        (300, 2100, 500),
        (530, 200, 40),
    ];
    // No more than two tiles, through which codes pass by.
    let few = [(); 10].map(|()| {
        let outputs = rng.within(1..200);
        (rng.within(1..33), rng.within(1..2300), outputs)
    });
    for (rows, cols, outputs) in shapes.into_iter().chain(few) {
        for (code, threads) in CODES.into_iter().zip([1, 3]) {
            let cpu = backend(threads);
            let cols = cols + rng.within(0..70);
            let mut part = quantized(&mut rng, code, (outputs, cols));
            let mut x = rng.values(rows * cols);
            if !signs {
                x = x.into_iter().map(f32::abs).collect();
                if code == Code::Int8 {
                    part.data = part.data.iter().map(|code| code & 0x7f).collect();
                }
                part.zeros.fill(0);
            }
            let (groups, in_order) = (part.group_ends.len(), part.inputs.is_none());
            println!(
                "{code:?}: {rows} x {cols} x {outputs}, {groups} groups, in order: {in_order}"
            );
            compare((&cpu, unit), &mut rng, &tensor(&cpu, &x, cols), &part);
        }
    }
}

#[test]
fn tiles_in_plain_rust_give_the_bits_of_vectors() {
    for seed in 81..84 {
        check(Model, seed, true);
    }
}

#[test]
fn the_instructions_give_the_bits_of_vectors_for_codes_with_a_sign() {
    match Isa::detect().tiles() {
        Some(amx) => check(amx, 91, true),
        None => println!("skipped: this CPU has no tiles"),
    }
}

#[test]
fn the_instructions_give_the_bits_of_vectors_for_codes_of_seven_bits() {
    match Isa::detect().tiles() {
        Some(amx) => check(amx, 92, false),
        None => println!("skipped: this CPU has no tiles"),
    }
}

#[test]
fn sums_of_the_largest_codes_with_a_sign_are_exact() {
    let mut rng = Rng::new(82);
    let cpu = backend(1);
    for (code, least) in CODES
        .into_iter()
        .flat_map(|code| [(code, false), (code, true)])
    {
        let mut part = quantized(&mut rng, code, (40, 512));
        let ends = if code == Code::Int8 {
            [0x80, 0x7f]
        } else {
            [0, 15]
        };
        part.data = vec![ends[usize::from(!least)]; part.data.len()].into();
        // All in one segment.
        part.group_ends = vec![512];
        part.scales.truncate(40);
        part.zeros.truncate(40);
        let mut x: Vec<f32> = (0..20 * 512).map(|_| rng.pick(&[1.0, -1.0, 1.0])).collect();
        x[..512].fill(1.0);
        x[512..1024].fill(-1.0);
        compare((&cpu, Model), &mut rng, &tensor(&cpu, &x, 512), &part);
    }
}

#[test]
fn what_is_no_number_stays_none() {
    let mut rng = Rng::new(83);
    let cpu = backend(1);
    for code in CODES {
        let w = cpu
            .load_quantized(&[quantized(&mut rng, code, (3, 40))], &mut |_| ())
            .unwrap();
        let mut x = rng.values(18 * 40);
        x[17 * 40 + 5] = f32::INFINITY;
        let mut out = cpu.allocate(18, 3, Precision::Compute).unwrap();
        linear(
            (&cpu, Model),
            &tensor(&cpu, &x, 40),
            (codes_of(&w), 0),
            None,
            &mut out,
        );
        for row in 0..18 {
            assert!(
                out.row(row)
                    .iter()
                    .all(|value| value.is_finite() == (row < 17))
            );
        }
    }
}

#[test]
fn few_rows_and_more_columns_than_memory_holds_are_for_vectors() {
    let cut = Cut {
        segment: SEGMENT,
        padding: 8,
        block: 1024,
    };
    let columns = |count| Columns::plain(count, cut);
    assert!(!pays(FEW_ROWS, &columns(4096)));
    assert!(pays(FEW_ROWS + 1, &columns(4096)));
    // 512 rows of all widths that models have.
    assert_eq!(Shape::of(512, &columns(28_672)).most_rows(), 512);
    assert!(pays(512, &columns(800_000)));
    assert!(!pays(512, &columns(2_000_000)));
}
