//! Accepted requests outlive the coordinator that accepted them.

use crate::adopt::forget;
use crate::client::{get, metric, post, request};
use crate::process::{Cluster, until};
use crate::turn;
use serde_json::{Value, json};
use std::thread;

const COMPLETIONS: &str = "/v1/completions";

/// More than are computed at once, so that some of them wait in the journal.
const REQUESTS: usize = 100;

fn body(index: usize) -> Value {
    json!({
        "prompt": format!("Once upon a time there were {index} dogs."), "max_tokens": 20 + index * 7 % 100,
        "ignore_eos": true, "temperature": 0.8, "seed": index,
    })
}

/// The choices of each request.
fn undisturbed(cluster: &Cluster, requests: usize) -> Vec<Value> {
    let address = cluster.address;
    thread::scope(|scope| {
        let asking: Vec<_> = (0..requests)
            .map(|index| scope.spawn(move || post(address, COMPLETIONS, &body(index))))
            .collect();
        let told = asking.into_iter().map(|it| it.join().expect("it answers"));
        told.map(|answer| answer["choices"].clone()).collect()
    })
}

fn accept(cluster: &Cluster, body: &Value) -> String {
    let (status, answer) = request(cluster.address, "POST", COMPLETIONS, &body.to_string());
    assert_eq!(status, 202, "{answer}");
    let answer: Value = serde_json::from_str(&answer).expect("JSON");
    format!("{COMPLETIONS}/{}", answer["id"].as_str().expect("an id"))
}

fn answer(cluster: &Cluster, path: &str) -> Value {
    serde_json::from_str(&get(cluster.address, path)).expect("JSON")
}

#[test]
fn what_was_accepted_is_computed_whoever_dies() {
    let _turn = turn();
    let name = "background";
    forget(name);
    let start = ["--name", name, "-tp", "2"];
    let mut cluster = Cluster::start(&start);
    let golden = undisturbed(&cluster, REQUESTS);
    let paths: Vec<String> = (0..REQUESTS)
        .map(|index| {
            let mut body = body(index);
            body["background"] = true.into();
            accept(&cluster, &body)
        })
        .collect();
    let ended = |cluster: &Cluster| metric(cluster.address, "cluster_background_requests", "ended");
    let mut kept = Vec::new();
    for kill in 1..=2 {
        until("some are answered", || {
            ended(&cluster) >= f64::from(20 * kill)
        });
        kept = paths
            .iter()
            .map(|path| answer(&cluster, path))
            .collect::<Vec<_>>();
        cluster.kill();
        cluster = Cluster::start(&start);
    }
    let open = kept.iter().filter(|it| it["status"] != "completed").count();
    assert!(open > 0, "it was killed midway");
    until("all are answered", || ended(&cluster) >= REQUESTS as f64);
    for (index, path) in paths.iter().enumerate() {
        let said = answer(&cluster, path);
        assert_eq!(said["status"], "completed", "{said}");
        assert_eq!(said["choices"], golden[index], "request {index}");
        if kept[index]["status"] == "completed" {
            assert_eq!(said, kept[index], "it was answered already");
        }
    }
    cluster.stop();
}
