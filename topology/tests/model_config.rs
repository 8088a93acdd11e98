//! `config.json` of every family in both dialects, and of nothing else.
//!
//! The configurations are written here by hand in the form that models of each family are
//! published in; those of the shard's fixtures are read as well.

#[cfg(test)]
#[path = "common/random.rs"]
mod random;

#[path = "model_config/gemma.rs"]
mod gemma;

use random::Random;
use serde_json::{Value, json};
use std::path::Path;
use topology::model_config::ShapeError;
use topology::model_shape::{Activation, Dtype, ModelShape, Rope, RopeScaling};

fn read(config: &Value) -> Result<ModelShape, ShapeError> {
    ModelShape::from_config(config.to_string().as_bytes())
}

fn shape(config: &Value) -> ModelShape {
    read(config).unwrap_or_else(|e| panic!("{config}: {e}"))
}

fn with(config: &Value, changes: &Value) -> Value {
    let mut config = config.clone();
    let changes = changes.as_object().expect("an object").clone();
    config.as_object_mut().expect("an object").extend(changes);
    config
}

fn without(config: &Value, key: &str) -> Value {
    let mut config = config.clone();
    config.as_object_mut().expect("an object").remove(key);
    config
}

/// Llama 3.1 8B, older dialect.
fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009], "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14_336,
        "max_position_embeddings": 131_072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500_000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 128_256
    })
}

fn mistral() -> Value {
    json!({
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14_336,
        "max_position_embeddings": 32_768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 4, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10_000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "vocab_size": 32_000
    })
}

fn qwen(architecture: &str) -> Value {
    json!({
        "architectures": [architecture], "bos_token_id": 151_643, "eos_token_id": 151_645,
        "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32_768, "max_window_layers": 2, "num_attention_heads": 14,
        "num_hidden_layers": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1_000_000.0, "sliding_window": 32_768, "tie_word_embeddings": true,
        "torch_dtype": "float16", "use_sliding_window": false, "vocab_size": 151_936
    })
}

#[test]
fn a_llama_is_read_whole() {
    let expected = ModelShape {
        architecture: "LlamaForCausalLM".to_owned(),
        hidden_size: 4096,
        intermediate_size: 14_336,
        num_layers: 32,
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        vocab_size: 128_256,
        max_position_embeddings: 131_072,
        rms_norm_eps: 1e-5,
        norm_weight_offset: 0.0,
        output_norms: false,
        embedding_scale: 1.0,
        activation: Activation::Silu,
        rope: Rope {
            theta: 500_000.0,
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position: 8192.0,
            },
        },
        local_rope: None,
        attention_scale: 128.0_f32.sqrt().recip(),
        attention_soft_cap: None,
        logit_soft_cap: None,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tie_word_embeddings: false,
        sliding_window: vec![None; 32],
        dtype: Dtype::Bfloat16,
        quantization: None,
        eos_token_ids: vec![128_001, 128_008, 128_009],
        bos_token_id: Some(128_000),
    };
    assert_eq!(shape(&llama()), expected);
}

/// The same models as a newer `transformers` would write them.
#[test]
fn both_dialects_give_the_same_shape() {
    for older in [
        llama(),
        mistral(),
        qwen("Qwen2ForCausalLM"),
        qwen("Qwen3ForCausalLM"),
    ] {
        let mut rope = older
            .get("rope_scaling")
            .cloned()
            .unwrap_or(json!({"rope_type": "default"}));
        rope["rope_theta"] = older["rope_theta"].clone();
        let changes = json!({"rope_parameters": rope, "dtype": older["torch_dtype"]});
        let mut newer = with(&older, &changes);
        for key in ["rope_theta", "rope_scaling", "torch_dtype"] {
            newer = without(&newer, key);
        }
        assert_eq!(shape(&older), shape(&newer));
        // Qwen's newer files also name each layer's kind.
        let named = with(&newer, &json!({"layer_types": vec!["full_attention"; 4]}));
        if older["num_hidden_layers"] == 4 && older.get("max_window_layers").is_some() {
            assert_eq!(shape(&older), shape(&named));
        }
    }
}

#[test]
fn families_differ_where_they_should() {
    let two = shape(&qwen("Qwen2ForCausalLM"));
    assert!(two.qkv_bias && !two.output_bias && !two.qk_norm && two.tie_word_embeddings);
    assert_eq!((two.head_dim, two.dtype), (64, Dtype::Float16));
    let three = shape(&qwen("Qwen3ForCausalLM"));
    assert!(!three.qkv_bias && !three.output_bias && three.qk_norm);
    assert_eq!(
        three.head_dim, 128,
        "Qwen3's default is not hidden_size / heads"
    );
    let biased = shape(&with(
        &qwen("Qwen3ForCausalLM"),
        &json!({"attention_bias": true}),
    ));
    assert!(biased.qkv_bias && biased.output_bias);
    let biased = shape(&with(
        &llama(),
        &json!({"attention_bias": true, "mlp_bias": true}),
    ));
    assert!(biased.qkv_bias && biased.output_bias && biased.mlp_bias);
    let own = shape(&with(&mistral(), &json!({"head_dim": 160})));
    assert_eq!(own.head_dim, 160);
    let multi_head = shape(&without(&llama(), "num_key_value_heads"));
    assert_eq!(multi_head.num_kv_heads, 32);
    assert_eq!(
        shape(&without(&llama(), "torch_dtype")).dtype,
        Dtype::Float32
    );
    assert_eq!(
        shape(&with(&llama(), &json!({"eos_token_id": 2}))).eos_token_ids,
        [2]
    );
    let none = shape(&with(
        &llama(),
        &json!({"eos_token_id": null, "bos_token_id": null}),
    ));
    assert_eq!((none.eos_token_ids.len(), none.bos_token_id), (0, None));
}

#[test]
fn windows_follow_each_familys_rule() {
    let windows = |config: &Value| shape(config).sliding_window;
    assert_eq!(windows(&mistral()), [Some(4096); 4]);
    assert_eq!(
        windows(&with(&mistral(), &json!({"sliding_window": null}))),
        [None; 4]
    );
    assert_eq!(
        windows(&without(&mistral(), "sliding_window")),
        [Some(4096); 4]
    );
    let odd = json!({"layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]});
    assert!(read(&with(&mistral(), &odd)).is_err());

    let qwen = qwen("Qwen2ForCausalLM");
    assert_eq!(windows(&qwen), [None; 4], "off unless use_sliding_window");
    let on = with(
        &qwen,
        &json!({"use_sliding_window": true, "sliding_window": 64}),
    );
    assert_eq!(
        windows(&on),
        [None, None, Some(64), Some(64)],
        "from max_window_layers on"
    );
    assert_eq!(windows(&with(&on, &odd)), [None, Some(64), None, None]);
    assert_eq!(
        windows(&with(&on, &json!({"sliding_window": null}))),
        [None; 4]
    );
    // A window by layer, but switched off: no reading of it is right.
    let refused = read(&with(&qwen, &odd))
        .expect_err("contradiction")
        .to_string();
    assert!(refused.contains("use_sliding_window"), "{refused}");
    assert_eq!(
        windows(&with(&llama(), &json!({"sliding_window": 9}))),
        [None; 32]
    );
}

/// Each change to a good configuration is refused with all of its words.
fn assert_refused(cases: &[(Value, Vec<&str>)]) {
    for (changes, words) in cases {
        let refused = read(&with(&llama(), changes));
        let refused = refused.expect_err(&changes.to_string()).to_string();
        for word in words {
            assert!(refused.contains(word), "{changes}: {refused}");
        }
    }
}

#[test]
fn an_unsupported_model_is_refused_with_what_is_supported() {
    let cases = [
        (
            json!({"architectures": ["MixtralForCausalLM"]}),
            vec![
                "MixtralForCausalLM",
                "Qwen3ForCausalLM",
                "Gemma3ForCausalLM",
            ],
        ),
        (json!({"architectures": []}), vec!["LlamaForCausalLM"]),
        (json!({"architectures": null}), vec!["MistralForCausalLM"]),
        (
            json!({"quantization_config": {"quant_method": "bitsandbytes"}}),
            vec!["bitsandbytes", "gptq", "unquantized"],
        ),
        (
            json!({"num_local_experts": 8}),
            vec!["mixture of experts", "dense"],
        ),
        (
            json!({"hidden_act": "gelu"}),
            vec!["hidden_act `gelu`", "silu", "gelu_pytorch_tanh"],
        ),
        (json!({"rope_interleaved": true}), vec!["rope_interleaved"]),
        (
            json!({"rope_scaling": {"type": "dynamic", "factor": 2}}),
            vec!["dynamic", "yarn"],
        ),
        (
            json!({"partial_rotary_factor": 0.5}),
            vec!["partial_rotary_factor"],
        ),
        (json!({"head_dim": 7}), vec!["head size of 7", "even"]),
        (json!({"head_dim": 0}), vec!["head_dim", "from 1"]),
    ];
    assert_refused(&cases);
}

#[test]
fn a_value_that_cannot_be_is_named() {
    let cases = [
        (
            json!({"hidden_size": 4100}),
            vec!["hidden_size", "32 heads"],
        ),
        (
            json!({"hidden_size": "4096"}),
            vec!["hidden_size", "whole number"],
        ),
        (json!({"hidden_size": null}), vec!["lacks `hidden_size`"]),
        (
            json!({"num_hidden_layers": 1_000_000_000}),
            vec!["num_hidden_layers"],
        ),
        (json!({"vocab_size": -1}), vec!["vocab_size"]),
        (json!({"vocab_size": 3.5}), vec!["vocab_size", "3.5"]),
        (
            json!({"num_key_value_heads": 5}),
            vec!["num_key_value_heads", "32 query heads"],
        ),
        (json!({"rms_norm_eps": 0}), vec!["rms_norm_eps"]),
        (json!({"rms_norm_eps": 1e-60}), vec!["rms_norm_eps"]),
        (
            json!({"torch_dtype": "float8_e4m3fn"}),
            vec!["float8_e4m3fn", "float16"],
        ),
        (
            json!({"tie_word_embeddings": "no"}),
            vec!["tie_word_embeddings", "true or false"],
        ),
        (json!({"eos_token_id": ["</s>"]}), vec!["eos_token_id"]),
    ];
    assert_refused(&cases);
    for json in [
        "",
        "[]",
        "3",
        "{",
        "{\"architectures\": [\"LlamaForCausalLM\"",
        "\u{0}",
    ] {
        let refused = ModelShape::from_config(json.as_bytes());
        assert!(matches!(refused, Err(ShapeError::Json(_))), "{json:?}");
    }
    let long = json!({"hidden_act": "x".repeat(100_000)});
    let refused = read(&with(&llama(), &long))
        .expect_err("unknown")
        .to_string();
    assert!(
        refused.len() < 400,
        "a hostile value must not fill the terminal"
    );
}

#[test]
fn the_fixtures_are_read() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shard/tests/fixtures");
    let mut seen = 0;
    for entry in std::fs::read_dir(root).expect("the shard's fixtures") {
        let path = entry.expect("an entry").path().join("config.json");
        if !path.is_file() {
            continue;
        }
        let config = std::fs::read(&path).expect("config.json");
        let shape = ModelShape::from_config(&config).unwrap_or_else(|e| panic!("{path:?}: {e}"));
        assert_eq!(shape.sliding_window.len(), shape.num_layers as usize);
        seen += 1;
    }
    assert!(seen >= 4, "{seen} fixtures");
}

/// Bytes and whole values replaced at random: an answer or an error, never a panic.
#[test]
fn mutations_never_panic() {
    let mut random = Random::new(random::seed(0x5EED));
    let originals = [
        llama(),
        mistral(),
        qwen("Qwen2ForCausalLM"),
        qwen("Qwen3ForCausalLM"),
        gemma::gemma2(),
        gemma::gemma3(),
    ];
    let values = [
        json!(0),
        json!(1),
        json!(-1),
        json!(7),
        json!(u64::MAX),
        json!(1e308),
        json!(1e-308),
        json!(true),
        json!(null),
        json!("yarn"),
        json!([]),
        json!({}),
        json!([1, "a", {}]),
        json!({"rope_type": "yarn", "factor": 1e300, "mscale": 1e300, "mscale_all_dim": -1e300}),
        json!({"type": "llama3", "factor": 1, "low_freq_factor": 1e-9, "high_freq_factor": 1e9}),
    ];
    let (mut read_well, mut refused) = (0, 0);
    for _ in 0..100_000 {
        let mut config = random.pick(&originals).clone();
        for _ in 0..random.below(3) {
            let keys: Vec<_> = config
                .as_object()
                .expect("an object")
                .keys()
                .cloned()
                .collect();
            config[random.pick(&keys)] = random.pick(&values).clone();
        }
        let mut bytes = config.to_string().into_bytes();
        for _ in 0..random.below(3) {
            let at = random.below(bytes.len());
            bytes[at] = u8::try_from(random.below(256)).expect("a byte");
        }
        match ModelShape::from_config(&bytes) {
            Ok(shape) => {
                read_well += 1;
                assert!(shape.num_heads.is_multiple_of(shape.num_kv_heads));
                assert!(shape.head_dim.is_multiple_of(2) && shape.head_dim > 0);
                assert_eq!(shape.sliding_window.len(), shape.num_layers as usize);
            }
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().is_empty());
            }
        }
    }
    assert!(
        read_well > 1000 && refused > 1000,
        "{read_well} read, {refused} refused"
    );
}
