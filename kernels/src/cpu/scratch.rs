//! Memory that each thread works in, taken at start.
//!
//! Nothing outlives the work of one thread in one operation. Invariant: nothing is taken later.

use super::simd::LANES;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Vectors of a thread's memory, 448 KiB: with a panel of weights and the outputs it stays in a second-level
/// cache of 1 MiB.
pub(crate) const VECTORS: usize = 7 << 10;

/// A thread's memory.
pub(crate) type Space = [[f32; LANES]];

/// Elements of the memory that all threads share, 4 MiB: attention of one token with 64 heads of 128 over 60,000
/// positions needs it all.
const SHARED: usize = 1 << 20;

/// One space for each thread, and one for all.
#[derive(Debug)]
pub(crate) struct Scratch {
    threads: Vec<Mutex<Vec<[f32; LANES]>>>,
    shared: Mutex<Vec<f32>>,
}

impl Scratch {
    /// For the threads `0..threads`.
    pub(super) fn of(threads: usize) -> Self {
        let space = || Mutex::new(vec![[0.0; LANES]; VECTORS]);
        Self {
            threads: (0..threads).map(|_| space()).collect(),
            shared: Mutex::new(vec![0.0; SHARED]),
        }
    }

    /// The memory of `thread`, [`VECTORS`] long, holding anything.
    ///
    /// The lock is for two callers at once, who have the same index; one alone never waits.
    pub(crate) fn of_thread(&self, thread: usize) -> MutexGuard<'_, Vec<[f32; LANES]>> {
        self.threads[thread]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory of all threads, [`SHARED`] long, for an operation that divides it among them.
    pub(crate) fn shared(&self) -> MutexGuard<'_, Vec<f32>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
