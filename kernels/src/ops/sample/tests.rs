//! Sampling against a reference that sorts everything in f64, and the properties that it promises.

use super::*;
use crate::backend::Backend;
use crate::sampling::Score;
use crate::testing::{Rng, backends, tensor};

pub(super) fn neutral() -> SampleParams {
    SampleParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
        seed: 0,
        position: 0,
        logit_bias: Vec::new(),
        banned: Vec::new(),
        allowed: Vec::new(),
        prompt: Vec::new(),
        generated: Vec::new(),
        last: None,
    }
}

/// Probabilities of all tokens after steps 2 and 3, for a positive temperature and finite logits.
fn reference(row: &[f32], params: &SampleParams) -> Vec<f64> {
    let mut logits: Vec<f64> = row.iter().map(|&logit| f64::from(logit)).collect();
    for &(token, bias) in &params.logit_bias {
        logits[token as usize] += f64::from(bias);
    }
    for (token, logit) in (0_u32..).zip(&mut logits) {
        let times = params
            .generated
            .iter()
            .filter(|&&other| other == token)
            .count();
        if times > 0 || params.prompt.contains(&token) {
            let factor = f64::from(params.repetition_penalty);
            *logit = if *logit > 0.0 {
                *logit / factor
            } else {
                *logit * factor
            };
        }
        if times > 0 {
            *logit -= f64::from(params.presence_penalty);
            *logit -= f64::from(params.frequency_penalty) * times as f64;
        }
        let allowed = params.allowed.is_empty() || params.allowed.contains(&token);
        if !allowed || params.banned.contains(&token) {
            *logit = f64::NEG_INFINITY;
        }
    }
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let temperature = f64::from(params.temperature);
    let mut weights: Vec<f64> = logits
        .iter()
        .map(|l| ((l - max) / temperature).exp())
        .collect();
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    for weight in &mut weights {
        *weight = if *weight < f64::from(params.min_p) {
            0.0
        } else {
            *weight
        };
    }
    if params.top_k > 0 {
        order
            .iter()
            .skip(params.top_k)
            .for_each(|&token| weights[token] = 0.0);
    }
    let target = weights.iter().sum::<f64>() * f64::from(params.top_p);
    let mut before = 0.0;
    for &token in &order {
        let weight = weights[token];
        if params.top_p < 1.0 && before >= target && before > 0.0 {
            weights[token] = 0.0;
        }
        before += weight;
    }
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

fn choose_one(isa: Isa, row: &[f32], params: &SampleParams) -> u32 {
    choose(isa, row, params, &mut Scratch::default())
}

/// A row and parameters, everything switched on by chance.
fn random_case(rng: &mut Rng) -> (Vec<f32>, SampleParams) {
    let vocab = rng.within(5..60);
    let row: Vec<f32> = rng.values(vocab).iter().map(|logit| logit * 4.0).collect();
    let some = |rng: &mut Rng, limit: usize| -> Vec<u32> {
        (0..rng.within(0..limit))
            .map(|_| rng.within(0..vocab) as u32)
            .collect()
    };
    let mut params = SampleParams {
        temperature: rng.pick(&[0.3, 1.0, 1.7]),
        top_k: rng.pick(&[0, 0, 1, 3, 17, 1000]),
        top_p: rng.pick(&[1.0, 1.0, 0.9, 0.5, 0.01]),
        min_p: rng.pick(&[0.0, 0.0, 0.05, 0.3]),
        presence_penalty: rng.pick(&[0.0, 0.7, -0.7]),
        frequency_penalty: rng.pick(&[0.0, 0.3]),
        repetition_penalty: rng.pick(&[1.0, 1.3]),
        seed: rng.next(),
        position: 0,
        logit_bias: some(rng, 4).into_iter().map(|token| (token, 1.5)).collect(),
        banned: some(rng, 4),
        allowed: Vec::new(),
        prompt: some(rng, 9),
        generated: some(rng, 9),
        last: None,
    };
    if rng.within(0..4) == 0 {
        params.allowed = some(rng, vocab);
        params.allowed.push(0);
        params.banned.retain(|&token| token != 0);
    }
    (row, params)
}

#[test]
fn draws_follow_the_reference_distribution() {
    let mut rng = Rng::new(20);
    let isas = Isa::available();
    for case in 0..60 {
        let (row, params) = random_case(&mut rng);
        println!("case {case}: {params:?}");
        let expected = reference(&row, &params);
        let draws = 4000_u32;
        let mut counts = vec![0_u32; row.len()];
        for position in 0..draws {
            let params = SampleParams {
                position,
                ..params.clone()
            };
            counts[choose_one(isas[case % isas.len()], &row, &params) as usize] += 1;
        }
        // Rare tokens together: chi-square needs expectations that are not tiny.
        let (mut chi, mut bins, mut rare) = (0.0, 0_u32, (0.0, 0.0));
        for (&p, &count) in expected.iter().zip(&counts) {
            let mean = p * f64::from(draws);
            if p == 0.0 {
                assert_eq!(count, 0, "a token that was filtered out");
            } else if mean < 10.0 {
                rare = (rare.0 + mean, rare.1 + f64::from(count));
            } else {
                chi += (f64::from(count) - mean).powi(2) / mean;
                bins += 1;
            }
        }
        if rare.0 > 0.0 {
            chi += (rare.1 - rare.0).powi(2) / rare.0.max(1.0);
            bins += 1;
        }
        // About five standard deviations above the mean of a chi-square.
        let freedom = f64::from(bins.max(2) - 1);
        assert!(
            chi < freedom + 5.0 * (2.0 * freedom).sqrt() + 5.0,
            "chi-square {chi} in {bins} bins"
        );
    }
}

#[test]
fn a_temperature_of_zero_takes_the_likeliest_of_the_reference() {
    let mut rng = Rng::new(21);
    for _ in 0..500 {
        let (row, params) = random_case(&mut rng);
        let expected = reference(
            &row,
            &SampleParams {
                temperature: 1.0,
                top_k: 1,
                ..params.clone()
            },
        );
        let likeliest = expected.iter().position(|&p| p > 0.0).unwrap() as u32;
        for temperature in [0.0, 1e-6, -1.0, f32::NAN] {
            let params = SampleParams {
                temperature,
                ..params.clone()
            };
            assert_eq!(choose_one(Isa::detect(), &row, &params), likeliest);
        }
        // The likeliest alone is left by the strictest of each filter, too, and a tiny temperature.
        for params in [
            SampleParams {
                temperature: 100.0,
                top_k: 1,
                ..params.clone()
            },
            SampleParams {
                temperature: 100.0,
                top_p: 0.0,
                ..params.clone()
            },
            SampleParams {
                temperature: 2e-5,
                ..params.clone()
            },
        ] {
            assert_eq!(
                choose_one(Isa::detect(), &row, &params),
                likeliest,
                "{params:?}"
            );
        }
    }
}

#[test]
fn filters_that_remove_nothing_and_the_batch_change_nothing() {
    let mut rng = Rng::new(22);
    // Several pieces, and not a whole number of them.
    let vocab = 5000;
    let row: Vec<f32> = rng.values(vocab).iter().map(|logit| logit * 3.0).collect();
    for seed in 0..200 {
        let params = SampleParams {
            seed,
            position: 5,
            ..neutral()
        };
        let token = choose_one(Isa::detect(), &row, &params);
        for same in [
            SampleParams {
                top_k: vocab,
                ..params.clone()
            },
            SampleParams {
                top_k: usize::MAX,
                min_p: 1e-9,
                ..params.clone()
            },
            SampleParams {
                top_k: vocab - 1,
                ..params.clone()
            },
            SampleParams {
                allowed: (0..vocab as u32).collect(),
                ..params.clone()
            },
            SampleParams {
                prompt: vec![1, 2],
                generated: vec![3],
                ..params.clone()
            },
        ] {
            assert_eq!(choose_one(Isa::detect(), &row, &same), token);
        }
    }

    let rows: Vec<f32> = (0..7).flat_map(|_| rng.values(vocab)).collect();
    let requests: Vec<SampleRequest> = (0..20)
        .map(|i| {
            let (_, params) = random_case(&mut rng);
            let choice = match i % 3 {
                0 => Choice::Score(rng.within(0..vocab) as u32),
                _ => Choice::Sample(Box::new(params)),
            };
            SampleRequest {
                row: rng.within(0..7),
                choice,
                logprobs: rng.pick(&[None, Some(0), Some(5)]),
            }
        })
        .collect();
    let mut first = None;
    for cpu in backends() {
        let mut logits = tensor(&cpu, &rows, vocab);
        let together = cpu.sample(&mut logits, vocab, &requests).unwrap();
        for (request, result) in requests.iter().zip(&together) {
            let alone = cpu
                .sample(&mut logits, vocab, std::slice::from_ref(request))
                .unwrap();
            assert_eq!(&alone[0], result);
        }
        assert_eq!(first.get_or_insert_with(|| together.clone()), &together);
    }
}

#[test]
fn scores_are_the_raw_distribution() {
    let mut rng = Rng::new(23);
    for cpu in backends() {
        let (vocab, padding) = (rng.within(10..3000), rng.within(0..20));
        let mut row: Vec<f32> = rng
            .values(vocab)
            .iter()
            .map(|logit| (logit * 40.0).round() + 0.0)
            .collect();
        let exact: Vec<f64> = row.iter().map(|&logit| f64::from(logit)).collect();
        let log_sum = exact.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|&a, &b| exact[b].total_cmp(&exact[a]).then(a.cmp(&b)));
        // Columns past the vocabulary do not count.
        row.extend(vec![1e9; padding]);
        let mut logits = tensor(&cpu, &row, vocab + padding);
        for top in [0, 1, 7, vocab, vocab + 5] {
            let token = rng.within(0..vocab);
            // Sampling parameters do not show in scores.
            let params = SampleParams {
                allowed: vec![token as u32],
                ..neutral()
            };
            for choice in [
                Choice::Score(token as u32),
                Choice::Sample(Box::new(params)),
            ] {
                let request = SampleRequest {
                    row: 0,
                    choice,
                    logprobs: Some(top),
                };
                let result = cpu
                    .sample(&mut logits, vocab, &[request])
                    .unwrap()
                    .remove(0);
                assert_eq!(result.token as usize, token);
                let Score {
                    logprob,
                    rank,
                    top: best,
                } = result.score.unwrap();
                assert!((f64::from(logprob) - (exact[token] - log_sum)).abs() < 1e-4);
                assert_eq!(order[rank as usize - 1], token);
                assert_eq!(best.len(), top.min(vocab));
                for ((id, logprob), &expected) in best.iter().zip(&order) {
                    assert_eq!(*id as usize, expected);
                    assert!((f64::from(*logprob) - (exact[expected] - log_sum)).abs() < 1e-4);
                }
            }
        }
    }
}

#[test]
fn rows_without_sense_have_an_answer() {
    let isa = Isa::detect();
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for temperature in [0.0, 1.0] {
        let params = SampleParams {
            temperature,
            top_k: 3,
            top_p: 0.9,
            min_p: 0.1,
            ..neutral()
        };
        let choose = |row: &[f32], params: &SampleParams| choose_one(isa, row, params);
        assert_eq!(choose(&[nan, 1.0, nan, 90.0, -inf], &params), 3);
        assert_eq!(choose(&[0.0, inf, 3.0], &params), 1);
        for row in [[nan; 4], [-inf; 4]] {
            assert!(choose(&row, &params) < 3);
            let allowed = SampleParams {
                allowed: vec![2],
                ..params.clone()
            };
            assert_eq!(choose(&row, &allowed), 2);
        }
        let none = SampleParams {
            banned: vec![0, 1, 2, 3],
            ..params.clone()
        };
        assert_eq!(choose(&[1.0; 4], &none), 0);
        // Tokens that do not exist are passed over, whatever they were meant for.
        let absent = SampleParams {
            logit_bias: vec![(9, 1.0)],
            banned: vec![9],
            allowed: vec![9, 2],
            prompt: vec![9],
            generated: vec![9],
            repetition_penalty: 2.0,
            ..params.clone()
        };
        assert_eq!(choose(&[1.0; 4], &absent), 2);
        for extreme in [inf, -inf, nan, 0.0] {
            let params = SampleParams {
                logit_bias: vec![(0, extreme)],
                repetition_penalty: extreme,
                frequency_penalty: extreme,
                top_p: extreme,
                min_p: extreme,
                prompt: vec![1],
                generated: vec![1, 2],
                ..params.clone()
            };
            assert!(choose(&[1.0, -2.0, inf, nan], &params) < 4);
        }
    }
    for row in [[nan; 4], [-inf; 4]] {
        let Score { logprob, rank, top } = score::score(isa, &row, (2, 1), &mut Scratch::default());
        assert!((logprob + 4_f32.ln()).abs() < 1e-6);
        assert_eq!((rank, top[0].0), (3, 0));
    }
    let impossible = score::score(isa, &[0.0, -inf], (1, 0), &mut Scratch::default());
    assert_eq!((impossible.logprob, impossible.rank), (-inf, 2));
}

#[test]
fn requests_that_name_what_is_not_there_are_refused() {
    for cpu in backends() {
        let mut logits = tensor(&cpu, &[0.0; 8], 4);
        let score = |row, token| SampleRequest {
            row,
            choice: Choice::Score(token),
            logprobs: None,
        };
        assert!(cpu.sample(&mut logits, 4, &[score(1, 3)]).is_ok());
        assert!(cpu.sample(&mut logits, 4, &[score(2, 0)]).is_err());
        assert!(cpu.sample(&mut logits, 3, &[score(1, 3)]).is_err());
        assert!(cpu.sample(&mut logits, 5, &[score(0, 0)]).is_err());
        assert!(cpu.sample(&mut logits, 0, &[]).is_err());
    }
}
