//! Every metric of the process: name, labels, buckets and meaning, here and nowhere else.
//!
//! `vllm:` names keep the meaning, labels and buckets that gateways and dashboards were built on;
//! `cluster_` names are ours. The pure core returns statistics and the engine's loop and the HTTP
//! side record them here: nothing in the scheduler knows of metrics. The recorder is a value, not
//! a global, so that two clusters (or two tests) in one process do not mix; the models of a cluster share
//! it, told apart by `model_name`. How handles come to be is `registrar`'s business.
//!
//! Invariant: every series exists from the start, at zero, so that a rate never misses its first
//! event; label values come from fixed lists and ranks, never from requests.

mod lint;
pub mod live;
mod registrar;

use live::Live;
use metrics::{Counter, Gauge, Histogram};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use registrar::{Registrar, handles};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use topology::wire::StepTimings;

/// How often samples of histograms are folded into their buckets; between scrapes they only take
/// memory.
pub const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Time to first token, as in vLLM.
const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Time between tokens: vLLM's, and finer ones below 10 ms.
const BETWEEN_TOKENS: &[f64] = &[
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Phases of a request, as in vLLM.
const REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Tokens in one step, as in vLLM.
const ITERATION: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
/// Choices of one request, as in vLLM.
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
/// A step, or a rank's part of one.
const STEP: &[f64] = &[
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
    10.0, 60.0,
];
/// What the coordinator adds to a step.
const OVERHEAD: &[f64] = &[
    0.000_001, 0.000_002, 0.000_005, 0.000_01, 0.000_02, 0.000_05, 0.000_1, 0.000_2, 0.000_5,
    0.001, 0.002, 0.005, 0.01, 0.1, 1.0,
];
/// Forming the group again: from a process of the built-in model to one that loads hundreds of gigabytes.
const RECOVERY: &[f64] = &[0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0];

/// Histograms by name; those counted in tokens of a request get [`one_two_five`] instead.
const HISTOGRAMS: &[(&str, &[f64])] = &[
    ("vllm:time_to_first_token_seconds", TTFT),
    ("vllm:inter_token_latency_seconds", BETWEEN_TOKENS),
    ("vllm:request_time_per_output_token_seconds", BETWEEN_TOKENS),
    ("vllm:e2e_request_latency_seconds", REQUEST),
    ("vllm:request_queue_time_seconds", REQUEST),
    ("vllm:request_inference_time_seconds", REQUEST),
    ("vllm:request_prefill_time_seconds", REQUEST),
    ("vllm:request_decode_time_seconds", REQUEST),
    ("vllm:iteration_tokens_total", ITERATION),
    ("vllm:request_params_n", CHOICES),
    ("cluster_step_duration_seconds", STEP),
    ("cluster_rank_step_seconds", STEP),
    ("cluster_rank_compute_seconds", STEP),
    ("cluster_rank_collective_seconds", STEP),
    ("cluster_rank_wait_seconds", STEP),
    ("cluster_rank_sample_seconds", STEP),
    ("cluster_rank_outside_kernels_seconds", STEP),
    ("cluster_recovery_seconds", RECOVERY),
    ("cluster_rank_idle_seconds", OVERHEAD),
    ("cluster_schedule_seconds", OVERHEAD),
    ("cluster_apply_seconds", OVERHEAD),
    ("cluster_step_overhead_seconds", OVERHEAD),
];
const TOKEN_HISTOGRAMS: &[&str] = &[
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_max_num_generation_tokens",
    "vllm:request_params_max_tokens",
];

/// Why a request was not admitted: the values of `vllm:admission_rejections_total`'s `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rejection {
    /// `--max-num-queued-reqs` is reached.
    QueuedRequests,
    /// `--max-num-queued-tokens` is reached.
    QueuedTokens,
}

impl Rejection {
    const ALL: [(Self, &str); 2] = [
        (Self::QueuedRequests, "max_num_queued_reqs"),
        (Self::QueuedTokens, "max_num_queued_tokens"),
    ];
}

/// How a request ended: the values of `vllm:request_success_total`'s `finished_reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// A stop token or string.
    Stop,
    /// `max_tokens` or the model's length.
    Length,
    /// The client went away.
    Abort,
    /// The cluster could not go on.
    Error,
}

impl Outcome {
    const ALL: [(Self, &str); 4] = [
        (Self::Stop, "stop"),
        (Self::Length, "length"),
        (Self::Abort, "abort"),
        (Self::Error, "error"),
    ];
}

/// What the labels of a model's series depend on; known before the first shard is started.
#[derive(Clone, Debug)]
pub struct Subject {
    /// `--served-model-name`, or the model's own.
    pub model_name: String,
    /// Ranks of the group.
    pub world_size: u32,
}

/// The series of a process, of all its models.
#[derive(Debug)]
pub struct Registry {
    handle: PrometheusHandle,
    recorder: PrometheusRecorder,
}

/// All handles of one model. Recording is a few atomic operations.
#[derive(Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    model_name: String,
    /// Requests.
    pub requests: RequestMetrics,
    /// The engine's loop and the scheduler.
    pub engine: EngineMetrics,
    ranks: Vec<RankMetrics>,
    finished: BTreeMap<Outcome, Counter>,
    rejected: BTreeMap<Rejection, Counter>,
    /// What `cluster status` reads.
    pub live: Live,
}

handles! {
    /// Handles about requests; `vllm:` names.
    RequestMetrics {
        prompt_tokens_total: Counter = "vllm:prompt_tokens_total",
            "Prompt tokens of requests whose computation began.";
        prompt_tokens_cached_total: Counter = "vllm:prompt_tokens_cached_total",
            "Prompt tokens taken from the prefix cache.";
        generation_tokens_total: Counter = "vllm:generation_tokens_total",
            "Tokens generated.";
        prefix_cache_queries_total: Counter = "vllm:prefix_cache_queries_total",
            "Prompt tokens looked up in the prefix cache.";
        prefix_cache_hits_total: Counter = "vllm:prefix_cache_hits_total",
            "Prompt tokens found in the prefix cache.";
        time_to_first_token_seconds: Histogram = "vllm:time_to_first_token_seconds",
            "Time from a request's arrival to its first token.";
        inter_token_latency_seconds: Histogram = "vllm:inter_token_latency_seconds",
            "Time between two tokens of a request.";
        time_per_output_token_seconds: Histogram = "vllm:request_time_per_output_token_seconds",
            "Mean time per token after the first, one sample per request.";
        e2e_request_latency_seconds: Histogram = "vllm:e2e_request_latency_seconds",
            "Time from a request's arrival to its last token.";
        queue_time_seconds: Histogram = "vllm:request_queue_time_seconds",
            "Time a request waited before its computation began.";
        inference_time_seconds: Histogram = "vllm:request_inference_time_seconds",
            "Time from the begin of computation to the last token.";
        prefill_time_seconds: Histogram = "vllm:request_prefill_time_seconds",
            "Time from the begin of computation to the first token.";
        decode_time_seconds: Histogram = "vllm:request_decode_time_seconds",
            "Time from the first token to the last.";
        prompt_tokens: Histogram = "vllm:request_prompt_tokens",
            "Prompt tokens of a request.";
        generation_tokens: Histogram = "vllm:request_generation_tokens",
            "Tokens generated for a request.";
        max_num_generation_tokens: Histogram = "vllm:request_max_num_generation_tokens",
            "Tokens generated for the longest choice of a prompt.";
        params_max_tokens: Histogram = "vllm:request_params_max_tokens",
            "Most tokens that a request asked for.";
        params_n: Histogram = "vllm:request_params_n",
            "Choices that a request asked for, for each of its prompts.";
    }
}

handles! {
    /// Handles about the loop, the scheduler and the fleet.
    EngineMetrics {
        num_requests_running: Gauge = "vllm:num_requests_running",
            "Sequences that hold KV blocks and are computed.";
        num_requests_waiting: Gauge = "vllm:num_requests_waiting",
            "Sequences that wait to be computed.";
        num_requests_waiting_for_capacity: Gauge = "vllm:num_requests_waiting_by_reason",
            "Sequences that wait to be computed, by reason; none is deferred for another's sake.",
            ("reason", "capacity");
        num_requests_waiting_deferred: Gauge = "vllm:num_requests_waiting_by_reason",
            "Sequences that wait to be computed, by reason; none is deferred for another's sake.",
            ("reason", "deferred");
        kv_cache_usage_perc: Gauge = "vllm:kv_cache_usage_perc",
            "Share of the KV blocks that running sequences use; 1 is all.";
        num_preemptions_total: Counter = "vllm:num_preemptions_total",
            "Running sequences that gave up their blocks to be computed again later.";
        iteration_tokens_total: Histogram = "vllm:iteration_tokens_total",
            "Tokens computed in one step.";
        step_duration_seconds: Histogram = "cluster_step_duration_seconds",
            "A step seen from the coordinator: from the plan, or the step before, to the last rank's answer.";
        schedule_seconds: Histogram = "cluster_schedule_seconds",
            "Deciding what a step computes.";
        apply_seconds: Histogram = "cluster_apply_seconds",
            "Taking in and delivering what a step gave.";
        step_overhead_seconds: Histogram = "cluster_step_overhead_seconds",
            "Time from one step's answer to the next beyond the slowest rank's own time.";
        prefill_tokens_total: Counter = "cluster_computed_tokens_total",
            "Tokens computed, by kind; prefill: prompts, and what was preempted or lost to a fault.",
            ("kind", "prefill");
        decode_tokens_total: Counter = "cluster_computed_tokens_total",
            "Tokens computed, by kind; prefill: prompts, and what was preempted or lost to a fault.",
            ("kind", "decode");
        discarded_tokens_total: Counter = "cluster_discarded_tokens_total",
            "Tokens computed for sequences that had ended in the step before.";
        prefill_backlog_tokens: Gauge = "cluster_prefill_backlog_tokens",
            "Prompt tokens of admitted requests that are not computed yet.";
        kv_tokens_used: Gauge = "cluster_kv_tokens",
            "Tokens that fit the KV blocks, by state; evictable: cached and used by none.",
            ("state", "used");
        kv_tokens_evictable: Gauge = "cluster_kv_tokens",
            "Tokens that fit the KV blocks, by state; evictable: cached and used by none.",
            ("state", "evictable");
        kv_tokens_free: Gauge = "cluster_kv_tokens",
            "Tokens that fit the KV blocks, by state; evictable: cached and used by none.",
            ("state", "free");
        kv_tokens_total: Gauge = "cluster_kv_tokens",
            "Tokens that fit the KV blocks, by state; evictable: cached and used by none.",
            ("state", "total");
        epoch: Gauge = "cluster_epoch",
            "The communicator's life; a fault begins a new one.";
        recoveries_total: Counter = "cluster_recoveries_total",
            "Faults after which the group was formed again and requests went on.";
        recovery_seconds: Histogram = "cluster_recovery_seconds",
            "From a fault until the group can compute again.";
        ranks_ready: Gauge = "cluster_ranks_ready",
            "Ranks that can compute.";
        slow_streams_cut_total: Counter = "cluster_slow_streams_cut_total",
            "Streams ended because the client did not read.";
    }
}

handles! {
    /// Handles of one rank.
    RankMetrics {
        step: Histogram = "cluster_rank_step_seconds",
            "A step on one rank, from the plan's arrival at the device thread to its end.";
        compute: Histogram = "cluster_rank_compute_seconds",
            "The part of a rank's step outside collectives and sampling.";
        collective: Histogram = "cluster_rank_collective_seconds",
            "The part of a rank's step inside collectives, waiting included.";
        wait: Histogram = "cluster_rank_wait_seconds",
            "The part of a rank's collectives spent waiting for a slower rank.";
        sample: Histogram = "cluster_rank_sample_seconds",
            "The part of a rank's step spent choosing and scoring tokens.";
        idle: Histogram = "cluster_rank_idle_seconds",
            "What a rank waited for the next step after the last, while there was work.";
        outside: Histogram = "cluster_rank_outside_kernels_seconds",
            "The part of a rank's step before its GPU's first kernel and after the last; 0 on CPUs.";
    }
}

handles! {
    /// Handles about requests that are answered later.
    BackgroundMetrics {
        queued: Gauge = "cluster_background_requests",
            "Background requests that are kept, by state.", ("state", "queued");
        in_progress: Gauge = "cluster_background_requests",
            "Background requests that are kept, by state.", ("state", "in_progress");
        ended: Gauge = "cluster_background_requests",
            "Background requests that are kept, by state.", ("state", "ended");
        bytes: Gauge = "cluster_background_bytes",
            "Bytes of background requests and their answers.";
        accepted: Counter = "cluster_background_accepted_total",
            "Background requests that were accepted.";
        rejected: Counter = "cluster_background_rejections_total",
            "Background requests for which there was no room, or that could not be written down.";
        completed: Counter = "cluster_background_ended_total",
            "Background requests that ended, by how.", ("outcome", "completed");
        failed: Counter = "cluster_background_ended_total",
            "Background requests that ended, by how.", ("outcome", "failed");
        cancelled: Counter = "cluster_background_ended_total",
            "Background requests that ended, by how.", ("outcome", "cancelled");
        expired: Counter = "cluster_background_ended_total",
            "Background requests that ended, by how.", ("outcome", "expired");
    }
}

impl Registry {
    /// For models of at most `max_model_len` tokens: the largest token bucket. `build` names the build, for
    /// `cluster_build_info`.
    pub fn new(max_model_len: u32, build: &str) -> Self {
        let tokens = one_two_five(max_model_len);
        let buckets = HISTOGRAMS.iter().copied();
        let token_buckets = TOKEN_HISTOGRAMS.iter().map(|name| (*name, &*tokens));
        let builder = buckets.chain(token_buckets).fold(
            PrometheusBuilder::new(),
            |builder, (name, buckets)| {
                builder
                    .set_buckets_for_metric(Matcher::Full(name.into()), buckets)
                    .expect("no list of buckets is empty")
            },
        );
        let recorder = builder.build_recorder();
        let build = [("version", env!("CARGO_PKG_VERSION")), ("build", build)];
        let help = "Always 1; the labels name the build.";
        Registrar::new(&recorder, None)
            .make::<Gauge>("cluster_build_info", help, &build)
            .set(1.0);
        let handle = recorder.handle();
        Self { handle, recorder }
    }

    /// Handles about requests that are answered later, of all models.
    pub fn background(&self) -> BackgroundMetrics {
        BackgroundMetrics::new(&Registrar::new(&self.recorder, None), &[])
    }

    /// The text that `/metrics` answers.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds samples into buckets; to be called every [`UPKEEP_INTERVAL`].
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

impl Metrics {
    /// All series of a model, at zero.
    pub fn new(registry: Arc<Registry>, subject: &Subject) -> Self {
        let r = Registrar::new(&registry.recorder, Some(&subject.model_name));
        r.make::<Gauge>("cluster_ranks", "Ranks of the tensor-parallel group.", &[])
            .set(f64::from(subject.world_size));
        let finished = Outcome::ALL.map(|(outcome, label)| {
            let help = "Requests that ended, by reason.";
            let labels = [("finished_reason", label)];
            (outcome, r.make("vllm:request_success_total", help, &labels))
        });
        let rejected = Rejection::ALL.map(|(reason, label)| {
            let help = "Requests that were not admitted, by reason.";
            let labels = [("reason", label)];
            (
                reason,
                r.make("vllm:admission_rejections_total", help, &labels),
            )
        });
        Self {
            requests: RequestMetrics::new(&r, &[]),
            engine: EngineMetrics::new(&r, &[]),
            ranks: (0..subject.world_size)
                .map(|rank| RankMetrics::new(&r, &[("rank", &rank.to_string())]))
                .collect(),
            finished: finished.into(),
            rejected: rejected.into(),
            live: Live::new(subject.world_size),
            model_name: subject.model_name.clone(),
            registry,
        }
    }

    /// The series of all models, this one's among them.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Counts a request's end.
    pub fn finished(&self, outcome: Outcome) {
        if let Some(counter) = self.finished.get(&outcome) {
            counter.increment(1);
        }
    }

    /// Counts a request that was not admitted.
    pub fn rejected(&self, reason: Rejection) {
        if let Some(counter) = self.rejected.get(&reason) {
            counter.increment(1);
        }
    }

    /// Says what the KV cache is made of, once the shards have answered.
    pub fn set_cache_config(
        &self,
        block_size: u32,
        num_blocks: u32,
        dtype: &str,
        prefix_caching: bool,
    ) {
        let labels = [
            ("block_size", &*block_size.to_string()),
            ("num_gpu_blocks", &*num_blocks.to_string()),
            ("cache_dtype", dtype),
            (
                "enable_prefix_caching",
                if prefix_caching { "True" } else { "False" },
            ),
        ];
        let help = "Always 1; the labels say what the KV cache is made of.";
        self.registrar()
            .make::<Gauge>("vllm:cache_config_info", help, &labels)
            .set(1.0);
        self.engine
            .kv_tokens_total
            .set(f64::from(block_size) * f64::from(num_blocks));
    }

    /// Says how long a phase of the start took. `phase` comes from a fixed list of the fleet's.
    pub fn set_startup(&self, phase: &str, took: Duration) {
        let help = "Time the start took, by phase; `total` is from the command to readiness.";
        self.registrar()
            .make::<Gauge>("cluster_startup_seconds", help, &[("phase", phase)])
            .set(took.as_secs_f64());
    }

    /// Says what a rank's memory is used for. `usage`: `weights`, `workspace`, `kv_blocks`, `free`.
    pub fn set_rank_memory(&self, rank: u32, usage: &str, bytes: u64) {
        let labels = [("rank", &*rank.to_string()), ("usage", usage)];
        let help = "Memory of a rank's device, by use.";
        self.registrar()
            .make::<Gauge>("cluster_rank_memory_bytes", help, &labels)
            .set(bytes as f64);
    }

    /// Ranks of the group.
    pub fn world_size(&self) -> usize {
        self.ranks.len()
    }

    /// Records where a step's time went on one rank.
    pub fn record_rank(&self, rank: usize, timings: &StepTimings, after_pause: bool) {
        let Some(metrics) = self.ranks.get(rank) else {
            return;
        };
        self.live.stepped(rank, timings.step_us);
        let seconds = |us: u64| us as f64 / 1e6;
        let elsewhere = timings.collective_us + timings.sample_us;
        metrics.step.record(seconds(timings.step_us));
        if !after_pause {
            metrics.idle.record(seconds(timings.idle_us));
        }
        metrics
            .compute
            .record(seconds(timings.step_us.saturating_sub(elsewhere)));
        metrics.collective.record(seconds(timings.collective_us));
        metrics.wait.record(seconds(timings.wait_us));
        metrics.sample.record(seconds(timings.sample_us));
        metrics.outside.record(seconds(timings.outside_us));
    }

    fn registrar(&self) -> Registrar<'_> {
        Registrar::new(&self.registry.recorder, Some(&self.model_name))
    }
}

/// 1, 2, 5, 10, 20, 50, … up to `max`, and at least 1.
fn one_two_five(max: u32) -> Vec<f64> {
    let decades = (0..).map(|exponent| 10u64.pow(exponent));
    decades
        .flat_map(|decade| [1, 2, 5].map(|mantissa| mantissa * decade))
        .take_while(|value| *value <= u64::from(max.max(1)))
        .map(|value| value as f64)
        .collect()
}
