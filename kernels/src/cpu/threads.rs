//! The CPU backend's own threads, and how matrices are divided among them.
//!
//! Work that is too small to be worth waking a thread for runs on the caller. Invariant: threads
//! divide outputs and never a reduction, so their number changes no bit of a result.

use crate::backend::DeviceError;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Multiply-adds, or elements moved, below which the caller works alone. Waking the pool and waiting for
/// it costs about ten microseconds; this much work costs about as much.
const INLINE_COST: usize = 1 << 18;

/// Pieces per thread: enough that a thread that was interrupted does not hold up the others.
const PIECES_PER_THREAD: usize = 4;

/// Threads of one backend. With one thread there is no pool and everything runs on the caller.
#[derive(Debug)]
pub(crate) struct Threads {
    pool: Option<ThreadPool>,
    count: usize,
    /// Work below this is done by the caller. Tests set it to zero, to divide small matrices too.
    pub(crate) inline_cost: usize,
}

impl Threads {
    /// Starts `count` threads. Where `cores` are given, each is pinned to one of them, in turn, and
    /// the calling thread is confined to all of them.
    pub(crate) fn start(count: usize, cores: Option<&[usize]>) -> Result<Self, DeviceError> {
        let failed = |reason: String| DeviceError::Failed {
            device: "cpu".into(),
            reason,
        };
        if count == 0 {
            return Err(failed("it needs at least one thread".into()));
        }
        if let Some(cores) = cores {
            if cores.is_empty() {
                return Err(failed("the list of cores is empty".into()));
            }
            pin(cores).map_err(failed)?;
        }
        let pool = (count > 1)
            .then(|| start_pool(count, cores))
            .transpose()
            .map_err(failed)?;
        Ok(Self {
            pool,
            count,
            inline_cost: INLINE_COST,
        })
    }

    /// How many threads work.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Calls `f(row index, row)` for every row of `values: [rows, width]`; a row costs `cost`.
    pub(crate) fn rows<F>(&self, values: &mut [f32], width: usize, cost: usize, f: F)
    where
        F: Fn(usize, &mut [f32]) + Sync,
    {
        let rows = values.len() / width;
        match self.pool(rows, cost) {
            None => values
                .chunks_exact_mut(width)
                .enumerate()
                .for_each(|(i, row)| f(i, row)),
            Some(pool) => pool.install(|| {
                values
                    .par_chunks_exact_mut(width)
                    .with_min_len(rows.div_ceil(self.count * PIECES_PER_THREAD))
                    .enumerate()
                    .for_each(|(i, row)| f(i, row));
            }),
        }
    }

    /// As [`Self::rows`] over two matrices of one shape.
    pub(crate) fn row_pairs<F>(
        &self,
        (a, b): (&mut [f32], &mut [f32]),
        width: usize,
        cost: usize,
        f: F,
    ) where
        F: Fn(usize, &mut [f32], &mut [f32]) + Sync,
    {
        let rows = a.len() / width;
        match self.pool(rows, cost) {
            None => {
                let pairs = a.chunks_exact_mut(width).zip(b.chunks_exact_mut(width));
                pairs.enumerate().for_each(|(i, (a, b))| f(i, a, b));
            }
            Some(pool) => pool.install(|| {
                a.par_chunks_exact_mut(width)
                    .zip(b.par_chunks_exact_mut(width))
                    .with_min_len(rows.div_ceil(self.count * PIECES_PER_THREAD))
                    .enumerate()
                    .for_each(|(i, (a, b))| f(i, a, b));
            }),
        }
    }

    /// Divides `values: [rows, width]` by columns and calls `f` for every panel; a column costs `cost`.
    /// Panels start at multiples of `align` columns.
    pub(crate) fn panels<F>(
        &self,
        values: &mut [f32],
        width: usize,
        (align, cost): (usize, usize),
        f: F,
    ) where
        F: Fn(Panel<'_>) + Sync,
    {
        let rows = values.len() / width;
        let matrix = Matrix {
            base: values.as_mut_ptr(),
            rows,
            width,
        };
        let Some(pool) = self.pool(width, cost) else {
            return f(Panel {
                matrix,
                columns: 0..width,
                lifetime: PhantomData,
            });
        };
        let columns = width
            .div_ceil(self.count * PIECES_PER_THREAD)
            .next_multiple_of(align);
        pool.install(|| {
            (0..width.div_ceil(columns)).into_par_iter().for_each(|i| {
                // The ranges are disjoint, which is what `Panel::row` relies on.
                let columns = i * columns..((i + 1) * columns).min(width);
                f(Panel {
                    matrix,
                    columns,
                    lifetime: PhantomData,
                });
            });
        });
    }

    /// Collects `f(i)` for every `i` below `items`, in order; each costs `cost`.
    pub(crate) fn map<T: Send>(
        &self,
        items: usize,
        cost: usize,
        f: impl Fn(usize) -> T + Send + Sync,
    ) -> Vec<T> {
        match self.pool(items, cost) {
            None => (0..items).map(f).collect(),
            Some(pool) => pool.install(|| (0..items).into_par_iter().map(f).collect()),
        }
    }

    /// The pool, if `items` of `cost` each are worth waking it.
    fn pool(&self, items: usize, cost: usize) -> Option<&ThreadPool> {
        let worth = items > 1 && items.saturating_mul(cost) >= self.inline_cost;
        self.pool.as_ref().filter(|_| worth)
    }
}

/// Starts `count` named threads and waits until each is pinned.
fn start_pool(count: usize, cores: Option<&[usize]>) -> Result<ThreadPool, String> {
    let refused = Arc::new(Mutex::new(None));
    let mut builder = ThreadPoolBuilder::new()
        .num_threads(count)
        .thread_name(|i| format!("cpu-{i}"));
    if let Some(cores) = cores {
        let (cores, refused) = (cores.to_vec(), Arc::clone(&refused));
        builder = builder.start_handler(move |i| {
            if let Err(reason) = pin(&[cores[i % cores.len()]]) {
                refused
                    .lock()
                    .expect("no holder panics")
                    .get_or_insert(reason);
            }
        });
    }
    let pool = builder
        .build()
        .map_err(|e| format!("starting {count} threads: {e}"))?;
    // Every thread has run its start handler once it has answered.
    pool.broadcast(|_| ());
    match refused.lock().expect("no holder panics").take() {
        Some(reason) => Err(reason),
        None => Ok(pool),
    }
}

/// Confines the calling thread to `cores`.
fn pin(cores: &[usize]) -> Result<(), String> {
    let mut set = CpuSet::new();
    for &core in cores {
        if core >= CpuSet::MAX_CPU {
            return Err(format!(
                "there is no core {core}: the largest number is {}",
                CpuSet::MAX_CPU - 1
            ));
        }
        set.set(core);
    }
    sched_setaffinity(None, &set).map_err(|e| format!("pinning a thread to {cores:?}: {e}"))
}

/// A mutable matrix that several threads write to, each its own columns.
#[derive(Clone, Copy, Debug)]
struct Matrix {
    base: *mut f32,
    rows: usize,
    width: usize,
}

#[expect(unsafe_code, reason = "threads write disjoint columns of one matrix")]
// SAFETY: the pointer comes from a `&mut [f32]` held for the whole of `Threads::panels`, and is used only
// through `Panel`, whose column ranges are disjoint.
unsafe impl Sync for Matrix {}

/// Some columns of a matrix, in the hands of one thread.
#[derive(Debug)]
pub(crate) struct Panel<'a> {
    matrix: Matrix,
    columns: Range<usize>,
    lifetime: PhantomData<&'a mut [f32]>,
}

impl Panel<'_> {
    /// Its columns in the whole matrix.
    pub(crate) fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// Rows of the matrix.
    pub(crate) fn rows(&self) -> usize {
        self.matrix.rows
    }

    /// The panel's part of a row.
    pub(crate) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.matrix.rows, "row {row} of {}", self.matrix.rows);
        let start = row * self.matrix.width + self.columns.start;
        #[expect(
            unsafe_code,
            reason = "a panel is a strided view, which slices cannot express"
        )]
        // SAFETY: `start` is inside the slice that `base` was taken from.
        let first = unsafe { self.matrix.base.add(start) };
        #[expect(
            unsafe_code,
            reason = "a panel is a strided view, which slices cannot express"
        )]
        // SAFETY: `row < rows` and `columns.end <= width`, so the range lies in the slice that `base` was
        // taken from; no other panel has these columns, and `&mut self` keeps this one's rows apart.
        unsafe {
            std::slice::from_raw_parts_mut(first, self.columns.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_count_or_core_that_cannot_be_is_an_error() {
        assert!(Threads::start(0, None).is_err());
        assert!(Threads::start(1, Some(&[])).is_err());
        // In a thread of its own, which may be confined without harm to other tests.
        let far = std::thread::spawn(|| Threads::start(2, Some(&[CpuSet::MAX_CPU])).map(|_| ()));
        let error = far.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("there is no core"), "{error}");
    }

    #[test]
    fn threads_are_pinned_and_named() {
        let core = std::thread::spawn(|| {
            let mine = rustix::thread::sched_getaffinity(None).unwrap();
            let core = (0..CpuSet::MAX_CPU)
                .find(|&core| mine.is_set(core))
                .unwrap();
            let threads = Threads::start(2, Some(&[core])).unwrap();
            let seen = threads.pool.unwrap().broadcast(|context| {
                let set = rustix::thread::sched_getaffinity(None).unwrap();
                let name = std::thread::current().name().unwrap().to_owned();
                (
                    set.count(),
                    set.is_set(core),
                    name == format!("cpu-{}", context.index()),
                )
            });
            assert_eq!(seen, [(1, true, true); 2]);
            rustix::thread::sched_getaffinity(None).unwrap().count()
        });
        assert_eq!(core.join().unwrap(), 1);
    }

    #[test]
    fn every_element_is_visited_once() {
        for count in [1, 3] {
            let mut threads = Threads::start(count, None).unwrap();
            threads.inline_cost = 0;
            for (rows, width) in [(1, 1), (1, 40), (7, 16), (5, 100), (64, 3)] {
                let mut values = vec![0.0; rows * width];
                threads.rows(&mut values, width, 1, |i, row| {
                    row.fill((i + 1) as f32 + row[0]);
                });
                threads.panels(&mut values, width, (16, 1), |mut panel| {
                    assert_eq!(panel.columns().start % 16, 0);
                    for row in 0..panel.rows() {
                        for value in panel.row(row) {
                            *value += 1.0;
                        }
                    }
                });
                let mut other = vec![0.0; rows * width];
                threads.row_pairs((&mut values, &mut other), width, 1, |_, a, b| {
                    b.copy_from_slice(a);
                });
                let expected: Vec<f32> = (0..rows)
                    .flat_map(|i| vec![(i + 2) as f32; width])
                    .collect();
                assert_eq!((&values, &other), (&expected, &expected));
                assert!(threads.map(rows, 1, |i| i).into_iter().eq(0..rows));
            }
        }
    }
}
