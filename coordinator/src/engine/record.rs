//! What the loop measures of itself: statistics of the pure core, in metrics.

use super::Engine;
use super::handle::SubmitError;
use super::requests::Requests;
use super::streams::Taken;
use crate::clock::since;
use crate::fleet::StepOutcome;
use crate::metrics::Rejection;
use crate::scheduler::request::Refusal;
use std::time::Duration;

impl<G> Engine<G> {
    /// A step that was answered and delivered.
    pub(super) fn record(&mut self, outcome: &StepOutcome) {
        let engine = &self.metrics.engine;
        let answered = outcome.answered;
        engine.apply_seconds.record(since(answered));
        engine.step_duration_seconds.record(outcome.took);
        for (rank, timings) in outcome.timings.iter().enumerate() {
            self.metrics
                .record_rank(rank, timings, self.last_answer.is_none());
        }
        let slowest = outcome.timings.iter().map(|timings| timings.step_us).max();
        let shards = Duration::from_micros(slowest.unwrap_or(0));
        // Without a pause, what was done here between two steps belongs to the second.
        let last = self.last_answer;
        let period = last.map_or(outcome.took, |last| answered.duration_since(last));
        let overhead = period.saturating_sub(shards);
        engine.step_overhead_seconds.record(overhead);
        engine.iteration_tokens_total.record(outcome.tokens as f64);
        self.last_answer = Some(answered);
        self.requests.record_stats();
    }
}

impl Requests {
    /// Where the scheduler stands.
    pub(super) fn record_stats(&self) {
        let engine = &self.metrics.engine;
        let requests = &self.metrics.requests;
        let stats = self.scheduler.stats();
        self.metrics.live.record(&stats);
        engine.num_requests_running.set(stats.running as f64);
        engine.num_requests_waiting.set(stats.waiting as f64);
        engine
            .num_requests_waiting_for_capacity
            .set(stats.waiting as f64);
        let total = stats.blocks_total.max(1) as f64;
        engine
            .kv_cache_usage_perc
            .set(stats.blocks_used as f64 / total);
        engine
            .prefill_backlog_tokens
            .set(stats.waiting_tokens as f64);
        engine.kv_tokens_used.set(stats.kv_tokens_used() as f64);
        engine
            .kv_tokens_evictable
            .set(stats.kv_tokens_evictable() as f64);
        engine.kv_tokens_free.set(stats.kv_tokens_free() as f64);
        engine.kv_tokens_total.set(stats.kv_tokens_total() as f64);
        // The scheduler counts over its whole life, so its numbers replace the metric's.
        let counters = stats.counters;
        engine.num_preemptions_total.absolute(counters.preemptions);
        engine
            .prefill_tokens_total
            .absolute(counters.prefill_tokens);
        engine.decode_tokens_total.absolute(counters.decode_tokens);
        engine
            .discarded_tokens_total
            .absolute(counters.discarded_tokens);
        requests
            .prefix_cache_queries_total
            .absolute(counters.prefix_cache_queries);
        requests
            .prefix_cache_hits_total
            .absolute(counters.prefix_cache_hits);
    }

    pub(super) fn record_params(&self, choices: &[Taken]) {
        let requests = &self.metrics.requests;
        for of_one_prompt in choices.chunk_by(|one, next| one.prompt == next.prompt) {
            requests.params_n.record(of_one_prompt.len() as f64);
        }
        for choice in choices {
            requests
                .params_max_tokens
                .record(f64::from(choice.max_tokens));
        }
    }

    pub(super) fn record_rejection(&self, error: &SubmitError) {
        let reason = match error {
            SubmitError::Refused(Refusal::TooManyRequests { .. }) => Rejection::QueuedRequests,
            SubmitError::Refused(Refusal::TooManyTokens { .. }) => Rejection::QueuedTokens,
            // What can never be served is the client's mistake, and shutting down no full house.
            SubmitError::Refused(
                Refusal::TooLong { .. } | Refusal::TooLarge { .. } | Refusal::Invalid(_),
            )
            | SubmitError::Draining
            | SubmitError::NotReady(_) => return,
        };
        self.metrics.rejected(reason);
    }
}
