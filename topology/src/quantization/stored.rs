//! The tensors in which each layout keeps a matrix: names, types and shapes.
//!
//! Says nothing of how codes lie within them; the shard's readers do. Invariant: what a reader of a layout reads is
//! listed here, so that a checkpoint which passed its check cannot surprise it.

use super::{Code, Grouping, Layout, Order, Scheme};
use crate::checkpoint::StoredDtype;

/// Which types a tensor may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// F32, F16 or BF16.
    Floats,
    /// Words of 32 bits.
    Words,
    /// I8
    Int8,
    /// `F8_E4M3`
    Fp8,
    /// I32 or I64.
    Integers,
}

impl Accepted {
    /// Whether `dtype` is one of them.
    pub fn takes(self, dtype: &StoredDtype) -> bool {
        matches!(
            (self, dtype),
            (Self::Floats, StoredDtype::Float(_))
                | (Self::Words | Self::Integers, StoredDtype::I32)
                | (Self::Integers, StoredDtype::I64)
                | (Self::Int8, StoredDtype::I8)
                | (Self::Fp8, StoredDtype::F8E4m3)
        )
    }

    /// For messages.
    pub fn names(self) -> &'static str {
        match self {
            Self::Floats => "F32, F16 or BF16",
            Self::Words => "I32",
            Self::Int8 => "I8",
            Self::Fp8 => "F8_E4M3",
            Self::Integers => "I32 or I64",
        }
    }
}

/// What a stored tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The elements, or the codes that stand for them.
    Elements,
    /// Scales of groups.
    Scales,
    /// Zeros of groups.
    Zeros,
    /// The group of each input.
    GroupOfInput,
    /// `[out, in]`, where the codes' tensor does not say.
    Shape,
}

/// One tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredSpec {
    /// The name in the checkpoint.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Outermost dimension first.
    pub shape: Vec<u64>,
    /// Its types.
    pub accepted: Accepted,
    /// The shape may have other ones in it: `[n]` for `[n, 1]`, `[]` for `[1]`.
    pub loose: bool,
    /// May be absent.
    pub optional: bool,
}

impl StoredSpec {
    /// Whether `shape` is right.
    pub fn has_shape(&self, shape: &[u64]) -> bool {
        let long =
            |shape: &[u64]| -> Vec<u64> { shape.iter().copied().filter(|n| *n != 1).collect() };
        shape == self.shape || (self.loose && long(shape) == long(&self.shape))
    }
}

impl Scheme {
    /// The tensors of a matrix `[rows, cols]` of `module`.
    pub fn stored(&self, module: &str, [rows, cols]: [u32; 2]) -> Vec<StoredSpec> {
        let per_word = 32 / self.code.bits();
        let groups = self.grouping.groups_in(&(0..cols));
        let [row_words, col_words] = [rows, cols].map(|length| length.div_ceil(per_word));
        let by_output = self.scale_shape([rows, cols]);
        let mut specs = match self.layout {
            Layout::Gptq { .. } | Layout::Awq => {
                let elements = match self.layout {
                    Layout::Awq => vec![cols, row_words],
                    _ => vec![col_words, rows],
                };
                vec![
                    ("qweight", Role::Elements, elements, Accepted::Words),
                    (
                        "qzeros",
                        Role::Zeros,
                        vec![groups, row_words],
                        Accepted::Words,
                    ),
                    ("scales", Role::Scales, vec![groups, rows], Accepted::Floats),
                ]
            }
            Layout::Bytes { scale } => {
                let accepted = match self.code {
                    Code::Int8 => Accepted::Int8,
                    Code::Int4 | Code::Fp8 => Accepted::Fp8,
                };
                vec![
                    ("weight", Role::Elements, vec![rows, cols], accepted),
                    (scale, Role::Scales, by_output, Accepted::Floats),
                ]
            }
            Layout::Packed => vec![
                (
                    "weight_packed",
                    Role::Elements,
                    vec![rows, col_words],
                    Accepted::Words,
                ),
                ("weight_scale", Role::Scales, by_output, Accepted::Floats),
                ("weight_shape", Role::Shape, vec![2], Accepted::Integers),
            ],
        };
        let is_packed = self.layout == Layout::Packed;
        if is_packed && self.has_zeros {
            let shape = vec![row_words, groups];
            specs.push(("weight_zero_point", Role::Zeros, shape, Accepted::Words));
        }
        if self.order != Order::ByPlace {
            let name = if is_packed { "weight_g_idx" } else { "g_idx" };
            specs.push((name, Role::GroupOfInput, vec![cols], Accepted::Integers));
        }
        // One scale, or one for each output, is written as a matrix by some and as a vector by others.
        let is_loose = matches!(self.grouping, Grouping::Tensor | Grouping::Output);
        let spec = |(name, role, shape, accepted): (&str, _, Vec<u32>, _)| StoredSpec {
            name: format!("{module}.{name}"),
            role,
            shape: shape.into_iter().map(u64::from).collect(),
            accepted,
            loose: is_loose && role == Role::Scales,
            optional: role == Role::GroupOfInput && self.order == Order::MayBeListed,
        };
        specs.into_iter().map(spec).collect()
    }

    /// Shape of the scales in the layouts that keep them by output.
    fn scale_shape(&self, [rows, cols]: [u32; 2]) -> Vec<u32> {
        match self.grouping {
            Grouping::Tensor => vec![1, 1],
            Grouping::Output => vec![rows, 1],
            Grouping::Inputs(_) => vec![rows, self.grouping.groups_in(&(0..cols))],
            Grouping::Block { outputs, .. } => vec![
                rows.div_ceil(outputs.max(1)),
                self.grouping.groups_in(&(0..cols)),
            ],
        }
    }
}
