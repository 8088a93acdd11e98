//! Steps on one rank, in their order: the one that runs, and the one that is queued behind it.
//!
//! A step begins, which checks its plan and queues everything that it takes, and ends, which waits for what it sampled. On
//! a backend that defers sampling the next one may begin in between: the device then goes from one to the other,
//! and the tokens that the second takes from the first never leave it. A step that cannot be queued so (its logits
//! come in pieces, or its requests take more memory than there is) begins when the one before it has ended. On any
//! other backend a step is computed when it begins. What a step needs of the one before is a token for its input and
//! for penalties; random numbers depend on positions alone, and grammars and stops are the coordinator's.
//!
//! Invariant: before its first collective a step has passed every check that could fail on one rank
//! and not on another: epoch, number, digest, limits. After one that came to no end there is none.

use crate::clock;
use crate::comm::{Comm, CommTimings};
use crate::engine::{Engine, StepError};
use crate::run::{Answers, Run};
use crate::sampler::{self, Sampled};
use kernels::backend::{Backend, DeviceError};
use kernels::sampling::{Last, SampleResult};
use std::collections::VecDeque;
use std::time::Instant;
use topology::ids::{Epoch, Rank, Step};
use topology::wire::{PlanDigest, Ran, StepPlan, StepTimings, digest_of_tokens};

/// Steps that are queued at most: what sampling keeps of them on the device takes turns in two places.
const MOST_UNDER_WAY: usize = 2;

/// A communicator, and the steps of its epoch. `P`: what the backend waits for.
#[derive(Debug)]
pub(crate) struct Group<P, C> {
    pub(crate) epoch: Epoch,
    next: Step,
    comm: C,
    /// What the last step samples; `None` after one that came to no end, and then nor will those behind it.
    sampled: Option<Sampled>,
    /// The oldest first.
    under_way: VecDeque<UnderWay<P>>,
    /// When the last step ended.
    ended: Option<Instant>,
}

/// A step that has begun.
#[derive(Debug)]
struct UnderWay<P> {
    plan: Box<StepPlan>,
    digest: PlanDigest,
    begun: Instant,
    /// Spent sampling when it was queued.
    sample_us: u64,
    answers: Answers<P>,
}

impl<P, C> Group<P, C> {
    /// Before its first step.
    pub(crate) fn new(epoch: Epoch, comm: C) -> Self {
        Self {
            epoch,
            next: Step(0),
            comm,
            sampled: Some(Sampled::new()),
            under_way: VecDeque::with_capacity(MOST_UNDER_WAY),
            ended: None,
        }
    }

    /// Nothing comes of the steps under way, nor of any later one.
    fn give_up(&mut self) {
        self.under_way.clear();
        self.sampled = None;
    }

    /// Where the time of a step went that ends now.
    fn timings(&mut self, step: &UnderWay<P>, spent: (u64, u64, CommTimings)) -> StepTimings {
        let (sample_us, device_us, collective) = spent;
        let now = clock::now();
        let since = self.ended.map_or(step.begun, |ended| ended.max(step.begun));
        let idle_us = self.ended.map_or(0, |ended| clock::micros(ended, since));
        self.ended = Some(now);
        let step_us = clock::micros(since, now);
        StepTimings {
            step_us,
            idle_us,
            // Where a measured step stands for this one, it may have been the longer of the two.
            collective_us: collective.total_us.min(step_us),
            wait_us: collective.wait_us,
            sample_us,
            outside_us: step_us.saturating_sub(device_us),
        }
    }
}

impl<B: Backend, C: Comm<B>> Engine<B, C> {
    /// Begins a step. Gives the plan back, and has done nothing, where the step under way has to end first.
    ///
    /// # Errors
    /// [`StepError`]. After one of a collective or the device the epoch is over for this rank.
    pub fn begin(&mut self, plan: Box<StepPlan>) -> Result<Option<Box<StepPlan>>, StepError> {
        let begun = clock::now();
        let group = admit(&mut self.group, &plan)?;
        let pool = self.pool.as_mut().ok_or(StepError::NoBlocks)?;
        let digest = plan.digest();
        let before = group.sampled.take().unwrap_or_default();
        let last = sampler::last_tokens(&plan, &before)?;
        let host = pool.batcher.build(&plan)?;
        host.set_last_tokens(&last);
        let reports = self.partition.rank == Rank(0);
        let samples = reports || self.keeps_tokens;
        let requests = match (samples, reports) {
            (false, _) => Vec::new(),
            (true, true) => sampler::requests(&plan, &last),
            (true, false) => sampler::choices(sampler::requests(&plan, &last)),
        };
        let is_whole = host.logit_tokens.len() <= self.decoder.logit_rows();
        let may_begin = match group.under_way.len() {
            0 => true,
            MOST_UNDER_WAY.. => false,
            _ => is_whole && self.backend.defers(&requests),
        };
        if !may_begin {
            group.sampled = Some(before);
            return Ok(Some(plan));
        }
        group.next = plan.step.next();
        group.comm.begin_step(digest);
        let mut run = Run {
            backend: &self.backend,
            comm: &mut group.comm,
            decoder: &mut self.decoder,
            batch: &mut self.batch,
            vocab: samples.then_some(self.limits.vocab_size),
            spare: pool.spare,
            max_rows: self.limits.max_rows,
            sample_us: 0,
        };
        let computed = run.compute(host, &mut pool.cache, requests);
        let sample_us = run.sample_us;
        let answers = computed.inspect_err(|_| group.give_up())?;
        group.sampled = Some(if samples {
            sampler::places(&plan, reports)
        } else {
            vec![None; plan.rows.len()]
        });
        group.under_way.push_back(UnderWay {
            plan,
            digest,
            begun,
            sample_us,
            answers,
        });
        Ok(None)
    }

    /// Whether a step has begun and not ended.
    pub fn is_under_way(&self) -> bool {
        let group = self.group.as_ref();
        group.is_some_and(|group| !group.under_way.is_empty())
    }

    /// Whether a step is under way and waits for its device, so that another may begin.
    pub fn takes_another(&self) -> bool {
        let group = self.group.as_ref();
        let under_way = group.map(|group| &group.under_way);
        under_way.is_some_and(|steps| {
            let waits = |step: &UnderWay<_>| step.answers.pending.is_some();
            steps.len() < MOST_UNDER_WAY && steps.front().is_some_and(waits)
        })
    }

    /// Waits for the oldest step, but only until `is_called`, which is asked first. What goes wrong [`Self::end`] says.
    pub fn wait(&self, is_called: &mut dyn FnMut() -> bool) {
        let oldest = self
            .group
            .as_ref()
            .and_then(|group| group.under_way.front());
        if let Some(pending) = oldest.and_then(|step| step.answers.pending.as_ref()) {
            let _ = self.backend.wait(pending, is_called);
        }
    }

    /// Ends the oldest step.
    ///
    /// # Errors
    /// [`StepError`]; the epoch is over for this rank.
    ///
    /// # Panics
    /// If none is under way.
    pub fn end(&mut self) -> Result<Ran, StepError> {
        let group = self.group.as_mut();
        let group = group.expect("steps are under way in a group");
        let mut step = (group.under_way.pop_front()).expect("a step is under way");
        let results = finish(&self.backend, &mut step.answers).inspect_err(|_| group.give_up())?;
        let reports = self.partition.rank == Rank(0);
        let samples = reports || self.keeps_tokens;
        let (outputs, sampled) = sampler::answers(&step.plan, results, reports);
        let chosen = samples.then(|| digest_of_tokens(sampled.iter().copied().flatten()));
        if group.under_way.is_empty() && group.sampled.is_some() {
            let known = |token: Option<u32>| token.map(Last::Token);
            group.sampled = Some(sampled.into_iter().map(known).collect());
        }
        let collective = group.comm.take_timings();
        let device = self.backend.device_time();
        let sample_us = device.map_or(step.sample_us, |device| device.sample_us);
        // Where the device does not say, it had all of the time.
        let device_us = device.map_or(u64::MAX, |device| device.total_us);
        let timings = group.timings(&step, (sample_us, device_us, collective));
        Ok(Ran {
            epoch: step.plan.epoch,
            step: step.plan.step,
            digest: step.digest,
            outputs,
            chosen,
            timings,
        })
    }

    /// Computes one step, with none before it under way.
    ///
    /// # Errors
    /// As [`Self::begin`].
    ///
    /// # Panics
    /// If there is one.
    pub fn step(&mut self, plan: &StepPlan) -> Result<Ran, StepError> {
        assert!(!self.is_under_way(), "one after the other");
        self.begin(Box::new(plan.clone()))?;
        self.end()
    }

    /// The number of the oldest step under way.
    pub(crate) fn oldest(&self) -> Option<(Epoch, Step)> {
        let group = self.group.as_ref()?;
        let step = group.under_way.front()?;
        Some((step.plan.epoch, step.plan.step))
    }
}

/// What a step sampled, when it is done.
fn finish<B: Backend>(
    backend: &B,
    answers: &mut Answers<B::Pending>,
) -> Result<Vec<SampleResult>, DeviceError> {
    match answers.pending.take() {
        Some(pending) => backend.finish(pending),
        None => Ok(std::mem::take(&mut answers.results)),
    }
}

/// The group in which `plan` is the next step.
fn admit<'a, P, C>(
    group: &'a mut Option<Group<P, C>>,
    plan: &StepPlan,
) -> Result<&'a mut Group<P, C>, StepError> {
    let current = group.as_ref().map(|group| group.epoch);
    let is_plans = |group: &&mut Group<P, C>| group.epoch == plan.epoch && group.sampled.is_some();
    let group = group.as_mut().filter(is_plans).ok_or(StepError::Stale {
        plan: plan.epoch,
        current,
    })?;
    if group.next != plan.step {
        return Err(StepError::Order {
            found: plan.step,
            expected: group.next,
        });
    }
    Ok(group)
}
