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
        let spec = |name: &str, role, shape: [u32; 2], accepted| StoredSpec {
            name: format!("{module}.{name}"),
            role,
            shape: shape.map(u64::from).to_vec(),
            accepted,
            loose: false,
            optional: false,
        };
        let per_word = 32 / self.code.bits();
        let groups = self.grouping.groups_in(&(0..cols));
        let mut specs = match self.layout {
            Layout::Gptq { .. } => vec![
                spec(
                    "qweight",
                    Role::Elements,
                    [cols.div_ceil(per_word), rows],
                    Accepted::Words,
                ),
                spec(
                    "qzeros",
                    Role::Zeros,
                    [groups, rows.div_ceil(per_word)],
                    Accepted::Words,
                ),
                spec("scales", Role::Scales, [groups, rows], Accepted::Floats),
            ],
            Layout::Awq => vec![
                spec(
                    "qweight",
                    Role::Elements,
                    [cols, rows.div_ceil(per_word)],
                    Accepted::Words,
                ),
                spec(
                    "qzeros",
                    Role::Zeros,
                    [groups, rows.div_ceil(per_word)],
                    Accepted::Words,
                ),
                spec("scales", Role::Scales, [groups, rows], Accepted::Floats),
            ],
            Layout::Bytes { scale } => {
                let accepted = match self.code {
                    Code::Int8 => Accepted::Int8,
                    Code::Int4 | Code::Fp8 => Accepted::Fp8,
                };
                vec![
                    spec("weight", Role::Elements, [rows, cols], accepted),
                    spec(
                        scale,
                        Role::Scales,
                        self.scale_shape([rows, cols]),
                        Accepted::Floats,
                    ),
                ]
            }
            Layout::Packed => vec![
                spec(
                    "weight_packed",
                    Role::Elements,
                    [rows, cols.div_ceil(per_word)],
                    Accepted::Words,
                ),
                spec(
                    "weight_scale",
                    Role::Scales,
                    self.scale_shape([rows, cols]),
                    Accepted::Floats,
                ),
                StoredSpec {
                    shape: vec![2],
                    ..spec("weight_shape", Role::Shape, [2, 1], Accepted::Integers)
                },
            ],
        };
        if self.layout == Layout::Packed && self.has_zeros {
            let shape = [rows.div_ceil(per_word), groups];
            specs.push(spec(
                "weight_zero_point",
                Role::Zeros,
                shape,
                Accepted::Words,
            ));
        }
        if self.order != Order::ByPlace {
            let name = if self.layout == Layout::Packed {
                "weight_g_idx"
            } else {
                "g_idx"
            };
            specs.push(StoredSpec {
                shape: vec![cols.into()],
                optional: self.order == Order::MayBeListed,
                ..spec(name, Role::GroupOfInput, [cols, 1], Accepted::Integers)
            });
        }
        for spec in &mut specs {
            // One scale, or one for each output, is written as a matrix by some and as a vector by others.
            spec.loose = spec.role == Role::Scales
                && matches!(self.grouping, Grouping::Tensor | Grouping::Output);
        }
        specs
    }

    /// Shape of the scales in the layouts that keep them by output.
    fn scale_shape(&self, [rows, cols]: [u32; 2]) -> [u32; 2] {
        match self.grouping {
            Grouping::Tensor => [1, 1],
            Grouping::Output => [rows, 1],
            Grouping::Inputs(_) => [rows, self.grouping.groups_in(&(0..cols))],
            Grouping::Block { outputs, .. } => [
                rows.div_ceil(outputs.max(1)),
                self.grouping.groups_in(&(0..cols)),
            ],
        }
    }
}
