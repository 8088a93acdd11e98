//! Where the cluster stands now, in numbers that can be read back.
//!
//! Metrics are written for a scraper; these few are for `cluster status`, which asks the process
//! itself. Written by the engine's loop, read at any time; decides nothing.

use crate::scheduler::Stats;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use topology::ids::Epoch;

/// The numbers. Each is right by itself; two of them may be of different turns of the loop.
#[derive(Debug, Default)]
pub struct Live {
    running: AtomicU64,
    waiting: AtomicU64,
    kv_tokens_used: AtomicU64,
    kv_tokens_total: AtomicU64,
    epoch: AtomicU64,
    recoveries: AtomicU64,
    /// By rank, in microseconds; 0: none yet.
    last_steps: Vec<AtomicU64>,
}

impl Live {
    /// For `world_size` ranks that have done nothing yet.
    pub fn new(world_size: u32) -> Self {
        Self {
            last_steps: (0..world_size).map(|_| AtomicU64::new(0)).collect(),
            ..Self::default()
        }
    }

    /// Takes in where the scheduler stands.
    pub fn record(&self, stats: &Stats) {
        for (number, value) in [
            (&self.running, stats.running),
            (&self.waiting, stats.waiting),
            (&self.kv_tokens_used, stats.kv_tokens_used()),
            (&self.kv_tokens_total, stats.kv_tokens_total()),
        ] {
            number.store(value as u64, Ordering::Relaxed);
        }
    }

    /// The group was formed.
    pub fn begin(&self, epoch: Epoch) {
        self.epoch.store(epoch.0.into(), Ordering::Relaxed);
    }

    /// The group was formed again.
    pub fn recovered(&self, epoch: Epoch) {
        self.begin(epoch);
        self.recoveries.fetch_add(1, Ordering::Relaxed);
    }

    /// How long a rank's step took, in microseconds.
    pub fn stepped(&self, rank: usize, step_us: u64) {
        if let Some(last) = self.last_steps.get(rank) {
            last.store(step_us.max(1), Ordering::Relaxed);
        }
    }

    /// Requests that run.
    pub fn running(&self) -> u64 {
        self.running.load(Ordering::Relaxed)
    }

    /// Requests that wait.
    pub fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Tokens of key-value memory: held by running sequences, and in all.
    pub fn kv_tokens(&self) -> (u64, u64) {
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        (load(&self.kv_tokens_used), load(&self.kv_tokens_total))
    }

    /// The communicator's life.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Faults that were survived.
    pub fn recoveries(&self) -> u64 {
        self.recoveries.load(Ordering::Relaxed)
    }

    /// A rank's last step; `None` before the first.
    pub fn last_step(&self, rank: usize) -> Option<Duration> {
        let last = self.last_steps.get(rank)?.load(Ordering::Relaxed);
        (last > 0).then(|| Duration::from_micros(last))
    }
}
