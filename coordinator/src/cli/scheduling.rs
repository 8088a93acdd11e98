//! The flags of `cluster up` that say what a step holds and what may wait.
//!
//! Says nothing of what they mean: the scheduler's configuration does. Flags that `vllm serve` has keep its names and
//! meaning.

use super::values::{positive_tokens, tokens};
use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use serde::Serialize;

/// In which order waiting requests are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SchedulingPolicy {
    /// As they come; a request that asks for another place is refused.
    Fcfs,
    /// By the `priority` in the request, the lowest first, then as they come.
    Priority,
}

/// Flags under "Scheduling".
#[derive(Args, Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Scheduling {
    /// Which waiting request comes first: the one that came first, or the one with the lowest `priority`, which any
    /// client may then set.
    #[arg(long, env = "CLUSTER_SCHEDULING_POLICY", default_value = "fcfs", value_name = "POLICY",
          help_heading = SCHEDULING)]
    pub scheduling_policy: SchedulingPolicy,
    /// Most sequences in one step [default: 256, or --max-num-batched-tokens if that is less].
    #[arg(long, env = "CLUSTER_MAX_NUM_SEQS", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = SCHEDULING)]
    pub max_num_seqs: Option<u32>,
    /// Most tokens in one step [default: 512; on GPUs 2048, or 8192 where all have 70 GB].
    #[arg(long, env = "CLUSTER_MAX_NUM_BATCHED_TOKENS", value_name = "TOKENS",
          value_parser = positive_tokens, help_heading = SCHEDULING)]
    pub max_num_batched_tokens: Option<u32>,
    /// Most tokens of one request in one step; 0 is no limit.
    #[arg(long, env = "CLUSTER_LONG_PREFILL_TOKEN_THRESHOLD", default_value = "0",
          value_name = "TOKENS", value_parser = tokens, help_heading = SCHEDULING)]
    pub long_prefill_token_threshold: u32,
    /// Most prompt tokens in a step that goes on with streams, or an eighth of those that wait where that is more; 0 is no
    /// limit [default: 192; on GPUs 0].
    #[arg(long, env = "CLUSTER_MAX_MIXED_PREFILL_TOKENS", value_name = "TOKENS",
          value_parser = tokens, help_heading = SCHEDULING)]
    pub max_mixed_prefill_tokens: Option<u32>,
    /// Reuse KV blocks of equal prompt beginnings (turn off: --no-enable-prefix-caching).
    #[arg(long, env = "CLUSTER_ENABLE_PREFIX_CACHING", default_value_t = true,
          default_missing_value = "true", num_args = 0..=1, require_equals = true,
          value_name = "BOOL", value_parser = BoolishValueParser::new(),
          action = clap::ArgAction::Set, help_heading = SCHEDULING)]
    pub enable_prefix_caching: bool,
    /// Plan a step while the one before it is computed (turn off: --no-async-scheduling).
    #[arg(long, env = "CLUSTER_ASYNC_SCHEDULING", default_value_t = true,
          default_missing_value = "true", num_args = 0..=1, require_equals = true,
          value_name = "BOOL", value_parser = BoolishValueParser::new(),
          action = clap::ArgAction::Set, help_heading = SCHEDULING)]
    pub async_scheduling: bool,
    /// Most requests that may wait; more are answered 429.
    #[arg(long, env = "CLUSTER_MAX_NUM_QUEUED_REQS", default_value_t = 1024, value_name = "N",
          help_heading = SCHEDULING)]
    pub max_num_queued_reqs: u32,
    /// Most prompt tokens that may wait; more are answered 429.
    #[arg(long, env = "CLUSTER_MAX_NUM_QUEUED_TOKENS", default_value = "4m", value_name = "TOKENS",
          value_parser = tokens, help_heading = SCHEDULING)]
    pub max_num_queued_tokens: u32,
    /// Most alternatives a request may ask log-probabilities for.
    #[arg(long, env = "CLUSTER_MAX_LOGPROBS", default_value_t = 20, value_name = "N",
          help_heading = SCHEDULING)]
    pub max_logprobs: u32,
}

const SCHEDULING: &str = "Scheduling";
