//! What came when: tokens and requests under way over the run.
//!
//! Tokens of a chunk come at once; how many it holds is what its answer has on average.

use super::Outcome;
use crate::stream::Answer;
use std::collections::BTreeMap;
use std::time::Duration;

/// Requests that were answered whole.
pub(crate) fn completed(outcomes: &[Outcome]) -> impl Iterator<Item = (&Outcome, &Answer)> {
    let outcomes = outcomes.iter();
    outcomes.filter_map(|outcome| Some((outcome, outcome.answer.as_ref().ok()?)))
}

/// Tokens that came within each `width` of the run, by number of that stretch.
pub(crate) fn tokens_by(outcomes: &[Outcome], width: Duration) -> BTreeMap<u128, f64> {
    let width = width.as_nanos().max(1);
    let mut stretches: BTreeMap<u128, f64> = BTreeMap::new();
    for (outcome, answer) in completed(outcomes) {
        let each = answer.output_tokens as f64 / (answer.between.len() + 1) as f64;
        let mut at = outcome.sent + answer.first;
        *stretches.entry(at.as_nanos() / width).or_default() += each;
        for gap in &answer.between {
            at += *gap;
            *stretches.entry(at.as_nanos() / width).or_default() += each;
        }
    }
    stretches
}

/// Most tokens within one whole second.
pub(crate) fn peak_throughput(outcomes: &[Outcome]) -> f64 {
    let seconds = tokens_by(outcomes, Duration::from_secs(1));
    seconds.values().copied().fold(0.0, f64::max)
}

/// How many answers are under way from each moment on, ascending.
pub(crate) fn concurrency(outcomes: &[Outcome]) -> Vec<(Duration, usize)> {
    let ends = completed(outcomes).flat_map(|(it, a)| [(it.sent, true), (it.sent + a.last, false)]);
    let mut ends: Vec<(Duration, bool)> = ends.collect();
    // At the same moment one ends before another begins.
    ends.sort_unstable();
    let mut now = 0usize;
    let steps = ends.into_iter().map(|(at, begins)| {
        now = if begins {
            now + 1
        } else {
            now.saturating_sub(1)
        };
        (at, now)
    });
    steps.collect()
}

/// Most answers under way at one moment.
pub(crate) fn peak_concurrency(outcomes: &[Outcome]) -> usize {
    let steps = concurrency(outcomes).into_iter();
    steps.map(|(_, now)| now).max().unwrap_or(0)
}
