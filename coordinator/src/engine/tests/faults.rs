//! What becomes of streams when steps fail.

use super::super::handle::{Readiness, StreamEventKind, SubmitError};
use super::super::streams::GIVEN_UP;
use super::rig::{MS, VOCAB, failing_rig, many, read_all, request, rig, rig_of};
use crate::scheduler::request::FinishReason;
use std::sync::atomic::Ordering;
use std::time::Duration;
use topology::ids::Rank;

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
    let text = rig.metrics.registry().render();
    for line in [
        format!(
            "cluster_recoveries_total{{model_name=\"test\"}} {}",
            faults.len()
        ),
        format!("cluster_epoch{{model_name=\"test\"}} {}", faults.len()),
        "cluster_ranks_ready{model_name=\"test\"} 2".to_owned(),
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
async fn a_group_that_scores_prompts_gets_far() {
    // Every other step fails, and no step gives a token.
    let rig = failing_rig(MS, ((0..40).step_by(2).collect(), u32::MAX)).await;
    for first in 0..20 {
        let mut scored = request(&rig.handle, first, 0);
        scored.prompt_logprobs = Some(0);
        let events = rig.handle.submit(vec![scored]).await.unwrap();
        let (_, last) = read_all(events, 1).await.remove(0);
        assert_eq!(last, StreamEventKind::Finished(FinishReason::Length));
    }
    assert_eq!(rig.steps.load(Ordering::SeqCst), 40);
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
    let text = rig.metrics.registry().render();
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
async fn who_comes_during_a_long_recovery_hears_at_once_and_makes_room_when_gone() {
    let rig = failing_rig(Duration::from_secs(40), (vec![2], 1)).await;
    let early = rig.handle.submit(vec![request(&rig.handle, 1, 5)]);
    let early = early.await.unwrap();
    // The third step fails after two minutes, and mending it takes 40 s.
    tokio::time::sleep(Duration::from_secs(125)).await;
    assert!(matches!(rig.handle.readiness(), Readiness::Recovering(_)));
    let asked = tokio::time::Instant::now();
    let gone = rig.handle.submit(many(&rig.handle, 60)).await.unwrap();
    let refused = rig.handle.submit(many(&rig.handle, 60)).await;
    assert!(matches!(refused, Err(SubmitError::Refused(why)) if why.is_temporary()));
    drop(gone);
    let late = rig.handle.submit(many(&rig.handle, 60)).await.unwrap();
    assert_eq!(asked.elapsed(), Duration::ZERO);
    assert_eq!(read_all(early, 1).await[0].0, [2, 3, 4, 5, 6]);
    for (tokens, last) in read_all(late, 60).await {
        assert_eq!(tokens.len(), 50);
        assert_eq!(last, StreamEventKind::Finished(FinishReason::Length));
    }
}
