//! Decisions that have to be seen in one plain case each; everything else is in
//! `tests/scheduler_model`.

use super::request::{EventKind, FinishReason, Request, SamplingParams, SequenceId};
use super::{Scheduler, SchedulerConfig};
use topology::wire::{RowOutput, ScoredToken, StepPlan, TokenScore};

fn config() -> SchedulerConfig {
    SchedulerConfig {
        num_blocks: 64,
        block_size: 4,
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_model_len: 256,
        vocab_size: 1000,
        max_num_queued_reqs: usize::MAX,
        max_num_queued_tokens: usize::MAX,
        long_prefill_token_threshold: 0,
        max_mixed_prefill_tokens: 0,
        enable_prefix_caching: true,
        async_scheduling: true,
    }
}

/// A request whose prompt begins with its first token, so that others share it only on purpose.
fn request(id: u64, first: u32, prompt: u32, max_tokens: u32) -> Request {
    Request {
        id: SequenceId(id),
        prompt: (first..first + prompt).collect(),
        sampling: SamplingParams::default(),
        max_tokens,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        priority: 0,
        cache_salt: 0,
        prompt_logprobs: None,
    }
}

/// Answers a plan with token 999 wherever one is asked for.
fn answer(plan: &StepPlan) -> Vec<RowOutput> {
    let rows = plan.rows.iter();
    rows.map(|row| RowOutput {
        sampled: row.sampling.as_ref().map(|_| ScoredToken {
            token: 999,
            score: None,
        }),
        targets: vec![TokenScore::default(); row.targets.len()],
    })
    .collect()
}

/// Plans and computes one step; tokens per row.
fn step(scheduler: &mut Scheduler) -> Vec<usize> {
    let plan = scheduler.schedule().unwrap();
    scheduler.apply(&answer(&plan)).unwrap();
    scheduler.check().unwrap();
    plan.rows.iter().map(|row| row.tokens.len()).collect()
}

fn run_to_end(scheduler: &mut Scheduler) {
    while scheduler.has_work() {
        step(scheduler);
    }
}

#[test]
fn a_long_prompt_does_not_stop_those_that_generate() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_num_batched_tokens: 16,
        ..config()
    })
    .unwrap();
    scheduler
        .add(vec![request(0, 0, 4, 50), request(1, 100, 4, 50)])
        .unwrap();
    assert_eq!(step(&mut scheduler), [4, 4]);
    scheduler.add(vec![request(2, 200, 100, 5)]).unwrap();
    for _ in 0..7 {
        assert_eq!(step(&mut scheduler), [1, 1, 14]);
    }
    assert_eq!(step(&mut scheduler), [1, 1, 2]);
    let counters = scheduler.stats().counters;
    let computed = (counters.prefill_tokens, counters.decode_tokens);
    assert_eq!(computed, (4 + 4 + 100, 2 * 8));
}

#[test]
fn prompts_are_computed_in_small_pieces_while_others_generate() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_mixed_prefill_tokens: 8,
        ..config()
    })
    .unwrap();
    // Nobody generates: the whole budget is theirs.
    scheduler
        .add(vec![request(0, 0, 30, 12), request(1, 100, 34, 12)])
        .unwrap();
    assert_eq!(step(&mut scheduler), [30, 34]);
    scheduler
        .add(vec![request(2, 200, 20, 2), request(3, 300, 20, 2)])
        .unwrap();
    assert_eq!(step(&mut scheduler), [1, 1, 8]);
    assert_eq!(step(&mut scheduler), [1, 1, 8]);
    assert_eq!(
        step(&mut scheduler),
        [1, 1, 4, 4],
        "what is left is the next one's"
    );
    assert_eq!(step(&mut scheduler), [1, 1, 1, 8]);
    for id in [0, 1] {
        scheduler.cancel(SequenceId(id));
    }
    scheduler.add(vec![request(4, 400, 50, 1)]).unwrap();
    assert_eq!(step(&mut scheduler), [8, 50], "nobody generates any more");
}

#[test]
fn who_runs_progresses_beside_others_that_generate() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_mixed_prefill_tokens: 1,
        long_prefill_token_threshold: 4,
        ..config()
    })
    .unwrap();
    // The threshold lets several begin at once, and the first of them generates before the others do.
    let prompts = [(0, 4), (1, 7), (2, 8)];
    let requests = prompts.map(|(id, len)| request(u64::from(id), 100 * id, len, 9));
    scheduler.add(requests.to_vec()).unwrap();
    assert_eq!(step(&mut scheduler), [4, 4, 4]);
    assert_eq!(step(&mut scheduler), [1, 1, 1]);
    assert_eq!(step(&mut scheduler), [1, 1, 1]);
}

/// A prompt of 1,000 tokens beside one stream would take 125 steps of 8 tokens.
#[test]
fn a_large_backlog_is_not_computed_in_small_pieces() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 512,
        max_model_len: 2048,
        max_num_batched_tokens: 512,
        max_mixed_prefill_tokens: 8,
        vocab_size: 4096,
        ..config()
    })
    .unwrap();
    scheduler.add(vec![request(0, 0, 1, 100)]).unwrap();
    step(&mut scheduler);
    scheduler.add(vec![request(1, 100, 1000, 1)]).unwrap();
    let mut pieces = Vec::new();
    while scheduler.stats().running + scheduler.stats().waiting > 1 {
        pieces.push(step(&mut scheduler)[1]);
    }
    assert_eq!(pieces[..3], [125, 110, 96]);
    assert!(pieces.is_sorted_by(|a, b| a >= b), "{pieces:?}");
    assert_eq!(pieces.iter().sum::<usize>(), 1000);
    assert!((25..=30).contains(&pieces.len()), "{pieces:?}");
}

/// What the cache has is no work, and no reason for a long step.
#[test]
fn cached_tokens_are_not_a_backlog() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 1024,
        max_model_len: 2048,
        max_num_batched_tokens: 1024,
        max_mixed_prefill_tokens: 8,
        vocab_size: 4096,
        ..config()
    })
    .unwrap();
    // The first one's prompt is computed and ends; another stream runs.
    scheduler.add(vec![request(0, 100, 1000, 1)]).unwrap();
    step(&mut scheduler);
    scheduler.add(vec![request(1, 2000, 1, 100)]).unwrap();
    step(&mut scheduler);
    // The same prompt, and 40 tokens more.
    scheduler.add(vec![request(2, 100, 1040, 1)]).unwrap();
    let pieces: Vec<_> = (0..4).map(|_| step(&mut scheduler)[1]).collect();
    assert_eq!(pieces, [8; 4]);
}

#[test]
fn choices_over_one_prompt_compute_it_once() {
    let mut scheduler = Scheduler::new(config()).unwrap();
    let choices = (0..4).map(|id| request(id, 0, 101, 3)).collect();
    scheduler.add(choices).unwrap();
    // 101 tokens are 25 full blocks and one token, in steps of 64.
    assert_eq!(step(&mut scheduler), [64]);
    assert_eq!(step(&mut scheduler), [37]);
    assert_eq!(step(&mut scheduler), [1, 1, 1, 1]);
    let counters = scheduler.stats().counters;
    assert_eq!(counters.prefix_cache_hits, 3 * 100);
    assert_eq!(scheduler.stats().blocks_used, 25 + 4);
}

#[test]
fn a_salt_hides_what_others_computed() {
    let mut scheduler = Scheduler::new(config()).unwrap();
    for (id, salt, expected) in [(0, 1, 0), (1, 2, 0), (2, 1, 12), (3, 2, 12)] {
        let mut request = request(id, 0, 16, 1);
        request.cache_salt = salt;
        scheduler.add(vec![request]).unwrap();
        run_to_end(&mut scheduler);
        let started = &scheduler.take_events()[0].kind;
        let cached_tokens = expected;
        assert_eq!(*started, EventKind::Started { cached_tokens });
    }
}

#[test]
fn blocks_are_taken_from_the_lowest_class_and_the_latest() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 12,
        ..config()
    })
    .unwrap();
    for (id, priority) in [(0, 1), (1, 0), (2, 1)] {
        let first = 100 * u32::try_from(id).unwrap();
        let mut request = request(id, first, 4, 20);
        request.priority = priority;
        scheduler.add(vec![request]).unwrap();
    }
    let mut order = Vec::new();
    while scheduler.has_work() {
        step(&mut scheduler);
        let events = scheduler.take_events();
        let ended = events
            .iter()
            .filter(|e| matches!(e.kind, EventKind::Finished(_)));
        order.extend(ended.map(|e| e.id.0));
    }
    assert!(scheduler.stats().counters.preemptions > 0);
    assert_eq!(order, [1, 0, 2]);
}

/// S5: twice as many seats as blocks for them must not end in computing the same again and again.
#[test]
fn a_crowded_pool_does_not_thrash() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 40,
        max_num_seqs: 16,
        enable_prefix_caching: false,
        ..config()
    })
    .unwrap();
    for id in 0..100 {
        scheduler.add(vec![request(id, 0, 8, 32)]).unwrap();
    }
    run_to_end(&mut scheduler);
    let counters = scheduler.stats().counters;
    let needed = 100 * 8;
    println!("{counters:?}");
    assert!(counters.preemptions > 0, "the pool is not crowded");
    assert!(
        counters.prefill_tokens < 3 * needed,
        "{} prompt tokens were computed as {}",
        needed,
        counters.prefill_tokens
    );
}

#[test]
fn scoring_a_prompt_ends_without_a_token() {
    let mut scheduler = Scheduler::new(config()).unwrap();
    for (id, prompt) in [(0, 9), (1, 1)] {
        let mut request = request(id, 0, prompt, 0);
        request.prompt_logprobs = Some(0);
        scheduler.add(vec![request]).unwrap();
        run_to_end(&mut scheduler);
        let events = scheduler.take_events();
        assert!(
            matches!(&events[1].kind, EventKind::PromptScores(scores)
                if scores.len() == prompt as usize - 1),
            "{events:?}"
        );
        assert_eq!(events.len(), 3, "{events:?}");
    }
}

/// A request that ends every step it takes part in, among others that do not.
#[test]
fn only_the_sequence_that_kills_the_shards_is_given_up() {
    for poisoned in 0..5_u32 {
        let mut scheduler = Scheduler::new(config()).unwrap();
        let requests = (0..5_u32)
            .map(|id| request(id.into(), 100 * id, 20, 4))
            .collect();
        scheduler.add(requests).unwrap();
        let poison = 100 * poisoned;
        let (mut faults, mut ended) = (0, Vec::new());
        while scheduler.has_work() {
            let plan = scheduler.schedule().unwrap();
            let kills = |row: &topology::wire::PlanRow| row.tokens.contains(&poison);
            if plan.rows.iter().any(kills) {
                faults += 1;
                scheduler.reset(plan.epoch.next());
            } else {
                scheduler.apply(&answer(&plan)).unwrap();
            }
            scheduler.check().unwrap();
            let events = scheduler.take_events().into_iter();
            ended.extend(events.filter_map(|event| match event.kind {
                EventKind::Finished(reason) => Some((event.id, reason)),
                _ => None,
            }));
        }
        assert_eq!(faults, 6);
        assert_eq!(ended.len(), 5);
        for (id, reason) in ended {
            let expected = if id == SequenceId(poisoned.into()) {
                FinishReason::Error
            } else {
                FinishReason::Length
            };
            assert_eq!(reason, expected, "{id:?} of {poisoned}");
        }
        assert_eq!(scheduler.stats().blocks_used, 0);
    }
}

/// Whoever got a token in between is beyond suspicion, however many faults there are.
#[test]
fn faults_from_outside_give_no_one_up() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        max_num_batched_tokens: 1024,
        ..config()
    })
    .unwrap();
    scheduler
        .add(
            (0..4_u32)
                .map(|id| request(id.into(), 100 * id, 8, 40))
                .collect(),
        )
        .unwrap();
    let mut tokens = 0;
    for _ in 0..40 {
        step(&mut scheduler);
        let plan = scheduler.schedule();
        let events = scheduler.take_events();
        tokens += events
            .iter()
            .filter(|e| matches!(e.kind, EventKind::Token { .. }))
            .count();
        assert!(
            !events
                .iter()
                .any(|e| e.kind == EventKind::Finished(FinishReason::Error))
        );
        if let Some(plan) = plan {
            assert_eq!(plan.rows.len(), 4, "no one runs alone");
            scheduler.reset(plan.epoch.next());
        }
    }
    assert_eq!(tokens, 4 * 40);
    assert!(!scheduler.has_work());
}
