//! Ends waits for a device when another thread says so.
//!
//! A collective whose peer is dead never finishes, and nothing that waits for the stream behind it would.
//! So every wait looks at the event itself and at a flag that the communicator's owner may raise.
//! The work that was queued is not touched: whoever raises the flag must end it.
//!
//! Invariant: a wait returns within a millisecond of the flag, whatever the device does.

#![cfg_attr(
    all(feature = "cuda-emulation", not(test)),
    expect(dead_code, reason = "an emulated device is never waited for")
)]

use std::hint;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

/// Looks before the first sleep: some milliseconds, longer than most steps, because waking from a sleep takes longer
/// than what a step may spend outside kernels.
const SPINS: u32 = 20_000;
/// Between looks after that: waits this long are for other processes.
const PAUSE: Duration = Duration::from_micros(100);

/// The flag to look at, if any. All waits for one device share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop(Arc<Mutex<Weak<AtomicBool>>>);

/// How a wait ended, where it did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    /// What was waited for is there.
    Done,
    /// The flag came first.
    Stopped,
}

impl Stop {
    /// From now on, waits end when `flag` is raised, for as long as its owner keeps it.
    pub(crate) fn set(&self, flag: &Arc<AtomicBool>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(flag);
    }

    /// Whether a wait would end now. Only an emulated device asks, which has nothing to wait for.
    #[cfg(feature = "cuda-emulation")]
    pub(crate) fn is_raised(&self) -> bool {
        is_raised(self.flag().as_deref())
    }

    fn flag(&self) -> Option<Arc<AtomicBool>> {
        let flag = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        flag.upgrade()
    }

    /// Looks until `is_done` says so or fails.
    pub(crate) fn wait<E>(
        &self,
        mut is_done: impl FnMut() -> Result<bool, E>,
    ) -> Result<Waited, E> {
        if is_done()? {
            return Ok(Waited::Done);
        }
        let flag = self.flag();
        let is_raised = || is_raised(flag.as_deref());
        for looks in 0u32.. {
            if is_raised() {
                return Ok(Waited::Stopped);
            }
            if is_done()? {
                return Ok(Waited::Done);
            }
            if looks < SPINS {
                hint::spin_loop();
                // Others may have work for this core.
                if looks % 64 == 63 {
                    thread::yield_now();
                }
            } else {
                thread::sleep(PAUSE);
            }
        }
        // Not in this century: 2^32 pauses.
        Ok(Waited::Stopped)
    }
}

fn is_raised(flag: Option<&AtomicBool>) -> bool {
    flag.is_some_and(|flag| flag.load(Ordering::Acquire))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_what_comes_first() {
        let stop = Stop::default();
        let mut looks = 0;
        let done = stop.wait(|| {
            looks += 1;
            Ok::<_, ()>(looks == 30_000)
        });
        assert_eq!(done, Ok(Waited::Done), "also after the first sleep");
        let flag = Arc::new(AtomicBool::new(false));
        stop.set(&flag);
        let waiter = stop.clone();
        let waiting = thread::spawn(move || waiter.wait(|| Ok::<_, ()>(false)));
        thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished());
        flag.store(true, Ordering::Release);
        assert_eq!(waiting.join().unwrap(), Ok(Waited::Stopped));
        assert_eq!(stop.wait(|| Err::<bool, _>("broken")), Err("broken"));
        assert_eq!(
            stop.wait(|| Ok::<_, ()>(true)),
            Ok(Waited::Done),
            "what is there is there"
        );
    }
}
