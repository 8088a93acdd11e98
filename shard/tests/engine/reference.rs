//! What a fixture's reference says, and how far an answer is from it.
//!
//! Logits are compared through the log-probabilities of the whole vocabulary, which is all that leaves a
//! shard. Starts nothing and computes nothing. Invariant: a missing or undefined number is no small distance.

use safetensors::SafeTensors;
use std::path::Path;
use topology::ids::BlockId;
use topology::wire::{PlanRow, RowOutput};

pub(crate) struct Reference {
    pub(crate) prompt: Vec<u32>,
    /// `[prompt, vocab]`
    pub(crate) logits: Vec<Vec<f32>>,
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

impl Reference {
    /// The row of a plan that asks for the whole vocabulary after each prompt token, in the blocks from 0 on.
    pub(crate) fn row(&self, block_size: u32) -> PlanRow {
        let tokens = self.prompt.clone();
        let length = u32::try_from(tokens.len()).expect("a short prompt");
        let vocab = u32::try_from(self.logits[0].len()).expect("a small vocabulary");
        PlanRow {
            targets: tokens.clone(),
            target_alternatives: vocab,
            tokens,
            blocks: (0..length.div_ceil(block_size)).map(BlockId).collect(),
            ..PlanRow::default()
        }
    }

    /// What [`Self::row`] was answered, by token. `[prompt, vocab]`
    pub(crate) fn log_probabilities(&self, output: RowOutput) -> Vec<Vec<f32>> {
        assert!(output.sampled.is_none());
        let vocab = self.logits[0].len();
        let scores = output.targets.into_iter().zip(&self.prompt);
        let rows = scores.map(|(score, target)| {
            let mut row = vec![f32::NAN; vocab];
            for (token, logprob) in &score.top {
                row[*token as usize] = *logprob;
            }
            assert_eq!(score.logprob.to_bits(), row[*target as usize].to_bits());
            let ranked = score.top[score.rank as usize - 1].1;
            assert_eq!(ranked.to_bits(), score.logprob.to_bits());
            row
        });
        rows.collect()
    }

    /// The largest [`distance`] of the rows that [`Self::row`] was answered with.
    pub(crate) fn worst(&self, found: &[Vec<f32>]) -> f32 {
        assert_eq!(found.len(), self.logits.len());
        let rows = found.iter().zip(&self.logits);
        rows.map(|(found, logits)| distance(found, logits))
            .fold(0.0, f32::max)
    }
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
