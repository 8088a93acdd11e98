//! `cluster run-batch` against a cluster, either of which dies on the way.

use crate::client::{get, post, request};
use crate::process::{Cluster, RUN_DIR, command, finish, run, until};
use crate::turn;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::thread;
use tempfile::TempDir;

const COMPLETIONS: &str = "/v1/completions";

/// A directory with a file of `count` requests, and their bodies by `custom_id`.
fn batch(count: usize, max_tokens: u32) -> (TempDir, BTreeMap<String, Value>) {
    let dir = tempfile::tempdir().expect("a directory");
    let mut bodies = BTreeMap::new();
    let mut text = String::new();
    for index in 0..count {
        let body = json!({
            "prompt": format!("Once upon a time there were {index} dogs."), "max_tokens": max_tokens,
            "ignore_eos": true, "temperature": 0.8, "seed": index,
        });
        let id = format!("request-{index}");
        let line = json!({"custom_id": id, "method": "POST", "url": COMPLETIONS, "body": body});
        text += &line.to_string();
        text.push('\n');
        bodies.insert(id, body);
    }
    fs::write(dir.path().join("in.jsonl"), text).expect("it can be written");
    (dir, bodies)
}

fn arguments(dir: &TempDir, more: &[&str]) -> Vec<String> {
    let path = |name| dir.path().join(name).display().to_string();
    let files = [
        "run-batch".into(),
        "-i".into(),
        path("in.jsonl"),
        "-o".into(),
        path("out.jsonl"),
    ];
    files
        .into_iter()
        .chain(more.iter().map(ToString::to_string))
        .collect()
}

fn run_batch(dir: &TempDir, more: &[&str]) -> (i32, String, String) {
    let arguments = arguments(dir, more);
    run(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

fn start_batch(dir: &TempDir, more: &[&str]) -> Child {
    let arguments = arguments(dir, more);
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let mut batch = command(&arguments);
    let batch = batch
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    batch.spawn().expect("the binary runs")
}

fn out(dir: &TempDir) -> PathBuf {
    dir.path().join("out.jsonl")
}

/// Whole lines of the output so far.
fn answered(dir: &TempDir) -> usize {
    fs::read_to_string(out(dir))
        .unwrap_or_default()
        .matches('\n')
        .count()
}

/// Every request was answered once, with the text that it gets when asked alone.
fn check(dir: &TempDir, bodies: &BTreeMap<String, Value>, golden: &BTreeMap<String, Value>) {
    let text = fs::read_to_string(out(dir)).expect("it is there");
    let mut seen = BTreeSet::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).expect("every line is JSON");
        let id = line["custom_id"].as_str().expect("a text").to_owned();
        assert_eq!(line["response"]["status_code"], 200, "{line}");
        assert!(line["error"].is_null(), "{line}");
        let text = line["response"]["body"]["choices"][0]["text"].clone();
        assert_eq!(Some(&text), golden.get(&id));
        assert!(seen.insert(id), "twice: {line}");
    }
    assert_eq!(seen.len(), bodies.len());
}

fn golden(cluster: &Cluster, bodies: &BTreeMap<String, Value>) -> BTreeMap<String, Value> {
    let address = cluster.address;
    let ask = |(id, body): &(&String, &Value)| {
        let answer = post(address, COMPLETIONS, body);
        ((*id).clone(), answer["choices"][0]["text"].clone())
    };
    let bodies: Vec<_> = bodies.iter().collect();
    thread::scope(|scope| {
        // Several at a time, which changes no text.
        let asking = bodies
            .chunks(bodies.len().div_ceil(8))
            .map(|part| scope.spawn(move || part.iter().map(ask).collect::<Vec<_>>()));
        let asking: Vec<_> = asking.collect();
        let told = asking.into_iter().map(|it| it.join().expect("it answers"));
        told.flatten().collect()
    })
}

#[test]
fn a_batch_that_is_killed_goes_on_and_answers_each_request_once() {
    let _turn = turn();
    let cluster = Cluster::start(&["-tp", "1"]);
    let (dir, bodies) = batch(60, 60);
    let golden = golden(&cluster, &bodies);
    for kill in 1..=3 {
        let mut batch = start_batch(&dir, &["--max-concurrency", "4"]);
        until("some are answered", || answered(&dir) >= kill * 12);
        batch.kill().expect("it is our child");
        batch.wait().expect("it is our child");
        // What a crash leaves of a line that was being written.
        let mut text = fs::read_to_string(out(&dir)).expect("it is there");
        text.push_str("{\"custom_id\": \"request-");
        fs::write(out(&dir), text).expect("it can be written");
    }
    let before = answered(&dir);
    assert!(before < 60, "it was killed midway");
    let (code, _, stderr) = run_batch(&dir, &[]);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.contains(&format!("{before} of 60 requests are answered already")),
        "{stderr}"
    );
    check(&dir, &bodies, &golden);
    // Nothing is left to do, also over a URL.
    let written = fs::read(out(&dir)).expect("it is there");
    let url = format!("http://{}/v1", cluster.address);
    let (code, _, stderr) = run_batch(&dir, &["--url", &url]);
    assert!(
        code == 0 && stderr.contains("0 requests answered"),
        "{stderr}"
    );
    assert_eq!(fs::read(out(&dir)).expect("it is there"), written);
    cluster.stop();
}

fn line(id: &str, url: &str, body: &Value) -> String {
    let line = json!({"custom_id": id, "method": "POST", "url": url, "body": body});
    format!("{line}\n")
}

#[test]
fn what_is_refused_stands_in_the_output() {
    let _turn = turn();
    let cluster = Cluster::start(&[
        "-tp",
        "1",
        "--api-key",
        "sesame",
        "--max-num-queued-reqs",
        "2",
    ]);
    let (dir, _) = batch(0, 0);
    let chat =
        json!({"messages": [{"role": "user", "content": "What is 7 plus 5?"}], "temperature": 0});
    let mut text = line("chat", "/v1/chat/completions", &chat)
        + &line(
            "bad",
            COMPLETIONS,
            &json!({"prompt": "x", "temperature": -1}),
        )
        + &line("embed", "/v1/embeddings", &json!({}))
        + &line(
            "whole",
            COMPLETIONS,
            &json!({"prompt": "x", "stream": true}),
        );
    // More than may wait: a full queue is waited for.
    for index in 0..20 {
        text += &line(
            &format!("q{index}"),
            COMPLETIONS,
            &json!({"prompt": "Once", "max_tokens": 8}),
        );
    }
    fs::write(dir.path().join("in.jsonl"), &text).expect("it can be written");
    let (code, _, stderr) = run_batch(&dir, &["--api-key", "sesame", "--model", "demo"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.contains("24 requests answered") && stderr.contains("3 of them with an error"),
        "{stderr}"
    );
    let lines: BTreeMap<String, Value> = fs::read_to_string(out(&dir))
        .expect("it is there")
        .lines()
        .map(|line| serde_json::from_str(line).expect("every line is JSON"))
        .map(|line: Value| (line["custom_id"].as_str().expect("a text").to_owned(), line))
        .collect();
    let body = &lines["chat"]["response"]["body"];
    assert_eq!(body["choices"][0]["message"]["content"], "7 plus 5 is 12.");
    let id = lines["chat"]["response"]["request_id"]
        .as_str()
        .expect("a text");
    assert!(
        body["id"].as_str().is_some_and(|long| long.ends_with(id)),
        "{id}"
    );
    for (id, said) in [
        ("bad", "temperature"),
        ("embed", "/v1/completions can be used"),
        ("whole", "stream"),
    ] {
        let line = &lines[id];
        assert_eq!(line["response"]["status_code"], 400, "{line}");
        let message = line["error"]["error"]["message"].as_str().expect("a text");
        assert!(message.contains(said), "{message}");
    }
    cluster.stop();
}

#[test]
fn what_is_wrong_with_the_command_is_no_answer_to_anything() {
    let _turn = turn();
    let cluster = Cluster::start(&["-tp", "1", "--api-key", "sesame"]);
    let (dir, _) = batch(4, 1);
    for (wrong, said) in [
        (["--api-key", "open", "--model", "demo"], "--api-key"),
        (["--api-key", "sesame", "--model", "dmeo"], "`dmeo`"),
    ] {
        let (code, _, stderr) = run_batch(&dir, &wrong);
        assert_eq!(code, 2, "{stderr}");
        let is_said = stderr.contains("0 of 4 requests are answered") && stderr.contains(said);
        assert!(is_said, "{stderr}");
        assert_eq!(answered(&dir), 0);
    }
    // Of the keys in the variable one is enough.
    let arguments = arguments(&dir, &["--model", "demo"]);
    let mut corrected = command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    corrected.env("CLUSTER_API_KEY", "sesame,of-others");
    let (code, _, stderr) = finish(corrected);
    assert!(
        code == 0 && stderr.contains("4 requests answered"),
        "{stderr}"
    );
    assert_eq!(answered(&dir), 4);
    cluster.stop();
}

#[test]
fn what_is_wrong_with_a_batch_is_said_before_anything_is_asked() {
    let _turn = turn();
    let cluster = Cluster::start(&["-tp", "1"]);
    let (dir, _) = batch(1, 1);
    assert_eq!(run_batch(&dir, &[]).0, 0);
    let fails = |more: &[&str], code, said: &str| {
        let (ended, _, stderr) = run_batch(&dir, more);
        assert!(ended == code && stderr.contains(said), "{ended}: {stderr}");
    };
    fails(&["--url", "https://x"], 2, "http://");
    fails(&["--name", "no-such"], 2, "no cluster named");
    fs::write(
        dir.path().join("in.jsonl"),
        line("other", COMPLETIONS, &json!({})),
    )
    .expect("written");
    fails(&[], 2, "which");
    fs::write(dir.path().join("in.jsonl"), "{}\n").expect("written");
    fails(&[], 2, "line 1 of");
    cluster.stop();
}

#[test]
fn a_batch_outlives_the_coordinator() {
    let _turn = turn();
    let name = "batch-adopt";
    // It may not be there.
    let _ = fs::remove_dir_all(PathBuf::from(RUN_DIR).join(name));
    let start = ["--name", name, "-tp", "2"];
    let mut cluster = Cluster::start(&start);
    let shards = cluster.shards.clone();
    let port = cluster.address.port().to_string();
    let (dir, bodies) = batch(60, 100);
    let golden = golden(&cluster, &bodies);
    let mut batch = start_batch(&dir, &["--name", name, "--max-concurrency", "8"]);
    for kill in 1..=2 {
        until("some are answered", || answered(&dir) >= kill * 10);
        cluster.kill();
        // The second one has another port: it is found again by its name.
        let more: &[&str] = if kill == 1 { &["--port", &port] } else { &[] };
        cluster = Cluster::start(&[&start, more].concat());
        assert_eq!(cluster.shards, shards);
    }
    assert!(answered(&dir) < 60, "it was killed midway");
    let mut status = None;
    until("the batch ends", || {
        status = batch.try_wait().expect("it is our child");
        status.is_some()
    });
    assert_eq!(status.and_then(|status| status.code()), Some(0));
    check(&dir, &bodies, &golden);
    assert_eq!(request(cluster.address, "GET", "/ready", "").0, 200);
    assert!(get(cluster.address, "/metrics").contains("cluster_recoveries_total"));
    cluster.stop();
    // Nobody is there any more: it gives up in a sentence and can be run again.
    fs::write(out(&dir), "").expect("written");
    let gone = format!("http://127.0.0.1:{port}");
    let (code, _, stderr) = run_batch(&dir, &["--url", &gone, "--retry-timeout", "1"]);
    assert!(
        code == 1 && stderr.contains("0 of 60 requests are answered; the same command"),
        "{stderr}"
    );
}
