//! What the scheduler and the wire take of a step: planning, encoding, taking answers in.
//!
//!     cargo run --release -p coordinator --example scheduler_speed
//!
//! Sequences of 1,000 tokens decode, one token each in every step, while others wait for a place. Prints medians and
//! 99th percentiles in microseconds. The bounds that the project sets itself: 256 sequences planned in 50 µs, 4,096 in
//! 1,000 µs, and 10,000 that wait change neither.

#![expect(clippy::print_stdout, reason = "an example prints")]

use coordinator::clock::{now, since};
use coordinator::scheduler::request::{Request, SamplingParams, SequenceId};
use coordinator::scheduler::{Scheduler, SchedulerConfig};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use topology::link::Frame;
use topology::wire::{RowOutput, ScoredToken, StepPlan};

const PROMPT: usize = 1_000;
const STEPS: usize = 400;

fn main() {
    println!("sequences  queued  plan p50    p99  encode p50    p99  apply p50    p99  plan bytes");
    for sequences in [1, 64, 256, 1024, 4096] {
        for queued in [0, 10_000] {
            measure(sequences, queued);
        }
    }
}

fn config(sequences: u32) -> SchedulerConfig {
    SchedulerConfig {
        num_blocks: sequences * 512,
        block_size: 16,
        max_num_seqs: sequences,
        max_num_batched_tokens: 8192.max(sequences),
        max_model_len: 8192,
        vocab_size: 100_000,
        max_num_queued_reqs: usize::MAX,
        max_num_queued_tokens: usize::MAX,
        long_prefill_token_threshold: 0,
        max_mixed_prefill_tokens: 0,
        enable_prefix_caching: true,
        async_scheduling: true,
    }
}

fn request(id: usize) -> Request {
    let id = id as u64;
    let token = |place: usize| u32::try_from(id * 7 + place as u64 * 13).unwrap_or(0) % 100_000;
    Request {
        id: SequenceId(id),
        prompt: (0..PROMPT).map(token).collect(),
        sampling: SamplingParams {
            seed: id,
            ..SamplingParams::default()
        },
        max_tokens: 6_000,
        min_tokens: 0,
        stop_token_ids: vec![2],
        priority: 0,
        cache_salt: 0,
        prompt_logprobs: None,
    }
}

/// What each row of a plan would give.
fn answers(plan: &StepPlan) -> Vec<RowOutput> {
    let answer = |row: &topology::wire::PlanRow| RowOutput {
        sampled: row.sampling.as_ref().map(|_| ScoredToken {
            token: 17,
            score: None,
        }),
        targets: Vec::new(),
    };
    plan.rows.iter().map(answer).collect()
}

fn timed<T>(times: &mut Vec<Duration>, work: impl FnOnce() -> T) -> T {
    let begun: Instant = now();
    let result = work();
    times.push(since(begun));
    result
}

fn measure(sequences: u32, queued: usize) {
    let mut scheduler = Scheduler::new(config(sequences)).expect("a valid configuration");
    let requests = (0..sequences as usize + queued).map(request).collect();
    scheduler.add(requests).expect("there is no limit");
    let (mut plans, mut encodes, mut applies) = (Vec::new(), Vec::new(), Vec::new());
    let mut under_way = VecDeque::new();
    let (mut measured, mut bytes) = (0, 0);
    while measured < STEPS {
        // As the step loop does it: the next is planned before the last is answered.
        if let Some(plan) = timed(&mut plans, || scheduler.schedule()) {
            under_way.push_back(answers(&plan));
            let decodes = plan.num_tokens() == sequences as usize;
            let frame = timed(&mut encodes, || Frame::run(plan)).expect("it fits a frame");
            bytes = frame.0.body().len();
            if decodes {
                measured += 1;
            } else {
                plans.clear();
                encodes.clear();
                applies.clear();
            }
        } else {
            plans.pop();
            let outputs = under_way.pop_front().expect("a step is under way");
            timed(&mut applies, || scheduler.apply(&outputs)).expect("the answers fit");
            scheduler.take_events();
        }
    }
    let [plan, encode, apply] = [plans, encodes, applies].map(|mut times| {
        times.sort_unstable();
        let micros = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1e6;
        (micros(50), micros(99))
    });
    println!(
        "{sequences:9}  {queued:6}  {:8.1} {:6.1}  {:10.1} {:6.1}  {:9.1} {:6.1}  {bytes:10}",
        plan.0, plan.1, encode.0, encode.1, apply.0, apply.1
    );
}
