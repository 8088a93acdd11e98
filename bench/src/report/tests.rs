//! Numbers, table and file, from answers made up here.

use super::*;
use serde_json::json;

pub(crate) fn answer(first_ms: u64, gap_ms: u64, tokens: u64) -> Answer {
    let between = vec![Duration::from_millis(gap_ms); usize::try_from(tokens - 1).unwrap()];
    Answer {
        first: Duration::from_millis(first_ms),
        last: Duration::from_millis(first_ms) + between.iter().sum::<Duration>(),
        between,
        prompt_tokens: None,
        output_tokens: tokens,
    }
}

pub(crate) fn setting() -> Setting {
    Setting {
        backend: "openai",
        model: "models/m".into(),
        max_concurrency: Some(3),
        arrivals: Arrivals::AT_ONCE,
        metrics: vec![Metric::Ttft, Metric::Tpot, Metric::Itl, Metric::E2el],
        percentiles: vec![90.0, 99.0],
        limits: vec![],
    }
}

/// Requests that were all due at once, by the moment of sending.
fn outcomes(outcomes: impl IntoIterator<Item = (u64, anyhow::Result<Answer>)>) -> Vec<Outcome> {
    let outcomes = outcomes.into_iter().map(|(sent_ms, answer)| Outcome {
        prompt_tokens: 10,
        due: Duration::ZERO,
        sent: Duration::from_millis(sent_ms),
        answer,
    });
    outcomes.collect()
}

pub(crate) fn report_with(
    setting: Setting,
    of: impl IntoIterator<Item = (u64, anyhow::Result<Answer>)>,
) -> Report {
    let began = OffsetDateTime::UNIX_EPOCH + Duration::from_secs(3661);
    Report::new(setting, began, outcomes(of), Duration::from_secs(2), None)
}

fn report(of: impl IntoIterator<Item = (u64, anyhow::Result<Answer>)>) -> Report {
    report_with(setting(), of)
}

#[test]
fn peaks_are_those_of_the_whole_run() {
    // 0 to 140 ms, 100 to 400 ms, and 1000 to 1500 ms with all tokens in its second.
    let of = [(0, 100, 20, 3), (100, 300, 0, 1), (1000, 100, 100, 5)];
    let report = report(of.map(|(sent, first, gap, n)| (sent, Ok(answer(first, gap, n)))));
    assert_eq!(report.peak_concurrency, 2);
    assert!((report.peak_output_throughput - 5.0).abs() < 1e-9);
}

#[test]
fn the_file_has_the_names_of_vllm() {
    let mut setting = setting();
    setting.percentiles.push(99.9);
    let report = report_with(setting, [(0, Ok(answer(100, 20, 5)))]);
    let json = report.json(false);
    for (name, value) in [
        ("date", json!("19700101-010101")),
        ("backend", json!("openai")),
        ("model_id", json!("models/m")),
        ("num_prompts", json!(1)),
        ("request_rate", json!("inf")),
        ("burstiness", json!(1.0)),
        ("max_concurrency", json!(3)),
        ("duration", json!(2.0)),
        ("completed", json!(1)),
        ("failed", json!(0)),
        ("total_input_tokens", json!(10)),
        ("total_output_tokens", json!(5)),
        ("request_throughput", json!(0.5)),
        ("request_goodput", json!(null)),
        ("output_throughput", json!(2.5)),
        ("total_token_throughput", json!(7.5)),
        ("max_output_tokens_per_s", json!(5.0)),
        ("max_concurrent_requests", json!(1)),
        ("mean_ttft_ms", json!(100.0)),
        ("median_tpot_ms", json!(20.0)),
        ("std_itl_ms", json!(0.0)),
        ("p99_e2el_ms", json!(180.0)),
        ("p99.9_e2el_ms", json!(180.0)),
        ("latency_from", json!("sent")),
    ] {
        assert_eq!(json[name], value, "{name}");
    }
    assert!(json.get("ttfts").is_none());
    assert_eq!(
        report.file_name(),
        "openai-infqps-concurrency3-m-19700101-010101.json"
    );
}

#[test]
fn a_run_without_answers_has_a_table() {
    let nothing = report([]);
    assert!(!nothing.to_string().contains("-0.00"), "{nothing}");
}

#[test]
fn details_have_an_entry_for_each_request() {
    let failed = Err(anyhow::anyhow!("gone"));
    let json = report([(0, Ok(answer(100, 20, 3))), (5, failed)]).json(true);
    assert_eq!(json["input_lens"], json!([10, 10]));
    assert_eq!(json["output_lens"], json!([3, 0]));
    assert_eq!(json["ttfts"], json!([0.1, 0.0]));
    assert_eq!(json["itls"], json!([[0.02, 0.02], []]));
    assert_eq!(json["start_times"], json!([0.0, 0.005]));
    assert_eq!(json["errors"], json!(["", "gone"]));
}

#[test]
fn only_what_was_asked_for_is_reported() {
    let mut setting = setting();
    setting.metrics = vec![Metric::Itl];
    setting.percentiles = vec![50.0];
    let report = report_with(setting, [(0, Ok(answer(100, 20, 5)))]);
    let json = report.json(false);
    assert_eq!(json["p50_itl_ms"], json!(20.0));
    assert!(json.get("p99_itl_ms").is_none() && json.get("mean_ttft_ms").is_none());
    let table = report.to_string();
    assert!(
        table.contains("P50 ITL (ms)") && !table.contains("TTFT"),
        "{table}"
    );
}

#[test]
fn in_an_open_loop_latency_counts_from_the_due_moment() {
    // Due at 0, sent 40 ms later: a client that was held up must not make the server look faster.
    let of = || [(40, Ok(answer(100, 20, 5)))];
    let closed = report(of());
    assert!((closed.ttft_ms.mean - 100.0).abs() < 1e-9);
    let mut setting = setting();
    setting.arrivals.rate = 5.0;
    let open = report_with(setting, of());
    assert!((open.ttft_ms.mean - 140.0).abs() < 1e-9);
    assert!((open.e2el_ms.mean - 220.0).abs() < 1e-9);
    assert!((open.tpot_ms.mean - 20.0).abs() < 1e-9);
    assert!((open.itl_ms.mean - 20.0).abs() < 1e-9);
    assert_eq!(open.json(false)["latency_from"], "due");
    assert_eq!(open.json(false)["max_send_delay_ms"], json!(40.0));
    assert!(open.to_string().contains("due moment"), "{open}");
}

#[test]
fn goodput_counts_what_keeps_every_limit() {
    let limit = |metric, ms| Limit { metric, ms };
    let mut setting = setting();
    setting.limits = vec![limit(Metric::Ttft, 150.0), limit(Metric::Tpot, 25.0)];
    let of = [
        (0, Ok(answer(150, 25, 4))),
        (0, Ok(answer(151, 10, 4))),
        (0, Ok(answer(100, 26, 4))),
        // One token has no time per output token to exceed.
        (0, Ok(answer(100, 0, 1))),
        (0, Err(anyhow::anyhow!("refused"))),
    ];
    let report = report_with(setting, of);
    assert_eq!(report.good, 2);
    assert_eq!(report.json(false)["request_goodput"], json!(1.0));
    assert!(
        (report.good_share() - 0.4).abs() < 1e-9,
        "a failed one is not good"
    );
}

#[test]
fn failures_count_but_not_in_latency() {
    let refused = Err(anyhow::anyhow!("refused").context("connect"));
    let outcomes = [Ok(answer(100, 20, 5)), refused, Ok(answer(300, 40, 1))];
    let report = report(outcomes.map(|answer| (0, answer)));
    assert_eq!((report.completed, report.failed), (2, 1));
    assert_eq!((report.input_tokens, report.output_tokens), (20, 6));
    assert_eq!(report.error.as_deref(), Some("connect: refused"));
    assert!((report.output_throughput - 3.0).abs() < 1e-9);
    assert!((report.ttft_ms.mean - 200.0).abs() < 1e-9);
    assert!(
        (report.tpot_ms.mean - 20.0).abs() < 1e-9,
        "one token has no rest"
    );
    let p99 = report.e2el_ms.percentile(99.0);
    assert!((p99 - (180.0 + 120.0 * 0.99)).abs() < 1e-6);
    let table = report.to_string();
    assert!(
        table.contains("Mean TTFT (ms):                                   200.00"),
        "{table}"
    );
    assert!(table.contains("connect: refused"));
}
