//! `cluster bench serve`: a planned load against a running server.
//!
//! Does not judge the result: that every request failed is the only error that a slow or broken server can cause.

use crate::args::{Reporting, Serve};
use crate::load::{self, Arrivals};
use crate::plot;
use crate::report::{Report, Setting};
use crate::steps::StepTimes;
use crate::target::{self, Target};
use anyhow::{Context, ensure};
use serde_json::Value;
use std::path::Path;
use time::OffsetDateTime;
use tokio::time::Instant;

/// Measures, prints the table and writes what was asked for.
///
/// # Errors
/// If the server cannot be reached, the result cannot be written, or every request failed.
#[expect(clippy::print_stdout, reason = "the table is what the user asked for")]
pub async fn run(serve: &Serve) -> anyhow::Result<()> {
    let report = measure(serve).await?;
    println!("{report}");
    save(&serve.reporting, &report.json(serve.save_detailed), || {
        report.file_name()
    })?;
    if let Some(path) = &serve.plot {
        write(path, plot::serve(&report).as_bytes())?;
    }
    ensure!(
        report.completed > 0,
        "all {} requests failed",
        report.failed
    );
    Ok(())
}

/// Sends the load and measures.
///
/// # Errors
/// If the server does not name a model or does not answer at all; failed requests are counted.
pub async fn measure(serve: &Serve) -> anyhow::Result<Report> {
    target::with(&serve.server, async |target| {
        measure_at(target, serve).await
    })
    .await
}

/// Sends the load to a server that is known.
pub(crate) async fn measure_at(target: &Target, serve: &Serve) -> anyhow::Result<Report> {
    let arrivals = Arrivals {
        rate: serve.request_rate,
        burstiness: serve.burstiness,
    };
    let count = serve.num_prompts + serve.num_warmups;
    let mut plan = load::plan(
        &serve.prompts,
        target.backend,
        &target.model,
        arrivals,
        count,
    );
    // Prompts of their own, or a prefix cache would know the first ones measured.
    target
        .warm_up(plan.split_off(serve.num_prompts as usize))
        .await;
    let before = target.page().await;
    let began = OffsetDateTime::now_utc();
    let start = Instant::now();
    let room = serve.max_concurrency.unwrap_or(serve.num_prompts);
    let outcomes = target.send_all(plan, room, start).await?;
    let duration = start.elapsed();
    let after = target.page().await;
    let steps = before
        .zip(after)
        .and_then(|(before, after)| StepTimes::between(&before, &after));
    let setting = Setting::new(serve, &target.model);
    Ok(Report::new(setting, began, outcomes, duration, steps))
}

/// Writes a result to the files that were asked for.
pub(crate) fn save(
    reporting: &Reporting,
    json: &Value,
    name: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    let text = serde_json::to_vec_pretty(json)?;
    if let Some(path) = &reporting.json {
        write(path, &text)?;
    }
    let named = reporting.result_filename.clone();
    if reporting.save_result || named.is_some() {
        let folder = reporting.result_dir.clone().unwrap_or_default();
        if !folder.as_os_str().is_empty() {
            std::fs::create_dir_all(&folder)
                .with_context(|| format!("create {}", folder.display()))?;
        }
        write(&folder.join(named.unwrap_or_else(name)), &text)?;
    }
    Ok(())
}

/// Writes a result, if a file for it was given.
pub(crate) fn write_json(path: Option<&Path>, json: &Value) -> anyhow::Result<()> {
    path.map_or(Ok(()), |path| {
        write(path, &serde_json::to_vec_pretty(json)?)
    })
}

/// Writes a file, naming it where that fails.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
}
