//! `cluster bench throughput`: all prompts at once, and how long the server takes for them.
//!
//! File and line have the names of `vllm bench throughput`. Nothing is said about latency: all requests but the first few
//! wait in the server's queue.

use crate::args::Throughput;
use crate::load::{self, Arrivals};
use crate::report::timeline::completed;
use crate::target::{self, Target};
use anyhow::ensure;
use serde_json::{Value, json};
use std::fmt;
use tokio::time::Instant;

/// What was computed, and how long that took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// From sending the first to the last token of all, in seconds.
    pub elapsed_s: f64,
    /// Requests, all answered.
    pub requests: usize,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Generated tokens.
    pub output_tokens: u64,
}

/// Measures, prints and writes what was asked for.
///
/// # Errors
/// If the server cannot be reached or a request fails.
#[expect(
    clippy::print_stdout,
    reason = "the numbers are what the user asked for"
)]
pub async fn run(args: &Throughput) -> anyhow::Result<()> {
    let rates = target::with(&args.server, async |target| measure(target, args).await).await?;
    println!("{rates}");
    crate::serve::write_json(args.output_json.as_deref(), &rates.json())
}

async fn measure(target: &Target, args: &Throughput) -> anyhow::Result<Rates> {
    let mut prompts = args.lengths.prompts();
    prompts.random_prefix_len = args.prefix_len;
    prompts.random_range_ratio = args.random_range_ratio;
    let arrivals = Arrivals::AT_ONCE;
    let (backend, count) = (target.backend, args.num_prompts + 1);
    let mut plan = load::plan(&prompts, backend, &target.model, arrivals, count);
    target
        .warm_up(plan.split_off(args.num_prompts as usize))
        .await;
    let start = Instant::now();
    let outcomes = target.send_all(plan, args.num_prompts, start).await?;
    let elapsed_s = start.elapsed().as_secs_f64();
    let failed: Vec<_> = outcomes
        .iter()
        .filter_map(|it| it.answer.as_ref().err())
        .collect();
    ensure!(
        failed.is_empty(),
        "{} of {} requests failed, one with: {:#}",
        failed.len(),
        outcomes.len(),
        failed[0]
    );
    let prompt_tokens =
        completed(&outcomes).map(|(it, answer)| answer.prompt_tokens.unwrap_or(it.prompt_tokens));
    Ok(Rates {
        elapsed_s,
        requests: outcomes.len(),
        prompt_tokens: prompt_tokens.sum(),
        output_tokens: completed(&outcomes)
            .map(|(_, answer)| answer.output_tokens)
            .sum(),
    })
}

impl Rates {
    fn per_second(&self, count: u64) -> f64 {
        count as f64 / self.elapsed_s.max(f64::MIN_POSITIVE)
    }

    /// What is written to a file; `output_tokens_per_second` is ours.
    pub fn json(&self) -> Value {
        let all = self.prompt_tokens + self.output_tokens;
        json!({
            "elapsed_time": self.elapsed_s,
            "num_requests": self.requests,
            "total_num_tokens": all,
            "requests_per_second": self.per_second(self.requests as u64),
            "tokens_per_second": self.per_second(all),
            "output_tokens_per_second": self.per_second(self.output_tokens),
        })
    }
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "Throughput: {:.2} requests/s, {:.2} total tokens/s, {:.2} output tokens/s",
            self.per_second(self.requests as u64),
            self.per_second(self.prompt_tokens + self.output_tokens),
            self.per_second(self.output_tokens)
        )?;
        writeln!(f, "Total num prompt tokens:  {}", self.prompt_tokens)?;
        write!(f, "Total num output tokens:  {}", self.output_tokens)
    }
}
