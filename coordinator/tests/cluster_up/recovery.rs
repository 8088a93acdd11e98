//! Shards die, freeze and die again; no request is lost, no token repeated, no process left over.
//!
//! Every test compares with the text of an undisturbed run. `CHAOS_KILLS`, `CHAOS_FREEZES` and `CHAOS_SEED`
//! make two of them longer (`scripts/chaos.sh` does).

use crate::client::{Stream, endless, metric, request};
use crate::process::{Cluster, is_running, send_signal, until};
use crate::turn;
use coordinator::clock;
use rustix::process::Signal;
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const COMPLETIONS: &str = "/v1/completions";

/// Streams of one round: half greedy, half sampled with a seed of their own.
const STREAMS: usize = 64;

/// What the project promises from a kill to the next token, for 99 of 100.
const RESUME_LIMIT: Duration = Duration::from_secs(2);

/// What it promises where several shards die, at once or while the group is formed again.
const SEVERAL_LIMIT: Duration = Duration::from_secs(4);

/// What it promises from a fault to `/health` telling of it.
const HEALTH_LIMIT: Duration = Duration::from_secs(3);

/// What it promises where a shard does not die but freezes, which takes time to notice.
const FREEZE_LIMIT: Duration = Duration::from_secs(5);

/// A stream of `tokens` tokens; every second one is sampled.
pub(crate) fn body(index: usize, tokens: u32) -> Value {
    let names = ["Tom", "Lily", "Ben", "Anna", "Max", "Mia", "Sam", "Zoe"];
    let things = ["ball", "dog", "cat", "boat", "tree", "bird", "hat", "cake"];
    let (name, thing) = (names[index % 8], things[index / 8 % 8]);
    let mut body = endless(&format!("Once upon a time {name} had a {thing}."), tokens);
    if index % 2 == 1 {
        body["temperature"] = 0.8.into();
        body["seed"] = index.into();
    }
    body
}

/// All text of a stream that must end in order.
fn listen(stream: Stream) -> String {
    let (text, last) = stream.read_to_end();
    assert_eq!(last, "[DONE]", "after {text:?}");
    text
}

/// Streams of `tokens` tokens each, at once.
pub(crate) fn round(address: SocketAddr, streams: usize, tokens: u32) -> Vec<String> {
    let streams: Vec<_> = (0..streams)
        .map(|index| {
            let body = body(index, tokens);
            thread::spawn(move || listen(Stream::open(address, COMPLETIONS, body)))
        })
        .collect();
    streams
        .into_iter()
        .map(|stream| stream.join().expect("a stream was lost"))
        .collect()
}

pub(crate) fn recoveries(cluster: &Cluster) -> f64 {
    metric(cluster.address, "cluster_recoveries_total", "")
}

#[expect(
    clippy::disallowed_methods,
    reason = "scripts/chaos.sh and soak.sh make tests longer"
)]
pub(crate) fn number(name: &str, otherwise: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(otherwise, |text| text.parse().expect("it is a number"))
}

/// What a killer did.
#[derive(Default)]
struct Kills {
    done: u64,
    /// From a kill to the next token of any stream, for those kills that were not followed at once by
    /// another.
    resumed: Vec<Duration>,
}

/// Kills one shard at a time at random moments until told to stop, or `kills` are done.
fn kill_at_random(
    cluster: &Cluster,
    rng: &mut fastrand::Rng,
    kills: u64,
    stop: &AtomicBool,
) -> Kills {
    let tokens = || metric(cluster.address, "vllm:generation_tokens_total", "");
    let mut killed = Kills::default();
    let mut formed = recoveries(cluster);
    while killed.done < kills && !stop.load(Ordering::SeqCst) {
        let shards = cluster.children();
        let victim = shards[rng.usize(..shards.len())];
        send_signal(victim, Signal::KILL);
        let begun = clock::now();
        killed.done += 1;
        formed += 1.0;
        until("the group is formed again", || {
            recoveries(cluster) >= formed
        });
        let known = tokens();
        let after = cluster.children();
        assert_eq!(after.len(), shards.len());
        for survivor in shards.iter().filter(|pid| **pid != victim) {
            assert!(after.contains(survivor), "survivors keep their processes");
        }
        // Often before the new group has computed anything; but for ever so would be given up.
        if rng.bool() {
            until("a token is computed, or all are", || {
                tokens() > known || stop.load(Ordering::SeqCst)
            });
            killed.resumed.push(clock::since(begun));
        }
        thread::sleep(Duration::from_millis(rng.u64(..200)));
    }
    killed
}

#[test]
fn random_kills_under_64_streams_lose_nothing() {
    let _turn = turn();
    let (kills, seed) = (number("CHAOS_KILLS", 20), number("CHAOS_SEED", 1));
    println!("{kills} kills, seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let cluster = Cluster::start(&["--tensor-parallel-size", "2"]);
    let golden = round(cluster.address, STREAMS, 200);
    let (mut done, mut resumed, mut requests) = (0, Vec::new(), 0);
    while done < kills {
        let ended = AtomicBool::new(false);
        let left = kills - done;
        let told = thread::scope(|scope| {
            let killer = scope.spawn(|| kill_at_random(&cluster, &mut rng, left, &ended));
            let told = round(cluster.address, STREAMS, 200);
            ended.store(true, Ordering::SeqCst);
            let killed = killer.join().expect("the group is always formed again");
            done += killed.done;
            resumed.extend(killed.resumed);
            told
        });
        assert_eq!(told, golden);
        requests += told.len();
    }
    resumed.sort();
    let p99 = resumed[resumed.len() * 99 / 100];
    println!(
        "{requests} requests, {done} kills: 0 lost, 0 repeated; kill to next token: median {:.0?}, p99 {:.0?} of {}",
        resumed[resumed.len() / 2],
        p99,
        resumed.len(),
    );
    assert!(p99 < RESUME_LIMIT, "{p99:?}");
    assert!(metric(cluster.address, "cluster_kv_tokens", "used") < 0.5);
    cluster.stop();
}

/// Disturbs running rounds of 8 streams, each in one way, and expects the text of an undisturbed one. The longest time
/// from the beginning of a disturbance to the next token after its end.
pub(crate) fn undisturbed_by(arguments: &[&str], disturbances: &[&dyn Fn(&Cluster)]) -> Duration {
    let cluster = Cluster::start(arguments);
    let golden = round(cluster.address, 8, 400);
    let address = cluster.address;
    let tokens = || metric(address, "vllm:generation_tokens_total", "");
    let mut longest = Duration::ZERO;
    for disturb in disturbances {
        let before = recoveries(&cluster);
        let told = thread::spawn(move || round(address, 8, 400));
        until("it streams", || {
            metric(address, "vllm:num_requests_running", "") > 7.5
        });
        let begun = clock::now();
        disturb(&cluster);
        let known = tokens();
        until("a token is computed, or all are", || {
            tokens() > known || told.is_finished()
        });
        longest = longest.max(clock::since(begun));
        assert_eq!(told.join().expect("a stream was lost"), golden);
        assert!(recoveries(&cluster) > before, "it was disturbed");
        until("it is ready", || {
            request(address, "GET", "/ready", "").0 == 200
        });
    }
    cluster.stop();
    longest
}

#[test]
fn all_shards_but_one_may_die_at_once_and_all_too() {
    let _turn = turn();
    let kill_all_but = |cluster: &Cluster, spared: usize| {
        for shard in &cluster.children()[spared..] {
            send_signal(*shard, Signal::KILL);
        }
    };
    let resumed = undisturbed_by(
        &["--tensor-parallel-size", "4"],
        &[&|it| kill_all_but(it, 1), &|it| kill_all_but(it, 0)],
    );
    println!("next token after {resumed:.1?} at most");
    assert!(resumed < SEVERAL_LIMIT, "{resumed:?}");
}

#[test]
fn a_replacement_may_die_too() {
    let _turn = turn();
    let kill_replacements = |cluster: &Cluster| {
        let mut known = cluster.children();
        send_signal(known[0], Signal::KILL);
        for _ in 0..3 {
            let mut new = None;
            until("a replacement is there", || {
                let mut children = cluster.children().into_iter();
                new = children.find(|pid| !known.contains(pid));
                new.is_some()
            });
            let new = new.expect("found above");
            known.push(new);
            send_signal(new, Signal::KILL);
        }
    };
    let resumed = undisturbed_by(&["--tensor-parallel-size", "2"], &[&kill_replacements]);
    println!("next token after {resumed:.1?}");
    assert!(resumed < SEVERAL_LIMIT, "{resumed:?}");
}

#[test]
fn a_frozen_shard_is_replaced_and_health_tells_the_truth() {
    let _turn = turn();
    let (times, seed) = (number("CHAOS_FREEZES", 1), number("CHAOS_SEED", 1));
    println!("{times} times, seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let cluster = Cluster::start(&["--tensor-parallel-size", "2"]);
    let address = cluster.address;
    let golden = round(address, 8, 400);
    let (mut noticed, mut resumed) = (Vec::new(), Vec::new());
    for _ in 0..times {
        let told = thread::spawn(move || round(address, 8, 400));
        until("it streams", || {
            metric(address, "vllm:num_requests_running", "") > 7.5
        });
        thread::sleep(Duration::from_millis(rng.u64(..200)));
        let frozen = cluster.children()[rng.usize(..2)];
        let before = recoveries(&cluster);
        let begun = clock::now();
        send_signal(frozen, Signal::STOP);
        let health = || request(address, "GET", "/health", "").0;
        until("health tells", || health() == 503);
        noticed.push(clock::since(begun));
        until("it is replaced", || recoveries(&cluster) > before);
        let known = metric(address, "vllm:generation_tokens_total", "");
        until("a token is computed, or all are", || {
            metric(address, "vllm:generation_tokens_total", "") > known || told.is_finished()
        });
        resumed.push(clock::since(begun));
        assert!(!is_running(frozen), "it cannot come back");
        assert_eq!(told.join().expect("a stream was lost"), golden);
        until("it is healthy", || health() == 200);
    }
    noticed.sort();
    resumed.sort();
    let last = noticed.len() * 99 / 100;
    let (noticed, resumed) = (noticed[last], resumed[last]);
    println!(
        "0 lost, 0 repeated; noticed after {noticed:.1?}, next token after {resumed:.1?} (p99)"
    );
    assert!(noticed < HEALTH_LIMIT, "{noticed:?}");
    assert!(resumed < FREEZE_LIMIT, "{resumed:?}");
    cluster.stop();
}

#[test]
fn a_shard_that_dies_while_nobody_asks_is_replaced() {
    let _turn = turn();
    let cluster = Cluster::start(&["--tensor-parallel-size", "2"]);
    let golden = round(cluster.address, 4, 50);
    for shard in 0..2 {
        let before = recoveries(&cluster);
        send_signal(cluster.children()[shard], Signal::KILL);
        until("it is replaced", || recoveries(&cluster) > before);
    }
    assert_eq!(round(cluster.address, 4, 50), golden);
    cluster.stop();
}
