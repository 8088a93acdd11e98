//! What several unit tests share: random model shapes. Compiled for tests only.

use crate::model_shape::{Activation, Dtype, ModelShape, Rope, RopeScaling};
use crate::random::Random;

/// A small shape of any family's kind; some cannot be split, which is the point.
pub(crate) fn random_shape(random: &mut Random) -> ModelShape {
    let small = |random: &mut Random, most| u32::try_from(1 + random.below(most)).unwrap();
    let num_kv_heads = small(random, 8);
    let num_layers = small(random, 3);
    let head_dim = 2 * small(random, 16);
    ModelShape {
        architecture: "LlamaForCausalLM".to_owned(),
        hidden_size: small(random, 64),
        intermediate_size: small(random, 200),
        num_layers,
        num_heads: num_kv_heads * small(random, 8),
        num_kv_heads,
        head_dim,
        vocab_size: small(random, 300),
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        norm_weight_offset: 0.0,
        output_norms: random.below(2) == 1,
        embedding_scale: 1.0,
        activation: Activation::Silu,
        rope: Rope {
            theta: 1e4,
            scaling: RopeScaling::None,
        },
        local_rope: None,
        attention_scale: (head_dim as f32).sqrt().recip(),
        attention_soft_cap: None,
        logit_soft_cap: None,
        qkv_bias: random.below(2) == 1,
        output_bias: random.below(2) == 1,
        mlp_bias: random.below(2) == 1,
        qk_norm: random.below(2) == 1,
        tie_word_embeddings: random.below(2) == 1,
        sliding_window: vec![None; num_layers as usize],
        dtype: Dtype::Float32,
        quantization: None,
        eos_token_ids: vec![],
        bos_token_id: None,
    }
}
