//! The fixtures' reference outputs against this decoder, at every tensor-parallel size.
//!
//! Logits are compared through the log-probabilities of the whole vocabulary, which is all that
//! leaves a shard: they are the logits up to a constant per row, and that constant changes no answer.
//! The tolerance is relative to the row's largest absolute reference logit. Promised is 1e-3; what is
//! tested is ten times closer, and what is found is another fifty.

use crate::support::{
    BLOCK_SIZE, Cluster, Group, Random, Request, Tested, Ways, fixtures, generate, load, open,
};
use kernels::cpu::CpuBackend;
use safetensors::SafeTensors;
use std::path::Path;
use topology::ids::{BlockId, Rank};
use topology::model_files::ModelFiles;
use topology::partition::Partition;
use topology::wire::{Load, PlanRow, Sampling};

const TOLERANCE: f32 = 1e-4;

pub(crate) struct Reference {
    pub(crate) prompt: Vec<u32>,
    /// `[prompt, vocab]`
    logits: Vec<Vec<f32>>,
    pub(crate) greedy: Vec<u32>,
}

pub(crate) fn reference(folder: &Path) -> Reference {
    let bytes = std::fs::read(folder.join("reference.safetensors")).expect("a reference");
    let tensors = SafeTensors::deserialize(&bytes).expect("a readable reference");
    let ids = |name: &str| -> Vec<u32> {
        let tensor = tensors.tensor(name).expect("the reference has this tensor");
        assert_eq!(tensor.dtype(), safetensors::Dtype::I64);
        let words = tensor.data().chunks_exact(8);
        let id = |word: &[u8]| i64::from_le_bytes(word.try_into().expect("eight bytes"));
        words
            .map(|word| u32::try_from(id(word)).expect("an id"))
            .collect()
    };
    let logits = tensors.tensor("logits").expect("the reference has logits");
    assert_eq!(logits.dtype(), safetensors::Dtype::F32);
    let vocab = logits.shape()[1];
    let float = |word: &[u8]| f32::from_le_bytes(word.try_into().expect("four bytes"));
    let values: Vec<f32> = logits.data().chunks_exact(4).map(float).collect();
    Reference {
        prompt: ids("prompt_ids"),
        logits: values.chunks(vocab).map(<[f32]>::to_vec).collect(),
        greedy: ids("greedy_ids"),
    }
}

/// Log-probabilities of the whole vocabulary after each prompt token. `[prompt, vocab]`
fn log_probabilities<B: Tested>(cluster: &mut Group<B>, reference: &Reference) -> Vec<Vec<f32>> {
    let tokens = reference.prompt.clone();
    let vocab = reference.logits[0].len();
    let blocks = u32::try_from(tokens.len())
        .expect("a short prompt")
        .div_ceil(BLOCK_SIZE);
    let row = PlanRow {
        targets: tokens.clone(),
        target_alternatives: u32::try_from(vocab).expect("a small vocabulary"),
        tokens,
        blocks: (0..blocks).map(BlockId).collect(),
        ..PlanRow::default()
    };
    let output = cluster.step(vec![row]).swap_remove(0);
    assert!(output.sampled.is_none());
    let scores = output.targets.into_iter().zip(&reference.prompt);
    scores
        .map(|(score, target)| {
            let mut row = vec![f32::NAN; vocab];
            for (token, logprob) in &score.top {
                row[*token as usize] = *logprob;
            }
            assert_eq!(score.logprob.to_bits(), row[*target as usize].to_bits());
            assert_eq!(
                score.top[score.rank as usize - 1].1.to_bits(),
                score.logprob.to_bits()
            );
            row
        })
        .collect()
}

/// The largest difference of two rows of log-probabilities, relative to the largest logit.
fn distance(found: &[f32], logits: &[f32]) -> f32 {
    let largest = logits.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    let top = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - top).exp()).sum();
    let normaliser = f64::from(top) + sum.ln();
    let differences = found.iter().zip(logits).map(|(found, logit)| {
        let difference = (f64::from(*logit) - normaliser - f64::from(*found)).abs();
        // NaN is no small difference.
        if difference.is_nan() {
            f64::INFINITY
        } else {
            difference
        }
    });
    #[expect(
        clippy::cast_possible_truncation,
        reason = "for a comparison with a tolerance"
    )]
    let most = differences.fold(0.0, f64::max) as f32;
    most / largest
}

/// How far the logits of the prompt are off, and the greedy tokens after it.
pub(crate) fn compare<B: Tested>(
    files: &ModelFiles,
    load: &Load,
    reference: &Reference,
) -> (f32, Vec<u32>) {
    let mut cluster = Group::<B>::start(files, load);
    let found = log_probabilities(&mut cluster, reference);
    let distances = found
        .iter()
        .zip(&reference.logits)
        .map(|(f, r)| distance(f, r));
    let worst = distances.fold(0.0, f32::max);
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
                assert!(worst < TOLERANCE, "{case}: off by {worst}");
                assert_eq!(tokens, reference.greedy, "{case}");
                println!("{case}: off by {worst:e}");
            }
        }
    }
    // Sizes that the heads forbid are left out above; these must not be among them everywhere.
    for (size, least) in [(1, 8), (2, 7), (4, 7), (3, 1), (8, 3)] {
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
    let distances = found
        .iter()
        .zip(&reference.logits)
        .map(|(f, r)| distance(f, r));
    let worst = distances.fold(0.0, f32::max);
    assert!(worst > 10.0 * TOLERANCE, "off by {worst} only");
}
