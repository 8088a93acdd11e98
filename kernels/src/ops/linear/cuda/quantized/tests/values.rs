//! Single values through quantised weights, recordings of steps with them, and what is refused.

use super::{CODES, Layout, part, rounded_row, rounding, stands_for};
use crate::backend::{Backend, DeviceError, Element, Precision};
use crate::cuda::CudaTensor;
use crate::cuda::testing::{each_element, queue, read, values};
use crate::quantized::{Code, HostQuantized};
use crate::testing::{assert_close, rounded, tensor, tokens, upload};
use bytes::Bytes;

/// Rows with a single one in them read the weight back.
#[test]
fn every_code_has_its_value_both_ways() {
    each_element(214, |cuda, _| {
        for code in CODES {
            let cols = 256;
            let is_number = |code: &u8| code & 0x7f != 0x7f;
            let data: Vec<u8> = match code {
                // Each zero point has a row with all codes.
                Code::Int4 => (0..17 * cols).map(|at| (at % 16) as u8).collect(),
                Code::Int8 => (0..=255).collect(),
                Code::Fp8 => (0..=255)
                    .map(|code| if is_number(&code) { code } else { 0 })
                    .collect(),
            };
            let rows = data.len() / cols;
            let weight = HostQuantized {
                code,
                data: Bytes::from(data),
                rows,
                cols,
                row_stride: cols,
                inputs: None,
                group_ends: vec![128, cols],
                scales: vec![0.5; 2 * rows],
                zeros: if code == Code::Int4 {
                    (0..34).map(|at| at / 2).collect()
                } else {
                    Vec::new()
                },
            };
            let expected = stands_for(std::slice::from_ref(&weight));
            let expected = rounded(&expected, cuda.element());
            let weight = cuda.load_quantized(&[weight], &mut |_| ()).unwrap();
            for at_once in [8, 32, 256] {
                for start in (0..cols).step_by(at_once) {
                    let one = |at: usize| f32::from(u8::from(at / cols + start == at % cols));
                    let ones: Vec<f32> = (0..at_once * cols).map(one).collect();
                    let x = tensor(cuda, &ones, cols);
                    let mut out = cuda.allocate(at_once, rows, Precision::Compute).unwrap();
                    cuda.linear(&x, &weight, None, &mut out);
                    for (column, found) in (start..).zip(read(cuda, &out).chunks_exact(rows)) {
                        let row = |row: usize| expected[row * cols + column];
                        let expected: Vec<f32> = (0..rows).map(row).collect();
                        assert_eq!(
                            found, expected,
                            "{code:?}, column {column}, {at_once} at once"
                        );
                    }
                }
            }
        }
    });
}

/// A weight of ones on its diagonal gives the rows back as their codes stand for them.
#[test]
fn rows_become_the_nearest_codes() {
    each_element(215, |cuda, rng| {
        let (rows, width) = (40, 64);
        let one = |at: usize| if at / width == at % width { 0x38 } else { 0 };
        let weight = HostQuantized {
            code: Code::Fp8,
            data: (0..width * width).map(one).collect(),
            rows: width,
            cols: width,
            row_stride: width,
            inputs: None,
            group_ends: vec![width],
            scales: vec![1.0; width],
            zeros: Vec::new(),
        };
        let weight = cuda.load_quantized(&[weight], &mut |_| ()).unwrap();
        // From the largest code to below the smallest, and a row of zeros.
        let mut x: Vec<f32> = rng.values(rows * width);
        for x in &mut x {
            *x /= (1_u32 << rng.within(0..20)) as f32;
        }
        x[width..2 * width].fill(0.0);
        let x = rounded(&x, cuda.element());
        let mut out = cuda.allocate(rows, width, Precision::Compute).unwrap();
        cuda.linear(&tensor(cuda, &x, width), &weight, None, &mut out);
        let expected: Vec<f32> = x.chunks_exact(width).flat_map(rounded_row).collect();
        let expected = if cuda.element() == Element::F32 {
            x
        } else {
            expected
        };
        // The device divides by the largest as IEEE says; a result's last place may differ.
        let place = 2.0 * rounding(cuda.element());
        assert_close(
            &read(cuda, &out),
            &rounded(&expected, cuda.element()),
            1e-7,
            place,
        );
    });
}

#[test]
fn a_step_with_quantised_weights_is_recorded_and_replayed() {
    each_element(216, |cuda, rng| {
        for (code, rows) in [(Code::Int4, 5), (Code::Fp8, 20), (Code::Int8, 70)] {
            let inputs = 100;
            let layout = Layout::any(rng, inputs);
            let weight = part(rng, code, (48, inputs), &layout);
            let weight = cuda.load_quantized(&[weight], &mut |_| ()).unwrap();
            let ids = vec![0; rows];
            let positions = (0..rows as u32).collect();
            let mut batch = upload(cuda, &tokens(ids, positions));
            let host = batch.host().clone();
            let mut x = cuda.allocate(rows, inputs, Precision::Compute).unwrap();
            let mut out: CudaTensor = cuda.allocate(rows, 48, Precision::Compute).unwrap();
            for _ in 0..40 {
                cuda.write(&values(cuda, rng, rows * inputs), &mut x)
                    .unwrap();
                cuda.upload(&host, &mut batch).unwrap();
                let ops = || {
                    cuda.linear(&x, &weight, None, &mut out);
                    Ok::<_, DeviceError>(())
                };
                queue(cuda, rows, &batch, ops).unwrap();
                let found = read(cuda, &out);
                cuda.linear(&x, &weight, None, &mut out);
                assert_close(&found, &read(cuda, &out), 1e-4, 1e-2);
            }
            assert!(cuda.is_recorded(rows), "{code:?}");
            assert_eq!(cuda.take_notice(), None);
            cuda.forget();
        }
    });
}

#[test]
fn what_does_not_fit_together_is_refused() {
    each_element(217, |cuda, rng| {
        let layout = |cols| Layout {
            group_ends: vec![cols],
            inputs: None,
        };
        let refused = |parts: &[HostQuantized]| {
            cuda.load_quantized(parts, &mut |_| ())
                .unwrap_err()
                .to_string()
        };
        assert!(refused(&[]).contains("without parts"));
        let two = [8, 9].map(|cols| part(rng, Code::Int8, (3, cols), &layout(cols)));
        assert!(refused(&two).contains("columns"), "{}", refused(&two));
        let mut broken = part(rng, Code::Fp8, (3, 100), &layout(100));
        let mut data = broken.data.to_vec();
        data[99] = 0xff;
        broken.data = Bytes::from(data);
        assert!(refused(&[broken]).contains("no number"));
        let mut short = part(rng, Code::Int4, (3, 100), &layout(100));
        short.scales.pop();
        assert!(refused(&[short]).contains("scales"));
        for code in CODES {
            assert!(cuda.takes(code));
        }
    });
}
