//! Collectives between the ranks of one group.
//!
//! As mean as NCCL on purpose: a collective does not notice a dead peer. It ends when all ranks
//! have entered it, or when [`Abort::abort`] is called from another thread; then it returns
//! [`CommError::Aborted`] and the buffers hold anything. Recovery belongs to the coordinator.

#[cfg(feature = "cuda")]
pub mod nccl;
mod rounds;
pub mod shm;
pub mod tcp;

use kernels::backend::Backend;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Why a collective did not finish.
#[derive(Debug, thiserror::Error)]
pub enum CommError {
    /// The coordinator ended the epoch.
    #[error("the collective was aborted")]
    Aborted,
    /// Not all ranks came in time while the communicator was formed.
    #[error("only {joined} of {world_size} ranks joined the communicator within {}s", .limit.as_secs_f32())]
    Incomplete {
        /// Ranks that came.
        joined: u32,
        /// Ranks expected.
        world_size: u32,
        /// The deadline.
        limit: Duration,
    },
    /// The communicator was not formed in time, and the library does not say who was missing.
    #[error("the {world_size} ranks did not find each other within {}s", .limit.as_secs_f32())]
    TimedOut {
        /// Ranks expected.
        world_size: u32,
        /// The deadline.
        limit: Duration,
    },
    /// Another rank is gone, or the way to it. What becomes of the group the coordinator says.
    #[error("another rank was lost: {0}")]
    Lost(String),
    /// Memory, device or library failed.
    #[error("the communicator failed: {0}")]
    Failed(String),
}

/// Ends collectives from another thread.
#[derive(Clone, Debug, Default)]
pub struct Abort(Arc<Signal>);

#[derive(Debug, Default)]
struct Signal {
    raised: Arc<AtomicBool>,
    /// Guards nothing: it is what [`Abort::wait_while`] sleeps on.
    sleep: Mutex<()>,
    woken: Condvar,
}

impl Abort {
    /// Every collective under way or entered later returns [`CommError::Aborted`].
    pub fn abort(&self) {
        self.0.raised.store(true, Ordering::Release);
        self.wake();
    }

    /// Whether [`Self::abort`] was called.
    pub fn is_aborted(&self) -> bool {
        self.0.raised.load(Ordering::Acquire)
    }

    /// The flag itself, for waits in places that know no communicator.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.0.raised.clone()
    }

    /// Sleeps until the abort, or until `goes_on` is false, which is looked at on every [`Self::wake`].
    /// Without a deadline: for a thread that exists to wait.
    pub fn wait_while(&self, goes_on: impl Fn() -> bool) {
        let mut sleep = self.0.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.is_aborted() && goes_on() {
            let woken = self.0.woken.wait(sleep);
            sleep = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Makes [`Self::wait_while`] look again.
    pub fn wake(&self) {
        // Whoever looks at the flags holds the lock until it sleeps, so no wake falls between the two.
        let _sleep = self.0.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.woken.notify_all();
    }
}

/// A rank's place in a group that is being formed.
#[derive(Clone, Copy, Debug)]
pub struct Seat<'a> {
    /// What [`Comm::new_id`] answered on rank 0.
    pub id: &'a [u8],
    /// This rank, `0..world_size`.
    pub rank: u32,
    /// Ranks of the group.
    pub world_size: u32,
    /// This host's address on the network between the hosts; `None` where the group is on one host.
    pub interface: Option<IpAddr>,
    /// How long to wait for the others.
    pub limit: Duration,
    /// Ends the wait, and every collective later.
    pub abort: &'a Abort,
}

/// Collectives over one backend's tensors. All ranks call the same operations in the same order.
pub trait Comm<B: Backend>: Send + Sized + 'static {
    /// Readies a backend for a group of so many ranks, before it takes any memory. What this cannot do is said by
    /// [`Self::join`].
    fn prepare(_backend: &mut B, _world_size: u32) {}

    /// Makes the identity of a new group, on rank 0: at most `MAX_COMM_ID_BYTES` opaque bytes.
    /// No tensor of the group will have more than `max_elements` elements on one rank; `interface` is
    /// rank 0's [`Seat::interface`].
    fn new_id(
        world_size: u32,
        max_elements: usize,
        interface: Option<IpAddr>,
    ) -> Result<Vec<u8>, CommError>;

    /// Frees what [`Self::new_id`] made when nobody is going to join. Harmless otherwise.
    fn discard_id(id: &[u8]);

    /// Takes a seat and waits until all ranks have theirs.
    fn join(backend: &B, seat: &Seat<'_>) -> Result<Self, CommError>;

    /// Number of ranks.
    fn world_size(&self) -> u32;

    /// Names the plan that the following collectives serve. Where it costs nothing, ranks that hold
    /// different plans get [`CommError::Failed`] from their first collective.
    fn begin_step(&mut self, digest: [u8; 16]);

    /// Whether the step that was begun may be recorded or replayed by the backend ([`Backend::queue`]), as far as
    /// collectives go. Asked once in a step that could; all ranks get the same answer.
    fn is_recordable(&mut self) -> bool {
        false
    }

    /// Whether all ranks say yes, of which `mine` is this one's word. Asked in the same step on all, and rarely.
    ///
    /// # Errors
    /// [`CommError`]
    fn agree(&mut self, _backend: &B, mine: bool) -> Result<bool, CommError> {
        assert!(self.world_size() == 1, "ranks that record have to agree");
        Ok(mine)
    }

    /// Calls `launch`, which queues collectives that were recorded, unless the group was aborted; it is not aborted
    /// meanwhile.
    ///
    /// # Errors
    /// [`CommError`], or what `launch` said.
    fn replay<E: From<CommError>>(
        &mut self,
        launch: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        launch()
    }

    /// `x = sum over ranks of x`, summed in rank order so that all ranks hold the same bits.
    fn all_reduce_sum(&mut self, backend: &B, x: &mut B::Tensor) -> Result<(), CommError>;

    /// `out[row] = part_0[row] ++ part_1[row] ++ …`: `part: [rows, n]`, `out: [rows, world_size * n]`.
    fn all_gather(
        &mut self,
        backend: &B,
        part: &B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<(), CommError>;

    /// Time inside the collectives of the oldest step whose time was not taken, which is done on the backend, and the part
    /// of it spent waiting for other ranks. The step after it may have begun.
    fn take_timings(&mut self) -> CommTimings;
}

impl CommTimings {
    fn new(total: Duration, waited: Duration) -> Self {
        let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        Self {
            total_us: micros(total),
            wait_us: micros(waited),
        }
    }
}

/// Where the time in collectives went, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommTimings {
    /// Inside collectives, waiting included.
    pub total_us: u64,
    /// Waiting for a slower rank.
    pub wait_us: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn sleepers_wake_for_the_abort_and_for_their_own_reason() {
        for _ in 0..200 {
            let (abort, ended) = (Abort::default(), AtomicBool::new(false));
            thread::scope(|scope| {
                let sleeper = scope.spawn(|| abort.wait_while(|| !ended.load(Ordering::Acquire)));
                ended.store(true, Ordering::Release);
                abort.wake();
                sleeper.join().unwrap();
                assert!(!abort.flag().load(Ordering::Acquire));
                ended.store(false, Ordering::Release);
                let sleeper = scope.spawn(|| abort.wait_while(|| !ended.load(Ordering::Acquire)));
                abort.abort();
                sleeper.join().unwrap();
                assert!(abort.is_aborted() && abort.flag().load(Ordering::Acquire));
            });
        }
    }
}
