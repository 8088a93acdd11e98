//! Several models in one cluster: each says what it says alone, and feels nothing of the others' faults.

mod adopt;
mod hosts;

use crate::client::{Stream, endless, get, metric, request};
use crate::process::{Cluster, is_running, run, send_signal, until};
use crate::sockets::nothing_else_listens;
use crate::turn;
use coordinator::clock;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const COMPLETIONS: &str = "/v1/completions";
const STREAMS: usize = 4;
const TOKENS: u32 = 150;
/// Longest pause between two tokens of a model that nothing happens to. A fault of another one that paused it
/// would take longer: it is noticed after two seconds.
const LONGEST_GAP: Duration = Duration::from_millis(1500);

/// Two models that say different things, as directories: the built-in one, and one with a hole in its weights.
struct Pair {
    dir: tempfile::TempDir,
}

impl Pair {
    fn make() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let builtin = Path::new(env!("CARGO_MANIFEST_DIR")).join("builtin");
        for model in ["a", "b"] {
            let own = dir.path().join(model);
            fs::create_dir(&own).expect("a directory");
            for file in [
                "config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "model.safetensors",
            ] {
                fs::copy(builtin.join(file), own.join(file)).expect("it is copied");
            }
        }
        let file = dir.path().join("b/model.safetensors");
        let mut weights = fs::read(&file).expect("it was copied");
        let middle = weights.len() / 2;
        weights[middle..middle + (256 << 10)].fill(0);
        fs::write(file, weights).expect("a file");
        Self { dir }
    }

    fn path(&self, model: &str) -> PathBuf {
        self.dir.path().join(model)
    }

    /// `NAME=DIR`
    fn flag(&self, model: &str) -> String {
        format!("{model}={}", self.path(model).display())
    }

    /// What each says alone, on two ranks.
    fn golden(&self) -> [Vec<String>; 2] {
        ["a", "b"].map(|model| {
            let cluster = Cluster::start(&["--model", &self.flag(model), "-tp", "2"]);
            let told = round(cluster.address, model);
            cluster.stop();
            told
        })
    }

    fn start(&self, more: &[&str]) -> Cluster {
        let (a, b) = (self.flag("a"), self.flag("b"));
        Cluster::start(&[&["--model", &a, "--model", &b, "-tp", "2"], more].concat())
    }
}

fn body(model: &str, index: usize, tokens: u32) -> Value {
    let name = ["Tom", "Lily", "Ben", "Anna"][index % 4];
    let mut body = endless(&format!("Once upon a time {name} had a dog."), tokens);
    body["model"] = model.into();
    if index % 2 == 1 {
        body["temperature"] = 0.8.into();
        body["seed"] = index.into();
    }
    body
}

fn round(address: SocketAddr, model: &str) -> Vec<String> {
    let streams: Vec<_> = (0..STREAMS)
        .map(|index| {
            let body = body(model, index, TOKENS);
            thread::spawn(move || {
                let (text, last) = Stream::open(address, COMPLETIONS, body).read_to_end();
                assert_eq!(last, "[DONE]", "after {text:?}");
                text
            })
        })
        .collect();
    let told = streams
        .into_iter()
        .map(|it| it.join().expect("a stream was lost"));
    told.collect()
}

/// Both at once.
fn rounds(address: SocketAddr) -> [Vec<String>; 2] {
    let told = ["a", "b"].map(|model| thread::spawn(move || round(address, model)));
    told.map(|it| it.join().expect("a stream was lost"))
}

/// Streams of a model, one after the other, until told to stop: the longest pause between two events.
fn longest_gap(address: SocketAddr, model: &str, stop: &AtomicBool) -> Duration {
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::SeqCst) {
        let mut stream = Stream::open(address, COMPLETIONS, body(model, 0, 900));
        let mut last = clock::now();
        while let Some(data) = stream.next() {
            longest = longest.max(clock::since(last));
            last = clock::now();
            if data == "[DONE]" || stop.load(Ordering::SeqCst) {
                break;
            }
        }
    }
    longest
}

fn of(model: &str) -> String {
    format!("model_name=\"{model}\"")
}

fn recoveries(address: SocketAddr, model: &str) -> f64 {
    metric(address, "cluster_recoveries_total", &of(model))
}

#[test]
fn two_models_say_what_each_says_alone_and_feel_nothing_of_each_others_faults() {
    let _turn = turn();
    let pair = Pair::make();
    let golden = pair.golden();
    assert_ne!(golden[0], golden[1], "they are told apart by what they say");
    let cluster = pair.start(&[]);
    let address = cluster.address;
    assert_eq!(rounds(address), golden);
    assert_eq!(cluster.shards.len(), 4);

    // What is killed, and frozen, is of `a`.
    for signal in [Signal::KILL, Signal::STOP] {
        let stop = AtomicBool::new(false);
        let before = recoveries(address, "a");
        let of_a = |pid: &u32| !cluster.shards[2..].contains(pid);
        let victim = cluster
            .children()
            .into_iter()
            .find(of_a)
            .expect("it has shards");
        let gap = thread::scope(|scope| {
            let gap = scope.spawn(|| longest_gap(address, "b", &stop));
            let told = scope.spawn(|| round(address, "a"));
            until("both stream", || {
                ["a", "b"]
                    .iter()
                    .all(|model| metric(address, "vllm:num_requests_running", &of(model)) > 0.5)
            });
            send_signal(victim, signal);
            if signal == Signal::STOP {
                until("health tells whose fault it is", || {
                    let (status, text) = request(address, "GET", "/health", "");
                    status == 503 && text.contains("a: rank")
                });
            }
            until("a goes on", || recoveries(address, "a") > before);
            assert_eq!(told.join().expect("a stream was lost"), golden[0]);
            stop.store(true, Ordering::SeqCst);
            gap.join().expect("b streams")
        });
        println!("longest pause of the other model: {gap:.0?}");
        assert!(gap < LONGEST_GAP, "{gap:?}");
        assert!(recoveries(address, "b") < 0.5, "nothing happened to it");
        assert!(cluster.shards[2..].iter().all(|pid| is_running(*pid)));
        assert!(!is_running(victim));
    }
    assert_eq!(round(address, "b"), golden[1]);
    cluster.stop();
}

#[test]
fn requests_are_routed_by_name_and_everything_tells_models_apart() {
    let _turn = turn();
    let pair = Pair::make();
    let cluster = pair.start(&["--max-model-len", "512"]);
    routing(cluster.address, &pair);
    for model in ["a", "b"] {
        let address = cluster.address;
        assert!(metric(address, "vllm:generation_tokens_total", &of(model)) > 1.5);
        assert!((metric(address, "cluster_ranks_ready", &of(model)) - 2.0).abs() < 0.1);
        assert!(metric(address, "cluster_rank_step_seconds_count", &of(model)) > 0.5);
    }
    operators_view(&cluster);
    nothing_else_listens((cluster.pid(), cluster.address), &cluster.shards, 2);

    // Told to end, both finish what runs.
    let mut streams = ["a", "b"].map(|model| long_stream(cluster.address, model));
    for stream in &mut streams {
        stream.next().expect("it streams");
    }
    cluster.signal(Signal::TERM);
    for stream in streams {
        assert_eq!(stream.read_to_end().1, "[DONE]");
    }
    assert_eq!(cluster.wait().0.code(), Some(0));
}

fn routing(address: SocketAddr, pair: &Pair) {
    let models: Value = serde_json::from_str(&get(address, "/v1/models")).expect("JSON");
    let ids = models["data"].as_array().expect("a list");
    let ids: Vec<_> = ids.iter().map(|model| model["id"].as_str()).collect();
    let dirs = ["a", "b"].map(|model| pair.path(model).display().to_string());
    assert_eq!(ids, [Some("a"), Some(&dirs[0]), Some("b"), Some(&dirs[1])]);
    let ask = |model: Option<&str>| {
        let mut body = json!({"prompt": "Once", "max_tokens": 2});
        if let Some(model) = model {
            body["model"] = model.into();
        }
        request(address, "POST", COMPLETIONS, &body.to_string())
    };
    let (status, text) = ask(Some("c"));
    assert!(
        status == 404 && text.contains("`c` does not exist"),
        "{text}"
    );
    assert!(text.contains("`a`") && text.contains("`b`"), "{text}");
    let (status, text) = ask(None);
    assert!(
        status == 400 && text.contains("name one in `model`"),
        "{text}"
    );
    for (name, shown) in [("b", "b"), (dirs[0].as_str(), "a")] {
        let (status, text) = ask(Some(name));
        let shown = format!("\"model\":\"{shown}\"");
        assert!(status == 200 && text.contains(&shown), "{text}");
    }
    let (status, text) = request(address, "POST", "/tokenize", "{\"prompt\": \"x\"}");
    assert_eq!(status, 400, "{text}");
    let body = "{\"prompt\": \"x\", \"model\": \"b\"}";
    let (status, text) = request(address, "POST", "/tokenize", body);
    let length = "\"max_model_len\":512";
    assert!(status == 200 && text.contains(length), "{text}");
}

fn operators_view(cluster: &Cluster) {
    let port = cluster.address.port().to_string();
    let (code, table, _) = run(&["status", "--port", &port]);
    assert_eq!(code, 0, "{table}");
    for part in [
        "a, b at http",
        "a: ready, epoch 0",
        "b: ready, epoch 0",
        "shard  model  rank",
    ] {
        assert!(table.contains(part), "{part} is not in:\n{table}");
    }
    let rows = table.lines().map(|row| row.split_whitespace().collect());
    let rows: Vec<Vec<&str>> = rows.collect();
    let last = cluster.shards[3].to_string();
    let row = ["3", "b", "1", "localhost", &last, "ready"];
    assert!(rows.iter().any(|it| it.starts_with(&row)), "{table}");
    let (_, logs, _) = run(&["logs", "--port", &port]);
    assert!(logs.contains("[0 a] ") && logs.contains("[3 b] "), "{logs}");
    let (_, logs, _) = run(&["logs", "--port", &port, "3"]);
    assert!(
        logs.contains(&format!("process {last} was started")),
        "{logs}"
    );
}

fn long_stream(address: SocketAddr, model: &str) -> Stream {
    Stream::open(address, COMPLETIONS, body(model, 0, 400))
}

#[test]
fn a_model_that_is_given_up_ends_the_process_after_the_others_have_finished() {
    let _turn = turn();
    let pair = Pair::make();
    let cluster = pair.start(&["--max-recovery-attempts", "0"]);
    let address = cluster.address;
    let mut streams = ["a", "b"].map(|model| long_stream(address, model));
    for stream in &mut streams {
        stream.next().expect("it streams");
    }
    send_signal(cluster.shards[1], Signal::KILL);
    let [a, b] = streams;
    let (_, last) = a.read_to_end();
    assert!(last.contains("the shard process ended"), "{last}");
    assert_eq!(b.read_to_end().1, "[DONE]", "nothing happened to its model");
    let (status, stderr) = cluster.wait();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cluster: a: rank 1: "), "{stderr}");
}

#[test]
fn models_that_do_not_go_together_are_refused_with_the_reason() {
    let _turn = turn();
    let pair = Pair::make();
    let (a, b) = (pair.flag("a"), pair.flag("b"));
    let plan = |more: &[&str]| run(&[&["plan", "--model", &a], more].concat());
    for (more, said) in [
        (&["--model", &a][..], "two models are called a"),
        (&["--model", &b, "--cpus", "0"], "at least one core"),
        (&["--model", &b, "--gpus", "0-2"], "3 GPUs for 2 models"),
        (
            &["--model", &b, "--served-model-name", "x"],
            "name each as --model NAME=DIR",
        ),
        (
            &["--model", &b, "--max-model-len", "99999"],
            "a was made for",
        ),
        (
            &["--model", &b, "--kv-cache-memory-bytes", "900000G"],
            "do not fit beside each other on this host",
        ),
    ] {
        let (code, _, stderr) = plan(more);
        assert!(code == 2 && stderr.contains(said), "{more:?}: {stderr}");
    }
    let (code, text, stderr) = plan(&["--model", &b, "--cpus", "2"]);
    assert_eq!(code, 0, "{stderr}");
    for model in ["a: llama", "b: llama"] {
        assert!(text.to_lowercase().contains(model), "{text}");
    }
    assert_eq!(text.matches("rank 0: CPU, 1 thread").count(), 2, "{text}");
}
