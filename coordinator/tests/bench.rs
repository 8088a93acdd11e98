//! `cluster bench` against clusters that it starts itself, of the binary that is tested.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

/// A model of one thread: the built-in one.
const UP: [&str; 5] = ["--", "--cpus", "1", "--tensor-parallel-size", "1"];

fn bench(line: &str, json: (&str, &Path), up: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cluster"))
        .arg("bench")
        .args(line.split_whitespace())
        .arg(json.0)
        .arg(json.1)
        .args(up)
        .output()
        .expect("the binary runs")
}

/// Standard output and the file that was written, of a run that went well.
fn result(line: &str, flag: &str) -> (String, Value) {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("result.json");
    let output = bench(line, (flag, &file), &UP);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {said}");
    let json = serde_json::from_slice(&std::fs::read(&file).expect("a file")).expect("JSON");
    (String::from_utf8_lossy(&output.stdout).into_owned(), json)
}

fn number(json: &Value, name: &str) -> f64 {
    let value = json[name].as_f64();
    value.unwrap_or_else(|| panic!("{name} is no number in {json}"))
}

#[test]
fn a_start_is_taken_apart() {
    let line = "startup --num-iters-cold 1 --num-iters-warmup 0 --num-iters-warm 2";
    let (text, json) = result(line, "--output-json");
    let of = |name: &str| number(&json, &format!("median_warm_{name}_s"));
    assert!(
        of("listening") <= of("ready") && of("ready") <= of("first_token"),
        "{json}"
    );
    assert!(
        of("phase_load") > 0.0 && of("phase_load") < of("ready"),
        "{json}"
    );
    assert_eq!(json["warm_startup_times"].as_array().map(Vec::len), Some(2));
    // The built-in model lies in the binary that measures: it cannot be cold.
    assert!(text.contains("No cold starts"), "{text}");
}

#[test]
fn a_batch_and_all_prompts_at_once_are_timed() {
    let line = "latency --batch-size 3 --output-len 5 --num-iters-warmup 1 --num-iters 2";
    let (_, json) = result(line, "--output-json");
    assert_eq!(json["latencies"].as_array().map(Vec::len), Some(2));
    assert!(
        number(&json, "avg_first_token_latency") < number(&json, "avg_latency"),
        "{json}"
    );
    let (text, json) = result("throughput --num-prompts 6 --output-len 5", "--output-json");
    assert_eq!(json["num_requests"], 6);
    assert_eq!(
        json["total_num_tokens"],
        6 * (32 + 5),
        "ends of text are passed over"
    );
    assert!(text.contains("Total num output tokens:  30"), "{text}");
}

#[test]
fn a_sweep_has_a_row_for_each_load() {
    let line = "sweep --max-concurrency 1,4 --num-prompts 8 --random-output-len 4 --ignore-eos \
                --goodput e2el:600000";
    let (text, json) = result(line, "--json");
    let points = json["points"].as_array().expect("points");
    let loads: Vec<_> = points
        .iter()
        .map(|point| &point["max_concurrency"])
        .collect();
    assert_eq!(loads, [1, 4]);
    assert!(points.iter().all(|point| point["completed"] == 8), "{json}");
    assert_eq!(json["largest_within_goodput"], 4.0);
    assert!(text.contains("up to 4 at once"), "{text}");
}

#[test]
fn a_cluster_that_does_not_start_says_why() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("result.json");
    let output = bench(
        "throughput",
        ("--output-json", &file),
        &["--", "--model", "/no/such/model"],
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        said.contains("/no/such/model") && said.contains("ended before it was ready"),
        "{said}"
    );
}
