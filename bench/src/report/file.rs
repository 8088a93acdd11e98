//! The result as a file, in the names of `vllm bench serve --save-result`, so that what reads one reads the other;
//! `cluster_steps`, `latency_from` and the delays of sending are ours.

use super::{Done, Report};
use crate::report::summary::percentile_name;
use serde_json::{Value, json};
use std::time::Duration;
use time::OffsetDateTime;

impl Report {
    /// What is written to a file; with `detailed`, of each request too.
    pub fn json(&self, detailed: bool) -> Value {
        let setting = &self.setting;
        let rate = setting.arrivals.rate;
        let mut json = json!({
            "date": date(self.began),
            "backend": setting.backend,
            "endpoint_type": setting.backend,
            "model_id": setting.model,
            "num_prompts": self.completed + self.failed,
            "request_rate": if rate.is_finite() { json!(rate) } else { json!("inf") },
            "burstiness": setting.arrivals.burstiness,
            "max_concurrency": setting.max_concurrency,
            "duration": self.duration_s,
            "completed": self.completed,
            "failed": self.failed,
            "error": self.error,
            "total_input_tokens": self.input_tokens,
            "total_output_tokens": self.output_tokens,
            "request_throughput": self.request_throughput,
            "request_goodput": self.request_goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_throughput,
            "max_output_tokens_per_s": self.peak_output_throughput,
            "max_concurrent_requests": self.peak_concurrency,
            "latency_from": if setting.is_open_loop() { "due" } else { "sent" },
            "mean_send_delay_ms": self.send_delay_ms.mean,
            "max_send_delay_ms": self.send_delay_ms.percentile(100.0),
            "cluster_steps": self.steps,
        });
        for metric in &setting.metrics {
            let summary = self.summary(*metric);
            let mut write = |statistic: &str, value: f64| {
                json[format!("{statistic}_{}_ms", metric.name())] = json!(value);
            };
            write("mean", summary.mean);
            write("median", summary.median());
            write("std", summary.std);
            for percentile in &setting.percentiles {
                let name = format!("p{}", percentile_name(*percentile));
                write(&name, summary.percentile(*percentile));
            }
        }
        if detailed {
            self.add_details(&mut json);
        }
        json
    }

    /// One entry per request, in the order in which they were due; times in seconds, as vLLM has them.
    fn add_details(&self, json: &mut Value) {
        let seconds = |duration: &Duration| duration.as_secs_f64();
        let done = |outcome| Done::of(outcome, &self.setting);
        let of_each = |value: &dyn Fn(Done<'_>) -> Value, failed: Value| {
            let outcomes = self.outcomes.iter();
            let values = outcomes.map(|it| done(it).map_or_else(|| failed.clone(), value));
            Value::Array(values.collect())
        };
        json["input_lens"] = self.outcomes.iter().map(|it| it.prompt_tokens).collect();
        json["output_lens"] = of_each(&|it| json!(it.answer.output_tokens), json!(0));
        json["ttfts"] = of_each(&|it| json!(it.ttft_ms() / 1e3), json!(0.0));
        json["itls"] = of_each(
            &|it| it.answer.between.iter().map(seconds).collect(),
            json!([]),
        );
        json["start_times"] = self.outcomes.iter().map(|it| seconds(&it.sent)).collect();
        let errors = self.outcomes.iter().map(|it| match &it.answer {
            Ok(_) => String::new(),
            Err(error) => format!("{error:#}"),
        });
        json["errors"] = errors.collect();
    }

    /// What the file of `--save-result` is called.
    pub fn file_name(&self) -> String {
        let setting = &self.setting;
        let concurrency = setting.max_concurrency;
        let concurrency = concurrency.map_or(String::new(), |most| format!("-concurrency{most}"));
        // Models may be called after their folder.
        let model = setting.model.rsplit('/').next().unwrap_or_default();
        let rate = setting.arrivals.rate;
        format!(
            "{}-{rate}qps{concurrency}-{model}-{}.json",
            setting.backend,
            date(self.began)
        )
    }
}

/// `20261121-093000`, UTC.
fn date(at: OffsetDateTime) -> String {
    let (year, month, day) = (at.year(), u8::from(at.month()), at.day());
    let (hour, minute, second) = at.to_hms();
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}
