//! What is served: the same text however it is computed and however it is sent.

use crate::client::{Stream, chat, content, endless, get, metric, post, request};
use crate::process::{Cluster, until};
use crate::turn;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::thread;

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const COMPLETIONS: &str = "/v1/completions";

#[test]
fn the_text_is_the_same_at_every_size_streamed_or_whole() {
    let _turn = turn();
    let questions = [
        "What is 7 plus 5?",
        "What is the opposite of hot?",
        "Sort these numbers: 9 3 7 1",
        "Tell me a short story about a dog.",
    ];
    let mut first: Option<Vec<String>> = None;
    for size in ["1", "2", "4"] {
        let cluster = Cluster::start(&["--tensor-parallel-size", size]);
        assert_eq!(cluster.shards.len().to_string(), size);
        let whole: Vec<String> = questions
            .iter()
            .map(|question| content(&post(cluster.address, CHAT, &chat(question, 48))))
            .collect();
        assert!(whole[0].contains("12"), "7 plus 5 is not {:?}", whole[0]);
        for (question, whole) in questions.iter().zip(&whole) {
            let stream = Stream::open(cluster.address, CHAT, chat(question, 48));
            let (streamed, last) = stream.read_to_end();
            assert_eq!((&streamed, &*last), (whole, "[DONE]"), "{question}");
        }
        assert_eq!(*first.get_or_insert(whole.clone()), whole, "{size} ranks");
        cluster.stop();
    }
}

/// A request may ask for more scores than one answer of a shard can carry; nobody else may suffer.
#[test]
fn more_scores_than_one_message_holds_take_several_steps() {
    let _turn = turn();
    let cluster = Cluster::start(&["--max-logprobs", "4096"]);
    let ask = |token: u32| {
        let body = json!({
            "prompt": vec![token; 600], "max_tokens": 1, "echo": true, "logprobs": 4096,
        });
        let answer = post(cluster.address, COMPLETIONS, &body);
        let top = answer["choices"][0]["logprobs"]["top_logprobs"].as_array();
        top.expect("there are scores").len()
    };
    let counts = thread::scope(|scope| {
        let asking = [5, 6].map(|token| scope.spawn(move || ask(token)));
        asking.map(|thread| thread.join().unwrap())
    });
    assert_eq!(counts, [601, 601]);
    assert!(metric(cluster.address, "cluster_step_duration_seconds_count", "") > 2.5);
    cluster.stop();
}

#[test]
fn sixty_four_streams_finish_with_the_text_each_gives_alone() {
    let _turn = turn();
    let cluster = Cluster::start(&["--tensor-parallel-size", "2"]);
    let address = cluster.address;
    let names = ["Tom", "Lily", "Ben", "Anna", "Max", "Mia", "Sam", "Zoe"];
    let things = ["ball", "dog", "cat", "boat", "tree", "bird", "hat", "cake"];
    // Sampled, so that a stream that took another's randomness or blocks could not hide.
    let request = |index: usize| {
        let (name, thing) = (names[index % 8], things[index / 8]);
        let mut body = endless(&format!("Once upon a time {name} had a {thing}."), 24);
        body["temperature"] = 0.8.into();
        body["seed"] = index.into();
        body
    };
    let text = |stream: Stream| {
        let (text, last) = stream.read_to_end();
        assert_eq!(last, "[DONE]");
        text
    };
    let alone: Vec<String> = (0..64)
        .map(|index| text(Stream::open(address, COMPLETIONS, request(index))))
        .collect();
    assert_eq!(
        alone
            .iter()
            .collect::<std::collections::BTreeSet<_>>()
            .len(),
        64
    );
    let together: Vec<_> = (0..64)
        .map(|index| {
            let body = request(index);
            thread::spawn(move || text(Stream::open(address, COMPLETIONS, body)))
        })
        .collect();
    for (index, (stream, alone)) in together.into_iter().zip(&alone).enumerate() {
        assert_eq!(stream.join().unwrap(), *alone, "stream {index}");
    }
    let succeeded = metric(address, "vllm:request_success_total", "length");
    assert!(
        (succeeded - 128.0).abs() < 0.1,
        "{succeeded} requests were counted"
    );
    cluster.stop();
}

/// Chunked = whole, preempted = undisturbed, cache hit = miss, batched = alone: to the last bit of
/// every log-probability, through the whole of the program.
#[test]
fn neither_chunks_nor_preemption_nor_the_cache_change_a_bit() {
    let _turn = turn();
    // Blocks are the same in both: their borders are where attention adds up.
    let same = ["--block-size", "4", "--max-model-len", "256"];
    let calm = Cluster::start(&[&same[..], &["--enable-prefix-caching=false"]].concat());
    let crowded = ["--num-gpu-blocks-override", "80"];
    let chunked = ["--long-prefill-token-threshold", "5"];
    let disturbed = Cluster::start(&[&same[..], &crowded, &chunked].concat());
    let story = "Once upon a time there was a little dog named Max who lived in a red house. ";
    let body = |index: u32| {
        let mut body = json!({
            "prompt": format!("{story}{}", ["One day", "Max was sad", "A cat"][index as usize % 3]),
            "max_tokens": 100, "ignore_eos": true, "logprobs": 3, "seed": index,
        });
        if index.is_multiple_of(2) {
            body["temperature"] = 0.into();
        } else {
            body["temperature"] = 1.into();
            body["repetition_penalty"] = 1.2.into();
            body["frequency_penalty"] = 0.3.into();
        }
        body
    };
    let ask = |address, index| post(address, COMPLETIONS, &body(index))["choices"].take();
    let alone: Vec<Value> = (0..8).map(|index| ask(calm.address, index)).collect();
    let together = thread::scope(|scope| {
        let address = disturbed.address;
        let asking: Vec<_> = (0..16)
            .map(|index| scope.spawn(move || ask(address, index % 8)))
            .collect();
        let answers = asking.into_iter().map(|thread| thread.join().unwrap());
        answers.collect::<Vec<Value>>()
    });
    for (index, found) in together.iter().enumerate() {
        assert_eq!(*found, alone[index % 8], "request {index}");
    }
    let count = |cluster: &Cluster, name| metric(cluster.address, name, "");
    for name in ["vllm:num_preemptions_total", "vllm:prefix_cache_hits_total"] {
        assert!(count(&disturbed, name) > 0.5, "no {name}");
        assert!(count(&calm, name) < 0.5, "{name} where all were alone");
    }
    calm.stop();
    disturbed.stop();
}

#[test]
fn what_was_served_is_counted() {
    let _turn = turn();
    let cluster = Cluster::start(&[]);
    let address = cluster.address;
    let mut body = endless("The cat sat", 30);
    body["stream"] = false.into();
    let answer = post(address, COMPLETIONS, &body);
    let prompt_tokens = answer["usage"]["prompt_tokens"].as_f64().unwrap();
    for (name, value) in [
        ("vllm:prompt_tokens_total", prompt_tokens),
        ("vllm:generation_tokens_total", 30.0),
        ("vllm:request_success_total", 1.0),
        ("vllm:time_to_first_token_seconds_count", 1.0),
        ("vllm:inter_token_latency_seconds_count", 29.0),
        ("vllm:e2e_request_latency_seconds_count", 1.0),
        ("vllm:num_requests_running", 0.0),
        ("cluster_step_duration_seconds_count", 30.0),
        ("cluster_rank_step_seconds_count", 60.0),
        ("cluster_ranks_ready", 2.0),
    ] {
        let found = metric(address, name, "");
        assert!(
            (found - value).abs() < 0.1,
            "{name} is {found}, not {value}"
        );
    }
    for path in ["/health", "/ready", "/version", "/v1/models"] {
        get(address, path);
    }
    // A stop string ends a request as a success, not as an abort.
    let mut body = chat("What is 7 plus 5?", 30);
    body["stop"] = "plus".into();
    assert_eq!(content(&post(address, CHAT, &body)), "7 ");
    until("it is counted, in the engine's next turn", || {
        metric(address, "vllm:request_success_total", "\"stop\"") > 0.5
    });
    assert!(metric(address, "vllm:request_success_total", "abort") < 0.5);
    cluster.stop();
}

#[test]
fn a_generation_config_of_the_operator_s_bounds_all_and_is_checked_at_the_start() {
    let _turn = turn();
    let dir = tempfile::tempdir().expect("a directory");
    let text = json!({"max_new_tokens": 5, "top_p": 0}).to_string();
    std::fs::write(dir.path().join("generation_config.json"), text).expect("written");
    let path = dir.path().to_str().expect("UTF-8");
    let cluster = Cluster::start(&["-tp", "1", "--generation-config", path]);
    for max_tokens in [Value::Null, json!(3), json!(50)] {
        let body = json!({"prompt": "Once", "ignore_eos": true, "max_tokens": max_tokens});
        let answer = post(cluster.address, COMPLETIONS, &body);
        let most = max_tokens.as_u64().unwrap_or(5).min(5);
        assert_eq!(answer["usage"]["completion_tokens"], most, "{max_tokens}");
    }
    cluster.signal(Signal::TERM);
    let (_, stderr) = cluster.wait();
    assert_eq!(stderr.matches("top_p must be").count(), 1, "{stderr}");
}

#[test]
fn a_client_that_goes_away_frees_its_blocks() {
    let _turn = turn();
    let cluster = Cluster::start(&[]);
    let mut stream = Stream::open(cluster.address, COMPLETIONS, endless("Once", 1000));
    for _ in 0..5 {
        stream.next().expect("it streams");
    }
    drop(stream);
    until("no one is computed for", || {
        metric(cluster.address, "vllm:num_requests_running", "") < 0.5
    });
    let generated = metric(cluster.address, "vllm:generation_tokens_total", "");
    assert!(
        generated < 900.0,
        "{generated} tokens were computed for no one"
    );
    assert!(metric(cluster.address, "vllm:request_success_total", "abort") > 0.0);
    assert!(metric(cluster.address, "cluster_kv_tokens", "used") < 0.5);
    cluster.stop();
}

#[test]
fn a_full_queue_answers_429_and_serves_the_rest() {
    let _turn = turn();
    let cluster = Cluster::start(&["--max-num-seqs", "1", "--max-num-queued-reqs", "1"]);
    let address = cluster.address;
    let mut running = Stream::open(address, COMPLETIONS, endless("Once", 900));
    running.next().expect("it runs");
    let waiting = thread::spawn(move || {
        Stream::open(address, COMPLETIONS, endless("Twice", 4)).read_to_end()
    });
    until("it waits", || {
        metric(address, "vllm:num_requests_waiting", "") > 0.5
    });
    let (status, body) = request(address, "POST", CHAT, &chat("Hello", 4).to_string());
    assert_eq!(status, 429, "{body}");
    let error: Value = serde_json::from_str(&body).unwrap();
    assert!(
        error["error"]["message"]
            .as_str()
            .unwrap()
            .contains("queue is full"),
        "{body}"
    );
    drop(running);
    assert_eq!(waiting.join().unwrap().1, "[DONE]");
    assert!(
        metric(
            address,
            "vllm:admission_rejections_total",
            "max_num_queued_reqs"
        ) > 0.5
    );
    cluster.stop();
}

#[test]
fn a_server_with_a_seed_says_the_same_again() {
    let _turn = turn();
    let texts = ["7", "7", "8"].map(|seed| {
        let cluster = Cluster::start(&["--seed", seed, "--max-logprobs", "2"]);
        let mut body = endless("Once upon a time", 24);
        body["stream"] = false.into();
        body["temperature"] = 1.into();
        let texts = [0, 1].map(|_| {
            let answer = post(cluster.address, COMPLETIONS, &body);
            answer["choices"][0]["text"]
                .as_str()
                .expect("a text")
                .to_owned()
        });
        assert_ne!(texts[0], texts[1], "requests of one server differ");
        body["logprobs"] = 3.into();
        let (status, refused) = request(cluster.address, "POST", COMPLETIONS, &body.to_string());
        assert_eq!(status, 400, "{refused}");
        cluster.stop();
        texts
    });
    assert_eq!(texts[0], texts[1]);
    assert_ne!(texts[0], texts[2]);
}
