//! From answers to numbers, which table, file and plot are made of.
//!
//! Definitions as in `vllm bench serve`: time to first token is that of the first chunk with
//! content; time per output token is the rest divided by the tokens after the first; inter-token
//! latency is the time between chunks. Failed requests count in no latency.
//!
//! Invariant: in an open loop latency counts from the moment at which a request was due, so that a slow server
//! or client cannot hide by delaying what is sent (coordinated omission); otherwise from sending.

mod file;
mod summary;
mod text;
pub(crate) mod timeline;

pub use summary::{Summary, percentile_name};

use crate::args::{Limit, Metric, Serve};
use crate::load::Arrivals;
use crate::steps::StepTimes;
use crate::stream::Answer;
use std::time::Duration;
use time::OffsetDateTime;
use timeline::completed;

/// What came of one request.
#[derive(Debug)]
pub struct Outcome {
    /// Prompt tokens asked for; exact for token ids.
    pub prompt_tokens: u64,
    /// When it was due, counted from the beginning of the run.
    pub due: Duration,
    /// When it was sent, counted from the beginning of the run.
    pub sent: Duration,
    /// Its answer, whose times count from sending, or what went wrong.
    pub answer: anyhow::Result<Answer>,
}

/// What was asked of the server, as far as a reader of the result must know it.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// `openai` or `openai-chat`.
    pub backend: &'static str,
    /// Model's name.
    pub model: String,
    /// Most requests under way at once; `None`: no bound.
    pub max_concurrency: Option<u32>,
    /// When requests were due.
    pub arrivals: Arrivals,
    /// Which latencies are reported.
    pub metrics: Vec<Metric>,
    /// Which of their percentiles.
    pub percentiles: Vec<f64>,
    /// What a good request keeps; none: goodput is not reported.
    pub limits: Vec<Limit>,
}

/// The result of a run.
#[derive(Debug)]
pub struct Report {
    /// What was asked of the server.
    pub setting: Setting,
    /// When it began.
    pub began: OffsetDateTime,
    /// All requests, in the order in which they were due.
    pub outcomes: Vec<Outcome>,
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
    /// Requests that kept all limits; all completed ones where there are none.
    pub good: usize,
    /// Those per second; `None` without limits.
    pub request_goodput: Option<f64>,
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
    /// In an open loop, from being due to being sent.
    pub send_delay_ms: Summary,
    /// If the server is a `cluster`: where the time of its steps went, means in seconds.
    pub steps: Option<StepTimes>,
}

impl Setting {
    /// What is asked of `model` by these arguments.
    pub fn new(serve: &Serve, model: &str) -> Self {
        Self {
            backend: serve.server.backend().name(),
            model: model.to_owned(),
            max_concurrency: serve.max_concurrency,
            arrivals: Arrivals {
                rate: serve.request_rate,
                burstiness: serve.burstiness,
            },
            metrics: serve.reporting.percentile_metrics.clone(),
            percentiles: serve.reporting.metric_percentiles.clone(),
            limits: serve.reporting.goodput.clone(),
        }
    }

    /// Whether requests are due at moments of their own, however slow the server is.
    pub fn is_open_loop(&self) -> bool {
        self.arrivals.rate.is_finite()
    }
}

/// A request that was answered whole, with its latencies in milliseconds.
#[derive(Clone, Copy)]
struct Done<'a> {
    answer: &'a Answer,
    delay: Duration,
}

impl<'a> Done<'a> {
    fn of(outcome: &'a Outcome, setting: &Setting) -> Option<Self> {
        let answer = outcome.answer.as_ref().ok()?;
        let delay = if setting.is_open_loop() {
            outcome.sent.saturating_sub(outcome.due)
        } else {
            Duration::ZERO
        };
        Some(Self { answer, delay })
    }

    fn ttft_ms(self) -> f64 {
        ms(self.delay + self.answer.first)
    }

    /// `None` where there is no token after the first.
    fn tpot_ms(self) -> Option<f64> {
        let rest = self.answer.output_tokens.checked_sub(1);
        let rest = rest.filter(|rest| *rest > 0)?;
        let took = self.answer.last.saturating_sub(self.answer.first);
        Some(ms(took) / rest as f64)
    }

    fn e2el_ms(self) -> f64 {
        ms(self.delay + self.answer.last)
    }

    fn keeps(self, limit: &Limit) -> bool {
        let value = match limit.metric {
            Metric::Ttft => self.ttft_ms(),
            Metric::Tpot => self.tpot_ms().unwrap_or(0.0),
            Metric::E2el => self.e2el_ms(),
            // No limit of this kind can be given.
            Metric::Itl => return true,
        };
        value <= limit.ms
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Report {
    /// Sums up what came of a run's requests.
    pub fn new(
        setting: Setting,
        began: OffsetDateTime,
        mut outcomes: Vec<Outcome>,
        duration: Duration,
        steps: Option<StepTimes>,
    ) -> Self {
        outcomes.sort_by_key(|outcome| outcome.due);
        let done: Vec<Done<'_>> = outcomes
            .iter()
            .filter_map(|it| Done::of(it, &setting))
            .collect();
        let good = done
            .iter()
            .filter(|it| setting.limits.iter().all(|limit| it.keeps(limit)));
        let good = good.count();
        let error = outcomes.iter().find_map(|it| it.answer.as_ref().err());
        let input_tokens = completed(&outcomes)
            .map(|(outcome, answer)| answer.prompt_tokens.unwrap_or(outcome.prompt_tokens))
            .sum::<u64>();
        let output_tokens = done.iter().map(|it| it.answer.output_tokens).sum::<u64>();
        let duration_s = duration.as_secs_f64();
        let per_second = |count: u64| count as f64 / duration_s.max(f64::MIN_POSITIVE);
        let between = done.iter().flat_map(|it| &it.answer.between);
        Self {
            completed: done.len(),
            failed: outcomes.len() - done.len(),
            error: error.map(|error| format!("{error:#}")),
            duration_s,
            input_tokens,
            output_tokens,
            request_throughput: per_second(done.len() as u64),
            good,
            request_goodput: (!setting.limits.is_empty()).then(|| per_second(good as u64)),
            output_throughput: per_second(output_tokens),
            peak_output_throughput: timeline::peak_throughput(&outcomes),
            peak_concurrency: timeline::peak_concurrency(&outcomes),
            total_throughput: per_second(input_tokens + output_tokens),
            ttft_ms: Summary::of(done.iter().map(|it| it.ttft_ms()).collect()),
            tpot_ms: Summary::of(done.iter().filter_map(|it| it.tpot_ms()).collect()),
            itl_ms: Summary::of(between.map(|gap| ms(*gap)).collect()),
            e2el_ms: Summary::of(done.iter().map(|it| it.e2el_ms()).collect()),
            send_delay_ms: Summary::of(done.iter().map(|it| ms(it.delay)).collect()),
            steps,
            began,
            setting,
            outcomes,
        }
    }

    /// The distribution of one metric.
    pub fn summary(&self, metric: Metric) -> &Summary {
        match metric {
            Metric::Ttft => &self.ttft_ms,
            Metric::Tpot => &self.tpot_ms,
            Metric::Itl => &self.itl_ms,
            Metric::E2el => &self.e2el_ms,
        }
    }

    /// Share of all requests that kept all limits.
    pub fn good_share(&self) -> f64 {
        self.good as f64 / self.outcomes.len().max(1) as f64
    }
}

#[cfg(test)]
pub(crate) mod tests;
