//! Layouts against their packing, parts against the whole, and codes at load against the numbers they stand for.

#![expect(clippy::cast_possible_truncation, reason = "the sizes are small")]

use super::quantised::{QuantisedPart, Tensors};
use super::*;
use crate::testing::Random;
use half::f16;
use kernels::quantized::to_e4m3;
use std::collections::BTreeMap;
use topology::checkpoint::StoredDtype;
use topology::model_shape::Dtype;
use topology::partition::{Split, TensorPart, TensorSpec};
use topology::quantization::{Layout, Order, Role, Scheme};

/// No other thread.
const ALONE: Workers<'static> = &|work| work();

fn quantise(matrix: &HostMatrix, code: Code, first_input: u32) -> Result<HostQuantized> {
    at_load::quantise(ALONE, matrix, code, first_input)
}

/// A random matrix in some layout: its tensors, and what each element stands for.
struct Packed {
    spec: TensorSpec,
    scheme: Scheme,
    tensors: BTreeMap<u8, (Role, Vec<u8>, StoredDtype)>,
    /// `[rows, cols]`
    values: Vec<f32>,
}

impl Packed {
    fn part(&self, rows: [u32; 2], cols: [u32; 2]) -> Result<HostQuantized> {
        let mut tensors = Tensors::new();
        for (role, data, dtype) in self.tensors.values() {
            // One byte further in its file: nothing is aligned.
            let mut file = vec![0xff];
            file.extend(data);
            tensors.insert(*role, Bytes::from(file).slice(1..), dtype);
        }
        let part = TensorPart {
            rows: rows[0]..rows[1],
            cols: cols[0]..cols[1],
        };
        QuantisedPart::new(&self.spec, self.scheme, &part, tensors)?.read(ALONE)
    }

    fn put(&mut self, role: Role, data: Vec<u8>, dtype: StoredDtype) {
        self.tensors.insert(role as u8, (role, data, dtype));
    }
}

fn values(part: &HostQuantized) -> Vec<f32> {
    part.check().unwrap();
    let mut values = vec![0.0; part.rows * part.cols];
    for (row, values) in values.chunks_mut(part.cols).enumerate() {
        part.read_row(row, values);
    }
    values
}

/// Words of `[outer, inner]` fields, so many of them along the inner dimension to each; `order` says which comes first.
fn words(fields: &[u32], inner: usize, bits: u32, order: Option<[usize; 8]>) -> Vec<u32> {
    let per_word = 32 / bits as usize;
    let rows = fields.chunks(inner);
    let word = |fields: &[u32]| {
        let places = (0..per_word).map(|place| order.map_or(place, |order| order[place]));
        let shifted = places
            .enumerate()
            .map(|(place, field)| fields.get(field).copied().unwrap_or(0) << (place as u32 * bits));
        shifted.fold(0, |word, field| word | field)
    };
    rows.flat_map(|row| row.chunks(per_word).map(word))
        .collect()
}

fn transposed(fields: &[u32], cols: usize) -> Vec<u32> {
    let rows = fields.len() / cols;
    let places = (0..cols).flat_map(|col| (0..rows).map(move |row| row * cols + col));
    places.map(|place| fields[place]).collect()
}

fn little_endian(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A random scheme of `code` and a random matrix in it.
fn random_matrix(random: &mut Random) -> Packed {
    let code = [Code::Int4, Code::Int8, Code::Fp8][random.below(3)];
    let scale = "weight_scale";
    let layout = match (code, random.below(4)) {
        (Code::Int4, 0) => Layout::Awq,
        (Code::Fp8, _) | (Code::Int8, 0) => Layout::Bytes { scale },
        (_, 1) => Layout::Gptq {
            zeros_less_one: true,
        },
        (_, 2) => Layout::Gptq {
            zeros_less_one: false,
        },
        _ => Layout::Packed,
    };
    let by_group = matches!(layout, Layout::Awq | Layout::Gptq { .. });
    let [a, b] = [1 + random.below(20), 1 + random.below(20)].map(|size| size as u32);
    let grouping = match random.below(4) {
        0 if !by_group => Grouping::Tensor,
        1 if code == Code::Fp8 => Grouping::Block {
            outputs: a,
            inputs: b,
        },
        2 => Grouping::Output,
        _ => Grouping::Inputs(a),
    };
    let can_list = matches!(layout, Layout::Packed | Layout::Gptq { .. });
    let scheme = Scheme {
        code,
        layout,
        grouping,
        has_zeros: code == Code::Int4 && (by_group || random.below(2) == 0),
        order: if can_list && random.below(2) == 0 {
            Order::Listed
        } else {
            Order::ByPlace
        },
    };
    let [rows, cols] = [1 + random.below(40), 1 + random.below(60)].map(|size| size as u32);
    let spec = TensorSpec {
        name: "matrix.weight".to_owned(),
        rows,
        cols,
        is_vector: false,
        split: Split::Replicated,
        scheme: Some(scheme),
    };
    fill(
        random,
        Packed {
            spec,
            scheme,
            tensors: BTreeMap::new(),
            values: Vec::new(),
        },
    )
}

/// What a matrix is made of, before it is stored.
struct Drawn {
    /// `[rows, cols]`
    codes: Vec<u32>,
    /// `[rows, groups]`
    zeros: Vec<u32>,
    /// `[rows, groups]`, exact in 16 bits.
    scales: Vec<f32>,
    groups: usize,
}

fn fill(random: &mut Random, mut packed: Packed) -> Packed {
    let (scheme, bits) = (packed.scheme, packed.scheme.code.bits());
    let (rows, cols) = (packed.spec.rows as usize, packed.spec.cols as usize);
    let groups = scheme.grouping.groups_in(&(0..packed.spec.cols)) as usize;
    let number = |random: &mut Random, below: u32| random.below(below as usize) as u32;
    let by_place = |col: usize| scheme.grouping.group_of(col as u32) as usize;
    let mut group_of: Vec<usize> = (0..cols).map(by_place).collect();
    if scheme.order == Order::Listed {
        group_of.fill_with(|| random.below(groups));
        let list: Vec<u32> = group_of.iter().map(|group| *group as u32).collect();
        packed.put(Role::GroupOfInput, little_endian(&list), StoredDtype::I32);
    }
    let middle = 1 << (bits - 1);
    // 0x7f is no number in 8-bit floats.
    let below = if scheme.code == Code::Fp8 {
        0x7f
    } else {
        1 << bits
    };
    let mut zero = || {
        if scheme.has_zeros {
            number(random, 16)
        } else {
            middle
        }
    };
    let zeros = (0..rows * groups).map(|_| zero()).collect();
    let codes = (0..rows * cols).map(|_| number(random, below)).collect();
    let mut scales: Vec<f32> = (0..rows * groups)
        .map(|_| number(random, 100) as f32 / 64.0)
        .collect();
    for place in 0..scales.len() {
        // One for all, or for a block, where the scheme says so.
        scales[place] = scales[match scheme.grouping {
            Grouping::Tensor => 0,
            Grouping::Block { outputs, .. } => {
                let outputs = outputs as usize;
                place / groups / outputs * outputs * groups + place % groups
            }
            Grouping::Output | Grouping::Inputs(_) => place,
        }];
    }
    let drawn = Drawn {
        codes,
        zeros,
        scales,
        groups,
    };
    packed.values = (0..rows * cols)
        .map(|place| {
            let (at, code) = (
                place / cols * groups + group_of[place % cols],
                drawn.codes[place],
            );
            let value = match (scheme.code, scheme.layout) {
                (Code::Fp8, _) => quantized::e4m3(code as u8),
                (_, Layout::Bytes { .. }) => f32::from((code as u8).cast_signed()),
                _ => code as f32 - drawn.zeros[at] as f32,
            };
            drawn.scales[at] * value
        })
        .collect();
    match scheme.layout {
        Layout::Gptq { .. } | Layout::Awq => store_by_group(&mut packed, &drawn),
        Layout::Bytes { .. } | Layout::Packed => store_by_output(&mut packed, &drawn),
    }
    packed
}

fn halves<'a>(scales: impl Iterator<Item = &'a f32>) -> Vec<u8> {
    scales
        .flat_map(|scale| f16::from_f32(*scale).to_le_bytes())
        .collect()
}

/// GPTQ and AWQ: zeros and scales `[groups, rows]`.
fn store_by_group(packed: &mut Packed, drawn: &Drawn) {
    const AWQ: Option<[usize; 8]> = Some([0, 2, 4, 6, 1, 3, 5, 7]);
    let (layout, bits) = (packed.scheme.layout, packed.scheme.code.bits());
    let (rows, cols) = (packed.spec.rows as usize, packed.spec.cols as usize);
    let zeros = transposed(&drawn.zeros, drawn.groups);
    let (elements, mut zeros) = if layout == Layout::Awq {
        let codes = transposed(&drawn.codes, cols);
        (
            words(&codes, rows, bits, AWQ),
            words(&zeros, rows, bits, AWQ),
        )
    } else {
        // Along the inputs.
        let packed = words(&drawn.codes, cols, bits, None);
        let elements = transposed(&packed, cols.div_ceil(32 / bits as usize));
        (elements, words(&zeros, rows, bits, None))
    };
    if layout
        == (Layout::Gptq {
            zeros_less_one: true,
        })
    {
        let ones = u32::MAX / ((1 << bits) - 1);
        for word in &mut zeros {
            *word = word.wrapping_sub(ones);
        }
    }
    packed.put(Role::Elements, little_endian(&elements), StoredDtype::I32);
    packed.put(Role::Zeros, little_endian(&zeros), StoredDtype::I32);
    let groups = drawn.groups;
    let places = (0..groups).flat_map(|group| (0..rows).map(move |row| row * groups + group));
    let scales = halves(places.map(|place| &drawn.scales[place]));
    packed.put(Role::Scales, scales, StoredDtype::Float(Dtype::Float16));
}

/// compressed-tensors and fp8: scales `[rows, groups]`, or fewer.
fn store_by_output(packed: &mut Packed, drawn: &Drawn) {
    let (scheme, bits) = (packed.scheme, packed.scheme.code.bits());
    let (rows, cols) = (packed.spec.rows as usize, packed.spec.cols as usize);
    let elements = match scheme.layout {
        Layout::Packed => little_endian(&words(&drawn.codes, cols, bits, None)),
        _ => drawn.codes.iter().map(|code| *code as u8).collect(),
    };
    packed.put(Role::Elements, elements, StoredDtype::I32);
    let by_output = drawn.scales.chunks(drawn.groups);
    let scales = match scheme.grouping {
        Grouping::Tensor => halves(drawn.scales[..1].iter()),
        Grouping::Block { outputs, .. } => halves(by_output.step_by(outputs as usize).flatten()),
        Grouping::Output | Grouping::Inputs(_) => halves(by_output.flatten()),
    };
    packed.put(Role::Scales, scales, StoredDtype::Float(Dtype::Float16));
    if scheme.has_zeros {
        // Along the outputs.
        let turned = words(&transposed(&drawn.zeros, drawn.groups), rows, bits, None);
        let zeros = transposed(&turned, rows.div_ceil(32 / bits as usize));
        packed.put(Role::Zeros, little_endian(&zeros), StoredDtype::I32);
    }
}

#[test]
fn what_is_packed_is_read_back_whole_and_in_parts() {
    let mut seen = BTreeMap::new();
    for seed in 0..4000 {
        let mut random = Random::new(seed);
        let packed = random_matrix(&mut random);
        let (rows, cols) = (packed.spec.rows, packed.spec.cols);
        let case = format!("seed {seed}: [{rows}, {cols}], {:?}", packed.scheme);
        let whole = packed.part([0, rows], [0, cols]);
        let whole = whole.unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(values(&whole), packed.values, "{case}");
        *seen
            .entry(format!("{:?}", packed.scheme.layout))
            .or_insert(0) += 1;

        // Cut anywhere, by rows and by columns: each part is what it is in the whole.
        let [row, col] = [rows, cols].map(|length| random.below(length as usize) as u32);
        for (rows, cols) in [
            ([0, row], [0, cols]),
            ([row, rows], [0, cols]),
            ([0, rows], [0, col]),
            ([0, rows], [col, cols]),
            ([row, rows], [col, cols]),
        ] {
            if rows[0] == rows[1] || cols[0] == cols[1] {
                continue;
            }
            let part = packed
                .part(rows, cols)
                .unwrap_or_else(|e| panic!("{case}: {e}"));
            let expected = (rows[0]..rows[1]).flat_map(|row| {
                let start = (row * packed.spec.cols) as usize;
                packed.values[start..][cols[0] as usize..cols[1] as usize].to_vec()
            });
            let expected: Vec<f32> = expected.collect();
            assert_eq!(
                values(&part),
                expected,
                "{case}: rows {rows:?} of columns {cols:?}"
            );
        }
    }
    assert_eq!(seen.len(), 5, "{seen:?}");
    assert!(seen.values().all(|count| *count > 200), "{seen:?}");
}

#[test]
fn groups_that_are_not_there_are_refused() {
    let mut refused = 0;
    for seed in 0..1000 {
        let mut random = Random::new(seed);
        let mut packed = random_matrix(&mut random);
        if packed.scheme.order == Order::Listed {
            let list = [7, 1 << 20].map(|far: u32| packed.spec.cols * 100 + far);
            let cols = packed.spec.cols as usize;
            packed.put(
                Role::GroupOfInput,
                little_endian(&list.repeat(cols)),
                StoredDtype::I32,
            );
            let said = packed
                .part([0, packed.spec.rows], [0, packed.spec.cols])
                .unwrap_err();
            assert!(
                said.to_string()
                    .contains("matrix.weight lists for input 0 none of its"),
                "{said}"
            );
            refused += 1;
        }
    }
    assert!(refused > 100);
}

/// A matrix of numbers in one of the stored types, its columns a range of a wider one.
fn numbers(values: &[f32], cols: usize, element: Element) -> HostMatrix {
    let data: Vec<u8> = match element {
        Element::F32 => values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
        Element::F16 => values
            .iter()
            .flat_map(|v| f16::from_f32(*v).to_le_bytes())
            .collect(),
        Element::Bf16 => values
            .iter()
            .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
            .collect(),
        Element::Fp8 => values.iter().map(|v| to_e4m3(*v)).collect(),
    };
    HostMatrix {
        data: data.into(),
        element,
        rows: values.len() / cols,
        cols,
        row_stride: cols,
    }
}

#[test]
fn codes_at_load_are_near_the_numbers() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let (rows, cols) = (1 + random.below(6), 1 + random.below(400));
        let first_input = random.below(300) as u32;
        let mut weights: Vec<f32> = (0..rows * cols)
            .map(|_| random.below(2001) as f32 / 1000.0 - 1.0)
            .collect();
        // A row of zeros, and one of a single sign.
        weights[..cols].fill(0.0);
        for weight in &mut weights[(rows - 1) * cols..] {
            *weight = weight.abs();
        }
        for element in [Element::F32, Element::F16, Element::Bf16] {
            let matrix = numbers(&weights, cols, element);
            let exact = weights.iter().map(|weight| match element {
                Element::F16 => f16::from_f32(*weight).to_f32(),
                Element::Bf16 => half::bf16::from_f32(*weight).to_f32(),
                _ => *weight,
            });
            let exact: Vec<f32> = exact.collect();
            for code in [Code::Int8, Code::Int4, Code::Fp8] {
                let case = format!("seed {seed}: [{rows}, {cols}] in {code:?}");
                let quantised = quantise(&matrix, code, first_input).unwrap();
                let groups = quantised.group_ends.len() as u32;
                let inputs = first_input..first_input + cols as u32;
                assert_eq!(groups, Grouping::at_load(code).groups_in(&inputs), "{case}");
                for (found, weight) in values(&quantised).iter().zip(&exact) {
                    // Half a step of 1/127, 1/15 of up to two (less what is cut off), or a sixteenth.
                    let most = match code {
                        Code::Int8 => 0.5 / 127.0 + 1e-6,
                        Code::Int4 => 0.2,
                        Code::Fp8 => weight.abs() / 16.0 + 1e-4,
                    };
                    assert!(
                        (found - weight).abs() <= most,
                        "{case}: {found} for {weight}"
                    );
                }
            }
        }
    }
}

/// What a rank of several quantises to is what one rank does, wherever groups allow: rows always, and columns of 4 bits
/// at multiples of a group.
#[test]
fn ranks_quantise_as_one() {
    let mut random = Random::new(5);
    let (rows, cols) = (8, 512);
    let weights: Vec<f32> = (0..rows * cols)
        .map(|_| random.below(2001) as f32 - 1000.0)
        .collect();
    let whole = numbers(&weights, cols, Element::F32);
    for code in [Code::Int8, Code::Int4, Code::Fp8] {
        let all = values(&quantise(&whole, code, 0).unwrap());
        let lower = numbers(&weights[4 * cols..], cols, Element::F32);
        assert_eq!(values(&quantise(&lower, code, 0).unwrap()), all[4 * cols..]);
    }
    let right = HostMatrix {
        data: whole.data.slice(4 * 256..),
        cols: 256,
        ..whole.clone()
    };
    let all = values(&quantise(&whole, Code::Int4, 0).unwrap());
    let part = values(&quantise(&right, Code::Int4, 256).unwrap());
    for row in 0..rows {
        assert_eq!(part[row * 256..][..256], all[row * cols + 256..][..256]);
    }
}

/// The search over ranges pays: with one weight far out, the others are nearer than by smallest and largest.
#[test]
fn four_bits_are_chosen_for_the_least_squared_error() {
    let mut weights: Vec<f32> = (0..128).map(|place| (place % 13) as f32 / 13.0).collect();
    weights[0] = 1.3;
    let quantised = quantise(&numbers(&weights, 128, Element::F32), Code::Int4, 0).unwrap();
    let error: f32 = values(&quantised)
        .iter()
        .zip(&weights)
        .map(|(a, b)| (a - b) * (a - b))
        .sum();
    let step = 1.3 / 15.0;
    let plain = weights.iter().map(|weight| {
        let found = (weight / step).round() * step;
        (found - weight) * (found - weight)
    });
    assert!(error < 0.9 * plain.sum::<f32>(), "{error}");
}

#[test]
fn a_weight_that_is_not_finite_is_refused() {
    let weights = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
    for (bad, code) in weights
        .into_iter()
        .flat_map(|bad| [Code::Int8, Code::Int4, Code::Fp8].map(|code| (bad, code)))
    {
        // Alone in a lane, and before and after others.
        for place in [0, 5, 20, 36] {
            let mut row = vec![1.0; 37];
            row[place] = bad;
            let refused = quantise(&numbers(&row, 37, Element::F32), code, 0);
            let said = refused.unwrap_err().to_string();
            assert!(said.contains("not finite"), "{bad} in {code:?}: {said}");
        }
    }
}
