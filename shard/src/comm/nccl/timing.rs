//! How long collectives take on the device, measured by events around them.
//!
//! A pair of events costs about a microsecond of the device, and a decode step has a collective every
//! few dozen: so long steps are measured every time and short ones now and then, between which the last
//! measurement stands for them. Decode steps are alike; that is what makes it honest. A step that is recorded or
//! replayed carries no events, so now and then one is queued in the ordinary way, to be measured.
//!
//! A step may be queued while the one before it runs, so there are events for two.
//!
//! Invariant: what is reported was measured, on a step no more than [`MEASURE_EVERY`] steps before, or
//! [`MEASURE_REPLAYED_EVERY`] where they could be replayed.

use super::event::{Event, Stream};
use crate::comm::CommError;

/// Short steps between two that are measured.
const MEASURE_EVERY: u32 = 16;

/// Steps that could be replayed between two that are measured: those take longer than the others.
const MEASURE_REPLAYED_EVERY: u32 = 64;

/// A step whose collectives have this many bytes takes long enough to be measured every time.
const LONG_BYTES: usize = 1 << 20;

/// The events of the steps under way, and what decides which steps have any.
#[derive(Debug, Default)]
pub(super) struct Timing {
    /// Steps take turns.
    steps: [Marks; 2],
    /// That of the step that was begun last.
    turn: usize,
    /// Steps that were begun and not ended.
    under_way: usize,
    unmeasured: u32,
    /// Steps that could be replayed since one was kept from it.
    replayable: u32,
    /// Microseconds of the last step that was measured.
    last_us: u64,
}

/// The events of one step.
#[derive(Debug, Default)]
struct Marks {
    pairs: Vec<(Event, Event)>,
    used: usize,
    /// What this step does; `None` before its first collective.
    measures: Option<bool>,
}

impl Timing {
    /// A step begins. Of those before it, one at most has not ended.
    pub(super) fn begin(&mut self) {
        self.turn = 1 - self.turn;
        self.under_way = (self.under_way + 1).min(self.steps.len());
        let step = self.step();
        step.used = 0;
        step.measures = None;
    }

    fn step(&mut self) -> &mut Marks {
        &mut self.steps[self.turn]
    }

    /// Whether this step may be replayed, being one that could; if not, it is measured.
    pub(super) fn may_replay(&mut self) -> bool {
        self.replayable = (self.replayable + 1) % MEASURE_REPLAYED_EVERY;
        if self.replayable == 0 {
            self.step().measures = Some(true);
        }
        self.replayable != 0
    }

    /// This step is recorded or replayed, and not measured.
    pub(super) fn skip(&mut self) {
        self.step().measures = Some(false);
    }

    /// A collective over `bytes` is about to be queued.
    pub(super) fn before(&mut self, stream: Stream, bytes: usize) -> Result<(), CommError> {
        if !self.decide(bytes) {
            return Ok(());
        }
        let step = self.step();
        if step.used == step.pairs.len() {
            step.pairs.push((Event::timed()?, Event::timed()?));
        }
        step.pairs[step.used].0.record(stream)
    }

    /// It was queued.
    pub(super) fn after(&mut self, stream: Stream) -> Result<(), CommError> {
        let step = self.step();
        if step.measures != Some(true) {
            return Ok(());
        }
        step.used += 1;
        step.pairs[step.used - 1].1.record(stream)
    }

    /// The oldest step ends: microseconds inside its collectives; everything that was recorded in it is done.
    pub(super) fn end(&mut self) -> Result<u64, CommError> {
        let is_last = self.under_way < self.steps.len();
        let turn = if is_last { self.turn } else { 1 - self.turn };
        self.under_way = self.under_way.saturating_sub(1);
        let step = &self.steps[turn];
        match step.measures {
            None => return Ok(0),
            Some(false) => return Ok(self.last_us),
            Some(true) => {}
        }
        let mut total = 0.0;
        for (start, end) in &step.pairs[..step.used] {
            total += end.micros_since(start)?;
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "microseconds of one step"
        )]
        let total = total as u64;
        self.last_us = total;
        Ok(total)
    }

    /// Whether this step is measured, which its first collective decides.
    fn decide(&mut self, bytes: usize) -> bool {
        let unmeasured = &mut self.unmeasured;
        *self.steps[self.turn].measures.get_or_insert_with(|| {
            let measures = bytes >= LONG_BYTES || *unmeasured == 0;
            *unmeasured = (*unmeasured + 1) % MEASURE_EVERY;
            measures
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_steps_that_could_be_replayed_some_are_measured() {
        let mut timing = Timing::default();
        let mut kept = 0;
        for _ in 0..3 * MEASURE_REPLAYED_EVERY {
            timing.begin();
            if timing.may_replay() {
                timing.skip();
                assert!(!timing.decide(64 << 20));
            } else {
                assert!(timing.decide(1), "it is measured");
                kept += 1;
            }
        }
        assert_eq!(kept, 3);
    }

    #[test]
    fn a_step_that_ends_after_the_next_has_begun_gives_its_own_time() {
        let mut timing = Timing {
            last_us: 7,
            ..Timing::default()
        };
        // Its own way of being measured is what tells a step from the other here: events need a device.
        let replayed = |timing: &mut Timing| timing.skip();
        let without = |_: &mut Timing| {};
        let begin = |timing: &mut Timing, step: fn(&mut Timing)| {
            timing.begin();
            step(timing);
        };
        begin(&mut timing, replayed);
        begin(&mut timing, without);
        assert_eq!(timing.end().unwrap(), 7, "the first");
        begin(&mut timing, replayed);
        assert_eq!(timing.end().unwrap(), 0, "the second");
        assert_eq!(timing.end().unwrap(), 7, "the third");
        begin(&mut timing, without);
        assert_eq!(timing.end().unwrap(), 0, "one that was alone");
    }

    #[test]
    fn long_steps_are_measured_always_and_short_ones_now_and_then() {
        let mut timing = Timing::default();
        let mut measured = 0;
        for _ in 0..4 * MEASURE_EVERY {
            timing.begin();
            let first = timing.decide(8192);
            measured += u32::from(first);
            assert_eq!(
                timing.decide(64 << 20),
                first,
                "the first collective decides"
            );
        }
        assert_eq!(measured, 4);
        for _ in 0..5 {
            timing.begin();
            assert!(timing.decide(LONG_BYTES));
        }
        let mut timing = Timing::default();
        timing.begin();
        assert_eq!(timing.end().unwrap(), 0, "a step without collectives");
    }
}
