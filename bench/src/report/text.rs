//! The result as a table, line by line that of `vllm bench serve`.

use super::Report;
use crate::report::summary::percentile_name;
use std::fmt;

const WIDTH: usize = 56;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        heading(f, '=', " Serving Benchmark Result ")?;
        self.write_counts(f)?;
        for metric in &self.setting.metrics {
            let summary = self.summary(*metric);
            let name = metric.name().to_ascii_uppercase();
            heading(f, '-', metric.title())?;
            number(f, &format!("Mean {name} (ms):"), summary.mean)?;
            number(f, &format!("Median {name} (ms):"), summary.median())?;
            for percentile in &self.setting.percentiles {
                let title = format!("P{} {name} (ms):", percentile_name(*percentile));
                number(f, &title, summary.percentile(*percentile))?;
            }
        }
        if let Some(steps) = &self.steps {
            heading(f, '-', "Steps of the Server")?;
            line(f, "Steps:", &steps.steps)?;
            number(f, "Mean step (ms):", steps.step * 1e3)?;
            number(f, "  of it the slowest rank (ms):", steps.rank * 1e3)?;
            number(f, "Mean scheduling (us):", steps.schedule * 1e6)?;
            number(f, "Mean applying and delivering (us):", steps.apply * 1e6)?;
            let overhead = steps.overhead * 1e6;
            number(f, "Mean overhead outside the shards (us):", overhead)?;
        }
        heading(f, '=', "")?;
        if let Some(error) = &self.error {
            let failed = self.failed;
            writeln!(f, "One of the {failed} failed requests said: {error}")?;
        }
        Ok(())
    }
}

impl Report {
    fn write_counts(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        line(f, "Successful requests:", &self.completed)?;
        line(f, "Failed requests:", &self.failed)?;
        if let Some(most) = self.setting.max_concurrency {
            line(f, "Maximum request concurrency:", &most)?;
        }
        if self.setting.is_open_loop() {
            let arrivals = self.setting.arrivals;
            number(f, "Request rate configured (RPS):", arrivals.rate)?;
            // Who waits for the client or for room waits as a user does: it counts.
            line(f, "Latency counts from:", &"due moment")?;
            let delay = &self.send_delay_ms;
            number(f, "Mean delay of sending (ms):", delay.mean)?;
            number(f, "Longest delay of sending (ms):", delay.percentile(100.0))?;
        }
        number(f, "Benchmark duration (s):", self.duration_s)?;
        line(f, "Total input tokens:", &self.input_tokens)?;
        line(f, "Total generated tokens:", &self.output_tokens)?;
        number(f, "Request throughput (req/s):", self.request_throughput)?;
        if let Some(goodput) = self.request_goodput {
            number(f, "Request goodput (req/s):", goodput)?;
        }
        let output = self.output_throughput;
        number(f, "Output token throughput (tok/s):", output)?;
        let peak = self.peak_output_throughput;
        number(f, "Peak output token throughput (tok/s):", peak)?;
        line(f, "Peak concurrent requests:", &self.peak_concurrency)?;
        number(f, "Total token throughput (tok/s):", self.total_throughput)
    }
}

fn heading(f: &mut fmt::Formatter<'_>, fill: char, title: &str) -> fmt::Result {
    let left = (WIDTH - title.len()) / 2;
    let side = |count| String::from(fill).repeat(count);
    let right = WIDTH - title.len() - left;
    writeln!(f, "{}{title}{}", side(left), side(right))
}

fn line(f: &mut fmt::Formatter<'_>, name: &str, value: &dyn fmt::Display) -> fmt::Result {
    let value = value.to_string();
    writeln!(f, "{name:<42}{value:>14}")
}

fn number(f: &mut fmt::Formatter<'_>, name: &str, value: f64) -> fmt::Result {
    line(f, name, &format_args!("{value:.2}"))
}
