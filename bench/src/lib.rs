//! Load generator against any `OpenAI`-compatible server.
//!
//! It speaks HTTP and knows nothing of the inside of a server; what a `cluster` exports as metrics
//! it reads as any other client would. `cluster bench serve` is its command line.
//!
//! Invariant: the load is fixed by the arguments before the first request is sent; how fast the
//! server is changes when requests are sent only through `--max-concurrency`.

pub mod args;
pub mod client;
pub mod load;
pub mod report;
pub mod steps;
pub mod stream;

pub use args::{Args, Mode, Serve};
pub use report::{Outcome, Report, Setting};

use anyhow::{Context, ensure};
use args::Backend;
use client::Client;
use load::Planned;
use std::sync::Arc;
use std::time::Duration;
use steps::{Page, StepTimes};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// Runs what the command line asks for, and prints the result.
///
/// # Errors
/// If the server cannot be reached, the result cannot be written, or every request failed.
#[expect(clippy::print_stdout, reason = "the table is what the user asked for")]
pub async fn run(args: Args) -> anyhow::Result<()> {
    let Mode::Serve(serve) = args.mode;
    let report = measure(&serve).await?;
    println!("{report}");
    if let Some(path) = &serve.json {
        let json = serde_json::to_vec_pretty(&report.json())?;
        std::fs::write(path, json).with_context(|| format!("write {}", path.display()))?;
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
    let client = Arc::new(Client::new(&serve.url(), serve.api_key.as_deref())?);
    let model = match &serve.model {
        Some(model) => model.clone(),
        None => client
            .first_model()
            .await
            .with_context(|| format!("ask {} for its models", serve.url()))?,
    };
    let path = match serve.backend {
        Backend::Openai => "/v1/completions",
        Backend::OpenaiChat => "/v1/chat/completions",
    };
    let deadline = Duration::from_secs(serve.timeout);
    let mut plan = load::plan(serve, &model, serve.num_prompts + serve.num_warmups);
    // Prompts of their own, or a prefix cache would know the first ones measured.
    for warm_up in plan.split_off(serve.num_prompts as usize) {
        // If it fails, those that are measured will too, and are counted.
        let _ = client.generate(path, &warm_up.body, deadline).await;
    }
    let before = client.metrics().await.map(|text| Page::parse(&text));
    let start = Instant::now();
    let outcomes = send_all(&client, path, plan, serve, start).await?;
    let duration = start.elapsed();
    let after = client.metrics().await.map(|text| Page::parse(&text));
    let steps = before
        .zip(after)
        .and_then(|(before, after)| StepTimes::between(&before, &after));
    let setting = Setting::new(serve, &model);
    Ok(Report::new(setting, &outcomes, duration, steps))
}

/// Sends each request when it is due and there is room for it.
async fn send_all(
    client: &Arc<Client>,
    path: &'static str,
    plan: Vec<Planned>,
    serve: &Serve,
    start: Instant,
) -> anyhow::Result<Vec<Outcome>> {
    let deadline = Duration::from_secs(serve.timeout);
    let room = serve.max_concurrency.unwrap_or(serve.num_prompts);
    let room = Arc::new(Semaphore::new(room as usize));
    let mut requests = JoinSet::new();
    for planned in plan {
        sleep_until(start + planned.due).await;
        let seat = Arc::clone(&room).acquire_owned().await?;
        let client = Arc::clone(client);
        requests.spawn(async move {
            let sent = start.elapsed();
            let answer = client.generate(path, &planned.body, deadline).await;
            drop(seat);
            Outcome {
                prompt_tokens: planned.prompt_tokens,
                sent,
                answer,
            }
        });
    }
    let mut outcomes = Vec::with_capacity(requests.len());
    while let Some(outcome) = requests.join_next().await {
        outcomes.push(outcome.context("run a request")?);
    }
    Ok(outcomes)
}
