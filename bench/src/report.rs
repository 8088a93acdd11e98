//! From answers to numbers, and from numbers to a table.
//!
//! Definitions as in `vllm bench serve`: time to first token is that of the first chunk with
//! content; time per output token is the rest divided by the tokens after the first; inter-token
//! latency is the time between chunks. Failed requests count in no latency. The file has the names of
//! `--save-result` there, so that what reads one reads the other; `cluster_steps` is ours.

use crate::args::Serve;
use crate::steps::StepTimes;
use crate::stream::Answer;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

const WIDTH: usize = 56;

/// A distribution, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Arithmetic mean.
    pub mean: f64,
    /// Standard deviation of all there are, not an estimate for more.
    pub std: f64,
    /// Half are below.
    pub median: f64,
    /// 90 of 100 are below.
    pub p90: f64,
    /// 99 of 100 are below.
    pub p99: f64,
}

/// What came of one request.
#[derive(Debug)]
pub struct Outcome {
    /// Prompt tokens asked for; exact for token ids.
    pub prompt_tokens: u64,
    /// When it was sent, counted from the beginning of the run.
    pub sent: Duration,
    /// Its answer, or what went wrong.
    pub answer: anyhow::Result<Answer>,
}

/// What was asked of the server, as far as a reader of the result must know it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Setting {
    /// `openai` or `openai-chat`.
    pub backend: &'static str,
    /// Model's name.
    pub model: String,
    /// Most requests under way at once; `None`: no bound.
    pub max_concurrency: Option<u32>,
    /// Requests per second; infinite: all at once.
    pub request_rate: f64,
}

/// The result of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// What was asked of the server.
    pub setting: Setting,
    /// Requests answered whole.
    pub completed: usize,
    /// Requests that were not.
    pub failed: usize,
    /// What one of those said.
    pub error: Option<String>,
    /// From the first request's moment to the last answer's end, in seconds.
    pub duration_s: f64,
    /// Prompt tokens of completed requests.
    pub input_tokens: u64,
    /// Generated tokens of completed requests.
    pub output_tokens: u64,
    /// Completed requests per second.
    pub request_throughput: f64,
    /// Generated tokens per second.
    pub output_throughput: f64,
    /// Most tokens that came within one second of the run, counted from its beginning.
    pub peak_output_throughput: f64,
    /// Most requests that were under way at once and were answered whole.
    pub peak_concurrency: usize,
    /// Prompt and generated tokens per second.
    pub total_throughput: f64,
    /// Time to first token.
    pub ttft_ms: Summary,
    /// Time per output token after the first.
    pub tpot_ms: Summary,
    /// Time between chunks.
    pub itl_ms: Summary,
    /// Time to the last token.
    pub e2el_ms: Summary,
    /// If the server is a `cluster`: where the time of its steps went, means in seconds.
    pub steps: Option<StepTimes>,
}

impl Summary {
    /// Of values in milliseconds, in any order; zeros if there are none.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let count = values.len().max(1) as f64;
        // Not `sum`: of nothing that is -0.
        let mean = values.iter().fold(0.0, |sum, value| sum + value) / count;
        let squares = values
            .iter()
            .fold(0.0, |sum, value| sum + (value - mean).powi(2));
        Self {
            mean,
            std: (squares / count).sqrt(),
            median: quantile(&values, 0.5),
            p90: quantile(&values, 0.9),
            p99: quantile(&values, 0.99),
        }
    }
}

/// Linear between the two nearest of sorted values.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let place = share * last as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of an index is an index"
    )]
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64)
}

impl Report {
    /// Sums up what came of a run's requests.
    pub fn new(
        setting: Setting,
        outcomes: &[Outcome],
        duration: Duration,
        steps: Option<StepTimes>,
    ) -> Self {
        let completed = || {
            let outcomes = outcomes.iter();
            outcomes.filter_map(|outcome| Some((outcome, outcome.answer.as_ref().ok()?)))
        };
        let error = outcomes.iter().find_map(|it| it.answer.as_ref().err());
        let input_tokens = completed()
            .map(|(outcome, answer)| answer.prompt_tokens.unwrap_or(outcome.prompt_tokens))
            .sum::<u64>();
        let output_tokens = completed()
            .map(|(_, answer)| answer.output_tokens)
            .sum::<u64>();
        let duration_s = duration.as_secs_f64();
        let per_second = |count: u64| count as f64 / duration_s.max(f64::MIN_POSITIVE);
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let num_completed = completed().count();
        let of_each = |value: &dyn Fn(&Answer) -> Option<f64>| {
            Summary::of(completed().filter_map(|(_, a)| value(a)).collect())
        };
        let between = completed().flat_map(|(_, answer)| &answer.between);
        Self {
            setting,
            completed: num_completed,
            failed: outcomes.len() - num_completed,
            error: error.map(|error| format!("{error:#}")),
            duration_s,
            input_tokens,
            output_tokens,
            request_throughput: per_second(num_completed as u64),
            output_throughput: per_second(output_tokens),
            peak_output_throughput: peak_throughput(completed()),
            peak_concurrency: peak_concurrency(completed()),
            total_throughput: per_second(input_tokens + output_tokens),
            ttft_ms: of_each(&|a| Some(ms(a.first))),
            tpot_ms: of_each(&|a| {
                let after_first = a.output_tokens.checked_sub(1).filter(|rest| *rest > 0)?;
                Some(ms(a.last.saturating_sub(a.first)) / after_first as f64)
            }),
            itl_ms: Summary::of(between.map(|duration| ms(*duration)).collect()),
            e2el_ms: of_each(&|a| Some(ms(a.last))),
            steps,
        }
    }
}

/// Most tokens within one whole second. Tokens of a chunk come at once; how many it holds is what
/// its answer has on average.
fn peak_throughput<'a>(completed: impl Iterator<Item = (&'a Outcome, &'a Answer)>) -> f64 {
    let mut seconds: BTreeMap<u64, f64> = BTreeMap::new();
    for (outcome, answer) in completed {
        let each = answer.output_tokens as f64 / (answer.between.len() + 1) as f64;
        let mut at = outcome.sent + answer.first;
        *seconds.entry(at.as_secs()).or_default() += each;
        for gap in &answer.between {
            at += *gap;
            *seconds.entry(at.as_secs()).or_default() += each;
        }
    }
    seconds.values().copied().fold(0.0, f64::max)
}

/// Most answers under way at one moment.
fn peak_concurrency<'a>(completed: impl Iterator<Item = (&'a Outcome, &'a Answer)>) -> usize {
    let ends = completed.flat_map(|(it, answer)| [(it.sent, true), (it.sent + answer.last, false)]);
    let mut ends: Vec<(Duration, bool)> = ends.collect();
    // At the same moment one ends before another begins.
    ends.sort_unstable();
    let (mut now, mut most) = (0usize, 0);
    for (_, begins) in ends {
        now = if begins {
            now + 1
        } else {
            now.saturating_sub(1)
        };
        most = most.max(now);
    }
    most
}

impl Setting {
    /// What is asked of `model` by these arguments.
    pub fn new(serve: &Serve, model: &str) -> Self {
        Self {
            backend: serve.backend.name(),
            model: model.to_owned(),
            max_concurrency: serve.max_concurrency,
            request_rate: serve.request_rate,
        }
    }
}

impl Report {
    /// The distributions: title, name in the table, and values.
    fn latencies(&self) -> [(&'static str, &'static str, Summary); 4] {
        [
            ("Time to First Token", "TTFT", self.ttft_ms),
            (
                "Time per Output Token (excl. 1st token)",
                "TPOT",
                self.tpot_ms,
            ),
            ("Inter-token Latency", "ITL", self.itl_ms),
            ("End-to-end Latency", "E2EL", self.e2el_ms),
        ]
    }

    /// What is written to a file.
    pub fn json(&self) -> Value {
        let rate = self.setting.request_rate;
        let mut json = json!({
            "backend": self.setting.backend,
            "model_id": self.setting.model,
            "num_prompts": self.completed + self.failed,
            "request_rate": if rate.is_finite() { json!(rate) } else { json!("inf") },
            "max_concurrency": self.setting.max_concurrency,
            "duration": self.duration_s,
            "completed": self.completed,
            "failed": self.failed,
            "error": self.error,
            "total_input_tokens": self.input_tokens,
            "total_output_tokens": self.output_tokens,
            "request_throughput": self.request_throughput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_throughput,
            "max_output_tokens_per_s": self.peak_output_throughput,
            "max_concurrent_requests": self.peak_concurrency,
            "cluster_steps": self.steps,
        });
        for (_, name, summary) in self.latencies() {
            for (statistic, value) in [
                ("mean", summary.mean),
                ("std", summary.std),
                ("median", summary.median),
                ("p90", summary.p90),
                ("p99", summary.p99),
            ] {
                let key = format!("{statistic}_{}_ms", name.to_ascii_lowercase());
                json[key] = json!(value);
            }
        }
        json
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        heading(f, '=', " Serving Benchmark Result ")?;
        line(f, "Successful requests:", &self.completed)?;
        line(f, "Failed requests:", &self.failed)?;
        if let Some(most) = self.setting.max_concurrency {
            line(f, "Maximum request concurrency:", &most)?;
        }
        if self.setting.request_rate.is_finite() {
            let rate = self.setting.request_rate;
            number(f, "Request rate configured (RPS):", rate)?;
        }
        number(f, "Benchmark duration (s):", self.duration_s)?;
        line(f, "Total input tokens:", &self.input_tokens)?;
        line(f, "Total generated tokens:", &self.output_tokens)?;
        number(f, "Request throughput (req/s):", self.request_throughput)?;
        number(
            f,
            "Output token throughput (tok/s):",
            self.output_throughput,
        )?;
        number(
            f,
            "Peak output token throughput (tok/s):",
            self.peak_output_throughput,
        )?;
        line(f, "Peak concurrent requests:", &self.peak_concurrency)?;
        number(f, "Total token throughput (tok/s):", self.total_throughput)?;
        for (title, name, summary) in self.latencies() {
            heading(f, '-', title)?;
            number(f, &format!("Mean {name} (ms):"), summary.mean)?;
            number(f, &format!("Median {name} (ms):"), summary.median)?;
            number(f, &format!("P90 {name} (ms):"), summary.p90)?;
            number(f, &format!("P99 {name} (ms):"), summary.p99)?;
        }
        if let Some(steps) = &self.steps {
            heading(f, '-', "Steps of the Server")?;
            line(f, "Steps:", &steps.steps)?;
            number(f, "Mean step (ms):", steps.step * 1e3)?;
            number(f, "  of it the slowest rank (ms):", steps.rank * 1e3)?;
            number(f, "Mean scheduling (us):", steps.schedule * 1e6)?;
            number(f, "Mean applying and delivering (us):", steps.apply * 1e6)?;
            number(
                f,
                "Mean overhead outside the shards (us):",
                steps.overhead * 1e6,
            )?;
        }
        heading(f, '=', "")?;
        if let Some(error) = &self.error {
            writeln!(
                f,
                "One of the {} failed requests said: {error}",
                self.failed
            )?;
        }
        Ok(())
    }
}

fn heading(f: &mut fmt::Formatter<'_>, fill: char, title: &str) -> fmt::Result {
    let left = (WIDTH - title.len()) / 2;
    let side = |count| String::from(fill).repeat(count);
    let right = WIDTH - title.len() - left;
    writeln!(f, "{}{title}{}", side(left), side(right))
}

fn line(f: &mut fmt::Formatter<'_>, name: &str, value: &dyn fmt::Display) -> fmt::Result {
    writeln!(f, "{name:<42}{value:>14}")
}

fn number(f: &mut fmt::Formatter<'_>, name: &str, value: f64) -> fmt::Result {
    line(f, name, &format_args!("{value:.2}").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(first_ms: u64, gap_ms: u64, tokens: u64) -> Answer {
        let between = vec![Duration::from_millis(gap_ms); usize::try_from(tokens - 1).unwrap()];
        Answer {
            first: Duration::from_millis(first_ms),
            last: Duration::from_millis(first_ms) + between.iter().sum::<Duration>(),
            between,
            prompt_tokens: None,
            output_tokens: tokens,
        }
    }

    fn report(outcomes: impl IntoIterator<Item = (u64, anyhow::Result<Answer>)>) -> Report {
        let outcomes = outcomes.into_iter().map(|(sent_ms, answer)| Outcome {
            prompt_tokens: 10,
            sent: Duration::from_millis(sent_ms),
            answer,
        });
        let setting = Setting {
            backend: "openai",
            model: "m".into(),
            max_concurrency: Some(3),
            request_rate: f64::INFINITY,
        };
        let outcomes: Vec<Outcome> = outcomes.collect();
        Report::new(setting, &outcomes, Duration::from_secs(2), None)
    }

    #[test]
    fn peaks_are_those_of_the_whole_run() {
        // 0 to 140 ms, 100 to 400 ms, and 1000 to 1500 ms with all tokens in its second.
        let outcomes = [(0, 100, 20, 3), (100, 300, 0, 1), (1000, 100, 100, 5)];
        let report =
            report(outcomes.map(|(sent, first, gap, n)| (sent, Ok(answer(first, gap, n)))));
        assert_eq!(report.peak_concurrency, 2);
        assert!((report.peak_output_throughput - 5.0).abs() < 1e-9);
    }

    #[test]
    fn the_file_has_the_names_of_vllm() {
        let json = report([(0, Ok(answer(100, 20, 5)))]).json();
        for (name, value) in [
            ("backend", json!("openai")),
            ("model_id", json!("m")),
            ("num_prompts", json!(1)),
            ("request_rate", json!("inf")),
            ("max_concurrency", json!(3)),
            ("duration", json!(2.0)),
            ("completed", json!(1)),
            ("failed", json!(0)),
            ("total_input_tokens", json!(10)),
            ("total_output_tokens", json!(5)),
            ("request_throughput", json!(0.5)),
            ("output_throughput", json!(2.5)),
            ("total_token_throughput", json!(7.5)),
            ("max_output_tokens_per_s", json!(5.0)),
            ("max_concurrent_requests", json!(1)),
            ("mean_ttft_ms", json!(100.0)),
            ("median_tpot_ms", json!(20.0)),
            ("std_itl_ms", json!(0.0)),
            ("p99_e2el_ms", json!(180.0)),
        ] {
            assert_eq!(json[name], value, "{name}");
        }
        let nothing = report([]);
        assert!(!nothing.to_string().contains("-0.00"), "{nothing}");
    }

    #[test]
    fn quantiles_lie_between_neighbours() {
        let summary = Summary::of((0..=100).rev().map(f64::from).collect());
        assert_eq!(
            summary,
            Summary {
                mean: 50.0,
                std: 850f64.sqrt(),
                median: 50.0,
                p90: 90.0,
                p99: 99.0
            }
        );
        assert_eq!(
            Summary::of(vec![1.0, 2.0]).median.to_bits(),
            1.5f64.to_bits()
        );
        assert_eq!(Summary::of(vec![]), Summary::default());
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
        assert!((report.e2el_ms.p99 - (180.0 + 120.0 * 0.99)).abs() < 1e-6);
        let table = report.to_string();
        assert!(
            table.contains("Mean TTFT (ms):                                   200.00"),
            "{table}"
        );
        assert!(table.contains("connect: refused"));
    }
}
