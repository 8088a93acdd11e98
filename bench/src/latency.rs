//! `cluster bench latency`: one batch of requests with fixed lengths, again and again, each alone on the server.
//!
//! Prompts differ from batch to batch, so that no prefix cache helps. File and lines have the names of
//! `vllm bench latency`.

use crate::args::Latency;
use crate::load::{self, Arrivals};
use crate::report::{Outcome, Summary};
use crate::target::{self, Target};
use serde_json::{Value, json};
use std::fmt;
use tokio::time::Instant;

const PERCENTILES: [f64; 6] = [10.0, 25.0, 50.0, 75.0, 90.0, 99.0];

/// What the batches took.
#[derive(Debug)]
pub struct Latencies {
    /// From the first request to the last token, in seconds, in the order of the batches.
    pub all: Vec<f64>,
    /// The same as a distribution.
    pub whole: Summary,
    /// From the first request to the slowest first token, in seconds.
    pub first: Summary,
    /// Generated tokens per second behind the slowest first token; 0 where there is one token only.
    pub decode: Summary,
}

/// Measures, prints and writes what was asked for.
///
/// # Errors
/// If the server cannot be reached or a request fails.
#[expect(
    clippy::print_stdout,
    reason = "the numbers are what the user asked for"
)]
pub async fn run(args: &Latency) -> anyhow::Result<()> {
    let latencies = target::with(&args.server, async |target| measure(target, args).await).await?;
    println!("{latencies}");
    crate::serve::write_json(args.output_json.as_deref(), &latencies.json())
}

async fn measure(target: &Target, args: &Latency) -> anyhow::Result<Latencies> {
    let prompts = args.lengths.prompts();
    let count = args.batch_size * (args.num_iters_warmup + args.num_iters);
    let arrivals = Arrivals::AT_ONCE;
    let mut plan = load::plan(&prompts, target.backend, &target.model, arrivals, count);
    let (mut all, mut first, mut decode) = (vec![], vec![], vec![]);
    for number in 0..args.num_iters_warmup + args.num_iters {
        let rest = plan.split_off(args.batch_size as usize);
        let batch = std::mem::replace(&mut plan, rest);
        let outcomes = target
            .send_all(batch, args.batch_size, Instant::now())
            .await?;
        let (first_s, whole_s, tokens) = batch_of(&outcomes)?;
        if number < args.num_iters_warmup {
            continue;
        }
        all.push(whole_s);
        first.push(first_s);
        let behind = tokens.saturating_sub(u64::from(args.batch_size));
        let rate = behind as f64 / (whole_s - first_s);
        decode.push(if behind == 0 { 0.0 } else { rate });
    }
    Ok(Latencies {
        whole: Summary::of(all.clone()),
        first: Summary::of(first),
        decode: Summary::of(decode),
        all,
    })
}

/// Seconds to the slowest first token and to the last one, and all tokens.
fn batch_of(outcomes: &[Outcome]) -> anyhow::Result<(f64, f64, u64)> {
    let (mut first, mut last, mut tokens) = (0.0f64, 0.0f64, 0);
    for outcome in outcomes {
        let answer = outcome
            .answer
            .as_ref()
            .map_err(|error| anyhow::anyhow!("{error:#}"))?;
        first = first.max((outcome.sent + answer.first).as_secs_f64());
        last = last.max((outcome.sent + answer.last).as_secs_f64());
        tokens += answer.output_tokens;
    }
    Ok((first, last, tokens))
}

impl Latencies {
    /// What is written to a file; `avg_first_token_latency` and `decode_tokens_per_second` are ours.
    pub fn json(&self) -> Value {
        let percentiles = PERCENTILES.map(|p| (p.to_string(), json!(self.whole.percentile(p))));
        json!({
            "avg_latency": self.whole.mean,
            "latencies": self.all,
            "percentiles": serde_json::Map::from_iter(percentiles),
            "avg_first_token_latency": self.first.mean,
            "decode_tokens_per_second": self.decode.median(),
        })
    }
}

impl fmt::Display for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Avg latency: {:.6} seconds", self.whole.mean)?;
        for percentile in PERCENTILES {
            let value = self.whole.percentile(percentile);
            writeln!(f, "{percentile}% percentile latency: {value:.6} seconds")?;
        }
        let first = self.first.median();
        writeln!(
            f,
            "Median to the batch's slowest first token: {first:.6} seconds"
        )?;
        let decode = self.decode.median();
        write!(f, "Median behind it: {decode:.2} output tokens/s")
    }
}
