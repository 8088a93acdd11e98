//! What a plan wants to know about its logits, as requests to the kernel, and the answers as the
//! rows' outputs and as the tokens that the next plan leaves to this rank. Pure; the arithmetic is the
//! kernel's.
//!
//! Invariant: requests stand in the order of the logits' rows, so that logits can be computed and
//! dropped piece by piece.

use crate::batch::{PlanError, wanted_tokens};
use kernels::sampling::{Choice, Last, SampleParams, SampleRequest, SampleResult, Score};
use topology::wire::{PlanRow, RowOutput, Sampling, ScoredToken, StepPlan, TokenScore};

/// What a step sampled, by row of its plan: the tokens, or where they are until somebody has waited for them.
pub type Sampled = Vec<Option<Last>>;

/// The last tokens of the rows that leave them to the step before, which sampled `before`.
///
/// # Errors
/// [`PlanError`] if a row names one that sampled nothing.
pub fn last_tokens(plan: &StepPlan, before: &Sampled) -> Result<Sampled, PlanError> {
    let last = |(index, row): (usize, &PlanRow)| {
        let Some(from) = row.last_from else {
            return Ok(None);
        };
        let token = before.get(from as usize).copied().flatten();
        let what = || format!("takes a token of row {from} of the step before, which has none");
        let missing = || PlanError::Row {
            row: index,
            what: what(),
        };
        token.ok_or_else(missing).map(Some)
    };
    plan.rows.iter().enumerate().map(last).collect()
}

/// All requests of a plan, of which the step before sampled the `last` tokens. [`SampleRequest::row`]
/// counts the plan's wanted tokens (the batch's `logit_tokens`) from 0.
pub fn requests(plan: &StepPlan, last: &Sampled) -> Vec<SampleRequest> {
    let mut requests = Vec::new();
    let mut base = 0;
    for (row, last) in plan.rows.iter().zip(last) {
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
            let mut params = params(sampling);
            match last.filter(|_| sampling.penalises_generated()) {
                Some(Last::Token(token)) => params.generated.push(token),
                Some(Last::Chosen(request)) => params.last = Some(request),
                None => {}
            }
            requests.push(SampleRequest {
                row: base + wanted - 1,
                choice: Choice::Sample(Box::new(params)),
                logprobs: sampling.logprobs.map(|n| n as usize),
            });
        }
        base += wanted;
    }
    requests
}

/// Those of the requests that choose a token, and nothing but the token: what a rank needs that does
/// not report.
pub fn choices(requests: Vec<SampleRequest>) -> Vec<SampleRequest> {
    let chooses = |request: &SampleRequest| matches!(request.choice, Choice::Sample(_));
    let choices = requests
        .into_iter()
        .filter(chooses)
        .map(|request| SampleRequest {
            logprobs: None,
            ..request
        });
    choices.collect()
}

/// Where the tokens of a plan are while nobody has waited for them: by their places among [`requests`] (if this rank
/// `reports`) or [`choices`].
pub fn places(plan: &StepPlan, reports: bool) -> Sampled {
    let mut next = 0;
    let mut place = |row: &PlanRow| {
        next += if reports { row.targets.len() } else { 0 };
        row.sampling.as_ref()?;
        let request = u32::try_from(next).expect("a step's tokens are few");
        next += 1;
        Some(Last::Chosen(request))
    };
    plan.rows.iter().map(&mut place).collect()
}

/// The tokens that answer [`choices`].
fn chosen(plan: &StepPlan, results: &[SampleResult]) -> Vec<Option<u32>> {
    let mut results = results.iter().map(|result| result.token);
    let rows = plan.rows.iter();
    rows.map(|row| row.sampling.as_ref().and_then(|_| results.next()))
        .collect()
}

/// What a rank reports, and the tokens that it keeps for the next step, from the answers to [`requests`] (if it
/// `reports`), to [`choices`], or to nothing.
pub fn answers(
    plan: &StepPlan,
    results: Vec<SampleResult>,
    reports: bool,
) -> (Vec<RowOutput>, Vec<Option<u32>>) {
    if !reports {
        return (Vec::new(), chosen(plan, &results));
    }
    let outputs = outputs(plan, results);
    let sampled = outputs.iter().map(|output| output.sampled.as_ref());
    let sampled = sampled.map(|sampled| sampled.map(|s| s.token)).collect();
    (outputs, sampled)
}

/// The answers to [`requests`], in the same order, row by row.
fn outputs(plan: &StepPlan, results: Vec<SampleResult>) -> Vec<RowOutput> {
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
        last: None,
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
        let requests = requests(&plan, &vec![None; 5]);
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
        let choices: Vec<_> = choices(requests.clone()).iter().map(answer).collect();
        let chosen = chosen(&plan, &choices);
        assert!(choices.iter().all(|result| result.score.is_none()));
        let outputs = outputs(&plan, requests.iter().map(answer).collect());
        let sampled: Vec<_> = outputs
            .iter()
            .map(|o| o.sampled.as_ref().map(|s| s.token))
            .collect();
        assert_eq!(sampled, [Some(100), Some(102), None, Some(104), None]);
        assert_eq!(
            chosen, sampled,
            "ranks that do not report know the tokens too"
        );
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

    /// On ranks of both kinds.
    #[test]
    fn tokens_that_nobody_waited_for_are_known_by_the_requests_that_choose_them() {
        let plan = StepPlan {
            rows: vec![
                row(2, &[], Some(sample(Some(2)))),
                row(4, &[5, 6], Some(sample(None))),
                row(3, &[7], None),
                row(2, &[8, 9], Some(sample(None))),
                row(1, &[], None),
            ],
            ..StepPlan::default()
        };
        let all = requests(&plan, &vec![None; 5]);
        // The rows of logits after the last token of each row that samples.
        let expected = [Some(0), Some(3), None, Some(6), None];
        for (reports, requests) in [(true, all.clone()), (false, choices(all))] {
            let row_of = |place| match place {
                Last::Chosen(request) => requests[request as usize].row,
                Last::Token(_) => unreachable!("nobody has waited"),
            };
            let places = places(&plan, reports).into_iter();
            let rows: Vec<_> = places.map(|place| place.map(row_of)).collect();
            assert_eq!(rows, expected);
        }
    }

    #[test]
    fn a_token_of_the_step_before_is_a_generated_one() {
        let penalised = Sampling {
            generated: vec![4],
            frequency_penalty: 0.5,
            ..Sampling::default()
        };
        let from = |row: u32, sampling: Sampling| PlanRow {
            last_from: Some(row),
            ..self::row(1, &[], Some(sampling))
        };
        let mut plan = StepPlan {
            rows: vec![
                from(2, penalised),
                row(1, &[], Some(sample(None))),
                from(0, Sampling::default()),
            ],
            ..StepPlan::default()
        };
        let before = vec![Some(Last::Token(70)), None, Some(Last::Token(72))];
        let last = last_tokens(&plan, &before).unwrap();
        assert_eq!(last, [Some(Last::Token(72)), None, Some(Last::Token(70))]);
        let generated = |request: &SampleRequest| match &request.choice {
            Choice::Sample(params) => (params.generated.clone(), params.last),
            Choice::Score(_) => unreachable!("nothing is scored"),
        };
        let found: Vec<_> = requests(&plan, &last).iter().map(generated).collect();
        assert_eq!(found, [(vec![4, 72], None), (vec![], None), (vec![], None)]);
        // The same while the tokens are on the device.
        let before = vec![Some(Last::Chosen(0)), None, Some(Last::Chosen(1))];
        let last = last_tokens(&plan, &before).unwrap();
        let found: Vec<_> = requests(&plan, &last).iter().map(generated).collect();
        assert_eq!(found, [(vec![4], Some(1)), (vec![], None), (vec![], None)]);
        for missing in [1, 3] {
            plan.rows[2].last_from = Some(missing);
            let error = last_tokens(&plan, &before).unwrap_err().to_string();
            assert_eq!(
                error,
                format!(
                    "row 2 of the plan takes a token of row {missing} of the step before, which has none"
                )
            );
        }
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
            last: None,
        };
        assert_eq!(params(&sampling), expected);
    }
}
