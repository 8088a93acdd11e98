//! What is read of each method's configuration, and what is refused.

use super::*;
use crate::random::{Random, seed};
use serde_json::{Value, json};

fn config(quantization: &Value) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_hidden_layers": 2, "max_position_embeddings": 32, "vocab_size": 10, "torch_dtype": "bfloat16",
        "quantization_config": quantization
    })
}

fn read(quantization: &Value) -> Result<Quantization, String> {
    let shape = ModelShape::from_config(config(quantization).to_string().as_bytes());
    shape
        .map_err(|e| e.to_string())
        .map(|shape| shape.quantization.unwrap())
}

fn gptq() -> Value {
    json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": true, "desc_act": false})
}

fn awq() -> Value {
    json!({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM", "zero_point": true})
}

fn compressed() -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": null,
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": true}
        }}
    })
}

fn fp8() -> Value {
    json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]})
}

/// `value` with the key at a path (`a/b`) set.
fn with(mut value: Value, path: &str, to: Value) -> Value {
    let (parent, key) = path
        .rsplit_once('/')
        .map_or(("", path), |(parent, key)| (parent, key));
    let parent = if parent.is_empty() {
        String::new()
    } else {
        format!("/{parent}")
    };
    value.pointer_mut(&parent).unwrap()[key] = to;
    value
}

const WEIGHTS: &str = "config_groups/group_0/weights";

#[test]
fn each_method_is_read() {
    let up = "model.layers.1.mlp.up_proj";
    let base = Scheme {
        code: Code::Int4,
        layout: Layout::Packed,
        grouping: Grouping::Inputs(32),
        has_zeros: true,
        order: Order::ByPlace,
    };
    let v2 = with(gptq(), "desc_act", json!(true));
    let block = Grouping::Block {
        outputs: 128,
        inputs: 128,
    };
    for (config, expected) in [
        (
            gptq(),
            Scheme {
                layout: Layout::Gptq {
                    zeros_less_one: true,
                },
                order: Order::MayBeListed,
                ..base
            },
        ),
        (
            with(v2, "checkpoint_format", json!("gptq_v2")),
            Scheme {
                layout: Layout::Gptq {
                    zeros_less_one: false,
                },
                order: Order::Listed,
                ..base
            },
        ),
        (
            with(awq(), "group_size", json!(-1)),
            Scheme {
                layout: Layout::Awq,
                grouping: Grouping::Output,
                ..base
            },
        ),
        (
            with(compressed(), &format!("{WEIGHTS}/actorder"), json!("group")),
            Scheme {
                has_zeros: false,
                order: Order::Listed,
                ..base
            },
        ),
        (
            fp8(),
            Scheme {
                code: Code::Fp8,
                layout: Layout::Bytes {
                    scale: "weight_scale_inv",
                },
                grouping: block,
                has_zeros: false,
                ..base
            },
        ),
    ] {
        let quantization = read(&config).unwrap_or_else(|e| panic!("{config}: {e}"));
        assert_eq!(quantization.modules.len(), 14, "{config}");
        assert_eq!(quantization.modules[up], expected, "{config}");
        assert!(quantization.notes.is_empty());
    }
}

#[test]
fn modules_are_left_alone_as_each_method_says() {
    let left = |config: Value| {
        let quantization = read(&config).unwrap_or_else(|e| panic!("{config}: {e}"));
        14 - quantization
            .modules
            .keys()
            .filter(|name| *name != "lm_head")
            .count()
    };
    let skip = |config: Value, key: &str, names: Value| left(with(config, key, names));
    assert_eq!(
        skip(awq(), "modules_to_not_convert", json!(["self_attn"])),
        8
    );
    assert_eq!(skip(awq(), "modules_to_not_convert", json!(null)), 0);
    // Whole components: a name that only begins like another is another.
    assert_eq!(
        skip(
            fp8(),
            "modules_to_not_convert",
            json!(["model.layers.1.mlp.down"])
        ),
        0
    );
    assert_eq!(
        skip(
            fp8(),
            "modules_to_not_convert",
            json!(["model.layers.1.mlp", "lm_head"])
        ),
        3
    );
    assert_eq!(skip(fp8(), "ignored_layers", json!(["down_proj"])), 2);
    assert_eq!(
        skip(
            compressed(),
            "ignore",
            json!(["re:.*self_attn.*", "lm_head"])
        ),
        8
    );
    assert_eq!(
        skip(
            compressed(),
            "ignore",
            json!(["model.layers.0.mlp.down_proj"])
        ),
        1
    );
    // Python's match begins at the beginning.
    assert_eq!(skip(compressed(), "ignore", json!(["re:self_attn"])), 0);
    let head = read(&with(compressed(), "ignore", json!([]))).unwrap();
    assert!(head.modules.contains_key("lm_head"));
    let only = with(
        compressed(),
        "config_groups/group_0/targets",
        json!(["re:.*down_proj", "nothing"]),
    );
    assert_eq!(left(only), 12);
}

/// Each key set to a value in `base` is refused with these words.
fn refuses(base: &Value, cases: &[(&str, Value, [&str; 2])]) {
    for (path, value, words) in cases {
        let refused = read(&with(base.clone(), path, value.clone()));
        let refused = refused.expect_err(&format!("{path}: {value}"));
        for word in words {
            assert!(refused.contains(word), "{path}: {value}: {refused}");
        }
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_with_its_key() {
    for (config, word) in [
        (json!({"quant_method": "bitsandbytes"}), "bitsandbytes"),
        (json!({}), "quant_method"),
        (json!("gptq"), "an object"),
    ] {
        let refused = read(&config).expect_err(&config.to_string());
        assert!(refused.contains(word), "{config}: {refused}");
    }
    let gptq_cases = [
        ("bits", json!(3), ["`bits` 3", "4 and 8"]),
        ("group_size", json!(0), ["group_size", "from 1"]),
        ("group_size", json!(null), ["group_size", "lacks"]),
        ("checkpoint_format", json!("marlin"), ["marlin", "gptq_v2"]),
        ("lm_head", json!(true), ["`lm_head` true", "not quantized"]),
        ("dynamic", json!({"-:.*": {}}), ["dynamic", "alike"]),
        ("desc_act", json!("yes"), ["desc_act", "true or false"]),
        ("pack_dtype", json!("int64"), ["int64", "int32"]),
    ];
    refuses(&gptq(), &gptq_cases);
    let eight_bits = with(gptq(), "bits", json!(8));
    refuses(
        &eight_bits,
        &[("sym", json!(false), ["`sym` false", "8 bits"])],
    );
    let skip = "modules_to_not_convert";
    let awq_cases = [
        ("version", json!("gemv"), ["gemv", "gemm"]),
        ("zero_point", json!(false), ["`zero_point` false", "true"]),
        ("bits", json!(8), ["`bits` 8", "4 bits"]),
        (skip, json!(["q_proj"]), ["q_proj", "same bits"]),
        (skip, json!("q_proj"), [skip, "list"]),
    ];
    refuses(&awq(), &awq_cases);
    let fp8_cases = [
        ("fmt", json!("e5m2"), ["e5m2", "e4m3"]),
        (
            "weight_block_size",
            json!([128]),
            ["weight_block_size", "two"],
        ),
        (
            "activation_scheme",
            json!("odd"),
            ["activation_scheme", "dynamic"],
        ),
    ];
    refuses(&fp8(), &fp8_cases);
}

#[test]
fn what_compressed_tensors_cannot_have_is_refused_with_its_key() {
    let top = [
        (
            "format",
            json!("nvfp4-pack-quantized"),
            ["nvfp4", "int-quantized"],
        ),
        ("ignore", json!(["re:(?!x)"]), ["(?!x)", "look-around"]),
        ("ignore", json!(["re:(((("]), ["((((", "look-around"]),
        (
            "transform_config",
            json!({"a": 1}),
            ["transform_config", "transformed"],
        ),
        (
            "sparsity_config",
            json!({"format": "sparse-24"}),
            ["sparse-24", "dense"],
        ),
        ("config_groups", json!([]), ["config_groups", "object"]),
    ];
    refuses(&compressed(), &top);
    let weights = [
        ("num_bits", json!(3), ["`num_bits` 3", "8 bits"]),
        ("type", json!("float"), ["`type`", "int"]),
        (
            "strategy",
            json!("tensor_group"),
            ["tensor_group", "channel"],
        ),
        ("strategy", json!("block"), ["block_structure", "lacks"]),
        ("actorder", json!("odd"), ["odd", "group"]),
        ("dynamic", json!(true), ["`dynamic` true", "stored scales"]),
    ];
    for (key, value, words) in weights {
        let path = format!("{WEIGHTS}/{key}");
        refuses(&compressed(), &[(&path, value, words)]);
    }
}

#[test]
fn scales_of_activations_are_noted_and_not_used() {
    let static_scales = with(fp8(), "activation_scheme", json!("static"));
    assert!(read(&static_scales).unwrap().notes[0].contains("not used"));
    let activations = json!({"num_bits": 8, "dynamic": false});
    let group = with(
        compressed(),
        "config_groups/group_0/input_activations",
        activations,
    );
    assert!(read(&group).unwrap().notes[0].contains("input_activations"));
    let kv = with(compressed(), "kv_cache_scheme", json!({"num_bits": 8}));
    assert!(read(&kv).unwrap().notes[0].contains("--kv-cache-dtype"));
}

#[test]
fn a_flag_must_fit_the_checkpoint() {
    let mut shape = config(&json!(null));
    let read = |config: &Value| ModelShape::from_config(config.to_string().as_bytes()).unwrap();
    let dense = read(&shape);
    assert_eq!(at_load("auto", &dense), Ok(None));
    for code in [Code::Int4, Code::Int8, Code::Fp8] {
        assert_eq!(at_load(code.name(), &dense), Ok(Some(code)));
    }
    assert!(
        at_load("awq", &dense)
            .unwrap_err()
            .contains("not quantised; leave it out")
    );
    assert!(
        at_load("int3", &dense)
            .unwrap_err()
            .contains("must be int8")
    );
    shape["quantization_config"] = gptq();
    let stored = read(&shape);
    assert_eq!(at_load("auto", &stored), Ok(None));
    assert_eq!(at_load("gptq", &stored), Ok(None));
    for other in ["int8", "fp8", "awq", "nonsense"] {
        assert!(
            at_load(other, &stored).unwrap_err().contains("give gptq"),
            "{other}"
        );
    }
}

/// Whatever a configuration says, what comes of it is shapes or a sentence.
#[test]
fn hostile_configurations_never_panic() {
    let mut random = Random::new(seed(14));
    let odd = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(8),
        json!(1 << 20),
        json!(u64::MAX),
        json!(1.5),
        json!(""),
        json!("group"),
        json!("re:.*"),
        json!("0x0"),
        json!([]),
        json!([0, 0]),
        json!([1, 1_048_576]),
        json!({}),
        json!({"a": []}),
        json!("channel"),
        json!("block"),
        json!("gptq"),
        json!("fp8"),
        json!(4),
        json!("int-quantized"),
    ];
    let (mut read, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let mut value = random.pick(&[gptq(), awq(), compressed(), fp8()]).clone();
        for _ in 0..=random.below(3) {
            // Down a random path, then something odd in its place.
            let mut place = &mut value;
            while random.below(3) > 0
                && (place.is_object() && !place.as_object().unwrap().is_empty())
            {
                let map = place.as_object_mut().unwrap();
                let key = random.below(map.len());
                place = map.values_mut().nth(key).unwrap();
            }
            *place = random.pick(&odd).clone();
        }
        let Ok(shape) = ModelShape::from_config(config(&value).to_string().as_bytes()) else {
            refused += 1;
            continue;
        };
        read += 1;
        for spec in crate::tensors::tensors(&shape) {
            for stored in spec.stored() {
                assert!(stored.shape.iter().product::<u64>() < 1 << 40);
            }
        }
    }
    println!("{read} read, {refused} refused");
    assert!(
        read > 500 && refused > 500,
        "{read} read, {refused} refused"
    );
}
