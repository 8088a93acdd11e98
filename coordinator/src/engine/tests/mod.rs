//! The loop against a group of shards that exists in the test alone.

mod faults;
mod rig;

use super::CUT_BY_SHUTDOWN;
use super::handle::{StreamEventKind, SubmitError};
use super::streams::SLOW_CLIENT;
use crate::scheduler::request::FinishReason;
use rig::{MS, VOCAB, many, read_all, request, rig};
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

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
    let text = rig.metrics.registry().render();
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
    let text = rig.metrics.registry().render();
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
async fn what_a_request_waits_to_be_taken_is_part_of_its_times() {
    let rig = rig(MS, None).await;
    let mut submitted = Box::pin(rig.handle.submit(vec![request(&rig.handle, 1, 3)]));
    let first = poll_fn(|context| Poll::Ready(submitted.as_mut().poll(context)));
    assert!(first.await.is_pending());
    // The loop is held up for so long.
    tokio::time::advance(Duration::from_secs(5)).await;
    assert_eq!(read_all(submitted.await.unwrap(), 1).await[0].0, [2, 3, 4]);
    let text = rig.metrics.registry().render();
    for name in [
        "request_queue_time_seconds",
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
    ] {
        let sum = format!("vllm:{name}_sum{{model_name=\"test\",engine=\"0\"}} ");
        let sum = text.lines().find_map(|line| line.strip_prefix(&sum));
        let sum: f64 = sum.unwrap().parse().unwrap();
        assert!((5.0..5.1).contains(&sum), "{name}: {sum}");
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
    let text = rig.metrics.registry().render();
    assert!(
        text.contains("cluster_slow_streams_cut_total{model_name=\"test\"} 1"),
        "{text}"
    );
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
    let first = rig.handle.submit(many(&rig.handle, 60)).await.unwrap();
    let second = rig.handle.submit(many(&rig.handle, 60)).await;
    assert!(matches!(second, Err(SubmitError::Refused(refusal)) if refusal.is_temporary()));
    assert_eq!(read_all(first, 60).await.len(), 60);
    assert_eq!(read_all(blocker, 1).await.len(), 1);
    let text = rig.metrics.registry().render();
    assert!(text.contains("reason=\"max_num_queued_reqs\"} 1"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn who_comes_during_a_long_step_hears_at_once_whether_it_is_taken() {
    let rig = rig(Duration::from_secs(60), None).await;
    let running = rig.handle.submit(vec![request(&rig.handle, 1, 5)]);
    let running = running.await.unwrap();
    // Two steps are under way, so that nothing can be planned.
    tokio::time::sleep(MS).await;
    let asked = tokio::time::Instant::now();
    let taken = rig.handle.submit(many(&rig.handle, 60)).await.unwrap();
    let refused = rig.handle.submit(many(&rig.handle, 60)).await;
    assert!(matches!(refused, Err(SubmitError::Refused(why)) if why.is_temporary()));
    assert_eq!(asked.elapsed(), Duration::ZERO);
    drop(taken);
    assert_eq!(read_all(running, 1).await[0].0, [2, 3, 4, 5, 6]);
}

#[tokio::test(start_paused = true)]
async fn who_goes_before_it_is_taken_leaves_no_trace() {
    let rig = rig(MS, None).await;
    for _ in 0..3 {
        let mut gone = Box::pin(rig.handle.submit(many(&rig.handle, 60)));
        let submitted = poll_fn(|context| Poll::Ready(gone.as_mut().poll(context)));
        assert!(submitted.await.is_pending());
    }
    let stays = rig.handle.submit(many(&rig.handle, 60)).await.unwrap();
    assert_eq!(read_all(stays, 60).await.len(), 60);
    let text = rig.metrics.registry().render();
    for line in [
        "vllm:request_params_n_count{model_name=\"test\",engine=\"0\"} 60",
        "vllm:request_prompt_tokens_count{model_name=\"test\",engine=\"0\"} 60",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_comes_during_a_long_step_is_in_the_next_one() {
    let step = 100 * MS;
    let rig = rig(step, None).await;
    let first = rig.handle.submit(vec![request(&rig.handle, 1, 40)]);
    let mut first = first.await.unwrap();
    // Some steps have to be seen before the loop knows how long they take.
    while !matches!(
        first.recv().await.unwrap().kind,
        StreamEventKind::Token { index: 19, .. }
    ) {}
    let begun = tokio::time::Instant::now();
    let first = tokio::spawn(async move {
        while first.recv().await.is_some() {}
        begun.elapsed()
    });
    for offset in [10, 40, 70] {
        let answered = tokio::time::Instant::now();
        tokio::time::sleep(offset * MS).await;
        let second = rig.handle.submit(vec![request(&rig.handle, 9, 1)]);
        let second = read_all(second.await.unwrap(), 1).await;
        assert_eq!(second[0].0, [10]);
        // The rest of the step that was under way, and one more.
        assert_eq!(answered.elapsed(), 2 * step, "after {offset} ms");
    }
    assert_eq!(
        first.await.unwrap(),
        20 * step,
        "and no step is late for that"
    );
}
