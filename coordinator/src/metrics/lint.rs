//! What `promtool check metrics` would say, so that no test needs it; where the machine has
//! promtool, it is asked too.
#![cfg(test)]

use super::{Metrics, Outcome, Registry, Rejection, Subject};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use topology::wire::StepTimings;

/// Names that others fixed and that break a rule of promtool; ours break none.
/// promtool reserves `:` for recording rules, and every name of vLLM has one.
const FIXED_BY_OTHERS: &[&str] = &["vllm:iteration_tokens_total"];

fn exposed() -> String {
    let registry = Arc::new(Registry::new(1024, "test"));
    let of = |model_name: &str| {
        let model_name = model_name.into();
        let world_size = 2;
        Metrics::new(
            registry.clone(),
            &Subject {
                model_name,
                world_size,
            },
        )
    };
    let (metrics, _other) = (of("demo"), of("other"));
    metrics.set_cache_config(16, 100, "bfloat16", true);
    metrics.set_startup("load", Duration::from_millis(250));
    metrics.set_rank_memory(1, "weights", 1 << 20);
    metrics.finished(Outcome::Stop);
    metrics.rejected(Rejection::QueuedTokens);
    metrics.requests.time_to_first_token_seconds.record(0.03);
    metrics.record_rank(
        1,
        &StepTimings {
            step_us: 2_000,
            idle_us: 10,
            collective_us: 500,
            wait_us: 100,
            sample_us: 300,
            outside_us: 150,
        },
        false,
    );
    registry.background().accepted.increment(1);
    registry.upkeep();
    registry.render()
}

/// Family name → (type, whether it has a help text, sample lines).
fn families(text: &str) -> BTreeMap<String, (String, bool, Vec<String>)> {
    let mut families: BTreeMap<String, (String, bool, Vec<String>)> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let mut words = line.split(' ');
        match (words.next(), words.next()) {
            (Some("#"), Some("HELP")) => {
                let name = words.next().expect("HELP names a metric").to_owned();
                let help = words.next().is_some_and(|word| !word.is_empty());
                families.entry(name).or_default().1 |= help;
            }
            (Some("#"), Some("TYPE")) => {
                current = words.next().expect("TYPE names a metric").to_owned();
                let kind = words.next().expect("TYPE has a type").to_owned();
                let family = families.entry(current.clone()).or_default();
                assert!(family.0.is_empty(), "{current} is typed twice");
                family.0 = kind;
            }
            _ => {
                let series = line.split(['{', ' ']).next().expect("a line has a name");
                assert!(
                    series.starts_with(&current),
                    "{series} stands under {current}"
                );
                let family = families.get_mut(&current).expect("typed before sampled");
                family.2.push(line.to_owned());
            }
        }
    }
    families
}

#[test]
fn names_types_and_help_follow_the_rules() {
    let text = exposed();
    let families = families(&text);
    assert!(families.len() > 35, "only {} families", families.len());
    for (name, (kind, help, samples)) in &families {
        assert!(help, "{name} has no help text");
        assert!(!samples.is_empty(), "{name} has no sample");
        let own = name.starts_with("cluster_");
        assert!(
            own || name.starts_with("vllm:"),
            "{name} has no known prefix"
        );
        assert!(
            name.chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == ':'),
            "{name} has odd characters"
        );
        assert!(
            ["counter", "gauge", "histogram"].contains(&&**kind),
            "{name} is a {kind}"
        );
        if !FIXED_BY_OTHERS.contains(&&**name) {
            assert_eq!(
                kind == "counter",
                name.ends_with("_total"),
                "{name} is a {kind}"
            );
        }
        if own && kind == "histogram" {
            assert!(
                name.ends_with("_seconds") || name.ends_with("_bytes"),
                "{name}: base unit"
            );
        }
        let bad_unit = [
            "_ms",
            "_us",
            "_milliseconds",
            "_kb",
            "_mb",
            "_gb",
            "_percent",
        ]
        .into_iter()
        .find(|unit| name.ends_with(unit));
        assert_eq!(bad_unit, None, "{name}: use seconds and bytes");
        let has = |label: &str| samples.iter().all(|sample| sample.contains(label));
        let of_process = name == "cluster_build_info" || name.starts_with("cluster_background_");
        assert_eq!(has("model_name=\""), !of_process, "{name}: {samples:?}");
        assert_eq!(has("engine=\"0\""), !own, "{name}: {samples:?}");
        let distinct: BTreeSet<_> = samples
            .iter()
            .map(|it| it.rsplit_once(' ').map(|(series, _)| series))
            .collect();
        assert_eq!(distinct.len(), samples.len(), "{name}: models mix");
    }
}

#[test]
fn names_that_gateways_and_dashboards_read_are_there_from_the_start() {
    let text = exposed();
    for series in [
        "vllm:num_requests_running{",
        "vllm:num_requests_waiting{",
        "vllm:num_requests_waiting_by_reason{",
        "vllm:kv_cache_usage_perc{",
        "vllm:cache_config_info{",
        "vllm:prompt_tokens_total{",
        "vllm:generation_tokens_total{",
        "vllm:request_success_total{",
        "vllm:num_preemptions_total{",
        "vllm:prefix_cache_queries_total{",
        "vllm:prefix_cache_hits_total{",
        "vllm:prompt_tokens_cached_total{",
        "vllm:time_to_first_token_seconds_bucket{",
        "vllm:inter_token_latency_seconds_bucket{",
        "vllm:request_time_per_output_token_seconds_bucket{",
        "vllm:e2e_request_latency_seconds_bucket{",
        "vllm:request_queue_time_seconds_bucket{",
        "vllm:request_inference_time_seconds_bucket{",
        "vllm:request_prefill_time_seconds_bucket{",
        "vllm:request_decode_time_seconds_bucket{",
        "vllm:request_prompt_tokens_bucket{",
        "vllm:request_generation_tokens_bucket{",
        "vllm:request_max_num_generation_tokens_bucket{",
        "vllm:request_params_max_tokens_bucket{",
        "vllm:request_params_n_bucket{",
        "vllm:iteration_tokens_total_bucket{",
        "vllm:admission_rejections_total{",
        "cluster_build_info{",
        "cluster_kv_tokens{",
        "cluster_rank_wait_seconds_bucket{",
    ] {
        assert!(
            text.lines().any(|line| line.starts_with(series)),
            "{series} is missing"
        );
    }
    assert!(text.contains("block_size=\"16\"") && text.contains("num_gpu_blocks=\"100\""));
    assert!(text.contains("finished_reason=\"stop\"} 1"), "{text}");
    let tokens = |le: &str| {
        text.contains(&format!(
            "vllm:request_prompt_tokens_bucket{{model_name=\"demo\",engine=\"0\",le=\"{le}\"}}"
        ))
    };
    assert!(
        tokens("1000") && !tokens("2000"),
        "token buckets end at the model's length"
    );
}

#[test]
fn promtool_finds_nothing_of_ours() {
    let spawned = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = spawned else {
        println!("promtool is not installed; the rules above were checked without it");
        return;
    };
    let mut stdin = promtool.stdin.take().expect("stdin is piped");
    stdin
        .write_all(exposed().as_bytes())
        .expect("promtool reads");
    drop(stdin);
    let output = promtool.wait_with_output().expect("promtool ends");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    let findings: Vec<&str> = said
        .lines()
        .filter(|line| !line.is_empty())
        .filter(|line| {
            let colon = line.starts_with("vllm:") && line.ends_with("should not contain ':'");
            let fixed = FIXED_BY_OTHERS.iter().any(|name| line.starts_with(name));
            !colon && !fixed
        })
        .collect();
    assert!(findings.is_empty(), "promtool: {findings:#?}");
}
