//! Products with quantised weights against what their rows stand for: every code, way, layout of groups and order of
//! columns.
//!
//! Tolerances are stated as roundings: of out's element once, of the weight's elements where it becomes such, and of
//! f32 sums. Where rows of x become codes they are rounded by a table in the same way, so that the rest is as close.

mod values;

use crate::backend::{Backend, Element, Precision};
use crate::cuda::CudaBackend;
use crate::cuda::testing::{each_element, read, values};
use crate::ops::linear::tests::reference;
use crate::quantized::{Code, HostQuantized};
use crate::testing::{Rng, host_matrix, rounded};
use bytes::Bytes;

const CODES: [Code; 3] = [Code::Int4, Code::Int8, Code::Fp8];

/// A random part with `cols` columns.
fn part(rng: &mut Rng, code: Code, (rows, cols): (usize, usize), layout: &Layout) -> HostQuantized {
    let stride = cols + rng.pick(&[0, 0, 3]);
    let groups = layout.group_ends.len();
    let any = |rng: &mut Rng| match code {
        Code::Int4 => rng.within(0..16) as u8,
        Code::Int8 => rng.within(0..256) as u8,
        Code::Fp8 => rng.pick(&[0, 0x80]) + rng.within(0..0x7f) as u8,
    };
    // So that all values are around one.
    let size = match code {
        Code::Int4 => 1.0 / 8.0,
        Code::Int8 => 1.0 / 128.0,
        Code::Fp8 => 1.0 / 448.0,
    };
    let is_half = rng.pick(&[false, true]);
    let mut scales: Vec<f32> = (0..rows * groups).map(|_| rng.value() * size).collect();
    if is_half {
        scales = rounded(&scales, Element::F16);
    }
    let zeros = match code {
        Code::Int4 => (0..rows * groups)
            .map(|_| rng.within(0..17) as u8)
            .collect(),
        Code::Int8 | Code::Fp8 => Vec::new(),
    };
    let codes = (rows - 1) * stride + cols;
    let mut data: Vec<u8> = (0..codes).map(|_| any(rng)).collect();
    if stride > cols {
        // What stands between rows is nobody's code.
        data.chunks_mut(stride)
            .filter_map(|row| row.get_mut(cols..))
            .for_each(|gap| gap.fill(0x7f));
    }
    HostQuantized {
        code,
        data: Bytes::from(data),
        rows,
        cols,
        row_stride: stride,
        inputs: layout.inputs.clone(),
        group_ends: layout.group_ends.clone(),
        scales,
        zeros,
    }
}

/// What stacked parts may share.
#[derive(Clone, Debug)]
struct Layout {
    group_ends: Vec<usize>,
    inputs: Option<Vec<u32>>,
}

impl Layout {
    fn any(rng: &mut Rng, cols: usize) -> Self {
        let group_ends = match rng.within(0..4) {
            0 => vec![cols],
            1 => {
                let size = rng.pick(&[32, 64, 128]);
                (size..cols + size)
                    .step_by(size)
                    .map(|end| end.min(cols))
                    .collect()
            }
            2 => {
                let size = rng.within(1..cols + 1);
                (size..cols + size)
                    .step_by(size)
                    .map(|end| end.min(cols))
                    .collect()
            }
            // What is left of groups where each rank has some of their columns.
            _ => {
                let mut ends: Vec<usize> = (0..rng.within(1..6))
                    .map(|_| rng.within(1..cols + 1))
                    .collect();
                ends.push(cols);
                ends.sort_unstable();
                ends.dedup();
                ends
            }
        };
        let inputs = rng.pick(&[false, true]).then(|| {
            let mut inputs: Vec<u32> = (0..cols as u32).collect();
            rng.shuffle(&mut inputs);
            inputs
        });
        Self { group_ends, inputs }
    }
}

/// All rows that the parts stand for.
fn stands_for(parts: &[HostQuantized]) -> Vec<f32> {
    let mut all = Vec::new();
    for part in parts {
        for row in 0..part.rows {
            let mut values = vec![0.0; part.cols];
            part.read_row(row, &mut values);
            all.extend(values);
        }
    }
    all
}

/// A row as `e4m3` codes with one scale, and what these stand for.
fn rounded_row(row: &[f32]) -> Vec<f32> {
    let most = row.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    if most == 0.0 {
        return vec![0.0; row.len()];
    }
    let (factor, scale) = (448.0 / most, most / 448.0);
    row.iter()
        .map(|x| rounded(&[factor * x], Element::Fp8)[0] * scale)
        .collect()
}

/// Half a last place of the element, as a part of a number.
fn rounding(element: Element) -> f32 {
    match element {
        Element::F32 => 1.0 / (1 << 24) as f32,
        Element::Bf16 => 1.0 / (1 << 9) as f32,
        Element::F16 => 1.0 / (1 << 12) as f32,
        Element::Fp8 => 1.0 / (1 << 4) as f32,
    }
}

/// Whether `found` is x times the weights: rounded once to out's element, `roundings` parts of each product off, and f32
/// sums in any order.
fn is_product(
    found: &[f32],
    (x, weights): (&[f32], &[f32]),
    inputs: usize,
    bias: Option<&[f32]>,
    (roundings, out): (f32, Element),
) -> bool {
    let expected = reference(x, weights, inputs, bias);
    let size = |values: &[f32]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
    let sizes = reference(&size(x), &size(weights), inputs, None);
    let sums = inputs as f32 * rounding(Element::F32);
    let mut all = found.iter().zip(&expected).zip(&sizes);
    // Numbers below a half's normal ones are a fixed distance apart.
    all.all(|((found, expected), size)| {
        let allowed = 2.0 * rounding(out) * expected.abs() + (roundings + sums) * size + 1e-7;
        (found - expected).abs() <= allowed
    })
}

/// One product of the device.
struct Case {
    rows: usize,
    parts: Vec<HostQuantized>,
    precision: Precision,
    is_biased: bool,
}

impl Case {
    fn describe(&self) -> String {
        let part = |part: &HostQuantized| {
            let groups = part.group_ends.len();
            let order = if part.inputs.is_some() {
                ", permuted"
            } else {
                ""
            };
            format!(
                "{:?} [{}, {}] in {groups} groups{order}",
                part.code, part.rows, part.cols
            )
        };
        let parts: Vec<_> = self.parts.iter().map(part).collect();
        format!("{} rows x {parts:?} to {:?}", self.rows, self.precision)
    }

    fn check(&self, cuda: &CudaBackend, rng: &mut Rng) {
        println!("{:?}: {}", cuda.element(), self.describe());
        let inputs = self.parts[0].cols;
        let outputs = self.parts.iter().map(|part| part.rows).sum();
        let mut progress = 0;
        let weight = cuda
            .load_quantized(&self.parts, &mut |bytes| progress += bytes)
            .unwrap();
        assert_eq!((weight.rows(), weight.cols()), (outputs, inputs));
        assert!(
            progress >= (inputs * outputs / 2) as u64,
            "{progress} bytes came"
        );
        let x_values = values(cuda, rng, self.rows * inputs);
        let mut x = cuda
            .allocate(self.rows + 2, inputs, Precision::Compute)
            .unwrap();
        cuda.write(&x_values, &mut x).unwrap();
        let bias_values = values(cuda, rng, outputs);
        let bias = host_matrix(rng, &bias_values, outputs, Element::F32);
        let bias = cuda.load(&[bias], Element::F32, &mut |_| ()).unwrap();
        let mut out = cuda.allocate(self.rows, outputs, self.precision).unwrap();
        // What is not written is seen.
        cuda.write(&vec![f32::NAN; self.rows * outputs], &mut out)
            .unwrap();
        cuda.linear(&x, &weight, self.is_biased.then_some(&bias), &mut out);
        let found = read(cuda, &out);
        let bias = self.is_biased.then_some(&*bias_values);
        let mut first = 0;
        for part in &self.parts {
            let columns = first..first + part.rows;
            let rows = found.chunks_exact(outputs);
            let rows = rows.flat_map(|row| &row[columns.clone()]);
            let found: Vec<f32> = rows.copied().collect();
            let bias = bias.map(|bias| &bias[columns]);
            self.check_part(
                cuda,
                (part, first),
                (&x_values, bias),
                (&found, out.element()),
            );
            first += part.rows;
        }
    }

    fn check_part(
        &self,
        cuda: &CudaBackend,
        (part, first): (&HostQuantized, usize),
        (x, bias): (&[f32], Option<&[f32]>),
        (found, out): (&[f32], Element),
    ) {
        let weights = stands_for(std::slice::from_ref(part));
        let becomes_elements = self.rows > super::FEW_ROWS || part.code == Code::Fp8;
        let roundings = if becomes_elements {
            2.0 * rounding(cuda.element())
        } else {
            0.0
        };
        let exact = is_product(found, (x, &weights), part.cols, bias, (roundings, out));
        let coded: Vec<f32> = x.chunks_exact(part.cols).flat_map(rounded_row).collect();
        let as_codes = is_product(found, (&coded, &weights), part.cols, bias, (0.0, out));
        let may_be_codes = part.code == Code::Fp8
            && part.group_ends.len() == 1
            && self.rows > super::FEW_ROWS_OF_CODES
            && cuda.element() != Element::F32;
        assert!(
            exact || as_codes && may_be_codes,
            "outputs from {first} on are not the product"
        );
        // The emulated library takes whatever a device's may.
        if cfg!(feature = "cuda-emulation") && may_be_codes && self.is_for_the_library(first, out) {
            assert!(as_codes, "rows were to become codes");
        }
    }

    /// Whether the library's conditions are met by the outputs of one section and where they begin.
    fn is_for_the_library(&self, first: usize, out: Element) -> bool {
        let one = self.parts.len() == 1 && self.parts[0].rows.is_multiple_of(16);
        one && (first * out.bytes()).is_multiple_of(16)
    }
}

#[test]
fn is_what_the_rows_stand_for() {
    each_element(211, |cuda, rng| {
        for turn in 0..30 {
            let rows = match turn % 5 {
                0 => rng.within(1..9),
                1 => rng.within(9..17),
                2 => rng.within(17..33),
                3 => rng.within(33..65),
                _ => rng.within(65..100),
            };
            let (inputs, code) = (rng.within(1..400), CODES[turn / 5 % 3]);
            let layout = Layout::any(rng, inputs);
            let outputs = rng.pick(&[1, 5, 16, 48, 64, 70]);
            let one = part(rng, code, (outputs, inputs), &layout);
            Case {
                rows,
                parts: vec![one],
                precision: rng.pick(&[Precision::Compute, Precision::F32]),
                is_biased: rng.pick(&[false, true]),
            }
            .check(cuda, rng);
        }
    });
}

/// Queries, keys and values may share their order of columns or have each its own, or even codes of their own.
#[test]
fn stacked_parts_keep_what_is_theirs() {
    each_element(212, |cuda, rng| {
        for turn in 0..9 {
            let inputs = rng.within(1..200);
            let mut layout = Layout::any(rng, inputs);
            let mut code = CODES[turn % 3];
            let mut parts = Vec::new();
            for _ in 0..3 {
                let outputs = rng.within(1..40);
                parts.push(part(rng, code, (outputs, inputs), &layout));
                if rng.pick(&[false, true]) {
                    layout = Layout::any(rng, inputs);
                }
                if rng.within(0..4) == 0 {
                    code = rng.pick(&CODES);
                }
            }
            let case = Case {
                rows: rng.pick(&[1, 7, 20, 70]),
                parts,
                precision: Precision::Compute,
                is_biased: rng.pick(&[false, true]),
            };
            case.check(cuda, rng);
        }
    });
}

/// More outputs than a piece of the weight has, more rows than a piece of x; few outputs, so that blocks share columns.
#[test]
fn pieces_and_shared_columns_make_a_whole() {
    each_element(213, |cuda, rng| {
        for (code, rows, outputs, inputs) in [
            (Code::Int4, 70, 300, 256),
            (Code::Int8, 300, 160, 130),
            (Code::Fp8, 300, 160, 128),
            (Code::Int4, 3, 16, 4100),
            (Code::Int8, 12, 20, 2100),
            (Code::Fp8, 9, 33, 2048),
        ] {
            let size = rng.pick(&[inputs, 128]);
            let layout = Layout {
                group_ends: (size..inputs + size)
                    .step_by(size)
                    .map(|end| end.min(inputs))
                    .collect(),
                inputs: None,
            };
            let one = part(rng, code, (outputs, inputs), &layout);
            let case = Case {
                rows,
                parts: vec![one],
                precision: Precision::Compute,
                is_biased: true,
            };
            case.check(cuda, rng);
        }
    });
}
