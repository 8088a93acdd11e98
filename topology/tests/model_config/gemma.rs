//! Gemma 2 and Gemma 3: what their files leave out, and what they say in ways of their own.
//!
//! Not here: what they share with the other families. Invariant: the defaults are those of `transformers`.

use super::{read, shape, with, without};
use serde_json::{Value, json};
use topology::model_shape::{Activation, Rope, RopeScaling};

/// Gemma 2 2B as published, with fewer layers.
pub(crate) fn gemma2() -> Value {
    json!({
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 107], "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
        "num_hidden_layers": 4, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 256_000
    })
}

/// Gemma 3 1B as published, with fewer layers.
pub(crate) fn gemma3() -> Value {
    json!({
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 106], "final_logit_softcapping": null, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32_768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 8, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10_000, "rope_scaling": null, "rope_theta": 1_000_000,
        "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
        "use_cache": true, "vocab_size": 262_144
    })
}

fn plain(theta: f64) -> Rope {
    Rope {
        theta,
        scaling: RopeScaling::None,
    }
}

fn nearly(a: f32, b: f32) -> bool {
    (a - b).abs() <= 1e-6 * b
}

#[test]
fn gemma2_is_read_whole() {
    let two = shape(&gemma2());
    assert!(two.output_norms && two.tie_word_embeddings && !two.qk_norm);
    assert!(!two.qkv_bias && !two.output_bias && !two.mlp_bias);
    assert!(nearly(two.norm_weight_offset, 1.0) && nearly(two.embedding_scale, 48.0));
    assert!(nearly(two.attention_scale, 1.0 / 16.0));
    assert_eq!(two.activation, Activation::GeluTanh);
    assert_eq!(
        (two.attention_soft_cap, two.logit_soft_cap),
        (Some(50.0), Some(30.0))
    );
    assert_eq!((&two.rope, &two.local_rope), (&plain(1e4), &None));
    assert_eq!(two.sliding_window, [Some(4096), None, Some(4096), None]);
    assert_eq!(two.eos_token_ids, [1, 107]);
    let other = with(
        &gemma2(),
        &json!({"query_pre_attn_scalar": 144, "head_dim": 128}),
    );
    assert!(nearly(shape(&other).attention_scale, 1.0 / 12.0));
}

#[test]
fn gemma3_is_read_whole() {
    let three = shape(&gemma3());
    assert!(three.output_norms && three.tie_word_embeddings && three.qk_norm);
    assert_eq!(
        (three.attention_soft_cap, three.logit_soft_cap),
        (None, None)
    );
    assert_eq!(
        (three.rope, three.local_rope),
        (plain(1e6), Some(plain(1e4)))
    );
    let (window, full) = (Some(512), None);
    let expected = [window, window, window, window, window, full, window, window];
    assert_eq!(three.sliding_window, expected);
}

/// Files leave out what is a default.
#[test]
fn what_is_not_said_is_the_default() {
    for (config, defaults) in [
        (
            gemma2(),
            vec![
                "attn_logit_softcapping",
                "final_logit_softcapping",
                "query_pre_attn_scalar",
                "head_dim",
                "hidden_activation",
                "sliding_window",
                "rope_theta",
            ],
        ),
        (
            with(&gemma3(), &json!({"sliding_window": 4096})),
            vec![
                "attn_logit_softcapping",
                "final_logit_softcapping",
                "query_pre_attn_scalar",
                "head_dim",
                "hidden_activation",
                "sliding_window",
                "sliding_window_pattern",
                "rope_theta",
                "rope_local_base_freq",
                "rope_scaling",
            ],
        ),
    ] {
        let mut less = config.clone();
        for key in defaults {
            less = without(&less, key);
        }
        assert_eq!(shape(&less), shape(&config));
    }
    let no_caps = json!({"attn_logit_softcapping": null, "final_logit_softcapping": null});
    let without_caps = shape(&with(&gemma2(), &no_caps));
    assert_eq!(
        (without_caps.attention_soft_cap, without_caps.logit_soft_cap),
        (None, None)
    );
}

#[test]
fn both_dialects_give_the_same_shape() {
    let scaling = json!({"rope_type": "linear", "factor": 8.0});
    let older = with(&gemma3(), &json!({"rope_scaling": scaling}));
    let kinds: Vec<_> = (1..=8)
        .map(|layer| {
            if layer == 6 {
                "full_attention"
            } else {
                "sliding_attention"
            }
        })
        .collect();
    let newer = json!({
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    });
    let mut newer = with(&older, &newer);
    for key in [
        "rope_theta",
        "rope_scaling",
        "rope_local_base_freq",
        "sliding_window_pattern",
    ] {
        newer = without(&newer, key);
    }
    assert_eq!(shape(&newer), shape(&older));
    // The scaling is the global layers' alone.
    let read = shape(&older);
    assert_eq!(read.rope.scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(read.local_rope, Some(plain(1e4)));

    let kinds = json!([
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention"
    ]);
    let named = with(&gemma2(), &json!({"layer_types": kinds}));
    assert_eq!(shape(&named), shape(&gemma2()));
}

#[test]
fn what_cannot_be_computed_is_refused() {
    for (config, change, word) in [
        (gemma2(), json!({"sliding_window": null}), "sliding_window"),
        (
            gemma3(),
            json!({"sliding_window_pattern": 0}),
            "sliding_window_pattern",
        ),
        (
            gemma3(),
            json!({"attn_logit_softcapping": 50.0}),
            "attn_logit_softcapping",
        ),
        (
            gemma2(),
            json!({"attn_logit_softcapping": -1.0}),
            "attn_logit_softcapping",
        ),
        (
            gemma2(),
            json!({"final_logit_softcapping": 0}),
            "final_logit_softcapping",
        ),
        (
            gemma2(),
            json!({"query_pre_attn_scalar": 0}),
            "query_pre_attn_scalar",
        ),
        (
            gemma2(),
            json!({"hidden_activation": "relu"}),
            "hidden_activation `relu`",
        ),
        (
            gemma3(),
            json!({"use_bidirectional_attention": true}),
            "causal",
        ),
        (
            gemma3(),
            json!({"rope_local_base_freq": 1.0}),
            "rope_local_base_freq",
        ),
        (
            gemma3(),
            json!({"rope_parameters": {"rope_theta": 1e4}}),
            "full_attention",
        ),
        (
            gemma3(),
            json!({"rope_parameters": {"full_attention": 3}}),
            "sliding_attention",
        ),
    ] {
        let refused = read(&with(&config, &change)).expect_err(word).to_string();
        assert!(refused.contains(word), "{change}: {refused}");
    }
}
