//! Which of several ways to do the same is the fastest on this device: each is tried in turn when there is work to do.
//!
//! Nothing is done for the trial's sake: the work is a step's own, with its data and caches as they are, and only
//! marks on the stream are added. Times are read when they are there; nobody waits for them. Results of
//! different ways may differ by rounding.
//!
//! Invariant: how many tries there are depends on nothing but their constants, so that ranks end them together.

use super::device::{Device, Mark};

/// Tries in all. Several of each way, because one may be disturbed.
pub(crate) const TRIES: usize = 24;

/// Ways that are being tried.
#[derive(Debug)]
pub(crate) struct Trials<W> {
    ways: Vec<Way<W>>,
    begun: usize,
    /// Marks around the tries that were not read yet, and their way.
    pending: Vec<(usize, Mark, Mark)>,
}

#[derive(Debug)]
struct Way<W> {
    what: W,
    /// The fastest try, in microseconds.
    best_us: f32,
    refused: bool,
}

impl<W> Trials<W> {
    /// `ways` in the order in which they are believed to be good; at least one.
    pub(crate) fn new(ways: impl IntoIterator<Item = W>) -> Self {
        let way = |what| Way {
            what,
            best_us: f32::INFINITY,
            refused: false,
        };
        Self {
            ways: ways.into_iter().map(way).collect(),
            begun: 0,
            pending: Vec::new(),
        }
    }

    /// Whether all tries were made; some may not be read yet.
    pub(crate) fn are_over(&self) -> bool {
        self.begun >= TRIES
    }

    /// Does the work in the way whose turn it is and marks how long that takes. If it is not to try, does it in the best
    /// way known, and asks nothing of the device.
    ///
    /// # Errors
    /// What the last way said, where none does it.
    pub(crate) fn run<E>(
        &mut self,
        device: &Device,
        tries: bool,
        mut work: impl FnMut(&W) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut last = None;
        if tries && !self.are_over() {
            self.read();
            let turn = self.begun % self.ways.len();
            self.begun += 1;
            let way = &mut self.ways[turn];
            if !way.refused {
                let start = device.mark_now();
                match work(&way.what) {
                    Ok(()) => {
                        // A try without marks is one that says nothing.
                        if let (Ok(start), Ok(end)) = (start, device.mark_now()) {
                            self.pending.push((turn, start, end));
                        }
                        return Ok(());
                    }
                    Err(error) => {
                        way.refused = true;
                        last = Some(error);
                    }
                }
            }
        }
        while let Some(way) = self.best() {
            match work(&self.ways[way].what) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    self.ways[way].refused = true;
                    last = Some(error);
                }
            }
        }
        match last {
            Some(error) => Err(error),
            // All were refused before: the first one says why once more.
            None => work(&self.ways[0].what),
        }
    }

    /// The way that was fastest, once all tries are read.
    pub(crate) fn winner(&mut self) -> Option<&W> {
        self.read();
        if !self.are_over() || !self.pending.is_empty() {
            return None;
        }
        self.best().map(|way| &self.ways[way].what)
    }

    fn read(&mut self) {
        let ways = &mut self.ways;
        self.pending
            .retain(|(way, start, end)| match end.micros_since(start) {
                Ok(None) => true,
                Ok(Some(us)) => {
                    ways[*way].best_us = ways[*way].best_us.min(us);
                    false
                }
                // The step's own calls say it to somebody who can act on it.
                Err(_) => false,
            });
    }

    /// Of those that work, the fastest; the first where nothing was measured.
    fn best(&self) -> Option<usize> {
        let working = self.ways.iter().enumerate().filter(|(_, way)| !way.refused);
        working
            .min_by(|(_, a), (_, b)| a.best_us.total_cmp(&b.best_us))
            .map(|(index, _)| index)
    }
}

#[cfg(all(test, feature = "cuda-emulation"))]
mod tests {
    use super::*;
    use crate::testing::Rng;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn the_fastest_way_that_works_wins_after_a_fixed_number_of_tries() {
        let device = Device::open(0).unwrap();
        let mut rng = Rng::new(7);
        for _ in 0..6 {
            let count = rng.within(1..6);
            let fastest = rng.within(0..count);
            let refused = (count > 1).then(|| (fastest + 1) % count);
            let mut trials = Trials::new(0..count);
            let mut done = 0;
            let mut run = |trials: &mut Trials<usize>, tries| {
                trials.run(&device, tries, |&way| {
                    if Some(way) == refused {
                        return Err("refused");
                    }
                    let pause = if way == fastest { 200 } else { 3000 };
                    thread::sleep(Duration::from_micros(pause));
                    done += 1;
                    Ok(())
                })
            };
            run(&mut trials, false).unwrap();
            assert!(trials.winner().is_none(), "not tried yet");
            for _ in 0..TRIES {
                assert!(!trials.are_over());
                run(&mut trials, true).unwrap();
            }
            assert!(trials.are_over());
            assert_eq!(trials.winner(), Some(&fastest));
            assert_eq!(done, TRIES + 1, "the work is done once each time");
        }
    }

    #[test]
    fn where_no_way_works_the_reason_is_told_every_time() {
        let device = Device::open(0).unwrap();
        let mut trials = Trials::new([1, 2, 3]);
        for tries in [true, false, true] {
            assert_eq!(trials.run(&device, tries, |_| Err("no")), Err("no"));
        }
        assert!(trials.winner().is_none());
    }
}
