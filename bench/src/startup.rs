//! `cluster bench startup`: how long `cluster up` takes until it listens, is ready, and gave its first token.
//!
//! Cold starts drop the model's files from the file cache first. Options and file have the names of
//! `vllm bench startup`, where "cold" speaks of compiled code: there is none here.

use crate::args::Startup;
use crate::cold::drop_cache;
use crate::launch::{Launched, value_of};
use crate::load::{self, Arrivals};
use crate::report::Summary;
use crate::target::{Target, this_program};
use anyhow::Context;
use serde_json::{Map, Value, json};
use std::fmt;
use std::path::{Path, PathBuf};

/// Phases of one start, each counted from the start of the process, in seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    /// It takes connections.
    pub listening: f64,
    /// `/ready` says so.
    pub ready: f64,
    /// The first token of the first request has come.
    pub first_token: f64,
    /// What the server itself says of its phases: name and duration.
    pub phases: Vec<(String, f64)>,
}

/// All starts of a run.
#[derive(Debug, Default)]
pub struct Starts {
    /// With the model's files not in the file cache; empty where there are no files.
    pub cold: Vec<Start>,
    /// With them in it.
    pub warm: Vec<Start>,
    /// Bytes that were dropped before each cold start.
    pub cold_bytes: u64,
}

/// Measures, prints and writes what was asked for.
///
/// # Errors
/// If a cluster does not start or does not answer.
#[expect(
    clippy::print_stdout,
    reason = "the numbers are what the user asked for"
)]
pub async fn run(args: &Startup) -> anyhow::Result<()> {
    let program = this_program()?;
    let mut starts = Starts::default();
    if let Some(folder) = model_folder(args) {
        for _ in 0..args.num_iters_cold {
            starts.cold_bytes = drop_cache(&folder)?;
            starts.cold.push(start(&program, args).await?);
        }
    }
    for number in 0..args.num_iters_warmup + args.num_iters_warm {
        let started = start(&program, args).await?;
        if number >= args.num_iters_warmup {
            starts.warm.push(started);
        }
    }
    println!("{starts}");
    crate::serve::write_json(args.output_json.as_deref(), &starts.json())
}

/// The folder of the model that is started; `None` for the built-in one.
fn model_folder(args: &Startup) -> Option<PathBuf> {
    let model = value_of(&args.server.up, "--model")?.to_str()?;
    // `NAME=DIR` or `DIR`.
    let folder = model.split_once('=').map_or(model, |(_, folder)| folder);
    Some(PathBuf::from(folder)).filter(|folder| folder.is_dir())
}

async fn start(program: &Path, args: &Startup) -> anyhow::Result<Start> {
    let key = args.server.key()?;
    let launched = Launched::start(program, &args.server.up, key.as_deref()).await?;
    let result = first_token(&launched, args).await;
    launched.stop().await?;
    result
}

async fn first_token(launched: &Launched, args: &Startup) -> anyhow::Result<Start> {
    let target = Target::at_port(&args.server, launched.port).await?;
    let prompts = args.lengths.prompts();
    let plan = load::plan(
        &prompts,
        target.backend,
        &target.model,
        Arrivals::AT_ONCE,
        1,
    );
    let outcomes = target.send_all(plan, 1, launched.began).await?;
    let outcome = outcomes.into_iter().next().context("send a request")?;
    let answer = outcome.answer.context("ask for the first token")?;
    let page = target.page().await.unwrap_or_default();
    let phases = page.samples("cluster_startup_seconds");
    let phases = phases.filter_map(|(labels, value)| {
        let name = labels.split_once("phase=\"")?.1.split_once('"')?.0;
        Some((name.to_owned(), value))
    });
    Ok(Start {
        listening: launched.listening.as_secs_f64(),
        ready: launched.ready.as_secs_f64(),
        first_token: (outcome.sent + answer.first).as_secs_f64(),
        phases: phases.collect(),
    })
}

/// A named column of some starts.
fn columns(starts: &[Start]) -> Vec<(String, Summary)> {
    let of = |value: &dyn Fn(&Start) -> f64| Summary::of(starts.iter().map(value).collect());
    let mut columns = vec![
        ("listening".to_owned(), of(&|it| it.listening)),
        ("ready".to_owned(), of(&|it| it.ready)),
        ("first token".to_owned(), of(&|it| it.first_token)),
    ];
    let names = starts
        .first()
        .map(|it| it.phases.clone())
        .unwrap_or_default();
    for (name, _) in names {
        let value = |it: &Start| {
            let phase = it.phases.iter().find(|phase| phase.0 == name);
            phase.map_or(0.0, |phase| phase.1)
        };
        columns.push((format!("  phase {name}"), of(&value)));
    }
    columns
}

impl Starts {
    /// What is written to a file: time to readiness under vLLM's names, and the rest under ours.
    pub fn json(&self) -> Value {
        let mut json = Map::new();
        for (name, starts) in [("cold", &self.cold), ("warm", &self.warm)] {
            let ready = Summary::of(starts.iter().map(|it| it.ready).collect());
            let percentiles = [10.0, 25.0, 50.0, 75.0, 90.0, 99.0];
            let percentiles = percentiles.map(|p| (p.to_string(), json!(ready.percentile(p))));
            let times: Vec<f64> = starts.iter().map(|it| it.ready).collect();
            json.insert(format!("avg_{name}_startup_time"), json!(ready.mean));
            json.insert(format!("{name}_startup_times"), json!(times));
            let percentiles = Map::from_iter(percentiles);
            json.insert(format!("{name}_startup_percentiles"), percentiles.into());
            for (column, summary) in columns(starts) {
                let column = column.trim().replace([' ', '-'], "_");
                json.insert(format!("median_{name}_{column}_s"), json!(summary.median()));
            }
        }
        json.insert("cold_bytes".into(), json!(self.cold_bytes));
        json.into()
    }
}

impl fmt::Display for Starts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let heading = ["seconds since the start", "median", "least", "most"];
        for (name, starts) in [("Cold", &self.cold), ("Warm", &self.warm)] {
            if starts.is_empty() {
                continue;
            }
            writeln!(f, "{name} file cache, {} starts", starts.len())?;
            let [first, rest @ ..] = heading;
            writeln!(
                f,
                "{first:<26}{:>10}{:>10}{:>10}",
                rest[0], rest[1], rest[2]
            )?;
            for (column, summary) in columns(starts) {
                writeln!(
                    f,
                    "{column:<26}{:>10.3}{:>10.3}{:>10.3}",
                    summary.median(),
                    summary.percentile(0.0),
                    summary.percentile(100.0)
                )?;
            }
        }
        if self.cold.is_empty() {
            write!(
                f,
                "No cold starts: the built-in model has no files of its own."
            )?;
        } else {
            let gib = self.cold_bytes as f64 / f64::from(1 << 30);
            write!(
                f,
                "Before each cold start {gib:.2} GiB were dropped from the file cache."
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(ready: f64) -> Start {
        Start {
            listening: 0.01,
            ready,
            first_token: ready + 0.1,
            phases: vec![("load".into(), ready / 2.0)],
        }
    }

    #[test]
    fn starts_are_summed_up_by_phase() {
        let starts = Starts {
            cold: vec![],
            warm: vec![start(1.0), start(3.0), start(2.0)],
            cold_bytes: 0,
        };
        let json = starts.json();
        assert_eq!(json["avg_warm_startup_time"], 2.0);
        assert_eq!(json["warm_startup_times"], json!([1.0, 3.0, 2.0]));
        assert_eq!(json["median_warm_first_token_s"], 2.1);
        assert_eq!(json["median_warm_phase_load_s"], 1.0);
        assert_eq!(json["cold_startup_times"], json!([]));
        let table = starts.to_string();
        assert!(
            table.contains("ready                          2.000     1.000     3.000"),
            "{table}"
        );
        assert!(table.contains("No cold starts"), "{table}");
    }
}
