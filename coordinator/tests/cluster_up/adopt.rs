//! The coordinator dies, and another one goes on with its shards; or nobody does, and nothing is left.
//!
//! That nothing was loaded again is read from the shards' own log. `CHAOS_COORDINATOR_KILLS` and `CHAOS_SEED`
//! make the first test longer (`scripts/chaos.sh --coordinator` does).

use crate::client::{Stream, post, request};
use crate::process::{Cluster, RUN_DIR, is_running, run, send_signal, until};
use crate::recovery::{body, number, recoveries, round};
use crate::turn;
use coordinator::clock;
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

const COMPLETIONS: &str = "/v1/completions";

/// What the project promises from a new coordinator's start to `/ready`.
const READY_LIMIT: Duration = Duration::from_secs(3);

fn start(name: &str, more: &[&str]) -> Cluster {
    let named = ["--name", name, "--tensor-parallel-size", "2"];
    Cluster::start(&[&named, more].concat())
}

/// How often weights were loaded, by shard.
pub(crate) fn loads(name: &str, shards: u32) -> Vec<usize> {
    let rank = |rank| {
        let log = format!("{RUN_DIR}/{name}/logs/rank-{rank}.log");
        let log = fs::read_to_string(log).unwrap_or_default();
        log.matches(" is loaded").count()
    };
    (0..shards).map(rank).collect()
}

/// A new name, so that no test finds what another one left.
pub(crate) fn forget(name: &str) {
    // It may not be there.
    let _ = fs::remove_dir_all(Path::new(RUN_DIR).join(name));
}

pub(crate) fn status(name: &str) -> (i32, Value) {
    let (code, stdout, stderr) = run(&["status", "--json", "--name", name]);
    let status = serde_json::from_str(&stdout);
    (code, status.unwrap_or_else(|_| panic!("{stdout}{stderr}")))
}

pub(crate) fn all_gone(shards: &[u32]) {
    until("no shard is left behind", || {
        !shards.iter().any(|pid| is_running(*pid))
    });
}

/// Streams that are under way, each of which gives its last event when it is cut off.
pub(crate) fn load(address: SocketAddr, streams: usize) -> Vec<thread::JoinHandle<String>> {
    let begun = Arc::new(Barrier::new(streams + 1));
    let open = |index| {
        let begun = begun.clone();
        thread::spawn(move || {
            let mut stream = Stream::open(address, COMPLETIONS, body(index, 900));
            stream.next().expect("it streams");
            begun.wait();
            stream.read_to_end().1
        })
    };
    let streams = (0..streams).map(open).collect();
    begun.wait();
    streams
}

/// Whether both shards say that they wait.
fn are_waiting(name: &str) -> bool {
    let notice = |rank| Path::new(RUN_DIR).join(format!("{name}/logs/rank-{rank}.held"));
    (0..2).all(|rank| notice(rank).exists())
}

#[test]
fn a_killed_coordinator_is_followed_by_one_that_loads_nothing() {
    let _turn = turn();
    let name = "adopt-cycles";
    forget(name);
    let (kills, seed) = (
        number("CHAOS_COORDINATOR_KILLS", 3),
        number("CHAOS_SEED", 1),
    );
    println!("{kills} kills, seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut cluster = start(name, &[]);
    let golden = round(cluster.address, 16, 60);
    let shards = cluster.shards.clone();
    let port = cluster.address.port().to_string();
    let mut took = Vec::new();
    for kill in 0..kills {
        let address = cluster.address;
        let open = load(address, 64);
        thread::sleep(Duration::from_millis(rng.u64(..300)));
        cluster.kill();
        for stream in open {
            let last = stream.join().expect("it is only cut off");
            assert_ne!(last, "[DONE]", "the longest was still under way");
        }
        assert!(shards.iter().all(|shard| is_running(*shard)));
        let begun = clock::now();
        // Now and then shards have noticed long before somebody comes.
        thread::sleep(Duration::from_millis(if rng.bool() { 0 } else { 800 }));
        let adopt = ["--port", &port, "--adopt"];
        let begun = if kill % 2 == 0 {
            clock::now()
        } else {
            begun.max(clock::now())
        };
        cluster = start(name, if kill % 2 == 0 { &adopt } else { &adopt[..2] });
        assert_eq!(request(cluster.address, "GET", "/ready", "").0, 200);
        took.push(clock::since(begun));
        assert_eq!(cluster.shards, shards, "shards keep their processes");
        let (_, said) = status(name);
        assert_eq!(
            said["models"][0]["queue"]["running"], 0,
            "nothing is half alive: {said}"
        );
        assert_eq!(round(cluster.address, 16, 60), golden);
        // A fault after that is one like any other.
        if kill + 1 == kills {
            let before = recoveries(&cluster);
            send_signal(shards[1], Signal::KILL);
            until("it is replaced", || recoveries(&cluster) > before);
            assert_eq!(round(cluster.address, 16, 60), golden);
        }
    }
    took.sort();
    println!(
        "from a new coordinator's start to /ready: median {:.0?}, longest {:.0?} of {}",
        took[took.len() / 2],
        took[took.len() - 1],
        took.len()
    );
    assert!(took[took.len() - 1] < READY_LIMIT, "{took:?}");
    assert_eq!(
        loads(name, 2),
        [1, 2],
        "only what was killed was loaded again"
    );
    cluster.stop();
    all_gone(&shards);
}

#[test]
fn shards_wait_as_long_as_they_may_and_then_nothing_is_left() {
    let _turn = turn();
    let name = "adopt-grace";
    for (seconds, least) in [("0", 0), ("2", 1)] {
        forget(name);
        let cluster = start(name, &["--shard-grace-period", seconds]);
        let shards = cluster.shards.clone();
        cluster.kill();
        let begun = clock::now();
        all_gone(&shards);
        let took = clock::since(begun);
        assert!(took > Duration::from_secs(least), "{took:?}");
        assert!(took < Duration::from_secs(least + 6), "{took:?}");
        let (code, _, stderr) = run(&["up", "--adopt", "--name", name, "--port", "0"]);
        assert!(code == 2 && stderr.contains("nothing to adopt"), "{stderr}");
        let (code, _, stderr) = run(&["status", "--name", name]);
        assert!(code == 2 && stderr.contains("no cluster named"), "{stderr}");
    }
    let (code, _, stderr) = run(&["up", "--adopt", "--port", "0"]);
    assert!(code == 2 && stderr.contains("--name or --port"), "{stderr}");
}

#[test]
fn status_tells_of_shards_that_wait_and_down_ends_them() {
    let _turn = turn();
    let name = "adopt-down";
    forget(name);
    let cluster = start(name, &[]);
    let (pid, shards) = (cluster.pid(), cluster.shards.clone());
    let file = fs::metadata(Path::new(RUN_DIR).join(name).join("legacy-0.json"));
    let mode = file.expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "there is a key in it");
    cluster.kill();
    let mut reason = String::new();
    until("it is known how long they wait", || {
        let (code, said) = status(name);
        assert_eq!((code, &said["state"]), (1, &"orphaned".into()));
        assert_eq!(said["ranks"][1]["pid"], shards[1], "{said}");
        said["reason"]
            .as_str()
            .expect("a text")
            .clone_into(&mut reason);
        reason.contains("more seconds")
    });
    let gone = format!("its process {pid} is gone; 2 of 2 shards hold their weights for");
    assert!(reason.contains(&gone), "{reason}");
    send_signal(shards[0], Signal::KILL);
    until("one is left", || {
        status(name).1["reason"]
            .as_str()
            .is_some_and(|why| why.contains("1 of 2"))
    });
    // One that is frozen does not outlive it either.
    send_signal(shards[1], Signal::STOP);
    let (code, stdout, stderr) = run(&["down", "--name", name]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("1 shards that waited"), "{stdout}");
    assert!(!is_running(shards[1]));
    assert_eq!(run(&["down", "--name", name]).0, 2);
    let (_, logs, _) = run(&["logs", "--name", name, "1"]);
    assert!(
        logs.contains("held for another coordinator for 60 s"),
        "{logs}"
    );
}

#[test]
fn shards_of_a_process_that_lives_are_not_for_others() {
    let _turn = turn();
    let name = "adopt-alive";
    forget(name);
    let cluster = start(name, &[]);
    let golden = round(cluster.address, 4, 50);
    let adopt = || run(&["up", "--adopt", "--name", name, "--port", "0", "-tp", "2"]);
    let (code, _, stderr) = adopt();
    assert!(code == 2 && stderr.contains("has its shards"), "{stderr}");

    // Frozen, it is no less there: nobody takes its place while it could wake up.
    cluster.signal(Signal::STOP);
    let shards = cluster.shards.clone();
    let (code, _, stderr) = adopt();
    assert!(code == 2 && stderr.contains("kill -9"), "{stderr}");
    let (code, _, stderr) = run(&["up", "--name", name, "--port", "0", "-tp", "2"]);
    assert!(code == 2 && stderr.contains("is taken by"), "{stderr}");
    until("its shards have noticed", || are_waiting(name));
    cluster.kill();
    let cluster = start(name, &["--adopt"]);
    assert_eq!(cluster.shards, shards);
    assert_eq!(round(cluster.address, 4, 50), golden);
    cluster.stop();
    all_gone(&shards);
}

#[test]
fn other_settings_begin_afresh_and_say_why() {
    let _turn = turn();
    let name = "adopt-other";
    forget(name);
    let cluster = start(name, &[]);
    let shards = cluster.shards.clone();
    cluster.kill();
    let (code, _, stderr) = run(&[
        "up",
        "--adopt",
        "--name",
        name,
        "--port",
        "0",
        "-tp",
        "2",
        "--max-model-len",
        "512",
    ]);
    assert_eq!(code, 2);
    assert!(
        stderr.contains("max-model-len was 1024, and is 512"),
        "{stderr}"
    );
    assert!(
        shards.iter().all(|pid| is_running(*pid)),
        "they are left alone"
    );
    let cluster = start(name, &["--block-size", "32"]);
    assert!(
        !shards.iter().any(|pid| is_running(*pid)),
        "they are ended first"
    );
    assert!(cluster.shards.iter().all(|pid| !shards.contains(pid)));
    let body = serde_json::json!({"prompt": "Once", "max_tokens": 4});
    post(cluster.address, COMPLETIONS, &body);
    cluster.signal(Signal::TERM);
    let (status, stderr) = cluster.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("block-size was 16, and is 32"), "{stderr}");
}

#[test]
fn a_shard_that_died_too_is_replaced_and_the_other_keeps_its_weights() {
    let _turn = turn();
    let name = "adopt-half";
    forget(name);
    let cluster = start(name, &[]);
    let golden = round(cluster.address, 8, 50);
    let shards = cluster.shards.clone();
    cluster.kill();
    send_signal(shards[0], Signal::KILL);
    let cluster = start(name, &[]);
    assert_eq!(cluster.shards[1], shards[1]);
    assert_ne!(cluster.shards[0], shards[0]);
    assert_eq!(round(cluster.address, 8, 50), golden);
    assert_eq!(loads(name, 2), [2, 1]);
    // Both are taken over again, the one without a pipe and the one with.
    let shards = cluster.shards.clone();
    cluster.kill();
    let cluster = start(name, &["--adopt"]);
    assert_eq!(cluster.shards, shards);
    assert_eq!(round(cluster.address, 8, 50), golden);
    cluster.kill();
    for shard in &shards {
        send_signal(*shard, Signal::KILL);
    }
    all_gone(&shards);
    // Nothing waits any more: it is a start like any other.
    let cluster = start(name, &[]);
    assert_eq!(round(cluster.address, 8, 50), golden);
    cluster.stop();
}
