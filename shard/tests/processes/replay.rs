//! Decode steps that ranks record and replay together, against the same steps queued one operation after the other.
//!
//! Only a device records: on the CPU there is nothing to check. Invariant: what is compared was replayed, which the
//! shards' log says.

use crate::group::{BLOCK_SIZE, Group, is_gpu, load, replayed_sizes};
use crate::life::{comparable, run};
use topology::ids::BlockId;
use topology::wire::{FromShard, Load, PlanRow, Sampling, ScoredToken, StepPlan, ToShard};

/// One is filled up to four rows.
const PROMPTS: [&[u32]; 3] = [
    &[9, 40, 77, 130, 12, 250, 99],
    &[61, 200, 18],
    &[7, 7, 31, 5, 90],
];
/// A device tries products' algorithms in some twenty steps before it records.
const STEPS: usize = 33;
/// Enough for each sequence to its end.
const BLOCKS_EACH: usize = 10;

pub(crate) fn replayed_steps_give_what_queued_ones_do() {
    if !is_gpu() {
        return;
    }
    for fixture in ["llama3", "gemma2"] {
        let before = replayed_sizes();
        let queued = generated(fixture, true);
        assert_eq!(replayed_sizes(), before, "{fixture}: nothing is recorded");
        let replayed = generated(fixture, false);
        assert_eq!(
            replayed_sizes(),
            before + 2,
            "{fixture}: one size on each of two ranks"
        );
        let comparable = |answers: Vec<Vec<ScoredToken>>| -> Vec<_> {
            answers.iter().map(|answers| comparable(answers)).collect()
        };
        assert_eq!(comparable(replayed), comparable(queued), "{fixture}");
    }
}

/// What each prompt is followed by.
fn generated(fixture: &str, enforce_eager: bool) -> Vec<Vec<ScoredToken>> {
    let load = Load {
        enforce_eager,
        ..load(fixture)
    };
    let mut answers = vec![Vec::new(); PROMPTS.len()];
    run(async {
        let mut group = Group::start_as(&load, None).await;
        group.form().await;
        let mut sequences = PROMPTS.map(<[u32]>::to_vec);
        let mut computed = [0; PROMPTS.len()];
        for _ in 0..STEPS {
            let rows = sequences.iter().zip(computed).zip(0..);
            let rows = rows.map(|((tokens, computed), place)| row(tokens, computed, place));
            let plan = StepPlan {
                epoch: group.epoch,
                step: group.next,
                rows: rows.collect(),
            };
            group.next = plan.step.next();
            for rank in &mut group.ranks {
                rank.say(ToShard::Run(Box::new(plan.clone()))).await;
            }
            let mut outputs = Vec::new();
            for rank in &mut group.ranks {
                match rank.hear().await {
                    FromShard::Ran(ran) => outputs.extend(ran.outputs),
                    other => panic!("no result but {other:?}"),
                }
            }
            for (place, output) in outputs.into_iter().enumerate() {
                let answer = output.sampled.expect("a sample was asked for");
                computed[place] = sequences[place].len();
                sequences[place].push(answer.token);
                answers[place].push(answer);
            }
        }
        group.stop().await;
    });
    answers
}

/// Computes `tokens[computed..]` of the sequence at `place` and samples.
fn row(tokens: &[u32], computed: usize, place: usize) -> PlanRow {
    let small = |at: usize| u32::try_from(at).expect("short");
    assert!(
        tokens.len() <= BLOCKS_EACH * BLOCK_SIZE,
        "the blocks are its own"
    );
    let blocks = 0..tokens.len().div_ceil(BLOCK_SIZE);
    PlanRow {
        tokens: tokens[computed..].to_vec(),
        position: small(computed),
        blocks: (blocks.map(|block| BlockId(small(place * BLOCKS_EACH + block)))).collect(),
        sampling: Some(Box::new(Sampling {
            position: small(tokens.len()),
            temperature: 0.8,
            seed: 11 + place as u64,
            logprobs: Some(2),
            ..Sampling::default()
        })),
        ..PlanRow::default()
    }
}
