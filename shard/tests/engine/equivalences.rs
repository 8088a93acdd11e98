//! What must not change an answer by a single bit: company in the batch, how a prompt was cut,
//! where blocks lie, and doing it again.
//!
//! Answers are compared with the log-probabilities of the chosen token and five others, greedy and
//! sampled. How near different tensor-parallel sizes are to each other is `references.rs`'s.

use crate::support::{Cluster, Random, Request, Ways, fixtures, generate, load, open};
use topology::ids::Rank;
use topology::partition::Partition;
use topology::wire::{PlanRow, Sampling, ScoredToken};

/// Requests of different lengths, greedy and sampled, with every kind of parameter among them.
pub(crate) fn requests(vocab: usize, random: &mut Random) -> Vec<Request> {
    let token = |random: &mut Random| u32::try_from(random.below(vocab)).expect("small");
    (0..6)
        .map(|index: u64| {
            let prompt: Vec<u32> = (0..=random.below(30)).map(|_| token(random)).collect();
            let mut sampling = Sampling {
                logprobs: Some(5),
                seed: index,
                ..Sampling::default()
            };
            if index % 2 == 1 {
                sampling.temperature = 0.9;
                sampling.top_p = 0.95;
                sampling.top_k = 50;
            }
            if index == 3 {
                sampling.repetition_penalty = 1.3;
                sampling.prompt.clone_from(&prompt);
                sampling.banned = vec![token(random)];
            }
            if index == 4 {
                sampling.presence_penalty = 0.4;
                sampling.frequency_penalty = 0.7;
            }
            Request {
                prompt,
                sampling,
                new_tokens: 3 + random.below(8),
            }
        })
        .collect()
}

pub(crate) const ALL: Ways = Ways {
    batched: true,
    chunked: true,
    scattered: true,
    ahead: true,
    overlapped: true,
};

#[test]
fn company_cuts_and_places_change_no_bit() {
    let seed = Random::seed("company");
    println!("seed {seed}");
    let mut random = Random::new(seed);
    for folder in fixtures() {
        let (files, shape) = open(&folder);
        for world_size in [1, 2, 4] {
            if Partition::new(&shape, Rank(0), world_size).is_err() {
                continue;
            }
            let mut cluster = Cluster::start(&files, &load(world_size, 256, "auto"));
            let requests = requests(shape.vocab_size as usize, &mut random);
            let mut run = |ways| generate(&mut cluster, &requests, ways, &mut random);
            let alone = run(Ways::default());
            for ways in [
                Ways {
                    batched: true,
                    ..Ways::default()
                },
                Ways {
                    chunked: true,
                    ..Ways::default()
                },
                Ways {
                    scattered: true,
                    ..Ways::default()
                },
                Ways {
                    ahead: true,
                    ..Ways::default()
                },
                Ways {
                    overlapped: true,
                    ..Ways::default()
                },
                ALL,
            ] {
                let found = run(ways);
                let case = format!("{} over {world_size}, {ways:?}", folder.display());
                assert_same_bits(&found, &alone, &case);
            }
        }
    }
}

#[test]
fn another_group_of_the_same_size_gives_the_same_bits() {
    let seed = Random::seed("again");
    println!("seed {seed}");
    for folder in fixtures().into_iter().step_by(3) {
        let (files, shape) = open(&folder);
        for world_size in [2, 3, 4, 8] {
            if Partition::new(&shape, Rank(0), world_size).is_err() {
                continue;
            }
            let run = |order: u64| {
                let requests = requests(shape.vocab_size as usize, &mut Random::new(seed));
                let mut cluster = Cluster::start(&files, &load(world_size, 256, "auto"));
                generate(&mut cluster, &requests, ALL, &mut Random::new(seed ^ order))
            };
            assert_same_bits(
                &run(1),
                &run(2),
                &format!("{} over {world_size}", folder.display()),
            );
        }
    }
}

/// A long prompt's targets take the head in several pieces when rows are few; a short one takes one.
#[test]
fn scores_do_not_depend_on_how_many_rows_the_head_takes_at_a_time() {
    let seed = Random::seed("scores");
    println!("seed {seed}");
    let folder = &fixtures()[0];
    let (files, shape) = open(folder);
    let mut random = Random::new(seed);
    let vocab = shape.vocab_size as usize;
    let tokens: Vec<u32> = (0..50)
        .map(|_| u32::try_from(random.below(vocab)).expect("small"))
        .collect();
    let row = PlanRow {
        targets: tokens[1..].to_vec(),
        target_alternatives: 3,
        blocks: (0..13).map(topology::ids::BlockId).collect(),
        sampling: Some(Box::new(Sampling {
            logprobs: Some(2),
            ..Sampling::default()
        })),
        tokens,
        ..PlanRow::default()
    };
    let outputs = [1, 7, 64].map(|rows| {
        let mut load = load(2, 64, "auto");
        load.max_num_seqs = rows;
        Cluster::start(&files, &load).step(vec![row.clone()])
    });
    assert_eq!(outputs[0], outputs[1]);
    assert_eq!(outputs[0], outputs[2]);
    assert_eq!(outputs[0][0].targets.len(), 49);
    assert!(outputs[0][0].sampled.is_some());
}

pub(crate) fn assert_same_bits(
    found: &[Vec<ScoredToken>],
    expected: &[Vec<ScoredToken>],
    case: &str,
) {
    let bits = |answers: &[Vec<ScoredToken>]| -> Vec<Vec<_>> {
        let bits = |answer: &ScoredToken| {
            let score = answer
                .score
                .clone()
                .expect("log-probabilities were asked for");
            assert!(
                score.logprob.is_finite() && score.top.len() == 5,
                "{score:?}"
            );
            let top = score
                .top
                .iter()
                .map(|(token, logprob)| (*token, logprob.to_bits()));
            (
                answer.token,
                score.logprob.to_bits(),
                score.rank,
                top.collect::<Vec<_>>(),
            )
        };
        answers
            .iter()
            .map(|answers| answers.iter().map(bits).collect())
            .collect()
    };
    assert_eq!(bits(found), bits(expected), "{case}");
}
