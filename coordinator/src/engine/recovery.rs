//! What becomes of the loop after a fault: the group is formed again, and requests go on.
//!
//! No request is lost: the scheduler puts running sequences back to waiting with the tokens they
//! have, and streams stay open; new ones are taken and wait. How a group is formed again is the
//! fleet's business. Invariant: it is given up after as many attempts without progress as the
//! operator allows, never silently. An epoch that gave a token, or the scores of a prompt, brought
//! some request nearer to its end, so that nothing goes on for ever.

use super::Engine;
use super::handle::Readiness;
use crate::clock::{now, since};
use crate::fleet::{Fault, Group};
use std::time::{Duration, Instant};

/// Wait before the second attempt in a row; doubled for each further one, up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest wait before an attempt.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// A group that stood idle for longer than this was not formed in vain: attempts before that do not count any more. One that
/// fails in a step is another matter, however seldom it is asked for one.
const MEMORY: Duration = Duration::from_secs(10 * 60);

/// How often in a row the group had to be formed again without progress in between.
#[derive(Debug)]
pub(super) struct Attempts {
    allowed: u32,
    in_a_row: u32,
    /// When the last one succeeded.
    mended: Option<Instant>,
}

impl Attempts {
    /// None so far, of `allowed` in a row.
    pub(super) fn new(allowed: u32) -> Self {
        Self {
            allowed,
            in_a_row: 0,
            mended: None,
        }
    }

    /// Some request came nearer to its end.
    pub(super) fn succeeded(&mut self) {
        self.in_a_row = 0;
    }

    /// There is a fault, of a group that computed nothing if it `is_idle`.
    fn failed(&mut self, now: Instant, is_idle: bool) {
        let is_old = |mended| now.saturating_duration_since(mended) > MEMORY;
        if is_idle && self.mended.is_some_and(is_old) {
            self.in_a_row = 0;
        }
    }

    /// The group stands again.
    fn mended_at(&mut self, now: Instant) {
        self.mended = Some(now);
    }

    /// How long to wait before the next attempt; `None`: there have been enough.
    fn next(&mut self) -> Option<Duration> {
        self.in_a_row += 1;
        if self.in_a_row > self.allowed {
            return None;
        }
        let pause = |doublings: u32| FIRST_PAUSE.saturating_mul(1 << doublings.min(10));
        let pause = self.in_a_row.checked_sub(2).map_or(Duration::ZERO, pause);
        Some(pause.min(MAX_PAUSE))
    }
}

impl<G: Group> Engine<G> {
    /// Turns of the loop until the process is to end, through as many faults as may be.
    pub(super) async fn serve(&mut self) -> Result<(), Fault> {
        while let Err(fault) = self.turns().await {
            self.recover(fault).await?;
        }
        Ok(())
    }

    /// Has the group formed again, and all requests start over from the tokens they have.
    async fn recover(&mut self, mut fault: Fault) -> Result<(), Fault> {
        let begun = now();
        let is_idle = self.requests.scheduler.steps_under_way() == 0;
        self.attempts.failed(begun, is_idle);
        self.change(&Readiness::Ready, Readiness::Recovering(fault.to_string()));
        self.metrics.engine.ranks_ready.set(0.0);
        let epoch = loop {
            let pause = self.attempts.next().filter(|_| fault.can_be_mended());
            let Some(pause) = pause else {
                return Err(fault);
            };
            tracing::warn!(
                rank = fault.rank.map(|rank| rank.0),
                attempt = self.attempts.in_a_row,
                running = self.requests.scheduler.stats().running,
                "the group is formed again: {fault}"
            );
            let again = async {
                tokio::time::sleep(pause).await;
                self.fleet.recover(&fault).await
            };
            match self.requests.take_while(again).await {
                Ok(epoch) => break epoch,
                Err(next) => fault = next,
            }
        };
        self.requests.scheduler.reset(epoch);
        self.lead.forget();
        // To whom the faults have to be laid hears of it here.
        self.requests.deliver(now());
        self.last_answer = None;
        self.attempts.mended_at(now());
        let took = since(begun);
        let engine = &self.metrics.engine;
        engine.epoch.set(f64::from(epoch.0));
        engine.ranks_ready.set(self.metrics.world_size() as f64);
        engine.recoveries_total.increment(1);
        self.metrics.live.recovered(epoch);
        engine.recovery_seconds.record(took);
        tracing::warn!(%epoch, "requests go on after {took:.1?}");
        self.change(&Readiness::Recovering(String::new()), Readiness::Ready);
        Ok(())
    }

    /// From one readiness to another, unless the process is in a third, as when it drains.
    pub(super) fn change(&self, from: &Readiness, to: Readiness) {
        self.readiness.send_if_modified(|state| {
            let is_from = std::mem::discriminant(state) == std::mem::discriminant(from);
            if is_from {
                *state = to;
            }
            is_from
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_in_a_row_are_limited_and_wait_longer_each_time() {
        let mut attempts = Attempts::new(9);
        let pauses: Vec<_> = std::iter::from_fn(|| attempts.next()).collect();
        let ms = [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000];
        assert_eq!(pauses, ms.map(Duration::from_millis));
        assert_eq!(Attempts::new(0).next(), None, "not one, if none is allowed");
    }

    #[test]
    fn a_token_makes_the_next_fault_the_first() {
        let mut attempts = Attempts::new(2);
        for _ in 0..100 {
            assert_eq!(attempts.next(), Some(Duration::ZERO));
            assert_eq!(attempts.next(), Some(FIRST_PAUSE));
            attempts.succeeded();
        }
    }

    #[test]
    fn faults_far_apart_are_not_in_a_row() {
        let (mut attempts, mut at) = (Attempts::new(2), now());
        for _ in 0..100 {
            at += MEMORY * 2;
            attempts.failed(at, true);
            assert_eq!(attempts.next(), Some(Duration::ZERO));
            attempts.mended_at(at);
        }
        at += MEMORY;
        attempts.failed(at, true);
        assert_eq!(attempts.next(), Some(FIRST_PAUSE), "it was not long ago");
        attempts.mended_at(at);
        at += MEMORY * 2;
        attempts.failed(at, false);
        assert_eq!(attempts.next(), None, "each time it was used");
    }
}
