//! Memory that each thread works in, taken at start.
//!
//! Nothing outlives the work of one thread in one operation. Invariant: nothing is taken later.

use super::region::Region;
use super::simd::LANES;
use crate::backend::DeviceError;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Vectors of a thread's memory, 448 KiB: with a panel of weights and the outputs it stays in a second-level
/// cache of 1 MiB.
pub(crate) const VECTORS: usize = 7 << 10;

/// A thread's memory.
pub(crate) type Space = [[f32; LANES]];

/// Elements of the memory that all threads share, 4 MiB: attention of one token with 64 heads of 128 over 60,000
/// positions needs it all.
const SHARED: usize = 1 << 20;

/// Lines of 64 bytes for activations as tiles, 16 MiB: 496 rows of 16384 columns. What is not used is never touched.
pub(crate) const TILE_INPUTS: usize = 256 << 10;

/// Lines of 64 bytes for a thread's work with tiles, 1 MiB, of a huge page where there are such: the sums of 512 rows and
/// 512 outputs, or attention with heads of 256.
pub(crate) const TILE_SPACE: usize = 16 << 10;

/// One space for each thread, and one for all.
#[derive(Debug)]
pub(crate) struct Scratch {
    threads: Vec<Mutex<Vec<[f32; LANES]>>>,
    shared: Mutex<Vec<f32>>,
    tiles: Option<TileScratch>,
}

/// What products on matrix tiles need more: whole cache lines.
#[derive(Debug)]
struct TileScratch {
    inputs: Mutex<Region>,
    spaces: Vec<Mutex<Region>>,
}

impl Scratch {
    /// For the threads `0..threads`.
    pub(crate) fn of(threads: usize) -> Self {
        let space = || Mutex::new(vec![[0.0; LANES]; VECTORS]);
        Self {
            threads: (0..threads).map(|_| space()).collect(),
            shared: Mutex::new(vec![0.0; SHARED]),
            tiles: None,
        }
    }

    /// The same with memory for tiles.
    pub(crate) fn with_tiles(self) -> Result<Self, DeviceError> {
        let lines = |count: usize| Region::zeroed(&[count, 64]).map(Mutex::new);
        let spaces = self.threads.iter().map(|_| lines(TILE_SPACE));
        let tiles = TileScratch {
            inputs: lines(TILE_INPUTS)?,
            spaces: spaces.collect::<Result<_, _>>()?,
        };
        Ok(Self {
            tiles: Some(tiles),
            ..self
        })
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

    /// The lines for activations as tiles.
    ///
    /// # Panics
    /// Without memory for tiles.
    pub(crate) fn tile_inputs(&self) -> MutexGuard<'_, Region> {
        let inputs = &self.tiles().inputs;
        inputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The [`TILE_SPACE`] lines of `thread`, holding anything.
    ///
    /// # Panics
    /// Without memory for tiles.
    pub(crate) fn tile_space(&self, thread: usize) -> MutexGuard<'_, Region> {
        let space = &self.tiles().spaces[thread];
        space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tiles(&self) -> &TileScratch {
        let tiles = self.tiles.as_ref();
        tiles.expect("memory for tiles was taken, since they are used")
    }
}
