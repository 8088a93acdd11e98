//! Products with quantised weights, against what the codes stand for and against themselves.
//!
//! With floats activations stay what they are, or on tiles become bfloat16, and sums are off by what f32 rounds. With integers the bound on what quantised activations cost is exact, not a guess: each is at most half a scale off, so a sum is off by at
//! most half the scale times the sum of the weights' sizes, plus what f32 rounds.

use crate::backend::{Backend, Element, Precision};
use crate::cpu::quantized::{Columns, Part};
use crate::cpu::weight::Values;
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use crate::quantized::{Code, HostQuantized};
use crate::testing::{Rng, backends, bits, quantized, tensor, weight};
use bytes::Bytes;
use half::bf16;

const CODES: [Code; 3] = [Code::Int8, Code::Int4, Code::Fp8];

/// Those that are integers.
const INTEGERS: [Code; 2] = [Code::Int8, Code::Int4];

/// Any part of so many columns.
fn any_part(rng: &mut Rng, cols: usize) -> HostQuantized {
    let (code, rows) = (rng.pick(&CODES), rng.within(1..70));
    quantized(rng, code, (rows, cols))
}

/// What the parts stand for. `[rows][cols]`
fn values(parts: &[HostQuantized]) -> Vec<Vec<f32>> {
    let rows = parts
        .iter()
        .flat_map(|part| (0..part.rows).map(move |row| (part, row)));
    let rows = rows.map(|(part, row)| {
        let mut values = vec![f32::NAN; part.cols];
        part.read_row(row, &mut values);
        values
    });
    rows.collect()
}

fn load(cpu: &CpuBackend, parts: &[HostQuantized]) -> CpuWeight {
    let mut bytes = 0;
    let loaded = cpu
        .load_quantized(parts, &mut |done| bytes += done)
        .unwrap();
    let bits = |part: &HostQuantized| part.rows * part.cols * part.code.bits();
    let needed = parts.iter().map(bits).sum::<usize>() as u64;
    // Half a byte may be left over in each part.
    assert!(bytes * 8 <= needed && needed < bytes * 8 + 8 * parts.len() as u64);
    loaded
}

fn multiply(cpu: &CpuBackend, x: &CpuTensor, w: &CpuWeight, bias: Option<&CpuWeight>) -> CpuTensor {
    let mut out = cpu
        .allocate(x.rows(), w.rows(), Precision::Compute)
        .unwrap();
    out.values_mut().fill(f32::NAN);
    cpu.linear(x, w, bias, &mut out);
    out
}

fn columns(part: &Part) -> &Columns {
    match part {
        Part::Codes(codes) => codes.columns(),
        Part::Floats(packed) => packed.columns(),
    }
}

fn parts_of(w: &CpuWeight) -> &[Part] {
    match w.values() {
        Values::Quantized(quantized) => quantized.parts(),
        _ => panic!("it is quantised"),
    }
}

/// A product, and how far it may be off.
fn product_and_bound(cpu: &CpuBackend, part: &Part, x: &[f32], w: &[f32]) -> (f64, f64) {
    let columns = columns(part);
    let (mut product, mut bound, mut sizes) = (0.0, 0.0, 0.0);
    for segment in columns.segments() {
        let (mut max, mut size) = (0.0_f64, 0.0);
        for column in segment.columns.clone() {
            let input = columns.input(column);
            let mut value = x[input];
            if cpu.isa.has_tiles() && matches!(part, Part::Floats(_)) {
                value = bf16::from_f32(value).to_f32();
            }
            let (x, w) = (f64::from(value), f64::from(w[input]));
            product += x * w;
            max = max.max(x.abs());
            size += w.abs();
        }
        bound += max / 127.0 / 2.0 * size;
        sizes += max * size;
    }
    match part {
        Part::Codes(_) => (product, bound + 1e-6 * sizes + 1e-30),
        Part::Floats(_) => (product, 1e-5 * sizes + 1e-30),
    }
}

#[test]
fn is_the_reference_within_half_a_scale_of_the_activations() {
    let mut rng = Rng::new(71);
    for cpu in backends() {
        for case in 0..24 {
            let cols = rng.pick(&[1, 7, 64, 96, 300, 1100, 2500]);
            let parts: Vec<_> = (0..rng.within(1..4))
                .map(|_| any_part(&mut rng, cols))
                .collect();
            let w = load(&cpu, &parts);
            let (rows, outputs) = (rng.within(1..24), w.rows());
            println!("{} case {case}: {rows} x {cols} x {outputs}", cpu.name());
            let (bias, bias_values) = weight(&mut rng, &cpu, (1, outputs), Element::Bf16);
            let size = rng.pick(&[1.0, 1e-5, 3e4]);
            let x_values: Vec<f32> = rng
                .values(rows * cols)
                .iter()
                .map(|x| x * x * x * size)
                .collect();
            let x = tensor(&cpu, &x_values, cols);
            let out = multiply(&cpu, &x, &w, Some(&bias));
            let known = values(&parts);
            for row in 0..rows {
                let mut output = 0;
                for part in parts_of(&w) {
                    for _ in 0..part.rows() {
                        let (product, bound) =
                            product_and_bound(&cpu, part, x.row(row), &known[output]);
                        let off = f64::from(out.row(row)[output])
                            - product
                            - f64::from(bias_values[output]);
                        assert!(
                            off.abs() <= bound + 1e-6,
                            "[{row}, {output}] {off} of {bound}"
                        );
                        output += 1;
                    }
                }
                let alone = multiply(&cpu, &tensor(&cpu, x.row(row), cols), &w, Some(&bias));
                assert_eq!(bits(alone.values()), bits(out.row(row)));
            }
        }
    }
}

/// More rows than fit into memory are multiplied in parts; each has the bits of that row alone.
#[test]
fn every_part_of_many_rows_gets_its_bias_once() {
    let mut rng = Rng::new(72);
    for cpu in backends() {
        let (rows, cols) = (rng.within(600..900), 1100);
        let parts = CODES.map(|code| quantized(&mut rng, code, (19, cols)));
        let w = load(&cpu, &parts);
        let (bias, _) = weight(&mut rng, &cpu, (1, w.rows()), Element::Bf16);
        let x = tensor(&cpu, &rng.values(rows * cols), cols);
        let out = multiply(&cpu, &x, &w, Some(&bias));
        for row in [0, 1, rows / 2, rows - 1] {
            let alone = multiply(&cpu, &tensor(&cpu, x.row(row), cols), &w, Some(&bias));
            assert_eq!(
                bits(alone.values()),
                bits(out.row(row)),
                "row {row} of {rows}"
            );
        }
    }
}

/// Where a segment's largest activation is 127, activations are their codes.
#[test]
fn products_of_small_integers_are_exact() {
    let mut rng = Rng::new(72);
    for cpu in backends() {
        for _ in 0..12 {
            let cols = rng.pick(&[5, 64, 128, 290]);
            let (code, outputs) = (rng.pick(&INTEGERS), rng.within(1..70));
            let mut part = quantized(&mut rng, code, (outputs, cols));
            for scale in &mut part.scales {
                *scale = rng.pick(&[1.0, -2.0]);
            }
            let w = load(&cpu, std::slice::from_ref(&part));
            let rows = rng.within(1..20);
            let mut x: Vec<f32> = (0..rows * cols)
                .map(|_| rng.within(0..255) as f32 - 127.0)
                .collect();
            for x in x.chunks_exact_mut(cols) {
                let columns = columns(&parts_of(&w)[0]);
                for segment in columns.segments() {
                    let any = rng.within(segment.columns.clone());
                    x[columns.input(any)] = rng.pick(&[127.0, -127.0]);
                }
            }
            let out = multiply(&cpu, &tensor(&cpu, &x, cols), &w, None);
            let known = values(&[part]);
            for (x, out) in x
                .chunks_exact(cols)
                .zip(out.values().chunks_exact(w.rows()))
            {
                for (w, out) in known.iter().zip(out) {
                    let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                    let off = f64::from(*out) - products.sum::<f64>();
                    assert!(off == 0.0, "{}: {off}", cpu.name());
                }
            }
        }
    }
}

/// With more rows than shared memory holds at once, so that they are cut, too.
#[test]
fn instruction_sets_with_fused_products_and_rows_alone_agree_bit_for_bit() {
    let mut rng = Rng::new(73);
    for code in CODES {
        let (rows, cols) = (60, 70_000);
        let part = quantized(&mut rng, code, (37, cols));
        let x = rng.values(rows * cols);
        let mut all: Vec<(String, Vec<u32>)> = Vec::new();
        for cpu in backends() {
            let w = load(&cpu, std::slice::from_ref(&part));
            let x = tensor(&cpu, &x, cols);
            let out = multiply(&cpu, &x, &w, None);
            for row in [0, 13, 59] {
                let alone = multiply(&cpu, &tensor(&cpu, x.row(row), cols), &w, None);
                assert_eq!(bits(alone.values()), bits(out.row(row)));
            }
            all.push((cpu.name(), bits(out.values())));
        }
        // Tiles round what they multiply floats with.
        let rounds = |name: &str| code == Code::Fp8 && name.contains("AMX");
        let fused: Vec<_> = all
            .iter()
            .filter(|(name, _)| !name.contains("portable") && !rounds(name))
            .collect();
        for (name, bits) in &fused {
            assert!(*bits == fused[0].1, "{name} differs from {}", fused[0].0);
        }
    }
}

#[test]
fn rows_are_what_the_codes_stand_for() {
    let mut rng = Rng::new(74);
    for cpu in &backends()[..2] {
        for _ in 0..40 {
            let cols = rng.within(1..400);
            let parts: Vec<_> = (0..rng.within(1..5))
                .map(|_| any_part(&mut rng, cols))
                .collect();
            let w = load(cpu, &parts);
            for (row, known) in values(&parts).into_iter().enumerate() {
                let mut found = vec![f32::NAN; cols];
                w.read_row(row, &mut found);
                assert_eq!(found, known);
            }
        }
    }
}

/// Neighbours whose columns are alike are one matrix, and give what they give alone.
#[test]
fn parts_side_by_side_give_what_they_give_alone() {
    let mut rng = Rng::new(75);
    let cpu = CpuBackend::new(1, None).unwrap();
    for code in CODES {
        let cols = 200;
        let one = quantized(&mut rng, code, (20, cols));
        let mut other = quantized(&mut rng, code, (33, cols));
        let groups = one.group_ends.len();
        other.inputs.clone_from(&one.inputs);
        other.group_ends.clone_from(&one.group_ends);
        other.scales = rng.values(33 * groups);
        other.zeros = one
            .zeros
            .iter()
            .copied()
            .cycle()
            .take(if code == Code::Int4 { 33 * groups } else { 0 })
            .collect();
        let parts = [one, other];
        let together = load(&cpu, &parts);
        assert_eq!(parts_of(&together).len(), 1);
        let x = tensor(&cpu, &rng.values(3 * cols), cols);
        let out = multiply(&cpu, &x, &together, None);
        let alone = parts.map(|part| multiply(&cpu, &x, &load(&cpu, &[part]), None));
        for row in 0..3 {
            let expected = [alone[0].row(row), alone[1].row(row)].concat();
            assert_eq!(bits(out.row(row)), bits(&expected));
        }
    }
}

#[test]
fn what_is_no_number_stays_none() {
    let mut rng = Rng::new(76);
    let cpu = CpuBackend::new(1, None).unwrap();
    for code in CODES {
        let w = load(&cpu, &[quantized(&mut rng, code, (3, 40))]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = rng.values(80);
            x[50] = bad;
            let out = multiply(&cpu, &tensor(&cpu, &x, 40), &w, None);
            assert!(out.row(0).iter().all(|value| value.is_finite()));
            assert!(out.row(1).iter().all(|value| !value.is_finite()));
        }
    }
}

/// In the second of three groups of one row.
#[test]
fn a_code_that_is_no_number_makes_its_output_none() {
    let mut rng = Rng::new(78);
    for cpu in backends() {
        let (rows, cols) = (40, 300);
        let mut part = quantized(&mut rng, Code::Fp8, (rows, cols));
        part.group_ends = vec![100, 200, 300];
        part.scales = rng.values(3 * rows);
        let mut data = part.data.to_vec();
        data[35 * part.row_stride + 150] = 0xff;
        part.data = data.into();
        let w = load(&cpu, std::slice::from_ref(&part));
        let out = multiply(&cpu, &tensor(&cpu, &rng.values(2 * cols), cols), &w, None);
        for (i, value) in out.values().iter().enumerate() {
            assert_eq!(value.is_nan(), i % rows == 35, "{value}");
        }
        let mut row = vec![0.0; cols];
        w.read_row(35, &mut row);
        assert_eq!(row.iter().filter(|value| value.is_nan()).count(), 1);
    }
}

#[test]
fn parts_that_do_not_fit_together_are_refused() {
    let mut rng = Rng::new(77);
    let cpu = CpuBackend::new(1, None).unwrap();
    let part = quantized(&mut rng, Code::Int8, (2, 8));
    let wider = quantized(&mut rng, Code::Int8, (2, 9));
    let short = HostQuantized {
        data: Bytes::from_static(&[0; 3]),
        ..part.clone()
    };
    for parts in [vec![], vec![part.clone(), wider], vec![part, short]] {
        let refused = cpu.load_quantized(&parts, &mut |_| ()).map(|_| ());
        println!("{}", refused.unwrap_err());
    }
}
