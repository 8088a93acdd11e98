//! What a plan wants to know about its logits, as requests to the kernel, and the answers as the
//! rows' outputs. Pure; the arithmetic is the kernel's.
//!
//! Invariant: requests stand in the order of the logits' rows, so that logits can be computed and
//! dropped piece by piece.

use crate::batch::wanted_tokens;
use kernels::sampling::{Choice, SampleParams, SampleRequest, SampleResult, Score};
use topology::wire::{PlanRow, RowOutput, Sampling, ScoredToken, StepPlan, TokenScore};

/// All requests of a plan. [`SampleRequest::row`] counts the plan's wanted tokens (the batch's
/// `logit_tokens`) from 0.
pub fn requests(plan: &StepPlan) -> Vec<SampleRequest> {
    let mut requests = Vec::new();
    let mut base = 0;
    for row in &plan.rows {
        let targets = row
            .targets
            .iter()
            .enumerate()
            .map(|(i, token)| SampleRequest {
                row: base + i,
                choice: Choice::Score(*token),
                logprobs: Some(row.target_alternatives as usize),
            });
        requests.extend(targets);
        let wanted = wanted_tokens(row).count();
        if let Some(sampling) = &row.sampling {
            requests.push(SampleRequest {
                row: base + wanted - 1,
                choice: Choice::Sample(Box::new(params(sampling))),
                logprobs: sampling.logprobs.map(|n| n as usize),
            });
        }
        base += wanted;
    }
    requests
}

/// The answers to [`requests`], in the same order, row by row.
pub fn outputs(plan: &StepPlan, results: Vec<SampleResult>) -> Vec<RowOutput> {
    let mut results = results.into_iter();
    let mut output = |row: &PlanRow| {
        let targets = results.by_ref().take(row.targets.len());
        let targets = targets
            .map(|r| token_score(r.score.unwrap_or_default()))
            .collect();
        let sampled = row.sampling.as_ref().and_then(|_| results.next());
        let sampled = sampled.map(|result| ScoredToken {
            token: result.token,
            score: result.score.map(token_score),
        });
        RowOutput { sampled, targets }
    };
    plan.rows.iter().map(&mut output).collect()
}

fn params(sampling: &Sampling) -> SampleParams {
    SampleParams {
        temperature: sampling.temperature,
        top_k: sampling.top_k as usize,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        repetition_penalty: sampling.repetition_penalty,
        seed: sampling.seed,
        position: sampling.position,
        logit_bias: sampling
            .logit_bias
            .iter()
            .map(|b| (b.token, b.bias))
            .collect(),
        banned: sampling.banned.clone(),
        allowed: sampling.allowed.clone(),
        prompt: sampling.prompt.clone(),
        generated: sampling.generated.clone(),
    }
}

fn token_score(score: Score) -> TokenScore {
    TokenScore {
        logprob: score.logprob,
        rank: score.rank,
        top: score.top,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(tokens: usize, targets: &[u32], sampled: Option<Sampling>) -> PlanRow {
        PlanRow {
            tokens: vec![9; tokens],
            targets: targets.to_vec(),
            target_alternatives: 3,
            sampling: sampled.map(Box::new),
            ..PlanRow::default()
        }
    }

    fn sample(logprobs: Option<u32>) -> Sampling {
        Sampling {
            logprobs,
            ..Sampling::default()
        }
    }

    #[test]
    fn rows_get_their_own_answers_in_order() {
        let plan = StepPlan {
            rows: vec![
                row(3, &[], Some(sample(None))),
                row(2, &[5, 6], Some(sample(Some(1)))),
                row(4, &[], None),
                row(4, &[7], Some(sample(Some(0)))),
                row(1, &[8], None),
            ],
            ..StepPlan::default()
        };
        let requests = requests(&plan);
        // One logits row for the first; two for the second, whose last target and sample share one;
        // none for the third; two apart for the fourth; one for the last.
        let rows: Vec<_> = requests.iter().map(|r| r.row).collect();
        assert_eq!(rows, [0, 1, 2, 2, 3, 4, 5]);
        let answer = |request: &SampleRequest| SampleResult {
            token: match &request.choice {
                Choice::Score(token) => *token,
                Choice::Sample(_) => 100 + u32::try_from(request.row).unwrap(),
            },
            score: request.logprobs.map(|n| Score {
                logprob: -1.0 - request.row as f32,
                rank: 1,
                top: vec![(0, -0.5); n],
            }),
        };
        let outputs = outputs(&plan, requests.iter().map(answer).collect());
        let sampled: Vec<_> = outputs
            .iter()
            .map(|o| o.sampled.as_ref().map(|s| s.token))
            .collect();
        assert_eq!(sampled, [Some(100), Some(102), None, Some(104), None]);
        let scores = |o: &RowOutput| o.targets.iter().map(|t| t.logprob).collect::<Vec<_>>();
        let targets: Vec<_> = outputs.iter().map(scores).collect();
        assert_eq!(
            targets,
            [vec![], vec![-2.0, -3.0], vec![], vec![-4.0], vec![-6.0]]
        );
        assert!(outputs[1].targets.iter().all(|t| t.top.len() == 3));
        assert!(outputs[0].sampled.as_ref().unwrap().score.is_none());
        assert_eq!(
            outputs[1]
                .sampled
                .as_ref()
                .unwrap()
                .score
                .as_ref()
                .unwrap()
                .top
                .len(),
            1
        );
        assert_eq!(
            outputs[3]
                .sampled
                .as_ref()
                .unwrap()
                .score
                .as_ref()
                .unwrap()
                .top
                .len(),
            0
        );
    }

    #[test]
    fn every_parameter_reaches_the_kernel() {
        let sampling = Sampling {
            temperature: 0.5,
            top_k: 4,
            top_p: 0.75,
            min_p: 0.125,
            presence_penalty: 1.5,
            frequency_penalty: 2.5,
            repetition_penalty: 3.5,
            seed: 77,
            position: 12,
            logit_bias: vec![topology::wire::LogitBias {
                token: 3,
                bias: -1.0,
            }],
            banned: vec![4],
            allowed: vec![5, 6],
            prompt: vec![7],
            generated: vec![8, 8],
            logprobs: None,
        };
        let expected = SampleParams {
            temperature: 0.5,
            top_k: 4,
            top_p: 0.75,
            min_p: 0.125,
            presence_penalty: 1.5,
            frequency_penalty: 2.5,
            repetition_penalty: 3.5,
            seed: 77,
            position: 12,
            logit_bias: vec![(3, -1.0)],
            banned: vec![4],
            allowed: vec![5, 6],
            prompt: vec![7],
            generated: vec![8, 8],
        };
        assert_eq!(params(&sampling), expected);
    }
}
