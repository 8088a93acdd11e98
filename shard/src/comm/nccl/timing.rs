//! How long collectives take on the device, measured by events around them.
//!
//! A pair of events costs about a microsecond of the device, and a decode step has a collective every
//! few dozen: so long steps are measured every time and short ones now and then, between which the last
//! measurement stands for them. Decode steps are alike; that is what makes it honest. A step that is recorded or
//! replayed carries no events, so now and then one is queued in the ordinary way, to be measured.
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

/// The events of one step.
#[derive(Debug, Default)]
pub(super) struct Timing {
    pairs: Vec<(Event, Event)>,
    used: usize,
    /// What this step does; `None` before its first collective.
    measures: Option<bool>,
    unmeasured: u32,
    /// Steps that could be replayed since one was kept from it.
    replayable: u32,
    /// Microseconds of the last step that was measured.
    last_us: u64,
}

impl Timing {
    /// A step begins.
    pub(super) fn begin(&mut self) {
        self.used = 0;
        self.measures = None;
    }

    /// Whether this step may be replayed, being one that could; if not, it is measured.
    pub(super) fn may_replay(&mut self) -> bool {
        self.replayable = (self.replayable + 1) % MEASURE_REPLAYED_EVERY;
        if self.replayable == 0 {
            self.measures = Some(true);
        }
        self.replayable != 0
    }

    /// This step is recorded or replayed, and not measured.
    pub(super) fn skip(&mut self) {
        self.measures = Some(false);
    }

    /// A collective over `bytes` is about to be queued.
    pub(super) fn before(&mut self, stream: Stream, bytes: usize) -> Result<(), CommError> {
        if !self.decide(bytes) {
            return Ok(());
        }
        if self.used == self.pairs.len() {
            self.pairs.push((Event::timed()?, Event::timed()?));
        }
        self.pairs[self.used].0.record(stream)
    }

    /// It was queued.
    pub(super) fn after(&mut self, stream: Stream) -> Result<(), CommError> {
        if self.measures != Some(true) {
            return Ok(());
        }
        self.used += 1;
        self.pairs[self.used - 1].1.record(stream)
    }

    /// Microseconds inside collectives; everything recorded is done.
    pub(super) fn total_us(&mut self) -> Result<u64, CommError> {
        match self.measures {
            None => return Ok(0),
            Some(false) => return Ok(self.last_us),
            Some(true) => {}
        }
        let mut total = 0.0;
        for (start, end) in &self.pairs[..self.used] {
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
        *self.measures.get_or_insert_with(|| {
            let measures = bytes >= LONG_BYTES || self.unmeasured == 0;
            self.unmeasured = (self.unmeasured + 1) % MEASURE_EVERY;
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
        timing.begin();
        assert_eq!(timing.total_us().unwrap(), 0, "a step without collectives");
    }
}
