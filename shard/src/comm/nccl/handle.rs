//! A communicator that one thread uses and another one ends.
//!
//! NCCL has no deadline of its own: a collective whose peer is dead runs until the communicator is aborted, and
//! the thread that queued it may be busy. So a thread exists for nothing but that call. It sleeps until
//! the [`Abort`] is raised or the handle is dropped, and takes the communicator away from its user.
//! A communicator is never destroyed in the orderly way, which waits for peers without a deadline.
//!
//! Invariant: no thread is inside a call with the communicator while it is aborted, and none after.

#![expect(unsafe_code, reason = "NCCL's interface is C")]

use crate::clock;
use crate::comm::{Abort, CommError};
use cudarc::nccl::sys::{self, ncclComm_t, ncclResult_t};
use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Between two looks at a communicator that is busy with itself.
const PAUSE: Duration = Duration::from_micros(200);

/// How long a communicator may be busy before looks at it become rare.
const IMPATIENT: Duration = Duration::from_millis(2);

/// A communicator. Dropping it aborts it and waits for that.
#[derive(Debug)]
pub(super) struct Handle {
    shared: Arc<Shared>,
    abort: Abort,
    watcher: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// `None` once it was aborted.
    comm: Mutex<Option<Pointer>>,
    dropped: AtomicBool,
}

#[derive(Debug)]
struct Pointer(ncclComm_t);

// SAFETY: NCCL lets any thread use a communicator, one at a time; the mutex sees to that.
unsafe impl Send for Pointer {}

impl Handle {
    /// Takes over a communicator that may still be forming.
    ///
    /// # Errors
    /// [`CommError::Failed`] if the thread cannot be started.
    pub(super) fn new(comm: ncclComm_t, abort: &Abort) -> Result<Self, CommError> {
        let shared = Arc::new(Shared {
            comm: Mutex::new(Some(Pointer(comm))),
            dropped: AtomicBool::new(false),
        });
        let (watched, ending) = (shared.clone(), abort.clone());
        let watch = move || {
            ending.wait_while(|| !watched.dropped.load(Ordering::Acquire));
            watched.abort();
        };
        let watcher = thread::Builder::new()
            .name("nccl-abort".to_owned())
            .spawn(watch);
        let watcher = watcher.map_err(|error| {
            shared.abort();
            CommError::Failed(format!(
                "cannot start the thread that ends collectives: {error}"
            ))
        })?;
        Ok(Self {
            shared,
            abort: abort.clone(),
            watcher: Some(watcher),
        })
    }

    /// Makes one call with the communicator, and waits for what the call leaves to be done in the background:
    /// the first collectives of their kind connect ranks.
    ///
    /// # Errors
    /// [`CommError::Aborted`]; [`CommError::TimedOut`] after `limit`; [`CommError::Lost`]; [`CommError::Failed`].
    pub(super) fn call(
        &self,
        what: &str,
        (world_size, limit): (u32, Duration),
        call: impl FnOnce(ncclComm_t) -> ncclResult_t,
    ) -> Result<(), CommError> {
        let code = self.with(call)?;
        if code == ncclResult_t::ncclInProgress {
            return self.settle((world_size, limit));
        }
        self.check(what, code)
    }

    /// Waits until the communicator has done what it does in the background.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub(super) fn settle(&self, (world_size, limit): (u32, Duration)) -> Result<(), CommError> {
        let start = clock::now();
        while self.is_busy()? {
            let waited = clock::now().duration_since(start);
            if waited > limit {
                return Err(CommError::TimedOut { world_size, limit });
            }
            // Every call leaves its launch to a thread of NCCL's, which takes some ten microseconds: a step has
            // dozens of calls, and no time for sleeps.
            if waited > IMPATIENT {
                thread::sleep(PAUSE);
            } else {
                thread::yield_now();
            }
        }
        Ok(())
    }

    /// Whether something is under way in the background; an error if something has failed there.
    pub(super) fn is_busy(&self) -> Result<bool, CommError> {
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is there, and `state` outlives the call.
        let code = self.with(|comm| unsafe { sys::ncclCommGetAsyncError(comm, &raw mut state) })?;
        self.check("ask for errors", code)?;
        if state == ncclResult_t::ncclInProgress {
            return Ok(true);
        }
        self.check("exchange activations", state).map(|()| false)
    }

    /// Aborts the communicator, if that has not been done, and waits for it.
    pub(super) fn end(&mut self) {
        self.shared.dropped.store(true, Ordering::Release);
        self.abort.wake();
        // It ends with the abort. Where that hangs, whoever asked for it ends the process in time.
        let _ = self.watcher.take().map(JoinHandle::join);
    }

    /// Calls with the communicator, or says that it is gone. It is not aborted meanwhile.
    ///
    /// # Errors
    /// [`CommError::Aborted`]
    pub(super) fn with<T>(&self, call: impl FnOnce(ncclComm_t) -> T) -> Result<T, CommError> {
        // Raised and not yet noticed by the other thread: what is queued now would be in vain.
        if self.abort.is_aborted() {
            return Err(CommError::Aborted);
        }
        let comm = self
            .shared
            .comm
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let pointer = comm.as_ref().ok_or(CommError::Aborted)?;
        Ok(call(pointer.0))
    }

    /// What a call answered, in words.
    fn check(&self, what: &str, code: ncclResult_t) -> Result<(), CommError> {
        if code == ncclResult_t::ncclSuccess {
            return Ok(());
        }
        if self.abort.is_aborted() {
            return Err(CommError::Aborted);
        }
        match (failed(what, code), code) {
            // Over sockets the library notices before the coordinator does. Nothing of this rank is to blame.
            (CommError::Failed(sentence), ncclResult_t::ncclRemoteError) => {
                Err(CommError::Lost(sentence))
            }
            (error, _) => Err(error),
        }
    }
}

impl Shared {
    /// Ends all collectives on the device and frees the communicator.
    fn abort(&self) {
        let comm = self
            .comm
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(Pointer(comm)) = comm {
            // SAFETY: taken out of its place, so nobody else has it or will have it.
            let code = unsafe { sys::ncclCommAbort(comm) };
            if code != ncclResult_t::ncclSuccess {
                tracing::warn!("{}", failed("abort the communicator", code));
            }
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.end();
    }
}

/// What NCCL says of a failure: the kind, and the last sentence of this process.
pub(super) fn failed(what: &str, code: ncclResult_t) -> CommError {
    // SAFETY: takes any code, and a null communicator for the process's last sentence.
    let kind = text(unsafe { sys::ncclGetErrorString(code) });
    // SAFETY: as above.
    let last = text(unsafe { sys::ncclGetLastError(std::ptr::null_mut()) });
    let last = if last.is_empty() {
        "NCCL_DEBUG=WARN says more".to_owned()
    } else {
        last
    };
    CommError::Failed(format!("NCCL could not {what}: {kind} ({last})"))
}

fn text(from: *const std::ffi::c_char) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: NCCL's sentences are C strings that stay where they are until the next error.
    let text = unsafe { CStr::from_ptr(from) };
    text.to_string_lossy().trim().to_owned()
}
