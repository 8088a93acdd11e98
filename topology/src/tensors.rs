//! Which tensors a model has: names, shapes and how each is cut.
//!
//! The one list that the check of a checkpoint, the fit arithmetic and the shard's loader share. It
//! does not say which range a rank has; [`crate::partition`] does.
//!
//! Invariant: every tensor of the forward pass is here once, under the name that it has where nothing is quantised.

use crate::model_shape::ModelShape;
use crate::quantization::{Accepted, Role, Scheme, StoredSpec};

/// What a weight's split follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Query heads, `head_dim` rows or columns each.
    Heads,
    /// Key and value heads, `head_dim` rows each.
    KvHeads,
    /// The feed-forward layer's inner width.
    Intermediate,
}

/// How a tensor is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// By output: rows of the weight, elements of the bias.
    Column(Axis),
    /// By input: columns of the weight. The ranks' products are summed.
    Row(Axis),
    /// By token: rows of embedding and head.
    Vocab,
    /// Every rank has all of it. A row-parallel layer's bias is among these: it is added once, after
    /// the sum.
    Replicated,
}

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name in a checkpoint that is not quantised.
    pub name: String,
    /// Outputs of a weight, or elements of a vector.
    pub rows: u32,
    /// Inputs of a weight; 1 for a vector.
    pub cols: u32,
    /// Whether it is stored as `[rows]` and not as `[rows, cols]`.
    pub is_vector: bool,
    /// How it is cut.
    pub split: Split,
    /// How it is quantised; `None` where it is stored as it is.
    pub scheme: Option<Scheme>,
}

/// The head where it is not the embedding.
pub const HEAD: &str = "lm_head.weight";

impl TensorSpec {
    /// Whether it is the matrix of a linear layer, which can be quantised at load. The embedding is not; of the head
    /// see [`head_at_load`](crate::quantization::head_at_load).
    pub fn is_linear(&self) -> bool {
        !self.is_vector && self.split != Split::Vocab
    }

    /// The tensors of the checkpoint that it is stored in.
    pub fn stored(&self) -> Vec<StoredSpec> {
        if let Some(scheme) = &self.scheme {
            let module = self.name.strip_suffix(".weight").unwrap_or(&self.name);
            return scheme.stored(module, [self.rows, self.cols]);
        }
        vec![StoredSpec {
            name: self.name.clone(),
            role: Role::Elements,
            shape: self.stored_shape(),
            accepted: Accepted::Floats,
            loose: false,
            optional: false,
        }]
    }

    /// The shape in the checkpoint, where it is not quantised.
    pub fn stored_shape(&self) -> Vec<u64> {
        if self.is_vector {
            vec![self.rows.into()]
        } else {
            vec![self.rows.into(), self.cols.into()]
        }
    }
}

/// Every tensor that a model needs, in the order of the forward pass.
pub fn tensors(shape: &ModelShape) -> Vec<TensorSpec> {
    let mut specs = Vec::new();
    let (vocab, hidden) = (shape.vocab_size, shape.hidden_size);
    specs.push(weight(
        "model.embed_tokens.weight".to_owned(),
        [vocab, hidden],
        Split::Vocab,
    ));
    for layer in 0..shape.num_layers {
        layer_tensors(shape, &format!("model.layers.{layer}"), &mut specs);
    }
    specs.push(vector(
        "model.norm.weight".to_owned(),
        hidden,
        Split::Replicated,
    ));
    if !shape.tie_word_embeddings {
        specs.push(weight(HEAD.to_owned(), [vocab, hidden], Split::Vocab));
    }
    if let Some(quantization) = &shape.quantization {
        for spec in specs.iter_mut().filter(|spec| !spec.is_vector) {
            let module = spec.name.strip_suffix(".weight");
            spec.scheme = module.and_then(|module| quantization.modules.get(module).copied());
        }
    }
    specs
}

fn layer_tensors(shape: &ModelShape, layer: &str, specs: &mut Vec<TensorSpec>) {
    let hidden = shape.hidden_size;
    let attention = shape.num_heads * shape.head_dim;
    let kv = shape.num_kv_heads * shape.head_dim;
    let mut linear = |name: &str, [rows, cols]: [u32; 2], split, has_bias: bool| {
        specs.push(weight(
            format!("{layer}.{name}.weight"),
            [rows, cols],
            split,
        ));
        if has_bias {
            let split = match split {
                Split::Row(_) => Split::Replicated,
                other => other,
            };
            specs.push(vector(format!("{layer}.{name}.bias"), rows, split));
        }
    };
    let (qkv_bias, mlp_bias) = (shape.qkv_bias, shape.mlp_bias);
    linear(
        "self_attn.q_proj",
        [attention, hidden],
        Split::Column(Axis::Heads),
        qkv_bias,
    );
    linear(
        "self_attn.k_proj",
        [kv, hidden],
        Split::Column(Axis::KvHeads),
        qkv_bias,
    );
    linear(
        "self_attn.v_proj",
        [kv, hidden],
        Split::Column(Axis::KvHeads),
        qkv_bias,
    );
    linear(
        "self_attn.o_proj",
        [hidden, attention],
        Split::Row(Axis::Heads),
        shape.output_bias,
    );
    let inner = shape.intermediate_size;
    linear(
        "mlp.gate_proj",
        [inner, hidden],
        Split::Column(Axis::Intermediate),
        mlp_bias,
    );
    linear(
        "mlp.up_proj",
        [inner, hidden],
        Split::Column(Axis::Intermediate),
        mlp_bias,
    );
    linear(
        "mlp.down_proj",
        [hidden, inner],
        Split::Row(Axis::Intermediate),
        mlp_bias,
    );
    layer_norms(shape, layer, specs);
}

fn layer_norms(shape: &ModelShape, layer: &str, specs: &mut Vec<TensorSpec>) {
    let hidden = shape.hidden_size;
    // The second name is that of two places: before the feed-forward layer, unless attention's result has a norm.
    let mut norms = vec![
        ("input_layernorm", hidden),
        ("post_attention_layernorm", hidden),
    ];
    if shape.output_norms {
        norms.push(("pre_feedforward_layernorm", hidden));
        norms.push(("post_feedforward_layernorm", hidden));
    }
    if shape.qk_norm {
        norms.push(("self_attn.q_norm", shape.head_dim));
        norms.push(("self_attn.k_norm", shape.head_dim));
    }
    for (name, length) in norms {
        let name = format!("{layer}.{name}.weight");
        specs.push(vector(name, length, Split::Replicated));
    }
}

fn weight(name: String, [rows, cols]: [u32; 2], split: Split) -> TensorSpec {
    TensorSpec {
        name,
        rows,
        cols,
        is_vector: false,
        split,
        scheme: None,
    }
}

fn vector(name: String, rows: u32, split: Split) -> TensorSpec {
    TensorSpec {
        name,
        rows,
        cols: 1,
        is_vector: true,
        split,
        scheme: None,
    }
}
