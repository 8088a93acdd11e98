//! How a checkpoint's linear layers are quantised: which of them, and in which published layout.
//!
//! Reads `quantization_config` of `config.json` (GPTQ, AWQ, compressed-tensors, fp8) into a [`Scheme`] for each module.
//! What the layouts' tensors are called and which shapes they have is in `stored`; who reads them is the shard. What
//! cannot be honoured is refused with the key and its value. Embedding tables are never quantised.
//!
//! Invariant: the parts of a product that is computed as one (q, k and v; gate and up) have the same code.

mod compressed;
mod config;
mod modules;
mod stored;
#[cfg(test)]
mod tests;

use crate::model_shape::ModelShape;
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::Range;

pub(crate) use config::read;
pub use stored::{Accepted, Role, StoredSpec};

/// How one element of a quantised matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Code {
    /// 4 bits with a zero point.
    Int4,
    /// 8 bits, signed.
    Int8,
    /// 8 bits, a float (`E4M3`).
    Fp8,
}

impl Code {
    /// Bits of one element.
    pub fn bits(self) -> u32 {
        match self {
            Self::Int4 => 4,
            Self::Int8 | Self::Fp8 => 8,
        }
    }

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int4 => "int4",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        }
    }
}

/// Who wrote the checkpoint: `quant_method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Method {
    /// `gptq`
    Gptq,
    /// `awq`
    Awq,
    /// `compressed-tensors`
    CompressedTensors,
    /// `fp8`
    Fp8,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Gptq, Self::Awq, Self::CompressedTensors, Self::Fp8];

    /// The name in `config.json` and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::Awq => "awq",
            Self::CompressedTensors => "compressed-tensors",
            Self::Fp8 => "fp8",
        }
    }
}

/// Where the codes of a matrix `[out, in]` are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Layout {
    /// `qweight [in / n, out]`: words of 32 bits hold n inputs of one output, the first in the lowest bits.
    Gptq {
        /// Zeros are stored less one (`checkpoint_format: gptq`).
        zeros_less_one: bool,
    },
    /// `qweight [in, out / 8]`: words hold eight outputs of one input, even ones first.
    Awq,
    /// `weight [out, in]`: a byte for each code.
    Bytes {
        /// What the scales' name ends in.
        scale: &'static str,
    },
    /// `weight_packed [out, in / n]`: words hold n inputs of one output, the first in the lowest bits, as unsigned numbers.
    Packed,
}

/// What shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Grouping {
    /// The whole matrix.
    Tensor,
    /// Each output.
    Output,
    /// So many inputs of an output.
    Inputs(u32),
    /// So many outputs by so many inputs.
    Block {
        /// Outputs.
        outputs: u32,
        /// Inputs.
        inputs: u32,
    },
}

/// Whether the group of an input is listed (act-order) or follows from its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Order {
    /// By place.
    ByPlace,
    /// Listed where the tensor is there; by place where not.
    MayBeListed,
    /// Listed.
    Listed,
}

/// How one matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Scheme {
    /// What an element becomes.
    pub code: Code,
    /// Where its codes are.
    pub layout: Layout,
    /// What shares a scale.
    pub grouping: Grouping,
    /// Whether zeros are stored; without, a 4-bit code stands for its distance from 8.
    pub has_zeros: bool,
    /// How inputs find their group.
    pub order: Order,
}

impl Grouping {
    /// What weights that are quantised to `code` at load get.
    pub fn at_load(code: Code) -> Self {
        match code {
            Code::Int4 => Self::Inputs(GROUP_AT_LOAD),
            Code::Int8 | Code::Fp8 => Self::Output,
        }
    }

    /// The group of an input, by place.
    pub fn group_of(self, input: u32) -> u32 {
        match self {
            Self::Tensor | Self::Output => 0,
            Self::Inputs(size) | Self::Block { inputs: size, .. } => input / size.max(1),
        }
    }

    /// How many groups a range of inputs meets, by place.
    pub fn groups_in(self, inputs: &Range<u32>) -> u32 {
        if inputs.is_empty() {
            return 0;
        }
        self.group_of(inputs.end - 1) - self.group_of(inputs.start) + 1
    }
}

impl Scheme {
    /// How many groups `part` of `inputs` inputs meets: where they are listed, all.
    pub fn groups_in(&self, part: &Range<u32>, inputs: u32) -> u32 {
        match self.order {
            Order::Listed => self.grouping.groups_in(&(0..inputs)),
            Order::ByPlace | Order::MayBeListed => self.grouping.groups_in(part),
        }
    }
}

/// How a model's linear layers are quantised.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Quantization {
    /// Who wrote it.
    pub method: Method,
    /// By name of the module (`model.layers.0.mlp.up_proj`); what is not here is not quantised.
    pub modules: BTreeMap<String, Scheme>,
    /// What the configuration says and this build does without, in sentences. Harmless: results are closer to the
    /// unquantised model's.
    pub notes: Vec<String>,
}

/// Inputs that share a scale where weights are quantised to 4 bits at load.
pub const GROUP_AT_LOAD: u32 = 128;

/// `--quantization`: what the matrices of a checkpoint that is not quantised become at load; `auto` is nothing.
///
/// The name of a method is accepted where the checkpoint was made by it, as in `vllm serve`.
///
/// # Errors
/// A sentence if the checkpoint is something else.
pub fn at_load(asked: &str, shape: &ModelShape) -> Result<Option<Code>, String> {
    let method = shape.quantization.as_ref().map(|stored| stored.method);
    let code = [Code::Int4, Code::Int8, Code::Fp8]
        .into_iter()
        .find(|code| code.name() == asked);
    match (asked, method, code) {
        ("auto", ..) => Ok(None),
        (_, Some(method), _) if method.name() == asked => Ok(None),
        (_, Some(method), _) => Err(format!(
            "--quantization {asked} is not how this checkpoint is quantised; leave it out, or give {}",
            method.name()
        )),
        (_, None, Some(code)) => Ok(Some(code)),
        (_, None, None) if Method::ALL.iter().any(|method| method.name() == asked) => Err(format!(
            "--quantization {asked} needs a checkpoint that was quantised so, and this one is not quantised; leave it \
             out, or give int8, int4 or fp8 to quantise it at load"
        )),
        _ => Err(format!(
            "--quantization is {asked}; it must be int8, int4 or fp8, or the checkpoint's own: gptq, awq, \
             compressed-tensors or fp8"
        )),
    }
}

/// What the head becomes on a CPU where linear layers become `at_load`.
///
/// A step of few rows takes the time to read the weights, and where the vocabulary is large the head is half of
/// them. In 8 bits with a scale for each token it chooses as before. A head that is the embedding, too, is kept twice
/// then. GPUs multiply many rows in the numbers' own type: they would have to make numbers of it in every step.
pub fn head_at_load(at_load: Option<Code>) -> Option<Code> {
    match at_load? {
        Code::Int8 | Code::Int4 => Some(Code::Int8),
        Code::Fp8 => None,
    }
}

/// Bytes of codes, scales and zeros of a matrix on a device.
pub fn device_bytes(code: Code, [rows, cols]: [u64; 2], groups: u64) -> u64 {
    const SCALE_BYTES: u64 = 4;
    let zeros = u64::from(code == Code::Int4);
    let codes = rows
        .saturating_mul(cols)
        .saturating_mul(code.bits().into())
        .div_ceil(8);
    let beside = rows
        .saturating_mul(groups)
        .saturating_mul(SCALE_BYTES + zeros);
    codes.saturating_add(beside)
}
