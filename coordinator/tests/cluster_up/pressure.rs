//! Too much at once: more requests than there is room for, clients that do not read, clients that come and go.
//!
//! Whoever was accepted is served to the end with the text it gets alone, whoever is not is told so at once, and
//! afterwards nothing is held. `SOAK_REQUESTS`, `SOAK_SEED` and `SOAK_FAULTS` make the last test longer and kill a
//! shard now and then (`scripts/soak.sh` does).

use crate::client::{Stream, endless, get, metric, request};
use crate::process::{Cluster, send_signal, until};
use crate::recovery::number;
use crate::turn;
use coordinator::clock;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const COMPLETIONS: &str = "/v1/completions";

/// Nothing runs, nothing waits, no block is held.
fn is_idle(address: SocketAddr) -> bool {
    let none = |name, label| metric(address, name, label) < 0.5;
    none("vllm:num_requests_running", "")
        && none("vllm:num_requests_waiting", "")
        && none("cluster_kv_tokens", "used")
}

/// Memory that a process holds, in KiB.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|it| it.parse().ok()).expect("a size")
}

/// Asks for `/health` until `done`; how long the answers took, shortest first.
fn watch_health(address: SocketAddr, done: &AtomicBool) -> Vec<Duration> {
    let mut times = Vec::new();
    while !done.load(Ordering::Relaxed) {
        let begun = clock::now();
        get(address, "/health");
        times.push(clock::since(begun));
        thread::sleep(Duration::from_millis(20));
    }
    times.sort_unstable();
    times
}

/// The text of an answer to `/v1/completions`.
fn text(answer: &str) -> Value {
    let mut answer: Value = serde_json::from_str(answer).expect("the answer is JSON");
    answer["choices"][0]["text"].take()
}

#[test]
fn ten_times_too_many_requests_are_refused_quickly_and_the_rest_is_served() {
    const ASKING: usize = 80;
    const RUNNING: usize = 4;
    const QUEUED: usize = 8;
    let _turn = turn();
    let limits = [RUNNING, QUEUED].map(|limit| limit.to_string());
    let cluster = Cluster::start(&[
        "--max-num-seqs",
        &limits[0],
        "--max-num-queued-reqs",
        &limits[1],
    ]);
    let address = cluster.address;
    let mut body = endless("Once upon a time", 40);
    body["stream"] = false.into();
    let (_, alone) = request(address, "POST", COMPLETIONS, &body.to_string());
    let before = resident(cluster.pid());
    let done = AtomicBool::new(false);
    let (answers, health) = thread::scope(|scope| {
        let health = scope.spawn(|| watch_health(address, &done));
        let queue = scope.spawn(|| {
            let mut most: f64 = 0.0;
            while !done.load(Ordering::Relaxed) {
                most = most.max(metric(address, "vllm:num_requests_waiting", ""));
            }
            most
        });
        let ask = || {
            let ask = |_| {
                let begun = clock::now();
                let (status, answer) = request(address, "POST", COMPLETIONS, &body.to_string());
                (status, answer, clock::since(begun))
            };
            (0..6).map(ask).collect::<Vec<_>>()
        };
        let asking: Vec<_> = (0..ASKING).map(|_| scope.spawn(ask)).collect();
        let answers = asking
            .into_iter()
            .flat_map(|it| it.join().expect("it is answered"));
        let answers: Vec<_> = answers.collect();
        done.store(true, Ordering::Relaxed);
        let waited = queue.join().expect("metrics are read");
        assert!(waited < QUEUED as f64 + 0.5, "{waited} waited");
        (answers, health.join().expect("it is healthy throughout"))
    });
    let mut refusals = Vec::new();
    for (status, answer, took) in &answers {
        match status {
            200 => assert_eq!(text(answer), text(&alone)),
            429 => refusals.push(*took),
            other => panic!("{other}: {answer}"),
        }
    }
    refusals.sort_unstable();
    let served = answers.len() - refusals.len();
    let half = refusals[refusals.len() / 2];
    let slow = health[health.len() * 99 / 100];
    let grown = resident(cluster.pid()).saturating_sub(before);
    println!(
        "{served} served, {} refused within {half:?} (median), /health within {slow:?} (p99), {grown} KiB more",
        refusals.len()
    );
    assert!(refusals.len() > ASKING, "too many were not too many");
    assert!(served >= RUNNING + QUEUED, "only {served} were served");
    assert!(half <= Duration::from_millis(100), "refused after {half:?}");
    assert!(slow <= Duration::from_secs(1), "/health after {slow:?}");
    assert!(grown <= 64 << 10, "{grown} KiB more");
    until("nothing is held", || is_idle(address));
    cluster.stop();
}

#[test]
fn clients_that_do_not_read_hold_nobody_up() {
    let _turn = turn();
    let cluster = Cluster::start(&["--max-logprobs", "20"]);
    let address = cluster.address;
    let whole = || Stream::open(address, COMPLETIONS, endless("The sun was up", 200)).read_to_end();
    let alone = whole();
    let before = resident(cluster.pid());
    // Many, and few with the longest answers there are.
    let (many, mut long) = (
        endless("Once upon a time", 900),
        endless("Once upon a time", 400),
    );
    long["n"] = 4.into();
    long["logprobs"] = 20.into();
    for (clients, body, most_each) in [(64, many, 64), (8, long, 8 << 10)] {
        let silent: Vec<_> = (0..clients)
            .map(|_| Stream::open(address, COMPLETIONS, body.clone()))
            .collect();
        for _ in 0..3 {
            assert_eq!(whole(), alone);
        }
        until("all of their tokens are computed", || {
            metric(address, "vllm:num_requests_running", "") < 0.5
        });
        let grown = resident(cluster.pid()).saturating_sub(before);
        println!("{grown} KiB for {clients} clients that do not read");
        assert!(grown <= clients * most_each, "{grown} KiB more");
        drop(silent);
        until("nothing is held", || is_idle(address));
    }
    assert_eq!(whole(), alone);
    cluster.stop();
}

/// What clients that come and go did.
#[derive(Default)]
struct Traffic {
    finished: AtomicU64,
    left: AtomicU64,
}

/// One client: asks, often leaves half-way, asks the same again. Whoever stays gets the text of that request.
fn come_and_go(address: SocketAddr, texts: &BTreeMap<usize, String>, seed: u64, traffic: &Traffic) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let index = rng.usize(..texts.len());
    let mut stream = Stream::open(address, COMPLETIONS, shared(index));
    if rng.u8(..3) > 0 {
        for _ in 0..rng.usize(..8) {
            stream.next().expect("it goes on");
        }
        drop(stream);
        traffic.left.fetch_add(1, Ordering::Relaxed);
        stream = Stream::open(address, COMPLETIONS, shared(index));
    }
    let (text, last) = stream.read_to_end();
    assert_eq!((&text, &*last), (&texts[&index], "[DONE]"), "seed {seed}");
    traffic.finished.fetch_add(1, Ordering::Relaxed);
}

/// Prompts of which each is the beginning of others, cut inside and at the end of blocks.
fn shared(index: usize) -> Value {
    let story =
        "Once upon a time there was a little dog named Max who lived in a red house with a boy.";
    let words: Vec<&str> = story.split(' ').collect();
    let cut = 3 + index % (words.len() - 3);
    let tokens = [24, 32, 40, 48, 56][index % 5];
    let mut body = endless(&words[..cut].join(" "), tokens);
    if index % 2 == 1 {
        body["temperature"] = 0.9.into();
        body["seed"] = index.into();
    }
    body
}

/// Kills a shard now and then, until `done`.
fn disturb(cluster: &Cluster, faults: u64, seed: u64, done: &AtomicBool) {
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..faults {
        for _ in 0..rng.u64(50..150) {
            if done.load(Ordering::Relaxed) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let shards = cluster.children();
        send_signal(shards[rng.usize(..shards.len())], Signal::KILL);
    }
}

/// Cancelled requests give blocks back that others share; a block given back twice, or too early, would show in
/// somebody's text. The cache is small, so that blocks are evicted all the time.
#[test]
fn clients_that_come_and_go_change_nobody_s_text() {
    const CLIENTS: usize = 12;
    let _turn = turn();
    let (requests, seed) = (number("SOAK_REQUESTS", 300), number("SOAK_SEED", 1));
    let faults = number("SOAK_FAULTS", 0);
    println!("{requests} requests, {faults} faults, seed {seed}");
    let small = ["--block-size", "4", "--num-gpu-blocks-override", "70"];
    let cluster = Cluster::start(&[&small[..], &["--max-model-len", "256"]].concat());
    let address = cluster.address;
    let alone = |index| {
        Stream::open(address, COMPLETIONS, shared(index))
            .read_to_end()
            .0
    };
    let texts: BTreeMap<usize, String> = (0..32).map(|index| (index, alone(index))).collect();
    let (traffic, next) = (Traffic::default(), AtomicU64::new(0));
    let (done, after_warm_up) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let disturbing = scope.spawn(|| disturb(&cluster, faults, seed, &done));
        let client = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number == requests / 4 {
                    after_warm_up.store(resident(cluster.pid()), Ordering::Relaxed);
                }
                if number >= requests {
                    return;
                }
                come_and_go(address, &texts, seed + number, &traffic);
            }
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        for client in clients {
            client.join().expect("no stream is lost");
        }
        done.store(true, Ordering::Relaxed);
        disturbing.join().expect("it ends");
    });
    let grown = resident(cluster.pid()).saturating_sub(after_warm_up.into_inner());
    let [finished, left] = [&traffic.finished, &traffic.left].map(|it| it.load(Ordering::Relaxed));
    let evicting = metric(address, "vllm:num_preemptions_total", "");
    println!(
        "{finished} finished, {left} left, {evicting} preemptions, {grown} KiB more after a quarter"
    );
    assert_eq!(finished, requests);
    assert!(evicting > 0.5, "blocks were never short");
    assert!(left > requests / 3, "only {left} went away");
    assert!(grown <= (8 << 10) + requests / 100, "{grown} KiB more");
    until("nothing is held", || is_idle(address));
    for (index, text) in &texts {
        assert_eq!(alone(*index), *text, "afterwards, request {index}");
    }
    cluster.stop();
}
