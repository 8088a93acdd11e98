//! One matrix in a published quantised layout: this rank's part of it, brought into the backends' form.
//!
//! Where a byte is a code already nothing is copied; otherwise codes are taken out of their words, row by row. A rank's
//! range may cut a group or a block: its part of that group is shorter. Where the groups of inputs are listed
//! (act-order), columns come in the order of their groups, and say which input they belong to.
//!
//! Invariant: what a file says (groups, zeros, shapes) is checked before it is an index.

use super::{Workers, over_threads, to_u32};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use half::{bf16, f16};
use kernels::quantized::HostQuantized;
use std::ops::Range;
use topology::checkpoint::StoredDtype;
use topology::model_shape::Dtype;
use topology::partition::{TensorPart, TensorSpec};
use topology::quantization::{Code, Grouping, Layout, Role, Scheme};

/// Where AWQ has output `n` of each eight: in which four bits of a word.
const AWQ_PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// The bytes of a stored tensor; elements are little endian and may be unaligned.
#[derive(Clone, Debug)]
struct Tensor {
    data: Bytes,
    dtype: StoredDtype,
}

impl Tensor {
    fn bytes_at<const N: usize>(&self, index: usize) -> [u8; N] {
        let bytes = &self.data[index * N..][..N];
        bytes.try_into().expect("a slice of this length")
    }

    fn word(&self, index: usize) -> u32 {
        u32::from_le_bytes(self.bytes_at(index))
    }

    fn float(&self, index: usize) -> f32 {
        match self.dtype {
            StoredDtype::Float(Dtype::Float16) => f16::from_le_bytes(self.bytes_at(index)).to_f32(),
            StoredDtype::Float(Dtype::Bfloat16) => {
                bf16::from_le_bytes(self.bytes_at(index)).to_f32()
            }
            _ => f32::from_le_bytes(self.bytes_at(index)),
        }
    }

    fn integer(&self, index: usize) -> i64 {
        match self.dtype {
            StoredDtype::I64 => i64::from_le_bytes(self.bytes_at(index)),
            _ => i32::from_le_bytes(self.bytes_at(index)).into(),
        }
    }
}

/// The stored tensors of one matrix, by what they are for.
#[derive(Debug)]
pub(super) struct Tensors(Vec<(Role, Tensor)>);

impl Tensors {
    pub(super) fn new() -> Self {
        Self(Vec::new())
    }

    /// `data` are the tensor's bytes, as many as its checked shape and type say.
    pub(super) fn insert(&mut self, role: Role, data: Bytes, dtype: &StoredDtype) {
        let dtype = dtype.clone();
        self.0.push((role, Tensor { data, dtype }));
    }

    fn take(&mut self, role: Role) -> Option<Tensor> {
        let at = self.0.iter().position(|(found, _)| *found == role)?;
        Some(self.0.swap_remove(at).1)
    }
}

/// A rank's part of a quantised matrix, still in the checkpoint.
#[derive(Clone, Debug)]
pub(super) struct QuantisedPart {
    name: String,
    scheme: Scheme,
    /// `[out, in]` of the whole matrix.
    whole: [usize; 2],
    rows: Range<usize>,
    cols: Range<usize>,
    elements: Tensor,
    scales: Tensor,
    zeros: Option<Tensor>,
    group_of_input: Option<Tensor>,
    groups: u32,
}

/// The columns of a part, in the order in which their groups follow each other.
struct Columns {
    /// Which column of the part each is; `None`: as they are.
    order: Option<Vec<u32>>,
    /// Where each group ends.
    ends: Vec<usize>,
    /// Which of the matrix's groups each is.
    groups: Vec<usize>,
}

impl QuantisedPart {
    /// The `part` of `spec`, whose tensors have the shapes that `scheme` says.
    ///
    /// # Errors
    /// If a tensor is missing or the stored shape is another one.
    pub(super) fn new(
        spec: &TensorSpec,
        scheme: Scheme,
        part: &TensorPart,
        mut tensors: Tensors,
    ) -> Result<Self> {
        let name = spec.name.clone();
        let needs = |found: Option<Tensor>| found.with_context(|| format!("{name} is incomplete"));
        if let Some(shape) = tensors.take(Role::Shape) {
            let found = [shape.integer(0), shape.integer(1)];
            ensure!(
                found == [i64::from(spec.rows), i64::from(spec.cols)],
                "{name} is stored with the shape {found:?}, but by config.json it must be [{}, {}]",
                spec.rows,
                spec.cols
            );
        }
        // Zeros that the scheme does not have (GPTQ's of 8 bits) are the code's middle.
        Ok(Self {
            scheme,
            whole: [spec.rows as usize, spec.cols as usize],
            rows: part.rows.start as usize..part.rows.end as usize,
            cols: part.cols.start as usize..part.cols.end as usize,
            elements: needs(tensors.take(Role::Elements))?,
            scales: needs(tensors.take(Role::Scales))?,
            zeros: tensors.take(Role::Zeros),
            group_of_input: tensors.take(Role::GroupOfInput),
            groups: scheme.groups_in(&part.cols, spec.cols),
            name,
        })
    }

    pub(super) fn code(&self) -> Code {
        self.scheme.code
    }

    pub(super) fn shape(&self) -> [usize; 2] {
        [self.rows.len(), self.cols.len()]
    }

    /// Groups of the part, for the arithmetic of memory.
    pub(super) fn groups(&self) -> u32 {
        self.groups
    }

    /// Brings it into the backends' form.
    ///
    /// # Errors
    /// If the file's groups or zeros cannot be.
    pub(super) fn read(&self, workers: Workers<'_>) -> Result<HostQuantized> {
        let [rows, cols] = self.shape();
        let columns = self.columns()?;
        let (data, row_stride) = match (self.scheme.layout, &columns.order) {
            (Layout::Bytes { .. }, None) if rows > 0 => {
                let stride = self.whole[1];
                let first = self.rows.start * stride + self.cols.start;
                let last = (self.rows.end - 1) * stride + self.cols.end;
                (self.elements.data.slice(first..last), stride)
            }
            (_, order) => (self.unpack(workers, order.as_deref()), cols),
        };
        let places = || {
            self.rows
                .clone()
                .flat_map(|row| columns.groups.iter().map(move |g| (row, *g)))
        };
        let zeros = places().map(|(row, group)| self.zero(row, group));
        let zeros = zeros.collect::<Result<Vec<u8>>>()?;
        Ok(HostQuantized {
            code: super::code(self.scheme.code),
            data,
            rows,
            cols,
            row_stride,
            inputs: columns.order,
            group_ends: columns.ends,
            scales: places()
                .map(|(row, group)| self.scale(row, group))
                .collect(),
            zeros: if self.scheme.code == Code::Int4 {
                zeros
            } else {
                Vec::new()
            },
        })
    }

    fn columns(&self) -> Result<Columns> {
        let groups = self.scheme.grouping.groups_in(&(0..to_u32(self.whole[1]))) as usize;
        let mut group_of = Vec::with_capacity(self.cols.len());
        for input in self.cols.clone() {
            let group = match &self.group_of_input {
                // -1 is written where a list was reserved and never made.
                Some(list) if list.integer(0) >= 0 => usize::try_from(list.integer(input)).ok(),
                _ => Some(self.scheme.grouping.group_of(to_u32(input)) as usize),
            };
            let group = group.filter(|group| *group < groups).with_context(|| {
                format!(
                    "{} lists for input {input} none of its {groups} groups",
                    self.name
                )
            })?;
            group_of.push(group);
        }
        let mut order = None;
        if !group_of.is_sorted() {
            let mut sorted: Vec<u32> = (0..to_u32(group_of.len())).collect();
            sorted.sort_by_key(|column| group_of[*column as usize]);
            group_of = sorted
                .iter()
                .map(|column| group_of[*column as usize])
                .collect();
            order = Some(sorted);
        }
        let runs = || group_of.chunk_by(|one, other| one == other);
        let ends = runs().scan(0, |end, run| {
            *end += run.len();
            Some(*end)
        });
        Ok(Columns {
            order,
            ends: ends.collect(),
            groups: runs().map(|run| run[0]).collect(),
        })
    }

    /// Codes of all rows, one byte each. `[rows, cols]`
    fn unpack(&self, workers: Workers<'_>, order: Option<&[u32]>) -> Bytes {
        let [rows, cols] = self.shape();
        let mut data = vec![0; rows * cols];
        let rows = data
            .chunks_mut(cols.max(1))
            .zip(self.rows.clone())
            .collect();
        over_threads(workers, rows, cols, |(codes, row)| {
            self.unpack_row(row, order, codes);
        });
        data.into()
    }

    /// Codes of one output of the whole matrix. `codes: [cols]`
    fn unpack_row(&self, row: usize, order: Option<&[u32]>, codes: &mut [u8]) {
        let [outputs, inputs] = self.whole;
        let (bits, per_word) = (self.scheme.code.bits() as usize, self.per_word());
        let field = |word: usize, place: usize| self.field(&self.elements, word, place * bits);
        match self.scheme.layout {
            Layout::Bytes { .. } => {
                let stored = &self.elements.data[row * inputs..][..inputs];
                self.fill(order, codes, |input| stored[input]);
            }
            Layout::Gptq { .. } => self.fill(order, codes, |input| {
                field(input / per_word * outputs + row, input % per_word)
            }),
            Layout::Awq => {
                let (words, place) = (outputs.div_ceil(per_word), AWQ_PLACES[row % per_word]);
                self.fill(order, codes, |input| {
                    field(input * words + row / per_word, place)
                });
            }
            Layout::Packed => {
                let start = row * inputs.div_ceil(per_word);
                self.fill(order, codes, |input| {
                    field(start + input / per_word, input % per_word)
                });
            }
        }
        if self.scheme.code == Code::Int8 && !matches!(self.scheme.layout, Layout::Bytes { .. }) {
            // Stored as a distance from -128.
            for code in codes {
                *code ^= 0x80;
            }
        }
    }

    fn fill(&self, order: Option<&[u32]>, codes: &mut [u8], code: impl Fn(usize) -> u8) {
        match order {
            None => {
                for (to, input) in codes.iter_mut().zip(self.cols.clone()) {
                    *to = code(input);
                }
            }
            Some(order) => {
                for (to, column) in codes.iter_mut().zip(order) {
                    *to = code(self.cols.start + *column as usize);
                }
            }
        }
    }

    fn per_word(&self) -> usize {
        32 / self.scheme.code.bits() as usize
    }

    fn max_code(&self) -> u32 {
        (1 << self.scheme.code.bits()) - 1
    }

    /// The bits of one code in a word of a tensor.
    fn field(&self, tensor: &Tensor, word: usize, shift: usize) -> u8 {
        self.low_bits(tensor.word(word) >> shift)
    }

    fn low_bits(&self, word: u32) -> u8 {
        let [low, ..] = (word & self.max_code()).to_le_bytes();
        low
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        let [outputs, inputs] = self.whole;
        let groups = self.scheme.grouping.groups_in(&(0..to_u32(inputs))) as usize;
        let by_group_first = matches!(self.scheme.layout, Layout::Gptq { .. } | Layout::Awq);
        self.scales.float(match self.scheme.grouping {
            _ if by_group_first => group * outputs + row,
            Grouping::Tensor => 0,
            Grouping::Output => row,
            Grouping::Inputs(_) => row * groups + group,
            Grouping::Block { outputs, .. } => row / outputs as usize * groups + group,
        })
    }

    /// The code that stands for 0.
    fn zero(&self, row: usize, group: usize) -> Result<u8> {
        let middle = if self.scheme.code == Code::Int4 {
            8
        } else {
            128
        };
        let Some(zeros) = &self.zeros else {
            return Ok(middle);
        };
        let (outputs, inputs) = (self.whole[0], self.whole[1]);
        let (bits, per_word) = (self.scheme.code.bits() as usize, self.per_word());
        let words = outputs.div_ceil(per_word);
        let groups = self.scheme.grouping.groups_in(&(0..to_u32(inputs))) as usize;
        let place = row % per_word;
        let zero = match self.scheme.layout {
            Layout::Gptq { zeros_less_one } => {
                // One is taken from, and added to, whole words, so that a zero of 0 borrows from its neighbour.
                let ones = if zeros_less_one {
                    u32::MAX / self.max_code()
                } else {
                    0
                };
                let word = zeros
                    .word(group * words + row / per_word)
                    .wrapping_add(ones);
                self.low_bits(word >> (place * bits))
            }
            Layout::Awq => self.field(
                zeros,
                group * words + row / per_word,
                AWQ_PLACES[place] * bits,
            ),
            Layout::Packed | Layout::Bytes { .. } => {
                self.field(zeros, row / per_word * groups + group, place * bits)
            }
        };
        ensure!(
            self.scheme.code == Code::Int4 || zero == middle,
            "{} has the zero point {zero}; with 8 bits only {middle} is supported",
            self.name
        );
        Ok(zero)
    }
}
