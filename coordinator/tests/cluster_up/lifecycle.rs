//! How it ends: by a signal, by a fault, and never silently.

use crate::client::{Stream, chat, endless, request};
use crate::process::{Cluster, is_running, send_signal, until};
use crate::turn;
use coordinator::clock;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::time::Duration;

const COMPLETIONS: &str = "/v1/completions";

/// Reads an open stream to its end: it must end with an error event that names the rank.
fn ends_with_an_error(stream: Stream, needle: &str) {
    let (_, last) = stream.read_to_end();
    let event: Value = serde_json::from_str(&last).unwrap_or_else(|_| panic!("ended with {last}"));
    let message = event["error"]["message"]
        .as_str()
        .unwrap_or_else(|| panic!("no error: {last}"));
    assert!(message.contains(needle), "{message}");
}

fn streams(cluster: &Cluster, count: usize) -> Vec<Stream> {
    let open = |index| {
        let prompt = format!("Once upon a time {index}");
        let mut stream = Stream::open(cluster.address, COMPLETIONS, endless(&prompt, 1000));
        stream.next().expect("it streams");
        stream
    };
    (0..count).map(open).collect()
}

#[test]
fn without_recovery_a_killed_shard_ends_every_stream_with_an_error_and_the_process_with_1() {
    let _turn = turn();
    let cluster = Cluster::start(&["--max-recovery-attempts", "0"]);
    let streams = streams(&cluster, 3);
    send_signal(cluster.shards[1], Signal::KILL);
    for stream in streams {
        ends_with_an_error(stream, "rank 1: the shard process ended (signal: 9");
    }
    let (status, stderr) = cluster.wait();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("rank 1"), "{stderr}");
}

#[test]
fn without_recovery_a_shard_that_dies_while_idle_ends_the_process() {
    let _turn = turn();
    let cluster = Cluster::start(&[
        "--tensor-parallel-size",
        "4",
        "--max-recovery-attempts",
        "0",
    ]);
    send_signal(cluster.shards[2], Signal::KILL);
    let (status, stderr) = cluster.wait();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("rank 2"), "{stderr}");
}

#[test]
fn a_shard_that_hangs_is_noticed_by_the_steps_deadline() {
    let _turn = turn();
    let cluster = Cluster::start(&["--step-timeout", "1", "--max-recovery-attempts", "0"]);
    let streams = streams(&cluster, 1);
    send_signal(cluster.shards[0], Signal::STOP);
    let begun = clock::now();
    for stream in streams {
        ends_with_an_error(stream, "no answer within 1s (step)");
    }
    let (status, stderr) = cluster.wait();
    assert_eq!(status.code(), Some(1), "{stderr}");
    let took = clock::since(begun);
    assert!(took < Duration::from_secs(15), "it took {took:?}");
}

#[test]
fn shards_do_not_outlive_a_killed_coordinator() {
    let _turn = turn();
    let cluster = Cluster::start(&["-tp", "2", "--shard-grace-period", "0"]);
    let shards = cluster.shards.clone();
    cluster.kill();
    until("no shard is left behind", || {
        !shards.iter().any(|pid| is_running(*pid))
    });
}

#[test]
fn sigterm_finishes_what_runs_and_takes_nothing_new() {
    let _turn = turn();
    let cluster = Cluster::start(&[]);
    let mut body = endless("Once", 800);
    body["stream_options"] = json!({"include_usage": true});
    let mut stream = Stream::open(cluster.address, COMPLETIONS, body);
    for _ in 0..3 {
        stream.next().expect("it streams");
    }
    cluster.signal(Signal::TERM);
    until("it drains", || {
        request(cluster.address, "GET", "/ready", "").0 == 503
    });
    let body = chat("Hello", 4).to_string();
    let (status, body) = request(cluster.address, "POST", "/v1/chat/completions", &body);
    assert_eq!(status, 503, "{body}");
    let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
    let [.., usage, done] = &*events else {
        panic!("it ended after {events:?}");
    };
    assert_eq!(done, "[DONE]");
    assert!(usage.contains("\"completion_tokens\":800"), "{usage}");
    let (status, stderr) = cluster.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
}

#[test]
fn what_does_not_finish_in_time_is_told_so_and_the_exit_code_is_0() {
    let _turn = turn();
    let cluster = Cluster::start(&["--shutdown-timeout", "0"]);
    let streams = streams(&cluster, 2);
    cluster.signal(Signal::INT);
    for stream in streams {
        ends_with_an_error(stream, "shutting down");
    }
    let (status, stderr) = cluster.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let _turn = turn();
    let cluster = Cluster::start(&[]);
    let _streams = streams(&cluster, 1);
    cluster.signal(Signal::INT);
    std::thread::sleep(Duration::from_millis(100));
    cluster.signal(Signal::INT);
    let (status, stderr) = cluster.wait();
    assert_eq!(status.code(), Some(130), "{stderr}");
    assert!(
        !stderr.contains("ERROR"),
        "what was asked for is no error: {stderr}"
    );
}

/// A terminal that goes away says so to everyone in it, more than once.
#[test]
fn a_hangup_finishes_what_runs() {
    let _turn = turn();
    let cluster = Cluster::start(&["--log-format", "json", "--log-level", "info"]);
    let mut stream = Stream::open(cluster.address, COMPLETIONS, endless("Once", 300));
    stream.next().expect("it streams");
    for _ in 0..3 {
        cluster.signal(Signal::HUP);
        std::thread::sleep(Duration::from_millis(10));
    }
    let last = std::iter::from_fn(|| stream.next()).last();
    assert_eq!(last.as_deref(), Some("[DONE]"));
    let (status, stderr) = cluster.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
    for line in stderr.lines() {
        let event: Result<Value, _> = serde_json::from_str(line);
        assert!(event.is_ok(), "not JSON: {line}");
    }
}
