//! The fixtures' reference outputs against this decoder, at every tensor-parallel size.
//!
//! Logits are compared through the log-probabilities of the whole vocabulary, which is all that
//! leaves a shard: they are the logits up to a constant per row, and that constant changes no answer.
//! The tolerance is relative to the row's largest absolute reference logit. Promised is 1e-3; what is
//! tested is ten times closer, and what is found is another fifty.

use crate::reference::{Reference, reference};
use crate::support::{
    BLOCK_SIZE, Cluster, Group, ON_TILES, Random, Request, Tested, Ways, fixtures, generate, load,
    open, rounds_on_tiles,
};
use kernels::cpu::CpuBackend;
use safetensors::SafeTensors;
use topology::ids::Rank;
use topology::model_files::ModelFiles;
use topology::partition::Partition;
use topology::wire::{Load, Sampling};

const TOLERANCE: f32 = 1e-4;

/// Log-probabilities of the whole vocabulary after each prompt token. `[prompt, vocab]`
fn log_probabilities<B: Tested>(cluster: &mut Group<B>, reference: &Reference) -> Vec<Vec<f32>> {
    let row = reference.row(BLOCK_SIZE);
    let output = cluster.step(vec![row]).swap_remove(0);
    reference.log_probabilities(output)
}

/// How far the logits of the prompt are off, and the greedy tokens after it.
pub(crate) fn compare<B: Tested>(
    files: &ModelFiles,
    load: &Load,
    reference: &Reference,
) -> (f32, Vec<u32>) {
    let mut cluster = Group::<B>::start(files, load);
    let found = log_probabilities(&mut cluster, reference);
    let worst = reference.worst(&found);
    let request = Request {
        prompt: reference.prompt.clone(),
        sampling: Sampling::default(),
        new_tokens: reference.greedy.len(),
    };
    let random = &mut Random::new(0);
    let answers = generate(&mut cluster, &[request], Ways::default(), random);
    let tokens = answers[0].iter().map(|answer| answer.token).collect();
    (worst, tokens)
}

/// As served by default, with the weights in their own type; and with everything in f32.
const DTYPES: [&str; 2] = ["auto", "float32"];

#[test]
fn logits_and_greedy_tokens_are_the_references_at_every_size() {
    let mut sizes = std::collections::BTreeMap::new();
    for folder in fixtures() {
        let (files, shape) = open(&folder);
        let reference = reference(&folder);
        assert_eq!((reference.prompt.len(), reference.greedy.len()), (40, 24));
        for world_size in [1, 2, 3, 4, 6, 8] {
            if Partition::new(&shape, Rank(0), world_size).is_err() {
                continue;
            }
            *sizes.entry(world_size).or_insert(0) += 1;
            for dtype in DTYPES {
                let case = format!("{} over {world_size} in {dtype}", folder.display());
                let load = load(world_size, 64, dtype);
                let (worst, tokens) = compare::<CpuBackend>(&files, &load, &reference);
                println!("{case}: off by {worst:e}");
                if dtype == "auto" && rounds_on_tiles(shape.dtype) {
                    assert!(worst < ON_TILES, "{case}: off by {worst}");
                    assert_eq!(tokens.len(), reference.greedy.len(), "{case}");
                } else {
                    assert!(worst < TOLERANCE, "{case}: off by {worst}");
                    assert_eq!(tokens, reference.greedy, "{case}");
                }
            }
        }
    }
    // Sizes that the heads forbid are left out above; these must not be among them everywhere.
    for (size, least) in [(1, 16), (2, 14), (4, 14), (3, 2), (6, 2), (8, 12)] {
        let tested = sizes.get(&size).copied().unwrap_or(0);
        assert!(tested >= least, "{tested} fixtures were split over {size}");
    }
}

/// A wrong tensor must not pass for rounding: one weight changed is far beyond the tolerance.
#[test]
fn the_tolerance_notices_a_single_changed_weight() {
    let folder = fixtures()
        .into_iter()
        .find(|f| f.ends_with("llama2"))
        .expect("llama2");
    let reference = reference(&folder);
    let copy = tempfile::tempdir().expect("a temporary folder");
    std::fs::copy(folder.join("config.json"), copy.path().join("config.json")).expect("a copy");
    let mut bytes = std::fs::read(folder.join("model.safetensors")).expect("the weights");
    let tensors = SafeTensors::deserialize(&bytes).expect("readable weights");
    let norm = tensors
        .tensor("model.norm.weight")
        .expect("the final norm")
        .data();
    let at = norm.as_ptr() as usize - bytes.as_ptr() as usize;
    // 4.0 as f16, in the place of something near 1.
    bytes[at..at + 2].copy_from_slice(&[0x00, 0x44]);
    std::fs::write(copy.path().join("model.safetensors"), bytes).expect("the changed weights");
    let (files, _) = open(copy.path());
    let mut cluster = Cluster::start(&files, &load(2, 64, "auto"));
    let found = log_probabilities(&mut cluster, &reference);
    let worst = reference.worst(&found);
    assert!(worst > 10.0 * TOLERANCE, "off by {worst} only");
}
