//! What a `cluster` server spends on a step outside its shards, from its metrics.
//!
//! Counters are read before and after the load, and only the difference counts. Servers without
//! these metrics give `None`.

use serde::Serialize;
use std::collections::BTreeMap;

/// A metrics page: samples by name with labels.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page(BTreeMap<String, f64>);

/// Means over the steps of a run, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepTimes {
    /// Steps that ran.
    #[serde(rename = "count")]
    pub steps: f64,
    /// From sending the plan to the last rank's answer.
    #[serde(rename = "mean_step_s")]
    pub step: f64,
    /// The slowest rank's own time.
    #[serde(rename = "mean_slowest_rank_s")]
    pub rank: f64,
    /// Deciding what a step computes.
    #[serde(rename = "mean_schedule_s")]
    pub schedule: f64,
    /// Taking in and delivering what it gave.
    #[serde(rename = "mean_apply_s")]
    pub apply: f64,
    /// A whole turn of the loop without the slowest rank's own time.
    #[serde(rename = "mean_overhead_s")]
    pub overhead: f64,
}

impl Page {
    /// Reads the text format; lines that are no samples are skipped.
    pub fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let samples = samples.filter_map(|line| {
            // Label values may hold spaces; the value behind them does not.
            let (name, value) = line.trim().rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        Self(samples.collect())
    }

    /// Samples of a name: labels as they are written, and value.
    pub fn samples<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> + 'a {
        self.0.iter().filter_map(move |(key, value)| {
            let labels = key.strip_prefix(name)?;
            (labels.is_empty() || labels.starts_with('{')).then_some((labels, *value))
        })
    }

    /// How much a sample grew since `before`, for each set of labels.
    fn growth<'a>(&'a self, before: &'a Self, name: &'a str) -> impl Iterator<Item = f64> + 'a {
        self.samples(name).map(move |(labels, value)| {
            let key = format!("{name}{labels}");
            value - before.0.get(&key).copied().unwrap_or(0.0)
        })
    }
}

impl StepTimes {
    /// What happened between two pages; `None` if no step ran or the server has no such metrics.
    pub fn between(before: &Page, after: &Page) -> Option<Self> {
        let total = |name: &str| after.growth(before, name).fold(0.0, |sum, more| sum + more);
        let steps = total("cluster_step_duration_seconds_count");
        if steps <= 0.0 {
            return None;
        }
        let mean = |name: &str| total(name) / steps;
        let ranks = after.growth(before, "cluster_rank_step_seconds_sum");
        let rank = ranks.fold(0.0, f64::max) / steps;
        let step = mean("cluster_step_duration_seconds_sum");
        let schedule = mean("cluster_schedule_seconds_sum");
        let apply = mean("cluster_apply_seconds_sum");
        // The mean of per-step maxima is the server's to know; without it, the means must do.
        let known = mean("cluster_step_overhead_seconds_sum");
        let overhead = if known > 0.0 {
            known
        } else {
            step - rank + schedule + apply
        };
        Some(Self {
            steps,
            step,
            rank,
            schedule,
            apply,
            overhead,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(steps: u32, step: f64, ranks: [f64; 2], extra: &str) -> Page {
        Page::parse(&format!(
            "# HELP cluster_step_duration_seconds A step.\n\
             # TYPE cluster_step_duration_seconds histogram\n\
             cluster_step_duration_seconds_bucket{{le=\"+Inf\"}} {steps}\n\
             cluster_step_duration_seconds_sum {step}\n\
             cluster_step_duration_seconds_count {steps}\n\
             cluster_rank_step_seconds_sum{{rank=\"0\",device=\"a b\"}} {}\n\
             cluster_rank_step_seconds_sum{{rank=\"1\",device=\"a b\"}} {}\n{extra}",
            ranks[0], ranks[1]
        ))
    }

    fn assert_near(value: f64, expected: f64) {
        assert!(
            (value - expected).abs() < 1e-12,
            "{value} is not {expected}"
        );
    }

    #[test]
    fn the_overhead_is_what_the_slowest_rank_did_not_spend() {
        let before = page(10, 5.0, [4.0, 4.0], "");
        let extra = "cluster_schedule_seconds_sum 0.5\ncluster_apply_seconds_sum 0.25\n";
        let after = page(20, 7.0, [5.0, 5.5], extra);
        let times = StepTimes::between(&before, &after).unwrap();
        assert_near(times.steps, 10.0);
        assert_near(times.step, 0.2);
        assert_near(times.rank, 0.15);
        assert_near(times.overhead, 0.05 + 0.05 + 0.025);
        let known = "cluster_step_overhead_seconds_sum 0.4\n";
        let after = page(20, 7.0, [5.0, 5.5], known);
        assert_near(StepTimes::between(&before, &after).unwrap().overhead, 0.04);
    }

    #[test]
    fn other_servers_have_no_steps() {
        let other = Page::parse("vllm:num_requests_running 3\n");
        assert_eq!(StepTimes::between(&other, &other), None);
        let idle = page(10, 5.0, [4.0, 4.0], "");
        assert_eq!(StepTimes::between(&idle, &idle), None);
    }
}
