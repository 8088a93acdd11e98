//! Reads `config.json` into a [`ModelShape`].
//!
//! Both dialects: `rope_theta` with `rope_scaling` and `torch_dtype`, and the newer
//! `rope_parameters` and `dtype`. Defaults are those of `transformers` for each family. What this
//! decoder cannot compute is refused here, with a sentence, and never approximated.
//!
//! Invariant: a shape that comes out has all dimensions within limits, so that products of any
//! two of them fit a `u64` and the arithmetic after it cannot overflow.

use crate::layer_config;
use crate::model_shape::{Activation, Dtype, ModelShape};
use crate::quantization;
use crate::rope_config;
use serde_json::{Map, Value};

/// Why `config.json` does not describe a model this build can serve. Each is a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// Not a JSON object.
    #[error("config.json is not a JSON object: {0}")]
    Json(String),
    /// `architectures` is absent or empty.
    #[error("config.json names no architecture; `architectures` must be one of {known}", known = known())]
    NoArchitecture,
    /// `architectures[0]` is not one of ours.
    #[error("config.json names the architecture {0}; supported are {known}", known = known())]
    UnknownArchitecture(String),
    /// A required key is absent.
    #[error("config.json lacks `{0}`")]
    Missing(&'static str),
    /// A key has a value that cannot be.
    #[error("`{field}` in config.json is {found}; it must be {expected}")]
    Invalid {
        /// The key.
        field: &'static str,
        /// Its value, shortened.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// The model needs something this build does not compute.
    #[error("{what} is not supported; {instead}")]
    Unsupported {
        /// What the configuration asks for.
        what: String,
        /// What would be served.
        instead: String,
    },
}

/// The families, which differ in defaults and in a few switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma2,
    Gemma3,
}

impl Family {
    fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }
}

const FAMILIES: [(&str, Family); 6] = [
    ("LlamaForCausalLM", Family::Llama),
    ("MistralForCausalLM", Family::Mistral),
    ("Qwen2ForCausalLM", Family::Qwen2),
    ("Qwen3ForCausalLM", Family::Qwen3),
    ("Gemma2ForCausalLM", Family::Gemma2),
    ("Gemma3ForCausalLM", Family::Gemma3),
];

/// Largest dimensions: several times those of any published model, small enough that no product
/// of two overflows. A configuration beyond them is a mistake.
const MAX_WIDTH: u32 = 1 << 20;
const MAX_LAYERS: u32 = 1 << 12;
const MAX_HEADS: u32 = 1 << 14;
const MAX_HEAD_DIM: u32 = 1 << 12;
const MAX_VOCAB: u32 = 1 << 24;
const MAX_POSITIONS: u32 = 1 << 30;

impl ModelShape {
    /// Reads the contents of a `config.json`.
    ///
    /// # Errors
    /// [`ShapeError`], whose `Display` is a sentence for the operator. Never panics, whatever the
    /// bytes are.
    pub fn from_config(json: &[u8]) -> Result<Self, ShapeError> {
        let value = serde_json::from_slice(json).map_err(|e| ShapeError::Json(e.to_string()))?;
        let Value::Object(map) = value else {
            return Err(ShapeError::Json(
                "it holds another kind of value".to_owned(),
            ));
        };
        let config = Fields(&map);
        let (architecture, family) = family(&map)?;
        refuse_unsupported(config, family)?;

        let hidden_size = config.dimension("hidden_size", MAX_WIDTH)?;
        let num_layers = config.dimension("num_hidden_layers", MAX_LAYERS)?;
        let num_heads = config.dimension("num_attention_heads", MAX_HEADS)?;
        let num_kv_heads = kv_heads(config, family, num_heads)?;
        let head_dim = head_dim(config, family, hidden_size, num_heads)?;
        let max_position_embeddings = config.dimension("max_position_embeddings", MAX_POSITIONS)?;
        let attention_bias = config.flag("attention_bias")?;
        let may_have_bias = matches!(family, Family::Llama | Family::Qwen3) || family.is_gemma();
        let has_attention_bias = may_have_bias && attention_bias;
        let is_gemma = family.is_gemma();
        let (rope, local_rope) = if family == Family::Gemma3 {
            let (global, local) = rope_config::by_layer_type(config, max_position_embeddings)?;
            (global, Some(local))
        } else {
            (rope_config::rope(config, max_position_embeddings)?, None)
        };
        let mut shape = Self {
            architecture: architecture.to_owned(),
            hidden_size,
            intermediate_size: config.dimension("intermediate_size", MAX_WIDTH)?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size: config.dimension("vocab_size", MAX_VOCAB)?,
            max_position_embeddings,
            rms_norm_eps: rms_norm_eps(config)?,
            norm_weight_offset: if is_gemma { 1.0 } else { 0.0 },
            output_norms: is_gemma,
            embedding_scale: if is_gemma {
                (hidden_size as f32).sqrt()
            } else {
                1.0
            },
            activation: activation(config, family)?,
            rope,
            local_rope,
            attention_scale: attention_scale(config, family, head_dim)?,
            attention_soft_cap: attention_soft_cap(config, family)?,
            logit_soft_cap: logit_soft_cap(config, family)?,
            qkv_bias: family == Family::Qwen2 || has_attention_bias,
            output_bias: has_attention_bias,
            mlp_bias: family == Family::Llama && config.flag("mlp_bias")?,
            qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
            // Gemma's published files say nothing of it.
            tie_word_embeddings: config.flag_or("tie_word_embeddings", is_gemma)?,
            sliding_window: layer_config::sliding_window(config, family, num_layers)?,
            dtype: dtype(config)?,
            eos_token_ids: token_ids(config, "eos_token_id")?,
            bos_token_id: token_ids(config, "bos_token_id")?.first().copied(),
            quantization: None,
        };
        shape.quantization = quantization::read(config, &shape)?;
        Ok(shape)
    }
}

fn known() -> String {
    let [first @ .., last] = FAMILIES.map(|(name, _)| name);
    format!("{} and {last}", first.join(", "))
}

fn family(config: &Map<String, Value>) -> Result<(&str, Family), ShapeError> {
    let named = config.get("architectures").and_then(|list| list.get(0));
    let name = named.and_then(Value::as_str);
    let name = name.ok_or(ShapeError::NoArchitecture)?;
    let family = FAMILIES.iter().find(|(known, _)| *known == name);
    let family = family
        .ok_or_else(|| ShapeError::UnknownArchitecture(shorten(name.escape_debug().to_string())))?;
    Ok((name, family.1))
}

/// Refuses what would silently give other numbers than the model's makers meant.
fn refuse_unsupported(config: Fields<'_>, family: Family) -> Result<(), ShapeError> {
    for field in ["num_local_experts", "num_experts", "n_routed_experts"] {
        if config
            .get(field)
            .and_then(Value::as_u64)
            .is_some_and(|experts| experts > 0)
        {
            let what = format!("a mixture of experts (`{field}`)");
            return Err(unsupported(what, "only dense feed-forward layers are"));
        }
    }
    if family.is_gemma() && config.flag("use_bidirectional_attention")? {
        let what = "use_bidirectional_attention".to_owned();
        return Err(unsupported(what, "only causal attention is"));
    }
    if config.get("rope_interleaved").and_then(Value::as_bool) == Some(true) {
        return Err(unsupported(
            "rope_interleaved".to_owned(),
            "only rotary embeddings that pair the two halves of a head are",
        ));
    }
    Ok(())
}

fn kv_heads(config: Fields<'_>, family: Family, num_heads: u32) -> Result<u32, ShapeError> {
    const FIELD: &str = "num_key_value_heads";
    let given = config.map().get(FIELD);
    // The other families' configurations have a default that no published model has: the key
    // must be there. `null` means one for each query head everywhere.
    let all = given.is_some_and(Value::is_null) || (given.is_none() && family == Family::Llama);
    if all {
        return Ok(num_heads);
    }
    let kv_heads = config.dimension(FIELD, MAX_HEADS)?;
    if num_heads.is_multiple_of(kv_heads) {
        Ok(kv_heads)
    } else {
        let expected = format!("a divisor of the {num_heads} query heads");
        Err(invalid(FIELD, &kv_heads.into(), expected))
    }
}

fn head_dim(
    config: Fields<'_>,
    family: Family,
    hidden_size: u32,
    num_heads: u32,
) -> Result<u32, ShapeError> {
    /// What `transformers` takes where a Qwen3 configuration does not say.
    const QWEN3_HEAD_DIM: u32 = 128;
    /// The same for Gemma.
    const GEMMA_HEAD_DIM: u32 = 256;
    let head_dim = if config.get("head_dim").is_some() {
        config.dimension("head_dim", MAX_HEAD_DIM)?
    } else if family == Family::Qwen3 {
        QWEN3_HEAD_DIM
    } else if family.is_gemma() {
        GEMMA_HEAD_DIM
    } else if hidden_size.is_multiple_of(num_heads) && hidden_size / num_heads <= MAX_HEAD_DIM {
        hidden_size / num_heads
    } else {
        let expected = format!(
            "a multiple of the {num_heads} heads, at most {MAX_HEAD_DIM} for each, or come with a \
             `head_dim`"
        );
        return Err(invalid("hidden_size", &hidden_size.into(), expected));
    };
    if head_dim.is_multiple_of(2) {
        Ok(head_dim)
    } else {
        let what = format!("a head size of {head_dim}");
        Err(unsupported(what, "rotary embeddings need an even one"))
    }
}

fn activation(config: Fields<'_>, family: Family) -> Result<Activation, ShapeError> {
    // Gemma's files may have both keys, of which `transformers` reads this one.
    let (field, default) = if family.is_gemma() {
        ("hidden_activation", "gelu_pytorch_tanh")
    } else {
        ("hidden_act", "silu")
    };
    let name = config.get(field).map_or(Some(default), Value::as_str);
    match name.unwrap_or("of another type") {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        other => {
            let what = format!("{field} `{}`", shorten(other.to_owned()));
            Err(unsupported(what, "`silu` and `gelu_pytorch_tanh` are"))
        }
    }
}

fn attention_scale(config: Fields<'_>, family: Family, head_dim: u32) -> Result<f32, ShapeError> {
    const FIELD: &str = "query_pre_attn_scalar";
    /// What `transformers` takes where a Gemma configuration does not say.
    const GEMMA_SCALAR: f32 = 256.0;
    let scalar = if family.is_gemma() {
        positive(config, FIELD)?.unwrap_or(GEMMA_SCALAR)
    } else {
        head_dim as f32
    };
    Ok(scalar.sqrt().recip())
}

/// The soft cap on attention scores. `null` is none; where nothing is said it is the family's default.
fn attention_soft_cap(config: Fields<'_>, family: Family) -> Result<Option<f32>, ShapeError> {
    const FIELD: &str = "attn_logit_softcapping";
    const GEMMA2_CAP: f32 = 50.0;
    match (family, config.map().get(FIELD)) {
        (Family::Gemma2, None) => Ok(Some(GEMMA2_CAP)),
        (Family::Gemma2, _) => positive(config, FIELD),
        // The published implementations disagree about such files: some compute none.
        (Family::Gemma3, Some(cap)) if !cap.is_null() => {
            let what = format!("{FIELD} in a Gemma 3 model");
            Err(unsupported(what, "Gemma 3 models without it are"))
        }
        _ => Ok(None),
    }
}

/// The soft cap on logits, in the same way.
fn logit_soft_cap(config: Fields<'_>, family: Family) -> Result<Option<f32>, ShapeError> {
    const FIELD: &str = "final_logit_softcapping";
    const GEMMA2_CAP: f32 = 30.0;
    match (family, config.map().get(FIELD)) {
        (Family::Gemma2, None) => Ok(Some(GEMMA2_CAP)),
        (Family::Gemma2 | Family::Gemma3, _) => positive(config, FIELD),
        _ => Ok(None),
    }
}

/// A number that is greater than 0 and no larger than what is certainly a mistake.
fn positive(config: Fields<'_>, field: &'static str) -> Result<Option<f32>, ShapeError> {
    const LEAST: f64 = 1e-3;
    const MOST: f64 = 1e6;
    match config.number(field)? {
        None => Ok(None),
        #[expect(clippy::cast_possible_truncation, reason = "rounds, as meant")]
        Some(number) if (LEAST..=MOST).contains(&number) => Ok(Some(number as f32)),
        Some(found) => {
            let expected = format!("a number from {LEAST} to {MOST}");
            Err(invalid(field, &found.into(), expected))
        }
    }
}

fn rms_norm_eps(config: Fields<'_>) -> Result<f32, ShapeError> {
    const FIELD: &str = "rms_norm_eps";
    let eps = config.number(FIELD)?.unwrap_or(1e-6);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the next line checks what is left of it"
    )]
    let rounded = eps as f32;
    if rounded > 0.0 && rounded < 1.0 {
        Ok(rounded)
    } else {
        Err(invalid(FIELD, &eps.into(), "between 0 and 1".to_owned()))
    }
}

fn dtype(config: Fields<'_>) -> Result<Dtype, ShapeError> {
    let Some(value) = config.get("dtype").or_else(|| config.get("torch_dtype")) else {
        return Ok(Dtype::Float32);
    };
    let name = value.as_str().unwrap_or_default();
    let name = name.strip_prefix("torch.").unwrap_or(name);
    Dtype::ALL
        .into_iter()
        .find(|dtype| dtype.name() == name)
        .ok_or_else(|| {
            let what = format!("the weight type {}", shorten(value.to_string()));
            unsupported(what, "float32, bfloat16 and float16 are")
        })
}

/// A token id, a list of them, or nothing.
fn token_ids(config: Fields<'_>, field: &'static str) -> Result<Vec<u32>, ShapeError> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| invalid(field, value, "a token id or a list of them".to_owned()))
    };
    match config.get(field) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

/// A JSON object with typed access. `null` reads as absent.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(crate) fn map(self) -> &'a Map<String, Value> {
        self.0
    }

    pub(crate) fn get(self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    /// A whole number.
    pub(crate) fn count(self, field: &'static str) -> Result<Option<u32>, ShapeError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        let count = value.as_u64().and_then(|count| u32::try_from(count).ok());
        count
            .map(Some)
            .ok_or_else(|| invalid(field, value, "a whole number".to_owned()))
    }

    /// A required whole number, `1..=max`.
    pub(crate) fn dimension(self, field: &'static str, max: u32) -> Result<u32, ShapeError> {
        let value = self.get(field).ok_or(ShapeError::Missing(field))?;
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        let number = number.filter(|number| (1..=max).contains(number));
        number.ok_or_else(|| invalid(field, value, format!("a whole number from 1 to {max}")))
    }

    pub(crate) fn flag(self, field: &'static str) -> Result<bool, ShapeError> {
        self.flag_or(field, false)
    }

    pub(crate) fn flag_or(self, field: &'static str, default: bool) -> Result<bool, ShapeError> {
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        value
            .as_bool()
            .ok_or_else(|| invalid(field, value, "true or false".to_owned()))
    }

    pub(crate) fn number(self, field: &'static str) -> Result<Option<f64>, ShapeError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        let number = value.as_f64().filter(|number| number.is_finite());
        number
            .map(Some)
            .ok_or_else(|| invalid(field, value, "a number".to_owned()))
    }
}

pub(crate) fn invalid(field: &'static str, found: &Value, expected: String) -> ShapeError {
    let found = shorten(found.to_string());
    ShapeError::Invalid {
        field,
        found,
        expected,
    }
}

pub(crate) fn unsupported(what: String, instead: &str) -> ShapeError {
    let instead = instead.to_owned();
    ShapeError::Unsupported { what, instead }
}

/// A hostile value must not fill the terminal.
pub(crate) fn shorten(text: String) -> String {
    const MAX_CHARS: usize = 60;
    if text.chars().nth(MAX_CHARS).is_none() {
        return text;
    }
    text.chars().take(MAX_CHARS).chain(['…']).collect()
}
