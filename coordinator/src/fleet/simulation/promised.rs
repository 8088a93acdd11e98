//! What is promised of single faults, in figures: how soon each is noticed, and how soon tokens come again.
//!
//! A script strikes chosen ranks at chosen moments while one stream is open; everything else is calm. Times are
//! those of the simulated clock: what the protocol waits for, with links of a few milliseconds and replacements
//! that start and load within 600 ms. How long real processes take is measured in `tests/cluster_up`.

use super::faults::{FOR_EVER, Ill, Moment, Plan, Strike};
use super::oracle;
use super::run::{Case, Cluster, paused, start};
use super::world::{FROM_SHARD, MS, TO_SHARD, World};
use crate::engine::handle::{EngineHandle, Readiness, StreamEventKind};
use crate::scheduler::SchedulerConfig;
use crate::scheduler::request::{Request, SamplingParams};
use fastrand::Rng;
use std::time::Duration;
use tokio::time::{Instant, sleep};
use topology::ids::Rank;

/// From the first of two kills, the second of which comes while the group is formed again, to the next token.
const SECOND_KILL_LIMIT: Duration = Duration::from_secs(4);

/// From a freeze or a cut to `/health` telling of it, and to the next token.
const NOTICE_LIMIT: Duration = Duration::from_millis(2500);
const SILENCE_LIMIT: Duration = Duration::from_secs(5);

const RANKS: u32 = 4;
const SEEDS: u64 = 12;

/// How it went.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    /// From the strike to its being known.
    noticed: Duration,
    /// The longest time between two tokens.
    gap: Duration,
}

impl Times {
    fn max(self, other: Self) -> Self {
        Self {
            noticed: self.noticed.max(other.noticed),
            gap: self.gap.max(other.gap),
        }
    }
}

fn case() -> Case {
    Case {
        world_size: RANKS,
        config: SchedulerConfig {
            num_blocks: 64,
            block_size: 4,
            max_num_seqs: 4,
            max_num_batched_tokens: 32,
            max_model_len: 96,
            vocab_size: oracle::VOCAB_SIZE,
            max_num_queued_reqs: 8,
            max_num_queued_tokens: 1000,
            long_prefill_token_threshold: 0,
            max_mixed_prefill_tokens: 0,
            enable_prefix_caching: true,
            async_scheduling: true,
        },
        attempts: 10,
        troubled_start: false,
        hopeless_at: None,
        drain: None,
    }
}

fn request(handle: &EngineHandle, seed: u64) -> Request {
    Request {
        id: handle.next_id(),
        prompt: (0..20)
            .map(|token| token * 3 % oracle::VOCAB_SIZE)
            .collect(),
        sampling: SamplingParams {
            seed,
            ..SamplingParams::default()
        },
        max_tokens: 60,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        priority: 0,
        cache_salt: 0,
        prompt_logprobs: None,
    }
}

/// When the group was first known not to be whole.
async fn noticed(handle: EngineHandle) -> Instant {
    while handle.readiness() == Readiness::Ready {
        sleep(MS).await;
    }
    Instant::now()
}

/// One stream through the strikes of `script`; it must be whole, and the cluster too afterwards.
async fn through(seed: u64, script: &[Strike]) -> Times {
    let plan = Plan {
        rough_ms: 0,
        budget: 0,
        ..Plan::draw(&mut Rng::with_seed(seed))
    };
    let (world, case) = (World::new(Rng::with_seed(seed), plan, true), case());
    let fleet = start(&world, &case).await.expect("nothing is in its way");
    let cluster = Cluster::new(&world, &case, fleet);
    sleep(MS).await; // the engine says that it is ready
    world.lock().plan.script = script.to_vec();
    let watching = tokio::spawn(noticed(cluster.handle.clone()));
    let request = request(&cluster.handle, seed);
    let (expected, _) = oracle::answer(&request, RANKS);
    let mut events = cluster
        .handle
        .submit(vec![request])
        .await
        .expect("it takes it");
    let (mut tokens, mut times) = (Vec::new(), Times::default());
    let (mut last, mut struck) = (Instant::now(), None);
    while let Some(event) = events.recv().await {
        if let StreamEventKind::Token { token, .. } = event.kind {
            tokens.push(token);
            let gap = last.elapsed();
            if gap > times.gap {
                (times.gap, struck) = (gap, Some(last));
            }
            last = Instant::now();
        }
    }
    assert_eq!(tokens, expected, "seed {seed}, {script:?}");
    assert!(
        world.lock().plan.script.is_empty(),
        "seed {seed}: {script:?} did not all come"
    );
    let since = struck.expect("there were tokens");
    // Counted from the last token before, it is a little too long.
    times.noticed = watching
        .await
        .expect("it ends")
        .saturating_duration_since(since);
    cluster
        .shutdown
        .send_replace(Some(Instant::now() + Duration::from_secs(60)));
    cluster.end(false).await;
    let (_, violations, log) = world.report_all();
    assert!(
        violations.is_empty(),
        "seed {seed}: {violations:#?}\n{}",
        log.join("\n")
    );
    times
}

/// The worst of all seeds.
fn worst(script: impl Fn(u32) -> Vec<Strike>) -> Times {
    let times = (0..SEEDS).map(|seed| {
        let step = 3 + u32::try_from(seed).expect("few");
        paused(through(seed, &script(step)))
    });
    times.fold(Times::default(), Times::max)
}

fn strike(rank: u32, moment: Moment, ill: Ill) -> Strike {
    Strike {
        rank: Rank(rank),
        moment,
        after: 0,
        ill,
    }
}

fn later(after: u32, strike: Strike) -> Strike {
    Strike { after, ..strike }
}

#[test]
fn a_second_kill_in_any_phase_of_the_recovery_costs_seconds_and_no_token() {
    let phases = [
        // Survivors, when they are told and while they leave; rank 0 when it makes the communicator.
        (0, Moment::Abort),
        (2, Moment::Abort),
        (3, Moment::Leave),
        (0, Moment::MakeComm),
        // The replacement, on its whole way.
        (1, Moment::Launch),
        (1, Moment::Load),
        (1, Moment::Allocate),
        // Anyone, when all others wait for it.
        (0, Moment::Join),
        (1, Moment::Join),
        (3, Moment::Join),
    ];
    for (rank, phase) in phases {
        let times = worst(|step| {
            let first = later(step, strike(1, Moment::Collective, Ill::Kill));
            vec![first, strike(rank, phase, Ill::Kill)]
        });
        println!(
            "rank {rank} at {phase:?}: next token after {:?} at most",
            times.gap
        );
        assert!(
            times.gap <= SECOND_KILL_LIMIT,
            "rank {rank} at {phase:?}: {times:?}"
        );
    }
}

#[test]
fn all_but_one_may_die_at_once() {
    let times = worst(|step| {
        let first = later(step, strike(0, Moment::Step, Ill::Kill));
        let others = (1..RANKS - 1).map(|rank| strike(rank, Moment::Collective, Ill::Kill));
        [first].into_iter().chain(others).collect()
    });
    println!("next token after {:?} at most", times.gap);
    assert!(times.gap <= SECOND_KILL_LIMIT, "{times:?}");
}

#[test]
fn freezes_and_cuts_in_one_direction_are_noticed_and_fenced() {
    // For ever, and so that it comes back when another has its place.
    for time in [
        FOR_EVER,
        Duration::from_millis(2100),
        Duration::from_secs(3),
    ] {
        for ill in [
            Ill::Freeze(time),
            Ill::Cut(TO_SHARD, time),
            Ill::Cut(FROM_SHARD, time),
        ] {
            for moment in [Moment::Step, Moment::Collective, Moment::Answer] {
                let times = worst(|step| vec![later(step, strike(step % RANKS, moment, ill))]);
                println!("{ill:?} at {moment:?}: {times:?} at most");
                assert!(
                    times.noticed <= NOTICE_LIMIT,
                    "{ill:?} at {moment:?}: {times:?}"
                );
                assert!(
                    times.gap <= SILENCE_LIMIT,
                    "{ill:?} at {moment:?}: {times:?}"
                );
            }
        }
    }
}

/// A network that loses a few packets for a while, and a process that is paused shortly, are no faults.
#[test]
fn what_is_over_sooner_than_a_silence_is_no_fault() {
    for ill in [Ill::Freeze(1500 * MS), Ill::Cut(FROM_SHARD, 1500 * MS)] {
        paused(async {
            let world = World::new(Rng::with_seed(1), Plan::default(), true);
            let case = case();
            let fleet = start(&world, &case).await.expect("nothing is in its way");
            let cluster = Cluster::new(&world, &case, fleet);
            sleep(MS).await;
            world.lock().plan.script = [later(5, strike(1, Moment::Step, ill))].into();
            let request = request(&cluster.handle, 1);
            let (expected, _) = oracle::answer(&request, RANKS);
            let events = cluster.handle.submit(vec![request]).await;
            let mut events = events.expect("it takes it");
            let mut tokens = Vec::new();
            while let Some(event) = events.recv().await {
                assert_eq!(cluster.handle.readiness(), Readiness::Ready, "{ill:?}");
                if let StreamEventKind::Token { token, .. } = event.kind {
                    tokens.push(token);
                }
            }
            assert_eq!(tokens, expected);
            assert!(world.lock().plan.script.is_empty());
            let deadline = Instant::now() + Duration::from_secs(60);
            cluster.shutdown.send_replace(Some(deadline));
            cluster.end(false).await;
        });
    }
}
