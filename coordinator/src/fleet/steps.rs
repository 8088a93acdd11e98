//! Plans out, answers in.
//!
//! Two steps may be under way. Ranks compute them in order, but their answers come over links of their
//! own: one rank's answer to the second may be here before another's to the first, and is kept.
//! Invariant: of every rank, as many answers are believed as plans were sent, in their order.

use super::fault::{Cause, Fault, Phase};
use super::host::Host;
use super::inbox::unexpected;
use super::{Fleet, StepOutcome};
use crate::clock::now;
use std::collections::VecDeque;
use std::time::Instant;
use tokio::time::timeout_at;
use topology::ids::{Epoch, Rank, Step};
use topology::link::Frame;
use topology::wire::{FromShard, PlanDigest, Ran, StepPlan, digest_of_tokens};

/// The steps under way.
#[derive(Debug, Default)]
pub(super) struct Steps {
    sent: VecDeque<Sent>,
    /// By rank, to the oldest steps under way.
    answers: Vec<VecDeque<Ran>>,
    /// When the oldest has to be answered, once that is waited for.
    deadline: Option<tokio::time::Instant>,
    /// When the last step before these was answered.
    answered: Option<Instant>,
}

/// A plan that was sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) epoch: Epoch,
    pub(super) step: Step,
    pub(super) digest: PlanDigest,
    tokens: usize,
    at: Instant,
}

impl Steps {
    /// All are forgotten.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

impl<H: Host> Fleet<H> {
    /// See [`super::Group::send`].
    pub(super) async fn send_plan(&mut self, plan: StepPlan) -> Result<(), Fault> {
        let at = now();
        if plan.epoch != self.epoch {
            let (planned, current) = (plan.epoch, self.epoch);
            let why = format!("a plan of epoch {planned} in epoch {current}");
            return Err(coordinator(why));
        }
        let (epoch, step) = (plan.epoch, plan.step);
        let tokens = plan.num_tokens();
        let (frame, digest) = Frame::run(plan).map_err(|e| coordinator(e.to_string()))?;
        self.send_frame(&frame).await?;
        self.steps.sent.push_back(Sent {
            epoch,
            step,
            digest,
            tokens,
            at,
        });
        Ok(())
    }

    /// See [`super::Group::receive`].
    pub(super) async fn receive_answers(&mut self) -> Result<StepOutcome, Fault> {
        let none = || coordinator("an answer is awaited, and no plan was sent".into());
        let oldest = *self.steps.sent.front().ok_or_else(none)?;
        self.hear_answers(oldest.tokens).await?;
        self.steps.sent.pop_front();
        self.steps.deadline = None;
        let answers = self.steps.answers.iter_mut();
        let answers: Vec<Ran> = answers.filter_map(VecDeque::pop_front).collect();
        let answered = now();
        check_agreement(&oldest, &answers)?;
        let begun = self.steps.answered.replace(answered);
        let took = answered.duration_since(begun.map_or(oldest.at, |begun| begun.max(oldest.at)));
        self.pace.record(oldest.tokens, took);
        let timings = answers.iter().map(|ran| ran.timings).collect();
        let outputs = answers.into_iter().next().map(|ran| ran.outputs);
        Ok(StepOutcome {
            outputs: outputs.unwrap_or_default(),
            timings,
            tokens: oldest.tokens,
            took,
            answered,
        })
    }

    /// Waits until every rank has answered the oldest step, of `tokens` tokens. Cancel-safe.
    async fn hear_answers(&mut self, tokens: usize) -> Result<(), Fault> {
        let (phase, limit) = (Phase::Step, self.pace.limit(tokens, self.setup.limits.step));
        let Steps {
            sent,
            answers,
            deadline,
            ..
        } = &mut self.steps;
        // Who is cut off while waiting waits no longer for that.
        let deadline = *deadline.get_or_insert_with(|| tokio::time::Instant::now() + limit);
        answers.resize_with(self.members.len(), VecDeque::new);
        while let Some(silent) = answers.iter().position(VecDeque::is_empty) {
            let next = timeout_at(deadline, self.inbox.next()).await;
            let Ok(next) = next else {
                let silent = Rank(u32::try_from(silent).unwrap_or(u32::MAX));
                return Err(Fault::of(silent, Cause::Deadline { phase, limit }));
            };
            let (rank, message) = next?;
            match message {
                FromShard::Ran(ran) if answers[rank.index()].len() < sent.len() => {
                    answers[rank.index()].push_back(*ran);
                }
                other => return Err(unexpected(rank, phase, &other)),
            }
        }
        Ok(())
    }
}

fn coordinator(why: String) -> Fault {
    Fault::group(Cause::Coordinator(why))
}

/// All ranks computed what was sent, and only that, and chose the same tokens.
fn check_agreement(sent: &Sent, answers: &[Ran]) -> Result<(), Fault> {
    let outputs = answers.iter().flat_map(|ran| &ran.outputs);
    let sampled = outputs.filter_map(|output| output.sampled.as_ref());
    let chosen = digest_of_tokens(sampled.map(|sampled| sampled.token));
    for (rank, ran) in (0..).map(Rank).zip(answers) {
        if (ran.epoch, ran.step) != (sent.epoch, sent.step) {
            let message = format!("the answer to step {} of epoch {}", ran.step, ran.epoch);
            let phase = Phase::Step;
            return Err(Fault::of(rank, Cause::Unexpected { phase, message }));
        }
        if ran.digest != sent.digest {
            return Err(Fault::of(rank, Cause::Diverged));
        }
        if ran.chosen.is_some_and(|claimed| claimed != chosen) {
            return Err(Fault::of(rank, Cause::ChoseOtherwise));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use topology::wire::StepTimings;

    #[test]
    fn a_rank_that_computed_something_else_is_named() {
        let sent = Sent {
            epoch: Epoch(3),
            step: Step(7),
            digest: [9; 16],
            tokens: 1,
            at: now(),
        };
        let ran = || Ran {
            epoch: sent.epoch,
            step: sent.step,
            digest: sent.digest,
            outputs: Vec::new(),
            chosen: Some(digest_of_tokens([])),
            timings: StepTimings::default(),
        };
        let check = |answers: &[Ran]| check_agreement(&sent, answers);
        assert_eq!(check(&[ran(), ran(), ran()]), Ok(()));
        let mut other = ran();
        other.digest[5] ^= 1;
        assert_eq!(
            check(&[ran(), other]),
            Err(Fault::of(Rank(1), Cause::Diverged))
        );
        let mut other = ran();
        other.chosen = Some([2; 16]);
        assert_eq!(
            check(&[ran(), other.clone()]),
            Err(Fault::of(Rank(1), Cause::ChoseOtherwise))
        );
        other.chosen = None;
        assert_eq!(check(&[ran(), other]), Ok(()), "not all have to sample");
        for late in [
            Ran {
                epoch: Epoch(2),
                ..ran()
            },
            Ran {
                step: Step(6),
                ..ran()
            },
        ] {
            let fault = check(&[ran(), ran(), late]).unwrap_err();
            assert_eq!(fault.rank, Some(Rank(2)));
            assert!(
                matches!(
                    fault.cause,
                    Cause::Unexpected {
                        phase: Phase::Step,
                        ..
                    }
                ),
                "{fault}"
            );
        }
    }
}
