//! The CPU backend's own threads, and how matrices are divided among them.
//!
//! Work that is too small to be worth waking a thread for runs on the caller. Invariant: threads
//! divide outputs and never a reduction, so their number changes no bit of a result.

use super::matrix::{Matrix, Panel};
use super::pool::Pool;
use crate::backend::DeviceError;
use rustix::thread::{CpuSet, sched_setaffinity};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Multiply-adds, or elements moved, below which the caller works alone: handing work to threads that look out for it
/// and waiting for them costs about two microseconds.
const INLINE_COST: usize = 1 << 16;

/// Threads of one backend. With one thread there is no pool and everything runs on the caller.
#[derive(Debug)]
pub(crate) struct Threads {
    pool: Option<Pool>,
    count: usize,
    /// Cores that the caller could use before it was pinned.
    pub(super) host_cores: usize,
    /// Work below this is done by the caller. Tests set it to zero, to divide small matrices too.
    pub(crate) inline_cost: usize,
}

impl Threads {
    /// Starts `count` threads, of which the caller is one. Where `cores` are given, each thread is pinned to one of
    /// them, in turn, and the caller is confined to those that no other has, or all of them. More `cores` than threads
    /// are shared by all.
    pub(crate) fn start(count: usize, cores: Option<&[usize]>) -> Result<Self, DeviceError> {
        let failed = |reason: String| DeviceError::Failed {
            device: "cpu".into(),
            reason,
        };
        if count == 0 {
            return Err(failed("it needs at least one thread".into()));
        }
        let host_cores = std::thread::available_parallelism().map_or(1, usize::from);
        if let Some(cores) = cores {
            if cores.is_empty() {
                return Err(failed("the list of cores is empty".into()));
            }
            let are_shared = cores.len() > count;
            let others =
                |core: &usize| !are_shared && (1..count).any(|i| cores[i % cores.len()] == *core);
            let free: Vec<usize> = cores.iter().copied().filter(|core| !others(core)).collect();
            pin(if free.is_empty() { cores } else { &free }).map_err(failed)?;
        }
        let pool = (count > 1)
            .then(|| start_pool(count, cores, host_cores))
            .transpose()
            .map_err(failed)?;
        Ok(Self {
            pool,
            count,
            host_cores,
            inline_cost: INLINE_COST,
        })
    }

    /// How many threads work.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Calls `f` on all threads at once, the caller among them; one that comes late does not take part.
    pub(crate) fn all(&self, f: &(dyn Fn() + Sync)) {
        match &self.pool {
            None => f(),
            Some(pool) => pool.run(&|_| f()),
        }
    }

    /// Calls `f` on each thread that takes part, with what it uses to claim some of `items`; an item costs `cost`.
    pub(crate) fn share<F>(&self, items: usize, cost: usize, f: F)
    where
        F: Fn(Share<'_>) + Sync,
    {
        let claimed = AtomicUsize::new(0);
        let share = |thread| Share {
            thread,
            items,
            threads: self.count,
            least: 1,
            head: 0,
            claimed: &claimed,
        };
        match self.pool(items, cost) {
            None => f(Share {
                threads: 1,
                ..share(0)
            }),
            Some(pool) => pool.run(&|thread| f(share(thread))),
        }
    }

    /// Calls `f(row index, row)` for every row of `values: [rows, width]`; a row costs `cost`.
    pub(crate) fn rows<T, F>(&self, values: &mut [T], width: usize, cost: usize, f: F)
    where
        T: Send,
        F: Fn(usize, &mut [T]) + Sync,
    {
        let matrix = Matrix::of(values, width);
        self.share(matrix.rows, cost, |mut share| {
            while let Some(rows) = share.claim() {
                for row in rows {
                    // Every row is claimed once, which is what `Panel::row` relies on.
                    f(row, matrix.panel(row..row + 1, 0..width).row(row));
                }
            }
        });
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
        assert_eq!(a.len(), b.len(), "matrices of one shape");
        let b = Matrix::of(b, width);
        // A row of `a` is claimed once, and with it the same row of `b`.
        self.rows(a, width, cost, |i, a| {
            f(i, a, b.panel(i..i + 1, 0..width).row(i));
        });
    }

    /// Divides the columns `within` of `values: [rows, width]` in groups of `columns`, which together cost `cost`. Each
    /// thread that takes part calls `f` with what it uses to claim panels of whole groups.
    pub(crate) fn panels<F>(
        &self,
        (values, width): (&mut [f32], usize),
        within: Range<usize>,
        (columns, cost): (usize, usize),
        f: F,
    ) where
        F: Fn(Panels<'_>) + Sync,
    {
        let matrix = Matrix::of(values, width);
        self.share(within.len().div_ceil(columns), cost, |share| {
            f(Panels {
                share,
                matrix,
                within: within.clone(),
                columns,
            });
        });
    }

    /// Divides `values: [rows, width]` into tiles of `rows` rows and `columns` columns, each of which costs `cost`, and
    /// calls `f(thread, rows, tile)` for each.
    pub(crate) fn tiles<T, F>(
        &self,
        values: &mut [T],
        width: usize,
        ((rows, columns), cost): ((usize, usize), usize),
        f: F,
    ) where
        T: Send,
        F: Fn(usize, Range<usize>, Panel<'_, T>) + Sync,
    {
        let matrix = Matrix::of(values, width);
        let across = width.div_ceil(columns);
        let tiles = matrix.rows.div_ceil(rows) * across;
        self.share(tiles, cost, |mut share| {
            while let Some(tiles) = share.claim() {
                for tile in tiles {
                    let (row, column) = (tile / across * rows, tile % across * columns);
                    let columns = column..(column + columns).min(width);
                    let rows = row..(row + rows).min(matrix.rows);
                    f(share.thread(), rows.clone(), matrix.panel(rows, columns));
                }
            }
        });
    }

    /// Collects `f(i)` for every `i` below `items`, in order; each costs `cost`.
    pub(crate) fn map<T: Send>(
        &self,
        items: usize,
        cost: usize,
        f: impl Fn(usize) -> T + Send + Sync,
    ) -> Vec<T> {
        let mut results: Vec<Option<T>> = (0..items).map(|_| None).collect();
        self.rows(&mut results, 1, cost, |i, result| result[0] = Some(f(i)));
        let results = results.into_iter();
        results
            .map(|result| result.expect("every row was visited"))
            .collect()
    }

    /// The pool, if `items` of `cost` each are worth waking it.
    fn pool(&self, items: usize, cost: usize) -> Option<&Pool> {
        let worth = items > 1 && items.saturating_mul(cost) >= self.inline_cost;
        self.pool.as_ref().filter(|_| worth)
    }
}

/// One thread's way to its share of some items.
#[derive(Debug)]
pub(crate) struct Share<'a> {
    thread: usize,
    items: usize,
    threads: usize,
    /// How many are claimed at once at least.
    least: usize,
    /// How many are claimed first, if any.
    head: usize,
    claimed: &'a AtomicUsize,
}

impl Share<'_> {
    /// Index of the thread, below [`Threads::count`]. Two callers may have the same.
    pub(crate) fn thread(&self) -> usize {
        self.thread
    }

    /// The next items that are this thread's; `None` when all are claimed. First many and in the end few, so that
    /// threads end together even where one was interrupted.
    pub(crate) fn claim(&mut self) -> Option<Range<usize>> {
        let mut start = self.claimed.load(Ordering::Relaxed);
        loop {
            let left = self.items - start;
            if left == 0 {
                return None;
            }
            let count = (left / (2 * self.threads)).max(self.least).max(self.head);
            let count = count.min(left);
            let count = if self.threads == 1 { left } else { count };
            match self.claimed.compare_exchange_weak(
                start,
                start + count,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    self.head = 0;
                    return Some(start..start + count);
                }
                Err(now) => start = now,
            }
        }
    }
}

/// One thread's way to its panels of a matrix.
#[derive(Debug)]
pub(crate) struct Panels<'a> {
    share: Share<'a>,
    matrix: Matrix<f32>,
    within: Range<usize>,
    columns: usize,
}

impl Panels<'_> {
    /// The same for work that costs much to begin: a claim is no smaller than the first one, so that there are two for
    /// each thread.
    pub(crate) fn in_large_claims(mut self) -> Self {
        let share = &mut self.share;
        share.least = share.items.div_ceil(2 * share.threads);
        self
    }

    /// The same for a product of so many rows. Few wait for the weights, and most of a thread's part is then one claim, since
    /// each begins with waiting for what nobody has asked for.
    pub(crate) fn for_rows(mut self, rows: usize) -> Self {
        /// More than these are limited by arithmetic, and then threads may differ in speed.
        const FEW: usize = 32;
        if rows <= FEW {
            let share = &mut self.share;
            share.head = share.items * 7 / (8 * share.threads);
        }
        self
    }

    /// Index of the thread.
    pub(crate) fn thread(&self) -> usize {
        self.share.thread()
    }

    /// The next groups of columns that are this thread's, by number, and the panel of them.
    pub(crate) fn claim(&mut self) -> Option<(Range<usize>, Panel<'_>)> {
        let groups = self.share.claim()?;
        let [start, end] =
            [groups.start, groups.end].map(|group| self.within.start + group * self.columns);
        let columns = start..end.min(self.within.end);
        Some((groups, self.matrix.panel(0..self.matrix.rows, columns)))
    }
}

/// Starts all threads but the caller, and pins them.
fn start_pool(count: usize, cores: Option<&[usize]>, host_cores: usize) -> Result<Pool, String> {
    let cores = cores.map(<[usize]>::to_vec);
    // Threads that share cores must not keep each other from working by looking out for work.
    let eager = count <= cores.as_ref().map_or(host_cores, Vec::len);
    Pool::start(count - 1, eager, move |i| match &cores {
        Some(cores) if cores.len() > count => pin(cores),
        Some(cores) => pin(&[cores[i % cores.len()]]),
        None => Ok(()),
    })
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
            let came = AtomicUsize::new(0);
            threads.pool.unwrap().run(&|index| {
                let set = rustix::thread::sched_getaffinity(None).unwrap();
                assert_eq!((set.count(), set.is_set(core)), (1, true));
                if index > 0 {
                    assert_eq!(std::thread::current().name(), Some("cpu-1"));
                }
                came.fetch_or(1 << index, Ordering::SeqCst);
                while index == 0 && came.load(Ordering::SeqCst) < 3 {
                    std::thread::yield_now();
                }
            });
            rustix::thread::sched_getaffinity(None).unwrap().count()
        });
        assert_eq!(core.join().unwrap(), 1);
    }

    #[test]
    fn threads_share_cores_of_which_there_are_more() {
        let together = std::thread::spawn(|| {
            let mine = rustix::thread::sched_getaffinity(None).unwrap();
            let cores: Vec<usize> = (0..CpuSet::MAX_CPU)
                .filter(|&core| mine.is_set(core))
                .collect();
            let threads = Threads::start(cores.len().div_ceil(2), Some(&cores)).unwrap();
            let confined = || rustix::thread::sched_getaffinity(None).unwrap().count();
            assert_eq!(confined() as usize, cores.len());
            if let Some(pool) = threads.pool {
                pool.run(&|_| assert_eq!(confined() as usize, cores.len()));
            }
        });
        together.join().unwrap();
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
                for within in [0..width / 3, width / 3..width] {
                    let start = within.start;
                    let all = (&mut values[..], width);
                    threads.panels(all, within, (16, 1), |mut panels| {
                        assert!(panels.thread() < count);
                        while let Some((groups, mut panel)) = panels.claim() {
                            assert_eq!(panel.columns().start, start + 16 * groups.start);
                            for row in panel.rows() {
                                for value in panel.row(row) {
                                    *value += 1.0;
                                }
                            }
                        }
                    });
                }
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
