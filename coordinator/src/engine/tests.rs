//! The loop against a group of shards that exists in the test alone.

use super::handle::{EngineHandle, Events, Readiness, StreamEventKind, SubmitError};
use super::streams::{GIVEN_UP, SLOW_CLIENT};
use super::{CUT_BY_SHUTDOWN, Connections, DrainDeadline, Engine};
use crate::clock::now;
use crate::fleet::{Cause, Fault, Group, StepOutcome};
use crate::metrics::{Metrics, Subject};
use crate::scheduler::request::{FinishReason, Request, SamplingParams};
use crate::scheduler::{Scheduler, SchedulerConfig};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use topology::ids::{Epoch, Rank};
use topology::wire::{RowOutput, ScoredToken, StepPlan, StepTimings};

const VOCAB: u32 = 100;

/// Says after every token the one that follows it, and counts steps and rows.
#[derive(Debug)]
struct Counting {
    steps: Arc<AtomicU64>,
    rows: Arc<AtomicU64>,
    step_takes: Duration,
    /// Steps, counted over all epochs, that fail.
    fails_at: Vec<u64>,
    /// A token that ends every step in which it is computed.
    poison: Option<u32>,
    /// How many faults can be mended.
    mendable: u32,
    epoch: Epoch,
    ended: watch::Sender<Option<&'static str>>,
}

impl Group for Counting {
    async fn step(&mut self, plan: StepPlan) -> Result<StepOutcome, Fault> {
        let sent = now();
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        self.rows.store(plan.rows.len() as u64, Ordering::SeqCst);
        tokio::time::sleep(self.step_takes).await;
        assert_eq!(plan.epoch, self.epoch);
        let poison =
            |row: &topology::wire::PlanRow| row.tokens.iter().any(|t| Some(*t) == self.poison);
        if self.fails_at.contains(&step) || plan.rows.iter().any(poison) {
            return Err(Fault::of(
                Rank(1),
                Cause::Exited("signal: 9 (SIGKILL)".into()),
            ));
        }
        let answer = |row: &topology::wire::PlanRow| RowOutput {
            sampled: row.sampling.as_ref().map(|_| ScoredToken {
                token: (row.tokens.last().expect("rows have tokens") + 1) % VOCAB,
                score: None,
            }),
            targets: Vec::new(),
        };
        Ok(StepOutcome {
            outputs: plan.rows.iter().map(answer).collect(),
            timings: vec![StepTimings::default(); 2],
            took: self.step_takes,
            answered: sent + self.step_takes,
        })
    }

    async fn fault(&mut self) -> Fault {
        std::future::pending().await
    }

    async fn recover(&mut self, fault: &Fault) -> Result<Epoch, Fault> {
        tokio::time::sleep(self.step_takes).await;
        self.mendable = self.mendable.checked_sub(1).ok_or(fault.clone())?;
        self.epoch = self.epoch.next();
        Ok(self.epoch)
    }

    async fn stop(self) {
        self.ended.send_replace(Some("stopped"));
    }

    async fn kill(self) {
        self.ended.send_replace(Some("killed"));
    }
}

struct Rig {
    handle: EngineHandle,
    shutdown: watch::Sender<DrainDeadline>,
    ended: watch::Receiver<Option<&'static str>>,
    steps: Arc<AtomicU64>,
    rows: Arc<AtomicU64>,
    metrics: Arc<Metrics>,
    engine: JoinHandle<Result<(), Fault>>,
}

async fn rig(step_takes: Duration, fails_at: Option<u64>) -> Rig {
    failing_rig(step_takes, (Vec::from_iter(fails_at), 0)).await
}

/// A group whose steps fail at those counts, and as many of the faults can be mended.
async fn failing_rig(step_takes: Duration, (fails_at, mendable): (Vec<u64>, u32)) -> Rig {
    rig_of(step_takes, (fails_at, mendable), None).await
}

async fn rig_of(
    step_takes: Duration,
    (fails_at, mendable): (Vec<u64>, u32),
    poison: Option<u32>,
) -> Rig {
    let scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: 4096,
        block_size: 16,
        max_num_seqs: 32,
        max_num_batched_tokens: 64,
        max_model_len: 16384,
        vocab_size: VOCAB,
        max_num_queued_reqs: 64,
        max_num_queued_tokens: 10_000,
        long_prefill_token_threshold: 0,
        enable_prefix_caching: true,
    })
    .expect("the configuration is valid");
    let metrics = Arc::new(Metrics::new(&Subject {
        model_name: "test".into(),
        max_model_len: 16384,
        world_size: 2,
        build: "test".into(),
    }));
    let (readiness, mut ready) = watch::channel(Readiness::Loading);
    let (handle, submissions) = EngineHandle::new(ready.clone());
    let (shutdown, on_shutdown) = watch::channel(None);
    let (ended, on_end) = watch::channel(None);
    let steps = Arc::new(AtomicU64::new(0));
    let rows = Arc::new(AtomicU64::new(0));
    let group = Counting {
        steps: steps.clone(),
        rows: rows.clone(),
        step_takes,
        fails_at,
        poison,
        mendable,
        epoch: Epoch::default(),
        ended,
    };
    let connections = Connections {
        submissions,
        shutdown: on_shutdown,
        readiness,
        metrics: metrics.clone(),
        max_recovery_attempts: if poison.is_some() { 10 } else { 3 },
    };
    let engine = tokio::spawn(Engine::new(scheduler, group, connections).run());
    ready
        .wait_for(|state| *state == Readiness::Ready)
        .await
        .expect("the engine runs");
    Rig {
        handle,
        shutdown,
        ended: on_end,
        steps,
        rows,
        metrics,
        engine,
    }
}

fn request(handle: &EngineHandle, first: u32, max_tokens: u32) -> Request {
    Request {
        id: handle.next_id(),
        prompt: [first, first].into(),
        sampling: SamplingParams::default(),
        max_tokens,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        priority: 0,
        cache_salt: 0,
        prompt_logprobs: None,
    }
}

/// All events of all choices until the channel ends: tokens and the last event, by choice.
async fn read_all(mut events: Events, choices: usize) -> Vec<(Vec<u32>, StreamEventKind)> {
    let mut got: Vec<(Vec<u32>, Option<StreamEventKind>)> = vec![(Vec::new(), None); choices];
    while let Some(event) = events.recv().await {
        let (tokens, last) = &mut got[event.choice];
        assert_eq!(*last, None, "nothing comes after the last event");
        match event.kind {
            StreamEventKind::Token { index, token, .. } => {
                assert_eq!(index as usize, tokens.len(), "no gap, no repeat");
                tokens.push(token);
            }
            kind @ (StreamEventKind::Finished(_) | StreamEventKind::Failed(_)) => {
                *last = Some(kind);
            }
            StreamEventKind::Started { .. } | StreamEventKind::PromptScores(_) => {}
        }
    }
    let end = |(tokens, last): (_, Option<_>)| (tokens, last.expect("every choice has an end"));
    got.into_iter().map(end).collect()
}

const MS: Duration = Duration::from_millis(1);

#[tokio::test(start_paused = true)]
async fn every_choice_gets_its_tokens_and_one_end() {
    let rig = rig(MS, None).await;
    let first = [10, 40, 70];
    let choices = first.map(|first| request(&rig.handle, first, 20)).to_vec();
    let events = rig.handle.submit(choices).await.unwrap();
    for (first, (tokens, last)) in first.iter().zip(read_all(events, 3).await) {
        let expected: Vec<u32> = (1..=20).map(|i| (first + i) % VOCAB).collect();
        assert_eq!(tokens, expected);
        assert_eq!(last, StreamEventKind::Finished(FinishReason::Length));
    }
    let text = rig.metrics.render();
    assert!(
        text.contains("vllm:generation_tokens_total{model_name=\"test\",engine=\"0\"} 60"),
        "{text}"
    );
    assert!(
        text.contains("vllm:time_to_first_token_seconds_count{model_name=\"test\",engine=\"0\"} 3")
    );
    assert!(
        text.contains(
            "vllm:inter_token_latency_seconds_count{model_name=\"test\",engine=\"0\"} 57"
        )
    );
    assert!(text.contains("vllm:num_requests_running{model_name=\"test\",engine=\"0\"} 0"));
}

#[tokio::test(start_paused = true)]
async fn choices_of_one_prompt_are_measured_together() {
    let rig = rig(MS, None).await;
    let prompt = request(&rig.handle, 10, 0).prompt;
    // Three choices of one prompt, of which the longest counts, and a second prompt.
    let mut choices = [5, 9, 7, 4].map(|most| request(&rig.handle, 10, most));
    for choice in &mut choices[..3] {
        choice.prompt = Arc::clone(&prompt);
    }
    let events = rig.handle.submit(choices.to_vec()).await.unwrap();
    assert_eq!(read_all(events, 4).await.len(), 4);
    let text = rig.metrics.render();
    for (name, count, sum) in [
        ("params_n", 2, 3 + 1),
        ("max_num_generation_tokens", 2, 9 + 4),
        ("generation_tokens", 4, 5 + 9 + 7 + 4),
    ] {
        for (suffix, value) in [("count", count), ("sum", sum)] {
            let line =
                format!("vllm:request_{name}_{suffix}{{model_name=\"test\",engine=\"0\"}} {value}");
            assert!(text.lines().any(|it| it == line), "{line} is not in {text}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_engine_computes_nothing_and_wakes_at_once() {
    let rig = rig(MS, None).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(rig.steps.load(Ordering::SeqCst), 0);
    let events = rig
        .handle
        .submit(vec![request(&rig.handle, 1, 1)])
        .await
        .unwrap();
    assert_eq!(read_all(events, 1).await[0].0, [2]);
    assert_eq!(rig.steps.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn who_stops_listening_is_cancelled_within_two_steps() {
    let rig = rig(MS, None).await;
    let stays = rig
        .handle
        .submit(vec![request(&rig.handle, 1, 200)])
        .await
        .unwrap();
    let mut goes = rig
        .handle
        .submit(vec![request(&rig.handle, 2, 10_000)])
        .await
        .unwrap();
    while !matches!(
        goes.recv().await.unwrap().kind,
        StreamEventKind::Token { index: 9, .. }
    ) {}
    assert_eq!(rig.rows.load(Ordering::SeqCst), 2);
    drop(goes);
    let before = rig.steps.load(Ordering::SeqCst);
    while rig.rows.load(Ordering::SeqCst) == 2 {
        tokio::time::sleep(MS / 4).await;
    }
    let steps = rig.steps.load(Ordering::SeqCst) - before;
    assert!(steps <= 2, "{steps} steps");
    assert_eq!(read_all(stays, 1).await[0].0.len(), 200, "the others go on");
}

#[tokio::test(start_paused = true)]
async fn who_does_not_read_is_cut_with_a_sentence() {
    let rig = rig(MS, None).await;
    let choices = vec![request(&rig.handle, 1, 10_000), request(&rig.handle, 2, 3)];
    let mut slow = rig.handle.submit(choices).await.unwrap();
    let quick = rig
        .handle
        .submit(vec![request(&rig.handle, 3, 5000)])
        .await
        .unwrap();
    let quick = tokio::spawn(read_all(quick, 1));
    assert_eq!(
        quick.await.unwrap()[0].0.len(),
        5000,
        "a slow client holds no one up"
    );
    let mut last = [None, None];
    while let Some(event) = slow.recv().await {
        last[event.choice] = Some(event.kind);
    }
    assert_eq!(last[0], Some(StreamEventKind::Failed(SLOW_CLIENT.into())));
    assert_eq!(
        last[1],
        Some(StreamEventKind::Finished(FinishReason::Length))
    );
    let text = rig.metrics.render();
    assert!(text.contains("cluster_slow_streams_cut_total 1"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_fault_ends_every_stream_with_a_sentence() {
    let mut rig = rig(MS, Some(7)).await;
    let choices = (0..3)
        .map(|first| request(&rig.handle, first, 100))
        .collect();
    let events = rig.handle.submit(choices).await.unwrap();
    for (tokens, last) in read_all(events, 3).await {
        assert_eq!(tokens.len(), 7);
        let StreamEventKind::Failed(sentence) = last else {
            panic!("ended with {last:?}");
        };
        assert!(
            sentence.contains("rank 1") && sentence.contains("SIGKILL"),
            "{sentence}"
        );
    }
    let fault = rig.engine.await.unwrap().unwrap_err();
    assert_eq!(fault.rank, Some(Rank(1)));
    assert_eq!(*rig.ended.borrow_and_update(), Some("killed"));
    let refused = rig
        .handle
        .submit(vec![request(&rig.handle, 1, 1)])
        .await
        .unwrap_err();
    assert!(matches!(refused, SubmitError::NotReady(why) if why.contains("rank 1")));
}

#[tokio::test(start_paused = true)]
async fn streams_go_on_through_faults_without_gap_or_repeat() {
    let faults = vec![0, 1, 9, 30, 31, 52];
    let rig = failing_rig(MS, (faults.clone(), u32::MAX)).await;
    let first = [10, 40, 70];
    let choices = first.map(|first| request(&rig.handle, first, 50)).to_vec();
    let events = rig.handle.submit(choices).await.unwrap();
    // `read_all` asserts that indices have no gap and no repeat.
    for (first, (tokens, last)) in first.iter().zip(read_all(events, 3).await) {
        let expected: Vec<u32> = (1..=50).map(|i| (first + i) % VOCAB).collect();
        assert_eq!(tokens, expected);
        assert_eq!(last, StreamEventKind::Finished(FinishReason::Length));
    }
    assert_eq!(rig.handle.readiness(), Readiness::Ready);
    let text = rig.metrics.render();
    for line in [
        format!("cluster_recoveries_total {}", faults.len()),
        format!("cluster_epoch {}", faults.len()),
        "cluster_ranks_ready 2".to_owned(),
    ] {
        assert!(text.contains(&line), "{line} is missing in {text}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_group_that_never_gets_far_is_given_up() {
    let rig = failing_rig(MS, ((5..50).collect(), u32::MAX)).await;
    let events = rig.handle.submit(vec![request(&rig.handle, 1, 500)]);
    let (tokens, last) = read_all(events.await.unwrap(), 1).await.remove(0);
    assert!(
        matches!(last, StreamEventKind::Failed(why) if why.contains("SIGKILL")),
        "ends with a sentence"
    );
    assert_eq!(tokens.len(), 5);
    assert_eq!(
        rig.steps.load(Ordering::SeqCst),
        5 + 1 + 3,
        "three attempts are allowed"
    );
    assert!(rig.engine.await.unwrap().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_request_that_kills_its_shards_ends_alone() {
    let rig = rig_of(MS, (Vec::new(), u32::MAX), Some(30)).await;
    // The second prompt is the poison; no other counts up to it.
    let choices = [1, 30, 50]
        .map(|first| request(&rig.handle, first, 20))
        .to_vec();
    let events = rig.handle.submit(choices).await.unwrap();
    let told = read_all(events, 3).await;
    for (first, (tokens, last)) in [(1, &told[0]), (50, &told[2])] {
        assert_eq!(*tokens, (1..=20).map(|i| first + i).collect::<Vec<u32>>());
        assert_eq!(*last, StreamEventKind::Finished(FinishReason::Length));
    }
    assert_eq!(told[1], (vec![], StreamEventKind::Failed(GIVEN_UP.into())));
    let late = rig.handle.submit(vec![request(&rig.handle, 60, 5)]).await;
    assert_eq!(read_all(late.unwrap(), 1).await[0].0, [61, 62, 63, 64, 65]);
    let text = rig.metrics.render();
    assert!(text.contains("finished_reason=\"error\"} 1"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn requests_that_come_while_the_group_is_formed_wait_and_are_served() {
    let rig = failing_rig(Duration::from_secs(1), (vec![2], 1)).await;
    let early = rig.handle.submit(vec![request(&rig.handle, 1, 5)]);
    let early = early.await.unwrap();
    // The third step fails after 3 s, and mending it takes another.
    tokio::time::sleep(Duration::from_millis(3500)).await;
    let readiness = rig.handle.readiness();
    assert!(matches!(&readiness, Readiness::Recovering(why) if why.contains("rank 1")));
    let late = rig.handle.submit(vec![request(&rig.handle, 50, 5)]);
    let late = late.await.unwrap();
    assert_eq!(read_all(early, 1).await[0].0, [2, 3, 4, 5, 6]);
    assert_eq!(read_all(late, 1).await[0].0, [51, 52, 53, 54, 55]);
}

#[tokio::test(start_paused = true)]
async fn draining_finishes_what_runs_and_takes_nothing_new() {
    let rig = rig(MS, None).await;
    let events = rig
        .handle
        .submit(vec![request(&rig.handle, 1, 500)])
        .await
        .unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    rig.shutdown.send_replace(Some(deadline));
    let refused = rig
        .handle
        .submit(vec![request(&rig.handle, 2, 5)])
        .await
        .unwrap_err();
    assert_eq!(refused, SubmitError::Draining);
    let (tokens, last) = read_all(events, 1).await.remove(0);
    assert_eq!(tokens.len(), 500);
    assert_eq!(last, StreamEventKind::Finished(FinishReason::Length));
    assert_eq!(rig.engine.await.unwrap(), Ok(()));
    assert_eq!(*rig.ended.borrow(), Some("stopped"));
}

#[tokio::test(start_paused = true)]
async fn what_does_not_finish_in_time_is_told_so() {
    let rig = rig(Duration::from_secs(60), None).await;
    let events = rig
        .handle
        .submit(vec![request(&rig.handle, 1, 500)])
        .await
        .unwrap();
    let started = tokio::time::Instant::now();
    rig.shutdown
        .send_replace(Some(started + Duration::from_secs(5)));
    let (_, last) = read_all(events, 1).await.remove(0);
    assert_eq!(last, StreamEventKind::Failed(CUT_BY_SHUTDOWN.into()));
    assert_eq!(rig.engine.await.unwrap(), Ok(()));
    assert!(
        started.elapsed() < Duration::from_secs(6),
        "a long step is not waited for"
    );
    assert_eq!(*rig.ended.borrow(), Some("stopped"));
}

#[tokio::test(start_paused = true)]
async fn refusals_reach_who_asked_and_are_counted() {
    let rig = rig(MS, None).await;
    let too_long = rig
        .handle
        .submit(vec![request(&rig.handle, 1, 20_000)])
        .await;
    assert!(matches!(too_long, Err(SubmitError::Refused(refusal)) if !refusal.is_temporary()));
    let blocker = rig
        .handle
        .submit(vec![request(&rig.handle, 1, 100)])
        .await
        .unwrap();
    let many = |from: u32| {
        (from..from + 60)
            .map(|f| request(&rig.handle, f % VOCAB, 50))
            .collect()
    };
    let first = rig.handle.submit(many(0)).await.unwrap();
    let second = rig.handle.submit(many(60)).await;
    assert!(matches!(second, Err(SubmitError::Refused(refusal)) if refusal.is_temporary()));
    assert_eq!(read_all(first, 60).await.len(), 60);
    assert_eq!(read_all(blocker, 1).await.len(), 1);
    let text = rig.metrics.render();
    assert!(text.contains("reason=\"max_num_queued_reqs\"} 1"), "{text}");
}
