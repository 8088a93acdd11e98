//! The real engine, scheduler and fleet on simulated machines, by seed.
//!
//! Shards, links and clients are simulated; everything between them is the code that serves. Processes
//! die, freeze, hang and lie at any moment; links delay, fall silent in one direction and reorder. Time
//! is tokio's paused clock, so that hours of timeouts take milliseconds and a seed is a run.
//!
//! Safety: every stream has the oracle's tokens, each once and in order, and nothing after its end;
//! no rank has two processes; no step counts that not all ranks computed; epochs only go up, and
//! after a recovery all are in the same; no shard is given up that nothing was done to. Liveness: once
//! faults stop, everyone is served in bounded time, and the cluster is whole, idle and empty.
//!
//! A seed that fails is printed with its log up to there; [`LOOK_AT`] shows a whole one.

mod clients;
mod device;
mod faults;
mod host;
mod oracle;
mod promised;
mod run;
mod shard;
mod watched;
mod world;

use run::{Report, run};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The seed whose log `one_seed` prints: put one here, and run that test with `--nocapture`.
const LOOK_AT: u64 = 1;

/// Seeds of the ordinary test run.
const SEEDS: u64 = 500;

/// A seed that computes for so long is told: it spins, or simulates much more than the others.
const SLOW: Duration = Duration::from_secs(2);

/// Lines of the log that are shown of a seed that fails.
const SHOWN: usize = 60;

/// What all seeds together saw.
#[derive(Debug, Default)]
struct Sums {
    faults: u64,
    recoveries: u64,
    tokens: usize,
    finished: usize,
    failed: usize,
    took: Duration,
}

impl Sums {
    fn add(&mut self, report: &Report) {
        self.faults += u64::from(report.faults);
        self.recoveries += u64::from(report.recoveries);
        self.tokens += report.tokens;
        self.finished += report.finished;
        self.failed += report.failed;
        self.took += report.took;
    }
}

/// Runs seeds on all cores; the first that fails, if one does, is told with its log up to there.
fn sweep(first: u64, count: u64) -> Sums {
    let next = AtomicU64::new(first);
    let work = || {
        let mut sums = Sums::default();
        let mut failed: Vec<(u64, Vec<String>)> = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                return (sums, failed);
            }
            let begun = crate::clock::now();
            let ran = catch_unwind(AssertUnwindSafe(|| run(seed, false)));
            if crate::clock::since(begun) > SLOW {
                println!("seed {seed} takes long");
            }
            match ran {
                Ok(report) if report.violations.is_empty() => sums.add(&report),
                Ok(report) => failed.push((seed, report.violations)),
                Err(_) => failed.push((seed, vec!["it panics".to_owned()])),
            }
        }
    };
    let (mut sums, mut failed) = (Sums::default(), Vec::new());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            let (some, bad) = worker.join().expect("a worker catches panics");
            sums.faults += some.faults;
            sums.recoveries += some.recoveries;
            sums.tokens += some.tokens;
            sums.finished += some.finished;
            sums.failed += some.failed;
            sums.took += some.took;
            failed.extend(bad);
        }
    });
    failed.sort();
    if let Some((seed, violations)) = failed.first() {
        let log = catch_unwind(AssertUnwindSafe(|| run(*seed, true).log)).unwrap_or_default();
        let broken = log.iter().position(|line| line.contains(" VIOLATION"));
        let to = broken.map_or(log.len(), |line| line + 1);
        let from = to.saturating_sub(SHOWN);
        let seeds: Vec<u64> = failed.iter().map(|(seed, _)| *seed).collect();
        panic!(
            "{} of {count} seeds fail: {seeds:?}\nseed {seed}: {violations:#?}\n{}",
            seeds.len(),
            log[from..to].join("\n")
        );
    }
    sums
}

#[test]
fn whatever_happens_to_shards_and_links_streams_are_whole() {
    let sums = sweep(0, SEEDS);
    println!("{SEEDS} seeds: {sums:?}");
    assert!(
        sums.faults > SEEDS && sums.recoveries > SEEDS / 2,
        "{sums:?}"
    );
    assert!(sums.finished > 1000 && sums.failed > 20, "{sums:?}");
}

/// The long form, by `scripts/simulate.sh`; by itself a few seeds beyond the ordinary ones.
#[test]
fn seeds_of_the_long_form() {
    let count = number("SIMULATE_SEEDS", 20);
    let first = number("SIMULATE_FIRST", SEEDS);
    let begun = crate::clock::now();
    let sums = sweep(first, count);
    let took = crate::clock::since(begun);
    println!("{count} seeds from {first} in {took:.1?}: {sums:?}");
    assert!(sums.tokens > 0, "{sums:?}");
}

#[expect(
    clippy::disallowed_methods,
    reason = "how long the long form is comes from its script"
)]
fn number(name: &str, otherwise: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(otherwise, |text| text.parse().expect("it is a number"))
}

#[test]
fn a_seed_is_a_run() {
    for seed in 0..12 {
        let (one, again) = (run(seed, false), run(seed, false));
        assert_eq!(one.trace, again.trace, "seed {seed}");
        assert_eq!(one.took, again.took, "seed {seed}");
    }
    assert_ne!(run(1, false).trace, run(2, false).trace);
}

#[test]
fn one_seed() {
    let report = run(LOOK_AT, true);
    println!("{}", report.log.join("\n"));
    assert_eq!(report.violations, Vec::<String>::new());
}
