//! Threads that wait for work together with their caller, who works too.
//!
//! A decode step is a hundred and more pieces of work of a few microseconds to a millisecond, one after the other. So
//! the workers look out for the next for a while before they sleep: waking a sleeping thread costs tens of
//! microseconds. One that wakes too late finds the work closed and is not waited for. What is not here: how work is divided.
//!
//! Invariant: [`Pool::run`] returns, or unwinds, only when no worker is inside the work any more.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Looks before a thread sleeps, about 50 ns each: as much time as waking it would cost.
const LOOKS: usize = 2000;

/// In [`Shared::state`]: workers may enter. Below it is the number of those inside, above it the work's number.
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

/// What all threads do, each with its own index.
type Work<'a> = &'a (dyn Fn(usize) + Sync);

/// Workers with the indices from 1 on; the caller is 0.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    busy: AtomicBool,
}

/// Keeps what is written often away from what others read.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Apart<T>(T);

#[derive(Debug, Default)]
struct Shared {
    state: Apart<AtomicU64>,
    /// The work, while it is open or somebody is inside.
    work: AtomicPtr<Work<'static>>,
    looks: usize,
    asleep: AtomicUsize,
    caller_sleeps: AtomicBool,
    stop: AtomicBool,
    panicked: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
    done: Condvar,
}

impl Pool {
    /// Starts `workers` named threads, each of which first runs `prepare` with its index.
    ///
    /// `eager` threads look out for work before they sleep: right where each has a core to itself.
    pub(super) fn start<F>(workers: usize, eager: bool, prepare: F) -> Result<Self, String>
    where
        F: Fn(usize) -> Result<(), String> + Clone + Send + 'static,
    {
        let shared = Arc::new(Shared {
            looks: if eager { LOOKS } else { 0 },
            ..Shared::default()
        });
        let mut pool = Self {
            shared: Arc::clone(&shared),
            workers: Vec::with_capacity(workers),
            busy: AtomicBool::new(false),
        };
        let (answer, answers) = std::sync::mpsc::sync_channel(workers);
        for index in 1..=workers {
            let (shared, prepare, answer) = (Arc::clone(&shared), prepare.clone(), answer.clone());
            let serve = move || {
                let prepared = prepare(index);
                let go = prepared.is_ok();
                // The receiver waits for all answers.
                let told = answer.send(prepared);
                drop(answer);
                if go && told.is_ok() {
                    shared.serve(index);
                }
            };
            let thread = std::thread::Builder::new().name(format!("cpu-{index}"));
            let thread = thread
                .spawn(serve)
                .map_err(|e| format!("starting {workers} threads: {e}"))?;
            pool.workers.push(thread);
        }
        drop(answer);
        answers.iter().collect::<Result<Vec<()>, _>>()?;
        Ok(pool)
    }

    /// Calls `work` on the caller and on every worker that comes in time, and waits for all of them.
    pub(super) fn run(&self, work: Work<'_>) {
        if self.busy.swap(true, Ordering::Acquire) {
            // Another caller has the workers. They are a help, not a need.
            return work(0);
        }
        let open = OpenWork { pool: self };
        let shared = &self.shared;
        shared.panicked.store(false, Ordering::Relaxed);
        let at = std::ptr::from_ref(&work).cast::<Work<'static>>();
        shared.work.store(at.cast_mut(), Ordering::Relaxed);
        let number = (shared.state.0.load(Ordering::Relaxed) >> 32) + 1;
        shared.state.0.store(number << 32 | OPEN, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            drop(shared.lock());
            shared.wake.notify_all();
        }
        work(0);
        drop(open);
        assert!(
            !shared.panicked.load(Ordering::Relaxed),
            "a thread of the CPU backend panicked"
        );
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.stop.store(true, Ordering::SeqCst);
        shared.state.0.fetch_add(1 << 32, Ordering::SeqCst);
        drop(shared.lock());
        shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // It has said so if it panicked.
            let _ = worker.join();
        }
    }
}

/// Closes the work and waits for those inside, also when the caller's own part panics.
struct OpenWork<'a> {
    pool: &'a Pool,
}

impl Drop for OpenWork<'_> {
    fn drop(&mut self) {
        let shared = &self.pool.shared;
        let mut inside = shared.state.0.fetch_and(!OPEN, Ordering::AcqRel) & INSIDE;
        for _ in 0..shared.looks {
            if inside == 0 {
                break;
            }
            std::hint::spin_loop();
            inside = shared.state.0.load(Ordering::Acquire) & INSIDE;
        }
        if inside > 0 {
            let mut guard = shared.lock();
            shared.caller_sleeps.store(true, Ordering::SeqCst);
            while shared.state.0.load(Ordering::SeqCst) & INSIDE > 0 {
                guard = shared
                    .done
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            shared.caller_sleeps.store(false, Ordering::SeqCst);
        }
        self.pool.busy.store(false, Ordering::Release);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.sleep.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker's life.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        while let Some(number) = self.next(seen) {
            seen = number;
            if self.enter(number) {
                self.work(index);
                self.leave();
            }
        }
    }

    /// Waits for work after number `seen`; `None` at the end.
    fn next(&self, seen: u64) -> Option<u64> {
        let current = || self.state.0.load(Ordering::SeqCst) >> 32;
        let mut looks = 0;
        while current() == seen && looks < self.looks {
            std::hint::spin_loop();
            looks += 1;
        }
        if current() == seen {
            let mut guard = self.lock();
            self.asleep.fetch_add(1, Ordering::SeqCst);
            while current() == seen {
                guard = self
                    .wake
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            self.asleep.fetch_sub(1, Ordering::SeqCst);
        }
        (!self.stop.load(Ordering::SeqCst)).then(current)
    }

    /// Whether work `number` is still open, and this worker inside now.
    fn enter(&self, number: u64) -> bool {
        let one_more =
            |state: u64| (state >> 32 == number && state & OPEN != 0).then_some(state + 1);
        let entered = self
            .state
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more);
        entered.is_ok()
    }

    /// Only between `enter` and `leave`.
    fn work(&self, index: usize) {
        let at = self.work.load(Ordering::Relaxed);
        #[expect(
            unsafe_code,
            reason = "the work borrows from its caller, and threads that outlive it cannot say so in types"
        )]
        // SAFETY: `run` stored a pointer to its `work` before it opened this number, which `enter` has seen;
        // it stays in its frame, where that lives, until it has closed the number and this worker has left.
        let work = unsafe { *at };
        if catch_unwind(AssertUnwindSafe(|| work(index))).is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
    }

    fn leave(&self) {
        self.state.0.fetch_sub(1, Ordering::SeqCst);
        if self.caller_sleeps.load(Ordering::SeqCst) {
            drop(self.lock());
            self.done.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_over_when_run_returns_and_everyone_can_take_part() {
        for eager in [false, true] {
            let pool = Pool::start(3, eager, |_| Ok(())).unwrap();
            let mut took_part = [false; 4];
            for round in 0..5000_usize {
                // On the caller's stack: a worker that stayed inside would be found out.
                let sums: [AtomicUsize; 4] = Default::default();
                let claimed = AtomicUsize::new(0);
                pool.run(&|index| {
                    while claimed.fetch_add(1, Ordering::Relaxed) < 64 {
                        sums[index].fetch_add(round, Ordering::Relaxed);
                        if round > 4900 {
                            std::thread::yield_now();
                        }
                    }
                });
                let sums = sums.map(AtomicUsize::into_inner);
                assert_eq!(sums.iter().sum::<usize>(), 64 * round);
                for (took_part, sum) in took_part.iter_mut().zip(sums) {
                    *took_part |= sum > 0;
                }
            }
            assert!(took_part[1..].contains(&true), "no worker ever worked");
        }
    }

    #[test]
    fn a_panic_is_passed_on_and_the_pool_goes_on() {
        let pool = Pool::start(2, true, |_| Ok(())).unwrap();
        for panicking in [0, 1] {
            let came = AtomicUsize::new(0);
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|index| {
                    came.fetch_add(1 << (8 * index), Ordering::SeqCst);
                    assert!(index != panicking, "as the test wants");
                    // The caller stays until worker 1 has come.
                    while index == 0 && came.load(Ordering::SeqCst) >> 8 & 1 == 0 {
                        std::thread::yield_now();
                    }
                });
            }));
            assert!(panicked.is_err());
        }
        let count = AtomicUsize::new(0);
        pool.run(&|index| {
            if index == 0 {
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        assert_eq!(count.into_inner(), 1);
    }

    #[test]
    fn work_inside_work_is_done_by_its_caller() {
        let pool = Pool::start(1, true, |_| Ok(())).unwrap();
        let inner = AtomicUsize::new(0);
        let outer = AtomicUsize::new(0);
        pool.run(&|_| {
            outer.fetch_add(1, Ordering::Relaxed);
            pool.run(&|_| {
                inner.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(inner.into_inner(), outer.into_inner());
    }
}
