//! Marks on a stream: when work is done, and how long it took.
//!
//! Waits look and never block in the driver, so that an abort ends them. Invariant: an event is used
//! by the thread whose context made it.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use crate::comm::CommError;
use cudarc::driver::DriverError;
use cudarc::driver::result::event;
use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUresult, CUstream};
use std::thread;
use std::time::Duration;

/// Looks before the first sleep; see the backend's own waits.
const SPINS: u32 = 20_000;
const PAUSE: Duration = Duration::from_micros(100);

/// A mark on a stream.
#[derive(Debug)]
pub(super) struct Event(CUevent);

// SAFETY: the driver lets any thread use an event; the context is the device's own.
unsafe impl Send for Event {}

/// The stream that collectives are queued on, which is the backend's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stream(pub(super) CUstream);

// SAFETY: a name; the one thread that owns the device uses it.
unsafe impl Send for Stream {}

impl Event {
    /// A mark that can be timed.
    pub(super) fn timed() -> Result<Self, CommError> {
        Self::new(CUevent_flags::CU_EVENT_DEFAULT)
    }

    /// A mark that only says that work is done, which costs the device less.
    pub(super) fn untimed() -> Result<Self, CommError> {
        Self::new(CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    fn new(flags: CUevent_flags) -> Result<Self, CommError> {
        event::create(flags)
            .map(Self)
            .map_err(|e| failed("make an event", e))
    }

    /// Marks what is queued so far.
    pub(super) fn record(&self, stream: Stream) -> Result<(), CommError> {
        // SAFETY: the event is this one's and the stream lives as long as the backend.
        let recorded = unsafe { event::record(self.0, stream.0) };
        recorded.map_err(|e| failed("record an event", e))
    }

    /// Whether what was marked is done.
    pub(super) fn is_done(&self) -> Result<bool, CommError> {
        // SAFETY: the event is this one's.
        done(unsafe { sys::cuEventQuery(self.0) })
    }

    /// Microseconds from `start` to this mark; both are done.
    pub(super) fn micros_since(&self, start: &Self) -> Result<f32, CommError> {
        // SAFETY: both events are there.
        let milliseconds = unsafe { event::elapsed(start.0, self.0) };
        milliseconds
            .map(|ms| ms * 1e3)
            .map_err(|e| failed("measure time", e))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: destroyed once. A context that is gone took it along.
        let _ = unsafe { event::destroy(self.0) };
    }
}

impl Stream {
    /// Whether everything queued is done.
    pub(super) fn is_done(self) -> Result<bool, CommError> {
        // SAFETY: the stream lives as long as the backend.
        done(unsafe { sys::cuStreamQuery(self.0) })
    }
}

/// Looks until `is_done` says so or fails. What ends the wait early is up to `is_done`.
pub(super) fn wait(mut is_done: impl FnMut() -> Result<bool, CommError>) -> Result<(), CommError> {
    let mut looks = 0u32;
    while !is_done()? {
        looks = looks.saturating_add(1);
        if looks >= SPINS {
            thread::sleep(PAUSE);
        } else if looks.is_multiple_of(64) {
            thread::yield_now();
        }
    }
    Ok(())
}

fn done(status: CUresult) -> Result<bool, CommError> {
    match status {
        CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        status => status
            .result()
            .map(|()| true)
            .map_err(|e| failed("compute", e)),
    }
}

/// The driver's answer in words.
pub(super) fn failed(what: &str, error: DriverError) -> CommError {
    CommError::Failed(format!("the device could not {what} ({error})"))
}
