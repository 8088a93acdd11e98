//! From the flags under "Scheduling" to the sizes of a step and the scheduler's limits, with defaults by device.
//!
//! Whether they make sense together is for the scheduler to say.

use crate::cli::args::Up;
use crate::cli::scheduling::{Scheduling, SchedulingPolicy};
use crate::scheduler::SchedulerConfig;
use topology::fit::{FitReport, GpuMemory, Sizes};

/// Most tokens in one step on CPUs: a step of this size takes a blink with a small model.
const CPU_BATCHED_TOKENS: u32 = 512;
/// The same on GPUs, and on GPUs of at least [`LARGE_GPU_BYTES`]: as in `vllm serve`.
const GPU_BATCHED_TOKENS: u32 = 2048;
const LARGE_GPU_BATCHED_TOKENS: u32 = 8192;
const LARGE_GPU_BYTES: u64 = 70 << 30;
/// Most sequences in one step, unless said otherwise.
const MAX_NUM_SEQS: u32 = 256;
/// Most prompt tokens beside running streams on CPUs. What a decode step reads of the weights serves these tokens as well:
/// a token costs less there than in a step of prompts alone. More of them make the pause longer; fewer, a rush of requests. With
/// tiles, two cores and half a billion parameters a token takes 0.33 ms in 128 or 192 beside 32 streams, 0.39 in 64 or 448,
/// 0.46 in 512 alone.
const CPU_MIXED_PREFILL_TOKENS: u32 = 192;

/// Sizes of a step of `up`, on GPUs where their memory is given.
pub(super) fn sizes(up: &Up, max_model_len: u32, gpus: Option<&GpuMemory>) -> Sizes {
    let flags = &up.scheduling;
    let max_num_batched_tokens = flags
        .max_num_batched_tokens
        .unwrap_or_else(|| batched_tokens(gpus));
    Sizes {
        block_size: up.block_size,
        max_model_len,
        max_num_batched_tokens,
        max_num_seqs: flags
            .max_num_seqs
            .unwrap_or(MAX_NUM_SEQS.min(max_num_batched_tokens)),
    }
}

/// Most tokens in one step, where the operator does not say.
fn batched_tokens(gpus: Option<&GpuMemory>) -> u32 {
    match gpus {
        None => CPU_BATCHED_TOKENS,
        Some(gpus)
            if gpus
                .total_bytes
                .iter()
                .all(|total| *total >= LARGE_GPU_BYTES) =>
        {
            LARGE_GPU_BATCHED_TOKENS
        }
        Some(_) => GPU_BATCHED_TOKENS,
    }
}

/// The scheduler's limits for a model of this vocabulary, which may be on GPUs.
pub(super) fn config(
    up: &Up,
    report: &FitReport,
    (vocab_size, on_gpus): (u32, bool),
) -> SchedulerConfig {
    let flags = &up.scheduling;
    let sizes = &report.sizes;
    SchedulerConfig {
        num_blocks: report.num_blocks,
        block_size: sizes.block_size,
        max_num_seqs: sizes.max_num_seqs,
        max_num_batched_tokens: sizes.max_num_batched_tokens,
        max_model_len: sizes.max_model_len,
        vocab_size,
        max_num_queued_reqs: flags.max_num_queued_reqs as usize,
        max_num_queued_tokens: flags.max_num_queued_tokens as usize,
        long_prefill_token_threshold: flags.long_prefill_token_threshold,
        max_mixed_prefill_tokens: mixed_prefill_tokens(flags, on_gpus),
        enable_prefix_caching: flags.enable_prefix_caching,
        async_scheduling: flags.async_scheduling,
    }
}

/// Whether requests may have priorities. The scheduler goes by them in any case: without the flag all are 0.
pub(super) fn has_priorities(up: &Up) -> bool {
    up.scheduling.scheduling_policy == SchedulingPolicy::Priority
}

/// Not limited on GPUs, unless the operator says so: what is best there was not measured.
fn mixed_prefill_tokens(flags: &Scheduling, on_gpus: bool) -> u32 {
    let default = if on_gpus { 0 } else { CPU_MIXED_PREFILL_TOKENS };
    flags.max_mixed_prefill_tokens.unwrap_or(default)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args as _, Command, FromArgMatches as _};

    #[test]
    fn prompts_beside_streams_are_limited_on_cpus_or_where_the_operator_says_so() {
        let found = |arguments: &[&str]| {
            let command = Scheduling::augment_args(Command::new("up").no_binary_name(true));
            // Whatever the environment of the tests says.
            let command = command.mut_args(|argument| argument.env(None));
            let matches = command.try_get_matches_from(arguments).unwrap();
            let flags = Scheduling::from_arg_matches(&matches).unwrap();
            [false, true].map(|on_gpus| mixed_prefill_tokens(&flags, on_gpus))
        };
        assert_eq!(found(&[]), [192, 0]);
        assert_eq!(found(&["--max-mixed-prefill-tokens", "0"]), [0, 0]);
        assert_eq!(found(&["--max-mixed-prefill-tokens", "1k"]), [1000, 1000]);
    }
}
