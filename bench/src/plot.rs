//! What the plots of a run show.
//!
//! Pure: a report in, SVG text out.

use crate::report::{Report, Summary, timeline};
use crate::svg::{Axis, Draw, Panel, Series, document, label};
use crate::sweep::{Load, Points};
use std::time::Duration;

/// Bars of a distribution.
const NUM_BARS: u32 = 48;
/// Stretches of a run at most.
const NUM_STRETCHES: u32 = 120;

/// Distributions of the latencies, and throughput and requests under way over time.
pub fn serve(report: &Report) -> String {
    let setting = &report.setting;
    let load = match (setting.is_open_loop(), setting.max_concurrency) {
        (true, _) => format!("{} requests/s", label(setting.arrivals.rate)),
        (false, Some(most)) => format!("{most} at once"),
        (false, None) => "all at once".into(),
    };
    let subtitle = format!(
        "{load} · {} requests, {} failed · {:.1} s · {} output tokens/s",
        report.completed + report.failed,
        report.failed,
        report.duration_s,
        label(report.output_throughput)
    );
    let panels = [
        distribution("Time to first token", "ms", "requests (%)", &report.ttft_ms),
        distribution("Inter-token latency", "ms", "gaps (%)", &report.itl_ms),
        over_time(report),
        under_way(report),
    ];
    document(&setting.model, &subtitle, &panels)
}

/// Throughput and latency of each load of a sweep.
pub fn sweep(points: &Points) -> String {
    let all = &points.all;
    let load = match all.first() {
        Some((Load::Rate(_), _)) => "requests per second",
        _ => "requests at once",
    };
    let by_load = |name, value: &dyn Fn(&Report) -> f64| {
        line(name, all.iter().map(|(load, it)| (load.value(), value(it))))
    };
    let by_throughput = |name, value: &dyn Fn(&Report) -> f64| {
        line(
            name,
            all.iter().map(|(_, it)| (it.output_throughput, value(it))),
        )
    };
    let latency = |title: &str, of: &dyn Fn(&Report) -> &Summary| Panel {
        title: title.into(),
        x: logarithmic(load),
        y: logarithmic("ms"),
        series: vec![
            by_load("p50", &|it| of(it).median()),
            by_load("p99", &|it| of(it).percentile(99.0)),
        ],
        marks: vec![],
    };
    let named = [
        ("saturation", points.saturation()),
        ("within limits", points.within_limits()),
    ];
    let marks = named.map(|(name, load)| Some((load?.value(), name.to_owned())));
    let output = Panel {
        title: "Output throughput".into(),
        x: logarithmic(load),
        y: axis("tokens/s"),
        series: vec![by_load("output", &|it| it.output_throughput)],
        marks: marks.into_iter().flatten().collect(),
    };
    let tails = Panel {
        title: "Latency at that throughput".into(),
        x: axis("output tokens/s"),
        y: logarithmic("ms"),
        series: vec![
            by_throughput("TTFT p99", &|it| it.ttft_ms.percentile(99.0)),
            by_throughput("ITL p99", &|it| it.itl_ms.percentile(99.0)),
        ],
        marks: vec![],
    };
    let first = latency("Time to first token", &|it| &it.ttft_ms);
    let between = latency("Inter-token latency", &|it| &it.itl_ms);
    let model = all.first().map_or("", |(_, it)| &it.setting.model);
    let requests: usize = all.iter().map(|(_, it)| it.outcomes.len()).sum();
    let subtitle = format!("{} loads · {requests} requests", all.len());
    document(model, &subtitle, &[output, tails, first, between])
}

fn line(name: &str, points: impl Iterator<Item = (f64, f64)>) -> Series {
    Series {
        name: name.into(),
        draw: Draw::Line,
        points: points.collect(),
    }
}

fn logarithmic(title: &str) -> Axis {
    Axis {
        title: title.into(),
        logarithmic: true,
    }
}

fn axis(title: &str) -> Axis {
    Axis {
        title: title.into(),
        logarithmic: false,
    }
}

/// Shares of values by bars that are equally wide on a logarithmic axis.
fn distribution(title: &str, unit: &str, share: &str, summary: &Summary) -> Panel {
    let values = summary.values();
    let least = values.iter().copied().find(|value| *value > 0.0);
    let (low, high) = (least.unwrap_or(1.0), summary.percentile(100.0));
    // A distribution that is a point still gets bars around it.
    let ratio = (high / low).max(1.2).powf(1.0 / f64::from(NUM_BARS));
    let edge = |bar: u32| low * ratio.powi(i32::try_from(bar).unwrap_or(i32::MAX));
    let points = (0..=NUM_BARS).map(|bar| {
        let first = if bar == 0 { 0.0 } else { edge(bar) };
        let last = if bar + 1 >= NUM_BARS {
            f64::INFINITY
        } else {
            edge(bar + 1)
        };
        let count = values.partition_point(|value| *value < last)
            - values.partition_point(|value| *value < first);
        let height = if bar == NUM_BARS { 0 } else { count };
        (
            edge(bar),
            100.0 * height as f64 / values.len().max(1) as f64,
        )
    });
    let marks = [("p50", 50.0), ("p90", 90.0), ("p99", 99.0)].map(|(name, percentile)| {
        let value = summary.percentile(percentile);
        (value, format!("{name} {} {unit}", label(value)))
    });
    Panel {
        title: title.into(),
        x: logarithmic(unit),
        y: axis(share),
        series: vec![Series {
            name: title.into(),
            draw: Draw::Bars,
            points: points.collect(),
        }],
        marks: if values.is_empty() {
            vec![]
        } else {
            marks.to_vec()
        },
    }
}

/// Width of a stretch of time: a round part of a second or of seconds.
fn stretch(duration_s: f64) -> f64 {
    let rough = duration_s / f64::from(NUM_STRETCHES);
    let round = [
        0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
    ];
    round
        .into_iter()
        .find(|width| *width >= rough)
        .unwrap_or(rough)
}

fn over_time(report: &Report) -> Panel {
    let width = stretch(report.duration_s);
    let by = timeline::tokens_by(&report.outcomes, Duration::from_secs_f64(width));
    let last = by.keys().next_back().map_or(0, |last| last + 1);
    let points = (0..=last).map(|number| {
        let tokens = by.get(&number).copied().unwrap_or(0.0);
        (number as f64 * width, tokens / width)
    });
    Panel {
        title: "Output throughput".into(),
        x: axis("seconds since the beginning"),
        y: axis("tokens/s"),
        series: vec![Series {
            name: "output".into(),
            draw: Draw::Bars,
            points: points.collect(),
        }],
        marks: vec![],
    }
}

fn under_way(report: &Report) -> Panel {
    let steps = timeline::concurrency(&report.outcomes);
    let points = steps
        .iter()
        .map(|(at, now)| (at.as_secs_f64(), *now as f64));
    Panel {
        title: "Requests under way".into(),
        x: axis("seconds since the beginning"),
        y: axis("requests"),
        series: vec![Series {
            name: "requests".into(),
            draw: Draw::Bars,
            points: points.collect(),
        }],
        marks: vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Metric;
    use crate::load::Arrivals;
    use crate::report::{Outcome, Setting};
    use crate::stream::Answer;
    use time::OffsetDateTime;

    fn report(firsts_ms: &[u64]) -> Report {
        let outcomes = firsts_ms.iter().map(|first| Outcome {
            prompt_tokens: 1,
            due: Duration::ZERO,
            sent: Duration::ZERO,
            answer: Ok(Answer {
                first: Duration::from_millis(*first),
                last: Duration::from_millis(first + 10),
                between: vec![Duration::from_millis(10)],
                prompt_tokens: None,
                output_tokens: 2,
            }),
        });
        let setting = Setting {
            backend: "openai",
            model: "a<b & c".into(),
            max_concurrency: None,
            arrivals: Arrivals::AT_ONCE,
            metrics: vec![Metric::Ttft],
            percentiles: vec![],
            limits: vec![],
        };
        let began = OffsetDateTime::UNIX_EPOCH;
        let duration = Duration::from_secs(1);
        Report::new(setting, began, outcomes.collect(), duration, None)
    }

    #[test]
    fn every_value_is_in_one_bar() {
        for values in [vec![1.0], vec![5.0; 7], (1..2000).map(f64::from).collect()] {
            let summary = Summary::of(values);
            let panel = distribution("t", "ms", "%", &summary);
            let all: f64 = panel.series[0].points.iter().map(|point| point.1).sum();
            assert!((all - 100.0).abs() < 1e-6, "{all}");
        }
    }

    #[test]
    fn all_tokens_are_under_the_curve() {
        let panel = over_time(&report(&[10, 250, 900]));
        let points = &panel.series[0].points;
        let tokens: f64 = points
            .windows(2)
            .map(|pair| pair[0].1 * (pair[1].0 - pair[0].0))
            .sum();
        assert!((tokens - 6.0).abs() < 1e-6, "{tokens}");
    }

    #[test]
    fn a_plot_is_whole_whatever_came() {
        for firsts in [&[][..], &[0], &[7], &[1, 10, 100, 1000, 10_000]] {
            let svg = serve(&report(firsts));
            for wrong in ["NaN", "inf", "a<b", "\"-"] {
                let found = svg.contains(wrong);
                assert!(!found, "{wrong} in the plot of {firsts:?}:\n{svg}");
            }
            for tag in ["svg", "g", "text"] {
                let opened = svg.matches(&format!("<{tag} ")).count();
                assert_eq!(opened, svg.matches(&format!("</{tag}>")).count(), "{tag}");
            }
        }
    }
}
