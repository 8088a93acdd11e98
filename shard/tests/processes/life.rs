//! What becomes of shard processes, their epochs and their shared memory.

use crate::group::{Group, PATIENCE, Shard, is_gpu, load, replayed_sizes, say};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::time::Instant;
use topology::ids::Epoch;
use topology::link::Listener;
use topology::wire::{FromShard, ModelLocation, ScoredToken, ToShard};

const FIXTURE: &str = "llama3";
const PROMPT: [u32; 11] = [9, 40, 77, 130, 12, 250, 99, 9, 61, 200, 18];
/// A device tries products' algorithms in some twenty steps before it records one.
const REPLAYED_AFTER: usize = 33;
const TOKENS: usize = 40;

/// How soon a shard leaves its collective.
fn abort_limit() -> Duration {
    if is_gpu() {
        // What the project promises; two processes take turns on the GPU.
        Duration::from_secs(2)
    } else {
        Duration::from_millis(250)
    }
}

/// What must be the same however it was computed: on a GPU not the last bits of probabilities.
pub(crate) fn comparable(answers: &[ScoredToken]) -> Vec<ScoredToken> {
    let mut answers = answers.to_vec();
    if is_gpu() {
        for answer in &mut answers {
            answer.score = None;
        }
    }
    answers
}

pub(crate) fn run(check: impl Future<Output = ()>) {
    runtime().block_on(check);
}

pub(crate) fn runtime() -> Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.expect("a runtime")
}

/// Lines of a process's map that show its collectives' memory.
fn segments(shard: &Shard) -> Vec<String> {
    let pid = shard.process.pid().expect("it lives");
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("its maps");
    maps.lines()
        .filter(|line| line.contains("/dev/shm/cluster-"))
        .map(str::to_owned)
        .collect()
}

pub(crate) fn a_killed_rank_is_replaced() {
    run(async {
        let mut group = Group::start(FIXTURE).await;
        group.form().await;
        let segment = segments(&group.ranks[0]);
        let is_removed = segment.len() == 1 && segment[0].ends_with("(deleted)");
        assert!(is_gpu() || is_removed, "{segment:?}");

        let undisturbed = group.generate(&mut PROMPT.to_vec(), TOKENS).await;
        let mut sizes = 0;
        // The first dies in a prompt, which is queued.
        for (killed, before) in [(1, 0), (0, REPLAYED_AFTER), (1, 5)] {
            let mut tokens = PROMPT.to_vec();
            let mut answers: Vec<ScoredToken> = group.generate(&mut tokens, before).await;
            if is_gpu() && before == REPLAYED_AFTER {
                let recorded = replayed_sizes() - sizes;
                assert_eq!(recorded, 2, "both ranks replay when one dies");
            }
            // The plan reaches one rank alone; the other is gone, and nobody tells the collective.
            group.ranks[killed].process.kill();
            group.ranks[killed].exit_code().await;
            let computed = if before == 0 { 0 } else { tokens.len() - 1 };
            let plan = group.plan(&tokens, computed);
            let (epoch, left) = (group.epoch, 1 - killed);
            let mut ahead = group.plan(&[&tokens[..], &[0]].concat(), tokens.len());
            ahead.rows[0].last_from = Some(0);
            let alone = &mut group.ranks[left];
            alone.say(ToShard::Run(Box::new(plan))).await;
            // This one is over before it begins: nothing may come of it.
            alone.say(ToShard::Run(Box::new(ahead))).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
            let aborted = Instant::now();
            alone
                .sender
                .send_urgent(&ToShard::Abort { epoch })
                .await
                .expect("it listens");
            assert_eq!(alone.hear().await, FromShard::Aborted { epoch });
            let after = aborted.elapsed();
            say(&format!(
                "rank {left} was out of its collective {after:?} after the abort"
            ));
            assert!(after < abort_limit(), "left after {after:?}");
            assert!(
                segments(alone).is_empty(),
                "the epoch's memory is gone with it"
            );

            let rank = u32::try_from(killed).expect("0 or 1");
            let mut replacement = Shard::start(&mut group.listener, rank).await;
            replacement.prepare(FIXTURE).await;
            group.ranks[killed] = replacement;
            sizes = replayed_sizes();
            group.form().await;
            // Everything is recomputed from the tokens, and goes on as if nothing had been.
            answers.extend(group.generate(&mut tokens, TOKENS - before).await);
            assert_eq!(
                comparable(&answers),
                comparable(&undisturbed),
                "rank {killed} was killed"
            );
        }
        group.stop().await;
    });
}

pub(crate) fn steps_sent_ahead_give_the_same() {
    run(async {
        let mut group = Group::start(FIXTURE).await;
        group.form().await;
        let undisturbed = group.generate(&mut PROMPT.to_vec(), 12).await;
        let mut tokens = PROMPT.to_vec();
        let mut computed = 0;
        let mut answers = Vec::new();
        let mut chosen = Vec::new();
        // Answers to steps that began before the one before them had ended.
        let mut queued = 0;
        for sent in 0..=undisturbed.len() {
            if sent < undisturbed.len() {
                let mut plan = group.plan(&tokens, computed);
                plan.rows[0].last_from = (sent > 0).then_some(0);
                computed = tokens.len();
                tokens.push(0);
                for rank in &mut group.ranks {
                    rank.say(ToShard::Run(Box::new(plan.clone()))).await;
                }
            }
            if sent == 0 {
                continue; // two are under way from here on
            }
            for rank in &mut group.ranks {
                let FromShard::Ran(ran) = rank.hear().await else {
                    panic!("no result");
                };
                queued += usize::from(sent > 1 && ran.timings.idle_us == 0);
                chosen.push(ran.chosen.expect("every rank samples"));
                let outputs = ran.outputs.into_iter();
                answers.extend(outputs.filter_map(|output| output.sampled));
            }
        }
        assert_eq!(comparable(&answers), comparable(&undisturbed));
        assert!(chosen.chunks(2).all(|ranks| ranks[0] == ranks[1]));
        // Some plans come when it is too late for that.
        assert!(
            !is_gpu() || queued > 2,
            "only {queued} were queued behind another"
        );
        group.stop().await;
    });
}

pub(crate) fn an_incomplete_join_can_be_aborted() {
    run(async {
        let mut group = Group::start(FIXTURE).await;
        group.epoch = Epoch(4);
        let epoch = group.epoch;
        let comm_id = group.make_comm().await;
        group.ranks[0]
            .say(ToShard::JoinComm { epoch, comm_id })
            .await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let aborted = Instant::now();
        for rank in &mut group.ranks {
            // Rank 1 has nothing to leave and says so too.
            rank.say(ToShard::Abort { epoch }).await;
            assert_eq!(rank.hear().await, FromShard::Aborted { epoch });
        }
        assert!(
            aborted.elapsed() < abort_limit(),
            "left after {:?}",
            aborted.elapsed()
        );
        // A second abort is answered as the first was.
        for rank in &mut group.ranks {
            rank.say(ToShard::Abort { epoch }).await;
            assert_eq!(rank.hear().await, FromShard::Aborted { epoch });
        }
        assert!(segments(&group.ranks[0]).is_empty());
        group.form().await;
        group.generate(&mut PROMPT.to_vec(), 2).await;
        group.stop().await;
    });
}

pub(crate) fn a_late_plan_changes_nothing() {
    run(async {
        let mut group = Group::start(FIXTURE).await;
        group.form().await;
        let undisturbed = group.generate(&mut PROMPT.to_vec(), 4).await;
        let late = group.plan(&PROMPT, 0);
        let epoch = group.epoch;
        for rank in &mut group.ranks {
            rank.say(ToShard::Abort { epoch }).await;
            assert_eq!(rank.hear().await, FromShard::Aborted { epoch });
        }
        let late_join = ToShard::JoinComm {
            epoch,
            comm_id: vec![1, 2, 3],
        };
        for rank in &mut group.ranks {
            rank.say(ToShard::Run(Box::new(late.clone()))).await;
            rank.say(late_join.clone()).await;
        }
        // Had any of these been answered, the next answers would be others than these.
        group.form().await;
        let again = group.generate(&mut PROMPT.to_vec(), 4).await;
        assert_eq!(comparable(&again), comparable(&undisturbed));
        group.stop().await;
    });
}

pub(crate) fn stop_and_a_lost_parent() {
    run(async {
        let group = Group::start(FIXTURE).await;
        group.stop().await;
        let mut group = Group::start(FIXTURE).await;
        group.form().await;
        for rank in &mut group.ranks {
            rank.process.hang_up();
            assert_eq!(rank.exit_code().await, Some(1));
        }
        // A coordinator that closes the link instead of saying stop is gone as well.
        let mut group = Group::start(FIXTURE).await;
        for rank in &mut group.ranks {
            rank.sender.close("gone");
            assert_eq!(rank.exit_code().await, Some(1));
        }
    });
}

pub(crate) fn a_missing_model() {
    run(async {
        let mut listener = Listener::bind(std::net::Ipv4Addr::LOCALHOST.into()).expect("a port");
        let mut shard = Shard::start(&mut listener, 0).await;
        let model = ModelLocation::Directory("/nowhere/at/all".to_owned());
        shard
            .say(ToShard::Load(topology::wire::Load {
                model,
                ..load(FIXTURE)
            }))
            .await;
        assert_fails(
            &mut shard,
            "the model directory /nowhere/at/all does not exist",
        )
        .await;

        let mut shard = Shard::start(&mut listener, 0).await;
        let tensor_parallel_size = 3;
        shard
            .say(ToShard::Load(topology::wire::Load {
                tensor_parallel_size,
                ..load(FIXTURE)
            }))
            .await;
        assert_fails(&mut shard, "--tensor-parallel-size can be").await;

        // Every number is a GPU to the emulation.
        if !cfg!(feature = "cuda-emulation") {
            a_missing_gpu(&listener).await;
        }
    });
}

/// Without CUDA in the build, or without a second GPU or any on the machine.
async fn a_missing_gpu(listener: &Listener) {
    let gpu = topology::placement::Device::Gpu { index: 1, ranks: 1 };
    let mut process = Shard::spawn(listener, 0, gpu).await;
    let mut lines = process.lines.take().expect("nobody took them");
    let ended = tokio::time::timeout(PATIENCE, process.wait())
        .await
        .expect("in time");
    assert_eq!(ended.expect("a status").code(), Some(1));
    let mut said = String::new();
    while let Some(line) = lines.recv().await {
        said.push_str(&line);
    }
    assert!(said.contains("GPU 1"), "{said}");
}

pub(crate) fn a_bad_plan() {
    run(async {
        let mut group = Group::start(FIXTURE).await;
        group.form().await;
        let mut plan = group.plan(&PROMPT, 0);
        plan.rows[0].tokens[2] = 100_000;
        group.ranks[0].say(ToShard::Run(Box::new(plan))).await;
        assert_fails(
            &mut group.ranks[0],
            "row 0 of the plan has 100000 among its tokens",
        )
        .await;
        // Out of order.
        group.plan(&PROMPT, 0);
        let plan = group.plan(&PROMPT, 0);
        group.ranks[1].say(ToShard::Run(Box::new(plan))).await;
        assert_fails(&mut group.ranks[1], "step 2 arrived where step 0 was due").await;
    });
}

/// The shard says why, and ends with 1.
async fn assert_fails(shard: &mut Shard, sentence: &str) {
    let reason = loop {
        match shard.hear().await {
            FromShard::Progress { .. } => {}
            FromShard::Failed { reason } => break reason,
            other => panic!("no failure but {other:?}"),
        }
    };
    assert!(reason.contains(sentence), "{reason}");
    assert_eq!(shard.exit_code().await, Some(1));
}
