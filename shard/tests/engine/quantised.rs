//! Checkpoints in each published quantised layout, against what `transformers` says of the weights they stand for.
//!
//! The fixtures are made by `scripts/quantised_fixtures.py`, which packs them by code of its own. Says nothing of how much
//! a model loses by being quantised; the coordinator's tests do.

use crate::loading::load_rank;
use crate::reference::reference;
use crate::references::compare;
use crate::support::{
    BLOCK_SIZE, Cluster, ON_TILES, Random, fixture_root, load, open, rounds_on_tiles,
};
use kernels::cpu::CpuBackend;
use kernels::quantized::Code;
use shard::weights::DecoderWeights;
use std::path::PathBuf;
use topology::checkpoint::Checkpoint;
use topology::fit::{Elements, RankNeeds, Sizes};
use topology::ids::Rank;
use topology::model_files::ModelFiles;
use topology::model_shape::{Dtype, KvDtype, ModelShape};
use topology::partition::{Partition, world_sizes};
use topology::quantization::{at_load, head_at_load};
use topology::wire::Load;

/// Relative to the row's largest logit, where codes are floats.
const TOLERANCE: f32 = 1e-4;

/// The same where they are integers: activations are then rounded to 8 bits, which the reference's are not, and random
/// weights have nothing to spare. A layout that is misread is off by the size of the logits.
const INTEGER_TOLERANCE: f32 = 0.2;

pub(crate) fn fixtures() -> Vec<PathBuf> {
    let root = fixture_root().join("quantised");
    let folders = std::fs::read_dir(root).expect("the fixtures are in the repository");
    let mut folders: Vec<_> = folders
        .map(|entry| entry.expect("readable").path())
        .collect();
    folders.sort();
    folders
}

#[test]
fn every_layout_is_read_as_its_format_says_at_every_size() {
    let mut tested = Vec::new();
    for folder in fixtures() {
        let (files, shape) = open(&folder);
        let reference = reference(&folder);
        for world_size in world_sizes(&shape) {
            let case = format!("{} over {world_size}", folder.display());
            let load = load(world_size, 64, "auto");
            let (worst, tokens) = compare::<CpuBackend>(&files, &load, &reference);
            println!("{case}: off by {worst:e}");
            the_fit_was_right(&files, &load, &case);
            if case.contains("fp8") && rounds_on_tiles(shape.dtype) {
                assert!(worst < ON_TILES, "{case}: off by {worst}");
            } else if case.contains("fp8") {
                assert!(worst < TOLERANCE, "{case}: off by {worst}");
                assert_eq!(tokens, reference.greedy, "{case}");
            } else {
                assert!(worst < INTEGER_TOLERANCE, "{case}: off by {worst}");
            }
            tested.push(world_size);
        }
    }
    for size in [1, 2, 4, 8] {
        let count = tested.iter().filter(|tested| **tested == size).count();
        assert!(count >= 10, "{count} layouts over {size} ranks");
    }
}

/// What the arithmetic of memory counts before loading is what a rank takes. (Rows that fill up a quantised head have
/// one scale each, whatever the others have.)
fn the_fit_was_right(files: &ModelFiles, load: &Load, case: &str) {
    let config = files.read_json("config.json").expect("a config.json");
    let shape = ModelShape::from_config(&config).expect("it is supported");
    let at_load = at_load(&load.quantization, &shape).expect("a format");
    let elements = Elements {
        dtype: shape.dtype,
        at_load,
        head_at_load: head_at_load(at_load),
        compute: Dtype::Float32,
        kv: KvDtype::Float(Dtype::Float32),
    };
    let sizes = Sizes {
        block_size: load.block_size,
        max_model_len: load.max_model_len,
        max_num_batched_tokens: load.max_num_batched_tokens,
        max_num_seqs: load.max_num_seqs,
    };
    for partition in Partition::all(&shape, load.tensor_parallel_size).expect("it splits") {
        let engine = load_rank(files, load, partition.rank.0).expect("it loads");
        let needs = RankNeeds::estimate(&shape, &partition, elements, &sizes);
        let (counted, taken) = (needs.weight_bytes, engine.loaded().weight_bytes);
        let filled = if case.contains("ct-actorder") {
            counted / 50
        } else {
            0
        };
        assert!(
            counted.abs_diff(taken) <= filled,
            "{case}: {counted} counted, {taken} taken"
        );
        assert_eq!(needs.block_bytes, engine.loaded().block_bytes, "{case}");
    }
}

/// The first log-probabilities of a prompt, and the bytes of weights on rank 0.
fn first_answer(name: &str, world_size: u32, quantization: &str) -> (f32, u64) {
    let folder = fixture_root().join(name);
    let (files, _) = open(&folder);
    let load = Load {
        quantization: quantization.to_owned(),
        ..load(world_size, 64, "auto")
    };
    let mut cluster = Cluster::start(&files, &load);
    let reference = reference(&folder);
    let output = cluster.step(vec![reference.row(BLOCK_SIZE)]).swap_remove(0);
    let found = reference.log_probabilities(output);
    (reference.worst(&found), cluster.weight_bytes())
}

/// How far from the unquantised reference, relative to the largest logit, the fixtures may be: random weights have
/// nothing to spare. The backend's own rounding comes on top.
#[test]
fn numbers_are_quantised_at_load_to_the_bits_asked_for() {
    for (quantization, most) in [("int8", 0.2), ("fp8", 0.8), ("int4", 3.0)] {
        for name in ["llama3", "qwen25", "gemma2-odd"] {
            for world_size in [1, 2, 3, 4] {
                let (_, shape) = open(&fixture_root().join(name));
                if !world_sizes(&shape).contains(&world_size) {
                    continue;
                }
                let (dense, whole) = first_answer(name, world_size, "auto");
                let (worst, bytes) = first_answer(name, world_size, quantization);
                let (files, _) = open(&fixture_root().join(name));
                let load = Load {
                    quantization: quantization.to_owned(),
                    ..load(world_size, 64, "auto")
                };
                the_fit_was_right(&files, &load, &format!("{name} in {quantization}"));
                println!(
                    "{name} over {world_size} in {quantization}: off by {worst}, {bytes} of {whole} bytes"
                );
                assert!(
                    dense < worst && worst < most,
                    "{name} over {world_size}: {worst}"
                );
                assert!(bytes < whole, "{bytes} of {whole} bytes");
            }
        }
    }
}

#[test]
fn what_a_flag_or_a_device_does_not_take_is_a_sentence() {
    let load = |name: &str, change: &dyn Fn(&mut Load)| {
        let (files, _) = open(&fixture_root().join(name));
        let mut load = load(1, 16, "auto");
        change(&mut load);
        load_rank(&files, &load, 0)
            .map(|_| ())
            .map_err(|e| format!("{e:#}"))
    };
    let quantization =
        |asked: &'static str| move |load: &mut Load| load.quantization = asked.to_owned();
    load("quantised/awq", &quantization("awq")).expect("its own");
    let said = load("quantised/awq", &quantization("int8")).unwrap_err();
    assert!(said.contains("give awq"), "{said}");
    let said = load("llama3", &quantization("gptq")).unwrap_err();
    assert!(
        said.contains("needs a checkpoint that was quantised so"),
        "{said}"
    );
    for (asked, bytes) in [("auto", 4), ("float32", 4), ("bfloat16", 2), ("float16", 2)] {
        let (files, shape) = open(&fixture_root().join("llama3"));
        let mut load = crate::support::load(1, 16, "auto");
        load.kv_cache_dtype = asked.to_owned();
        let engine = load_rank(&files, &load, 0).expect("it loads");
        let tokens = u64::from(shape.num_layers * shape.num_kv_heads * shape.head_dim * BLOCK_SIZE);
        assert_eq!(engine.loaded().block_bytes, 2 * bytes * tokens, "{asked}");
    }
    let said = load("llama3", &|load| load.kv_cache_dtype = "int3".to_owned()).unwrap_err();
    assert!(
        said.contains("--kv-cache-dtype is int3; it must be one of auto"),
        "{said}"
    );

    // A device that takes 8 bits only.
    let (files, shape) = open(&fixture_root().join("quantised/awq"));
    let checkpoint = Checkpoint::open(&files).expect("a good file");
    let partition = Partition::new(&shape, Rank(0), 1).expect("one rank");
    let weights = DecoderWeights::find(
        &files,
        &checkpoint,
        &shape,
        &partition,
        shape.dtype,
        (None, None),
    );
    let weights = weights.expect("they are there");
    weights
        .refuse_unknown_codes("the device", |_| true)
        .expect("it takes all");
    let said = weights
        .refuse_unknown_codes("the device", |code| code == Code::Int8)
        .unwrap_err();
    assert!(
        said.to_string()
            .contains("the device cannot compute with int4 weights"),
        "{said}"
    );
}

/// Whatever is in the files, loading ends in a model or in a sentence.
#[test]
fn damaged_files_never_panic() {
    let mut random = Random::new(Random::seed("damaged_files_never_panic"));
    let (mut loaded, mut refused) = (0, 0);
    for folder in fixtures() {
        let config = std::fs::read_to_string(folder.join("config.json")).expect("a config.json");
        let weights = std::fs::read(folder.join("model.safetensors")).expect("weights");
        let header = u64::from_le_bytes(weights[..8].try_into().expect("eight bytes"));
        let header = 8..8 + usize::try_from(header).expect("a small header");
        for _ in 0..120 {
            let copy = tempfile::tempdir().expect("a temporary folder");
            let (mut config, mut weights) = (config.clone().into_bytes(), weights.clone());
            // Digits change numbers and types' sizes; bytes of the data change groups, zeros and shapes.
            for _ in 0..=random.below(2) {
                let (bytes, range) = match random.below(3) {
                    0 => (&mut config, 0..usize::MAX),
                    1 => (&mut weights, header.clone()),
                    _ => (&mut weights, header.end..usize::MAX),
                };
                let range = range.start..range.end.min(bytes.len());
                let digits: Vec<usize> = range
                    .clone()
                    .filter(|at| bytes[*at].is_ascii_digit())
                    .collect();
                let at = if range.end == bytes.len() && range.start == header.end {
                    range.start + random.below(range.len())
                } else {
                    digits[random.below(digits.len())]
                };
                bytes[at] = b"0123456789\xff\x80"
                    [random.below(if bytes[at].is_ascii_digit() { 10 } else { 12 })];
            }
            std::fs::write(copy.path().join("config.json"), config).expect("a copy");
            std::fs::write(copy.path().join("model.safetensors"), weights).expect("a copy");
            let files = ModelFiles::directory(copy.path()).expect("a folder");
            let world_size = [1, 2, 4][random.below(3)];
            match load_rank(&files, &load(world_size, 16, "auto"), world_size - 1) {
                Ok(_) => loaded += 1,
                Err(_) => refused += 1,
            }
        }
    }
    println!("{loaded} loaded, {refused} refused");
    assert!(
        loaded > 100 && refused > 100,
        "{loaded} loaded, {refused} refused"
    );
}
