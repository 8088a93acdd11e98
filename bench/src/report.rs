//! From answers to numbers, and from numbers to a table.
//!
//! Definitions as in `vllm bench serve`: time to first token is that of the first chunk with
//! content; time per output token is the rest divided by the tokens after the first; inter-token
//! latency is the time between chunks. Failed requests count in no latency.

use crate::steps::StepTimes;
use crate::stream::Answer;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

const WIDTH: usize = 56;

/// A distribution, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Arithmetic mean.
    pub mean: f64,
    /// Half are below.
    pub median: f64,
    /// 90 of 100 are below.
    pub p90: f64,
    /// 99 of 100 are below.
    pub p99: f64,
}

/// The result of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
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
        Self {
            mean: values.iter().sum::<f64>() / count,
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
    /// Sums up `outcomes`: each with the prompt tokens that were asked for.
    pub fn new(
        outcomes: &[(u64, anyhow::Result<Answer>)],
        duration: Duration,
        steps: Option<StepTimes>,
    ) -> Self {
        let completed = || {
            let answers = outcomes.iter();
            answers.filter_map(|(asked, outcome)| Some((asked, outcome.as_ref().ok()?)))
        };
        let error = outcomes
            .iter()
            .find_map(|(_, outcome)| outcome.as_ref().err());
        let input_tokens = completed()
            .map(|(asked, answer)| answer.prompt_tokens.unwrap_or(*asked))
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
            completed: num_completed,
            failed: outcomes.len() - num_completed,
            error: error.map(|error| format!("{error:#}")),
            duration_s,
            input_tokens,
            output_tokens,
            request_throughput: per_second(num_completed as u64),
            output_throughput: per_second(output_tokens),
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

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        heading(f, '=', " Serving Benchmark Result ")?;
        line(f, "Successful requests:", &self.completed)?;
        line(f, "Failed requests:", &self.failed)?;
        number(f, "Benchmark duration (s):", self.duration_s)?;
        line(f, "Total input tokens:", &self.input_tokens)?;
        line(f, "Total generated tokens:", &self.output_tokens)?;
        number(f, "Request throughput (req/s):", self.request_throughput)?;
        number(
            f,
            "Output token throughput (tok/s):",
            self.output_throughput,
        )?;
        number(f, "Total token throughput (tok/s):", self.total_throughput)?;
        for (title, name, summary) in [
            ("Time to First Token", "TTFT", self.ttft_ms),
            (
                "Time per Output Token (excl. 1st token)",
                "TPOT",
                self.tpot_ms,
            ),
            ("Inter-token Latency", "ITL", self.itl_ms),
            ("End-to-end Latency", "E2EL", self.e2el_ms),
        ] {
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

    #[test]
    fn quantiles_lie_between_neighbours() {
        let summary = Summary::of((0..=100).rev().map(f64::from).collect());
        assert_eq!(
            summary,
            Summary {
                mean: 50.0,
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
        let outcomes = vec![
            (10, Ok(answer(100, 20, 5))),
            (10, Err(anyhow::anyhow!("refused").context("connect"))),
            (10, Ok(answer(300, 40, 1))),
        ];
        let report = Report::new(&outcomes, Duration::from_secs(2), None);
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
