//! Tables of contents of good and of hostile checkpoints.

#[cfg(test)]
#[path = "common/random.rs"]
mod random;

use random::Random;
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;
use topology::checkpoint::{Checkpoint, CheckpointError, INDEX_FILE, SINGLE_FILE, StoredDtype};
use topology::model_files::{BuiltInFile, ModelFiles};
use topology::model_shape::{Dtype, ModelShape};
use topology::partition::tensors;
use topology::quantization::{Accepted, StoredSpec};

fn shape(config: &Value) -> ModelShape {
    ModelShape::from_config(config.to_string().as_bytes()).expect("a valid configuration")
}

fn tiny() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 8, "intermediate_size": 12,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
        "max_position_embeddings": 32, "vocab_size": 10, "torch_dtype": "bfloat16"
    })
}

/// A file with these tensors: name, type, bytes of one element, shape.
fn file(tensors: &[(String, &str, u64, Vec<u64>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, dtype, width, shape) in tensors {
        let start = end;
        end += width * shape.iter().product::<u64>();
        let info = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), info);
    }
    raw_file(&Value::Object(header), usize::try_from(end).expect("small"))
}

fn raw_file(header: &Value, data: usize) -> Vec<u8> {
    let header = header.to_string().into_bytes();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// Name, type, bytes of one element, shape.
type Tensor = (String, &'static str, u64, Vec<u64>);

fn needed(shape: &ModelShape) -> Vec<Tensor> {
    let specs = tensors(shape).into_iter();
    specs
        .map(|spec| (spec.name.clone(), "BF16", 2, spec.stored_shape()))
        .collect()
}

fn directory(files: &[(&str, &[u8])]) -> (TempDir, ModelFiles) {
    let directory = tempfile::tempdir().expect("a directory");
    for (name, bytes) in files {
        std::fs::write(directory.path().join(name), bytes).expect("a file");
    }
    let files = ModelFiles::directory(directory.path()).expect("the directory");
    (directory, files)
}

fn open(bytes: &[u8]) -> Result<Checkpoint, CheckpointError> {
    Checkpoint::open(&directory(&[(SINGLE_FILE, bytes)]).1)
}

#[test]
fn one_file_and_an_index_of_two_read_alike() {
    let shape = shape(&tiny());
    let all = needed(&shape);
    let whole = open(&file(&all)).expect("a good file");
    whole.check(&shape).expect("complete");
    let last = whole.tensor("lm_head.weight").expect("the head");
    assert_eq!(
        (last.dtype.clone(), &last.shape),
        (StoredDtype::Float(Dtype::Bfloat16), &vec![10, 8])
    );
    assert_eq!(
        last.bytes.end,
        whole.files()[last.file].bytes,
        "the last tensor ends the file"
    );

    let (first, second) = all.split_at(all.len() / 2);
    // A tensor that the index does not mention is not part of the model.
    let mut second = second.to_vec();
    second.push(("extra".to_owned(), "I64", 8, vec![3]));
    let mut map = serde_json::Map::new();
    for (part, tensors) in [("a.safetensors", first), ("b.safetensors", &second)] {
        for (name, ..) in tensors.iter().filter(|(name, ..)| name != "extra") {
            map.insert(name.clone(), json!(part));
        }
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
    let parts = [
        (INDEX_FILE, index.as_bytes()),
        ("a.safetensors", &file(first)),
        ("b.safetensors", &file(&second)),
    ];
    let (_keep, files) = directory(&parts);
    let split = Checkpoint::open(&files).expect("good parts");
    split.check(&shape).expect("complete");
    assert_eq!(split.files().len(), 2);
    let names = |checkpoint: &Checkpoint| {
        checkpoint
            .tensors()
            .map(|(name, _)| name.to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&whole), names(&split));
}

#[test]
fn the_index_cannot_point_elsewhere() {
    for (map, word) in [
        (
            json!({"weight_map": {"a": "../secret.safetensors"}}),
            "plain file name",
        ),
        (
            json!({"weight_map": {"a": "/etc/passwd"}}),
            "plain file name",
        ),
        (
            json!({"weight_map": {"a": "absent.safetensors"}}),
            "absent.safetensors",
        ),
        (
            json!({"weight_map": {"absent": "a.safetensors"}}),
            "does not have it",
        ),
        (json!({"weight_map": ["a"]}), "invalid"),
        (json!({}), "weight_map"),
    ] {
        let part = file(&[("a".to_owned(), "F32", 4, vec![2])]);
        let (_keep, files) = directory(&[
            (INDEX_FILE, map.to_string().as_bytes()),
            ("a.safetensors", &part),
        ]);
        let refused = Checkpoint::open(&files).expect_err("hostile").to_string();
        assert!(refused.contains(word), "{map}: {refused}");
    }
}

#[test]
fn a_wrong_length_is_named_with_both_sizes() {
    let good = file(&[("a".to_owned(), "F32", 4, vec![100])]);
    let cut = &good[..good.len() - 7];
    let refused = open(cut).expect_err("truncated").to_string();
    for word in [
        "model.safetensors",
        "truncated",
        &good.len().to_string(),
        &cut.len().to_string(),
    ] {
        assert!(refused.contains(word), "{refused}");
    }
    let mut longer = good.clone();
    longer.push(0);
    assert!(
        open(&longer)
            .expect_err("too long")
            .to_string()
            .contains("too long")
    );
    for length in [0, 5, 8, 20] {
        assert!(open(&good[..length]).is_err(), "{length} bytes");
    }
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n";
    assert!(
        open(pointer)
            .expect_err("a pointer")
            .to_string()
            .contains("git lfs pull")
    );
    let (_keep, empty) = directory(&[]);
    let refused = Checkpoint::open(&empty).expect_err("nothing").to_string();
    assert!(
        refused.contains(SINGLE_FILE) && refused.contains(INDEX_FILE),
        "{refused}"
    );
}

#[test]
fn hostile_headers_are_refused() {
    let max = usize::MAX as u64;
    let info = |shape: Value, offsets: [u64; 2]| json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
    for header in [
        json!({"a": info(json!([2]), [0, 8]), "b": info(json!([2]), [4, 12])}), // overlap
        json!({"a": info(json!([2]), [0, 8]), "b": info(json!([1]), [12, 16])}), // gap
        json!({"a": info(json!([2]), [8, 16])}),
        json!({"a": info(json!([3]), [0, 16])}),
        json!({"a": info(json!([2]), [8, 0])}),
        json!({"a": info(json!([max, max]), [0, 16])}),
        json!({"a": info(json!([max / 4 + 1]), [0, 0])}),
        json!({"a": info(json!([-1]), [0, 16])}),
        json!({"a": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}}),
        json!({"a": 1}),
        json!([]),
    ] {
        let refused = open(&raw_file(&header, 16)).expect_err(&header.to_string());
        assert!(
            matches!(refused, CheckpointError::Header { .. }),
            "{header}: {refused}"
        );
    }
    let mut huge = raw_file(&json!({}), 0);
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(
        open(&huge)
            .expect_err("huge")
            .to_string()
            .contains("above the limit")
    );
}

#[test]
fn what_the_model_needs_is_checked() {
    let shape = shape(&tiny());
    let check = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let mut all = needed(&shape);
        change(&mut all);
        let checkpoint = open(&file(&all)).expect("a good file");
        checkpoint
            .check(&shape)
            .expect_err("not what the model needs")
            .to_string()
    };
    let k_bias = "model.layers.1.self_attn.k_proj.bias";
    let refused = check(&|all| all.retain(|(name, ..)| name != k_bias));
    assert!(
        refused.contains(k_bias) && refused.contains("1 of the 27"),
        "{refused}"
    );
    let down = "model.layers.0.mlp.down_proj.weight";
    let refused = check(&|all| {
        for tensor in all.iter_mut().filter(|(name, ..)| name == down) {
            tensor.3.swap(0, 1);
        }
    });
    assert!(
        refused.contains(down) && refused.contains("[12, 8]") && refused.contains("[8, 12]"),
        "{refused}"
    );
    let refused = check(&|all| (all[3].1, all[3].2) = ("F8_E4M3", 1));
    assert!(
        refused.contains("F8_E4M3") && refused.contains("BF16"),
        "{refused}"
    );
    // A vector is not a matrix of one column.
    let refused = check(&|all| {
        for tensor in all
            .iter_mut()
            .filter(|(name, ..)| name == "model.norm.weight")
        {
            tensor.3.push(1);
        }
    });
    assert!(refused.contains("model.norm.weight"), "{refused}");
    // Tied embeddings need no head.
    let mut tied = tiny();
    tied["tie_word_embeddings"] = json!(true);
    let tied = ModelShape::from_config(tied.to_string().as_bytes()).expect("valid");
    open(&file(&needed(&tied)))
        .expect("good")
        .check(&tied)
        .expect("complete");
}

/// Types of the tensors that a model needs, as its configuration has them quantised.
fn needed_quantised(shape: &ModelShape) -> Vec<Tensor> {
    let specs = tensors(shape).into_iter().flat_map(|spec| spec.stored());
    let tensor = |spec: StoredSpec| {
        let (dtype, width) = match spec.accepted {
            Accepted::Floats => ("F16", 2),
            Accepted::Words | Accepted::Integers => ("I32", 4),
            Accepted::Int8 => ("I8", 1),
            Accepted::Fp8 => ("F8_E4M3", 1),
        };
        (spec.name, dtype, width, spec.shape)
    };
    specs.map(tensor).collect()
}

#[test]
fn what_a_quantised_model_needs_is_checked() {
    let mut config = tiny();
    config["quantization_config"] =
        json!({"quant_method": "gptq", "bits": 4, "group_size": 4, "desc_act": true});
    let shape = shape(&config);
    let all = needed_quantised(&shape);
    let down = "model.layers.0.mlp.down_proj";
    let shapes: Vec<_> = all
        .iter()
        .filter(|(name, ..)| name.starts_with(down))
        .collect();
    let kinds: Vec<_> = shapes
        .iter()
        .map(|(name, _, _, shape)| (&name[down.len()..], &**shape))
        .collect();
    // 12 inputs and 8 outputs: two words of inputs, one of outputs, three groups.
    assert_eq!(
        kinds,
        [
            (".qweight", &[2, 8][..]),
            (".qzeros", &[3, 1]),
            (".scales", &[3, 8]),
            (".g_idx", &[12])
        ]
    );
    let check = |change: &dyn Fn(&mut Tensor)| {
        let mut all = all.clone();
        all.iter_mut().for_each(change);
        open(&file(&all)).expect("a good file").check(&shape)
    };
    check(&|_| ()).expect("complete");
    for (kind, dtype, other) in [
        (".qweight", "F32", vec![8, 2]),
        (".qzeros", "F16", vec![3, 8]),
        (".scales", "I32", vec![8, 3]),
        (".g_idx", "F32", vec![3]),
    ] {
        let name = format!("{down}{kind}");
        let refused = check(&|tensor| {
            if tensor.0 == name {
                (tensor.1, tensor.2) = (dtype, if dtype == "F16" { 2 } else { 4 });
            }
        });
        let said = refused.expect_err("another type").to_string();
        assert!(said.contains(&name) && said.contains(dtype), "{said}");
        let refused = check(&|tensor| {
            if tensor.0 == name {
                tensor.3.clone_from(&other);
            }
        });
        let said = refused.expect_err("another shape").to_string();
        assert!(
            said.contains(&name) && said.contains(&format!("{other:?}")),
            "{said}"
        );
        let refused = check(&|tensor| {
            if tensor.0 == name {
                tensor.0.push('x');
            }
        });
        let said = refused.expect_err("missing").to_string();
        assert!(said.contains(&name) && said.contains("lacks"), "{said}");
    }
    // Numbers where codes should be: the unquantised checkpoint under the quantised one's configuration.
    let refused = open(&file(&needed(&shape)))
        .expect("a good file")
        .check(&shape);
    assert!(
        refused
            .expect_err("no codes")
            .to_string()
            .contains(".qweight")
    );
}

#[test]
fn the_fixtures_are_complete() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shard/tests/fixtures");
    let mut seen = 0;
    for entry in std::fs::read_dir(root).expect("the shard's fixtures") {
        let path = entry.expect("an entry").path();
        if !path.join("config.json").is_file() {
            continue;
        }
        let files = ModelFiles::directory(&path).expect("a directory");
        let config = files.read_json("config.json").expect("config.json");
        let shape = ModelShape::from_config(&config).expect("a valid configuration");
        let checkpoint = Checkpoint::open(&files).unwrap_or_else(|e| panic!("{path:?}: {e}"));
        checkpoint
            .check(&shape)
            .unwrap_or_else(|e| panic!("{path:?}: {e}"));
        let float = StoredDtype::Float(shape.dtype);
        assert!(
            checkpoint
                .tensors()
                .all(|(_, tensor)| tensor.dtype == float),
            "{path:?}"
        );
        seen += 1;
    }
    assert!(seen >= 4, "{seen} fixtures");
}

/// Whatever the bytes are: an answer whose ranges lie inside the file, or an error.
#[test]
fn mutations_never_panic() {
    const DTYPES: [&str; 3] = ["BF16", "F32", "I64"];
    let mut random = Random::new(random::seed(0x00C0_FFEE));
    let (mut read, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let dtype = *random.pick(&DTYPES);
        let width = match dtype {
            "BF16" => 2,
            "F32" => 4,
            _ => 8,
        };
        let mut bytes = file(&[
            ("a".to_owned(), dtype, width, vec![2, 3]),
            ("b".to_owned(), "F32", 4, vec![random.next() % 5]),
        ]);
        for _ in 0..random.below(3) {
            let at = random.below(bytes.len());
            bytes[at] = u8::try_from(random.below(256)).expect("a byte");
        }
        if random.below(4) == 0 {
            bytes.truncate(random.below(bytes.len()));
        }
        // A few hundred bytes each: leaking them is cheaper than a file.
        let bytes: &'static [u8] = bytes.leak();
        let file = BuiltInFile {
            name: SINGLE_FILE,
            bytes,
        };
        match Checkpoint::open(&ModelFiles::BuiltIn(vec![file].leak())) {
            Err(_) => refused += 1,
            Ok(checkpoint) => {
                read += 1;
                for (name, tensor) in checkpoint.tensors() {
                    let range = &tensor.bytes;
                    assert!(
                        range.start <= range.end && range.end <= bytes.len() as u64,
                        "{name}"
                    );
                }
            }
        }
    }
    assert!(
        read > 500 && refused > 500,
        "{read} read, {refused} refused"
    );
}
