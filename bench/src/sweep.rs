//! `cluster bench sweep`: the same requests under rising load, a row each; where more load no longer helps, and how
//! much of it keeps within the goodput limits.

use crate::args::{Serve, Sweep};
use crate::report::Report;
use crate::target::{self, Target};
use crate::{plot, serve};
use anyhow::ensure;
use serde_json::{Value, json};
use std::fmt;

/// A load counts as saturating from this share of the best throughput on.
const SATURATED: f64 = 0.95;
/// A load keeps the limits if this share of its requests does.
const WITHIN_LIMITS: f64 = 0.99;
/// Requests of a point for each that is under way at once.
const ROUNDS: u32 = 6;
/// Seconds for which requests come at a given rate.
const RATE_SECONDS: f64 = 30.0;
/// Fewer requests than this say little.
const MIN_PROMPTS: u32 = 16;

/// How much was asked at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// So many requests under way.
    Concurrency(u32),
    /// So many requests per second.
    Rate(f64),
}

impl Load {
    /// The number, for axes.
    pub fn value(self) -> f64 {
        match self {
            Self::Concurrency(count) => f64::from(count),
            Self::Rate(rate) => rate,
        }
    }

    fn num_prompts(self) -> u32 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rate is above 0, and `as` saturates"
        )]
        let count = match self {
            Self::Concurrency(count) => count.saturating_mul(ROUNDS),
            Self::Rate(rate) => (rate * RATE_SECONDS).round() as u32,
        };
        count.max(MIN_PROMPTS)
    }
}

/// Rising loads and what came of them.
#[derive(Debug)]
pub struct Points {
    /// In the order in which they ran.
    pub all: Vec<(Load, Report)>,
}

/// Measures, prints and writes what was asked for.
///
/// # Errors
/// If the server cannot be reached, a result cannot be written, or every request failed.
#[expect(clippy::print_stdout, reason = "the table is what the user asked for")]
pub async fn run(args: &Sweep) -> anyhow::Result<()> {
    let points = target::with(&args.server, async |target| measure(target, args).await).await?;
    println!("{points}");
    let name = || {
        points
            .all
            .first()
            .map_or_else(String::new, |(_, it)| format!("sweep-{}", it.file_name()))
    };
    serve::save(&args.reporting, &points.json(), name)?;
    if let Some(path) = &args.plot {
        serve::write(path, plot::sweep(&points).as_bytes())?;
    }
    let completed: usize = points.all.iter().map(|(_, report)| report.completed).sum();
    ensure!(completed > 0, "every request of every load failed");
    Ok(())
}

async fn measure(target: &Target, args: &Sweep) -> anyhow::Result<Points> {
    let loads: Vec<Load> = match &args.request_rate {
        Some(rates) => rates.iter().copied().map(Load::Rate).collect(),
        None => args
            .max_concurrency
            .iter()
            .copied()
            .map(Load::Concurrency)
            .collect(),
    };
    let mut points = Points { all: Vec::new() };
    for (number, load) in (0..).zip(loads) {
        let mut prompts = args.prompts.clone();
        // Other prompts for each load, or a prefix cache would know them.
        prompts.seed = prompts.seed.wrapping_add(number);
        let (max_concurrency, request_rate) = match load {
            Load::Concurrency(count) => (Some(count), f64::INFINITY),
            Load::Rate(rate) => (None, rate),
        };
        let serve = Serve {
            server: args.server.clone(),
            prompts,
            reporting: args.reporting.clone(),
            num_prompts: args.num_prompts.unwrap_or_else(|| load.num_prompts()),
            num_warmups: 1,
            max_concurrency,
            request_rate,
            burstiness: args.burstiness,
            save_detailed: false,
            plot: None,
        };
        points
            .all
            .push((load, serve::measure_at(target, &serve).await?));
    }
    Ok(points)
}

impl Points {
    /// The least load that reaches nearly the best throughput of all.
    pub fn saturation(&self) -> Option<Load> {
        let all = || self.all.iter();
        let best = all()
            .map(|(_, it)| it.output_throughput)
            .fold(0.0, f64::max);
        let reach =
            all().filter(|(_, it)| it.completed > 0 && it.output_throughput >= SATURATED * best);
        least(reach.map(|(load, _)| *load), |a, b| a < b)
    }

    /// The largest load whose requests keep within the limits; `None` without limits or where none does.
    pub fn within_limits(&self) -> Option<Load> {
        let keep = self
            .all
            .iter()
            .filter(|(_, it)| it.request_goodput.is_some() && it.good_share() >= WITHIN_LIMITS);
        least(keep.map(|(load, _)| *load), |a, b| a > b)
    }

    /// What is written to a file: one entry per load as `serve` writes it.
    pub fn json(&self) -> Value {
        let points = self.all.iter().map(|(_, report)| report.json(false));
        let value = |load: Option<Load>| load.map(Load::value);
        json!({
            "points": points.collect::<Vec<_>>(),
            "saturation": value(self.saturation()),
            "largest_within_goodput": value(self.within_limits()),
        })
    }
}

fn least(loads: impl Iterator<Item = Load>, before: impl Fn(f64, f64) -> bool) -> Option<Load> {
    loads.reduce(|a, b| if before(b.value(), a.value()) { b } else { a })
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Concurrency(count) => write!(f, "{count} at once"),
            Self::Rate(rate) => write!(f, "{rate} requests/s"),
        }
    }
}

impl fmt::Display for Points {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let heads = [
            "req/s", "tok/s", "TTFT p50", "p99", "TPOT p50", "ITL p50", "p99", "good %", "failed",
        ];
        write!(f, "{:<18}", "load")?;
        for head in heads {
            write!(f, "{head:>10}")?;
        }
        writeln!(f, "   (latency in ms)")?;
        for (load, report) in &self.all {
            write!(f, "{:<18}", load.to_string())?;
            for value in [
                report.request_throughput,
                report.output_throughput,
                report.ttft_ms.median(),
                report.ttft_ms.percentile(99.0),
                report.tpot_ms.median(),
                report.itl_ms.median(),
                report.itl_ms.percentile(99.0),
            ] {
                write!(f, "{value:>10.2}")?;
            }
            let good = report
                .request_goodput
                .map(|_| format!("{:.1}", 100.0 * report.good_share()));
            let good = good.unwrap_or_else(|| "-".into());
            writeln!(f, "{good:>10}{:>10}", report.failed)?;
        }
        if let Some(load) = self.saturation() {
            let share = 100.0 * SATURATED;
            writeln!(
                f,
                "Saturation: {load}, the least load with {share:.0} % of the best throughput."
            )?;
        }
        let share = 100.0 * WITHIN_LIMITS;
        let limited = self.all.iter().any(|(_, it)| it.request_goodput.is_some());
        match self.within_limits() {
            Some(load) => writeln!(
                f,
                "Within the goodput limits (for {share:.0} % of requests): up to {load}."
            )?,
            None if limited => writeln!(
                f,
                "No load keeps within the goodput limits for {share:.0} % of requests."
            )?,
            None => {}
        }
        let error = self.all.iter().find_map(|(_, it)| it.error.as_ref());
        match error {
            Some(error) => writeln!(f, "One failed request said: {error}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Limit, Metric};
    use crate::report::tests::{answer, report_with, setting};

    /// A point of `count` requests with that many tokens, in 2 s, of which the first token came after `first_ms`.
    fn point(load: u32, tokens: u64, first_ms: u64, limited: bool) -> (Load, Report) {
        let mut setting = setting();
        if limited {
            setting.limits = vec![Limit {
                metric: Metric::Ttft,
                ms: 100.0,
            }];
        }
        let report = report_with(setting, [(0, Ok(answer(first_ms, 1, tokens)))]);
        (Load::Concurrency(load), report)
    }

    fn points(limited: bool) -> Points {
        let all = [
            (1, 100, 10),
            (2, 190, 20),
            (4, 385, 90),
            (8, 400, 500),
            (16, 390, 2000),
        ];
        let all = all.map(|(load, tokens, first)| point(load, tokens, first, limited));
        Points { all: all.into() }
    }

    #[test]
    fn saturation_is_the_least_load_with_nearly_the_best_throughput() {
        assert_eq!(points(false).saturation(), Some(Load::Concurrency(4)));
        assert_eq!(Points { all: vec![] }.saturation(), None);
    }

    #[test]
    fn the_largest_load_within_the_limits_is_named() {
        assert_eq!(points(true).within_limits(), Some(Load::Concurrency(4)));
        assert_eq!(points(false).within_limits(), None, "no limits, no answer");
        let json = points(true).json();
        assert_eq!(json["largest_within_goodput"], 4.0);
        assert_eq!(json["points"][3]["total_output_tokens"], 400);
        let text = points(true).to_string();
        assert!(text.contains("up to 4 at once"), "{text}");
    }

    #[test]
    fn a_plot_of_a_sweep_is_whole() {
        for points in [points(true), points(false), Points { all: vec![] }] {
            let svg = plot::sweep(&points);
            assert!(!svg.contains("NaN") && !svg.contains("inf") && svg.ends_with("</svg>\n"));
        }
    }
}
