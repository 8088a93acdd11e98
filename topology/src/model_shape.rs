//! `config.json` as numbers: the one decoder that all families are.
//!
//! Llama, Mistral, Qwen2, Qwen3, Gemma 2 and Gemma 3 differ in fields of [`ModelShape`] and in nothing else.

use crate::quantization::Quantization;
use serde::Serialize;

/// A decoder-only transformer, read from data.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "six independent switches of the published configurations"
)]
pub struct ModelShape {
    /// `architectures[0]`, for messages.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width of the feed-forward layer.
    pub intermediate_size: u32,
    /// Decoder layers.
    pub num_layers: u32,
    /// Query heads.
    pub num_heads: u32,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: u32,
    /// Width of a head; `num_heads * head_dim` need not be `hidden_size`.
    pub head_dim: u32,
    /// Entries of the vocabulary.
    pub vocab_size: u32,
    /// Positions the model was made for.
    pub max_position_embeddings: u32,
    /// Added under the root in RMSNorm.
    pub rms_norm_eps: f32,
    /// What the norms' stored weights are relative to: 1 where a stored 0 leaves the norm as it is (Gemma), else 0.
    pub norm_weight_offset: f32,
    /// RMSNorm of what attention and the feed-forward layer give, before it is added to the residual (Gemma).
    pub output_norms: bool,
    /// Factor on embeddings, rounded to the weights' type before use; 1 in most families.
    pub embedding_scale: f32,
    /// Of the feed-forward layer's gate.
    pub activation: Activation,
    /// Rotary embedding.
    pub rope: Rope,
    /// Rotary embedding of the layers with a sliding window, where it is another one (Gemma 3).
    pub local_rope: Option<Rope>,
    /// Factor on q·k, usually `1 / sqrt(head_dim)`.
    pub attention_scale: f32,
    /// Attention scores become `cap * tanh(score / cap)` before the mask (Gemma 2).
    pub attention_soft_cap: Option<f32>,
    /// Logits become `cap * tanh(logit / cap)` (Gemma 2).
    pub logit_soft_cap: Option<f32>,
    /// Biases on the q, k and v projections (Qwen2).
    pub qkv_bias: bool,
    /// Bias on the attention output projection (Llama's `attention_bias`).
    pub output_bias: bool,
    /// Biases on the feed-forward projections (Llama's `mlp_bias`).
    pub mlp_bias: bool,
    /// RMSNorm over each query and key head (Qwen3, Gemma 3).
    pub qk_norm: bool,
    /// The head is the embedding table.
    pub tie_word_embeddings: bool,
    /// For each layer: how many last positions a token sees, itself included; `None` is all.
    pub sliding_window: Vec<Option<u32>>,
    /// Type of the stored weights as the config names it.
    pub dtype: Dtype,
    /// How linear layers are stored, where it is not as `dtype`.
    pub quantization: Option<Quantization>,
    /// End-of-sequence tokens of `config.json` (those of `generation_config.json` are added by the coordinator).
    pub eos_token_ids: Vec<u32>,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
}

/// What the feed-forward layer's gate goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// GELU in its tanh form, `gelu_pytorch_tanh`.
    GeluTanh,
}

/// Rotary embedding and its scaling.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched.
    pub scaling: RopeScaling,
}

/// Ways to stretch rotary frequencies beyond the trained positions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth passage between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// `low_freq_factor`.
        low_freq_factor: f64,
        /// `high_freq_factor`.
        high_freq_factor: f64,
        /// `original_max_position_embeddings`.
        original_max_position: f64,
    },
    /// YaRN (Peng et al., 2023), with the attention factor folded into cos and sin.
    Yarn {
        /// The stretch.
        factor: f64,
        /// `original_max_position_embeddings`.
        original_max_position: f64,
        /// `beta_fast`, 32 by default.
        beta_fast: f64,
        /// `beta_slow`, 1 by default.
        beta_slow: f64,
        /// Factor on cos and sin, already resolved from `attention_factor`, `mscale`, `mscale_all_dim`.
        attention_factor: f64,
        /// `truncate`, true by default: round the correction range to whole dimensions.
        truncate: bool,
    },
}

/// Element types of weights and KV blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Dtype {
    /// 32-bit float.
    Float32,
    /// bfloat16.
    Bfloat16,
    /// IEEE half.
    Float16,
}

impl Dtype {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Float32, Self::Bfloat16, Self::Float16];

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 | Self::Float16 => 2,
        }
    }

    /// The name in `config.json` and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }
}

/// What keys and values may be kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// A type that weights may have too.
    Float(Dtype),
    /// 8 bits, a float (`E4M3`).
    Fp8,
}

impl KvDtype {
    /// What `--kv-cache-dtype` may be.
    pub const NAMES: [&str; 6] = ["auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3"];

    /// Reads `--kv-cache-dtype`; `None` is `auto`, what the device computes in.
    ///
    /// # Errors
    /// A sentence.
    pub fn parse(text: &str) -> Result<Option<Self>, String> {
        let dtype = Dtype::ALL.into_iter().find(|dtype| dtype.name() == text);
        match (text, dtype) {
            ("auto", _) => Ok(None),
            ("fp8" | "fp8_e4m3", _) => Ok(Some(Self::Fp8)),
            (_, Some(dtype)) => Ok(Some(Self::Float(dtype))),
            _ => Err(format!(
                "--kv-cache-dtype is {text}; it must be one of {}",
                Self::NAMES.join(", ")
            )),
        }
    }

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.bytes(),
            Self::Fp8 => 1,
        }
    }
}
