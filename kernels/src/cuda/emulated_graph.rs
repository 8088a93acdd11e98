//! The twin of `graph.rs` for machines without a GPU: launches are kept by `emulation_graph.h`, with their arguments.
//!
//! Invariant: the same interface as `graph.rs`, and as strict: copies between host and device are not recorded, and
//! `emulated.rs` refuses them while a recording is under way.

#![expect(unsafe_code, reason = "the recorder is C++")]
#![expect(clippy::unnecessary_wraps, reason = "the interface is graph.rs's")]

use super::device::Device;
use crate::backend::DeviceError;
use std::ffi::{c_int, c_void};

unsafe extern "C" {
    fn cluster_emulation_begin();
    fn cluster_emulation_end() -> *mut c_void;
    fn cluster_emulation_is_recording() -> c_int;
    fn cluster_emulation_replay(recorded: *const c_void) -> c_int;
    fn cluster_emulation_free(recorded: *mut c_void);
    fn cluster_emulation_queue(
        run: extern "C" fn(*mut c_void) -> c_int,
        free: extern "C" fn(*mut c_void),
        data: *mut c_void,
    ) -> c_int;
}

/// Recorded work. Addresses and sizes are those of the time of recording; contents are those of each launch.
#[derive(Debug)]
pub(crate) struct Graph(*mut c_void);

// SAFETY: memory of the recorder, bound to no thread; one thread at a time uses it, since `Graph` is not `Sync`.
unsafe impl Send for Graph {}

/// From now on, what this thread queues is recorded.
pub(crate) fn begin(_: &Device) -> Result<(), DeviceError> {
    // SAFETY: takes nothing, and concerns this thread alone.
    unsafe { cluster_emulation_begin() };
    Ok(())
}

/// Ends the recording.
pub(crate) fn end(device: &Device) -> Result<Graph, DeviceError> {
    // SAFETY: what it hands over is ended by `Graph`.
    let recorded = unsafe { cluster_emulation_end() };
    if recorded.is_null() {
        return Err(failed(device, "lost a recording"));
    }
    Ok(Graph(recorded))
}

/// Whether this thread records.
pub(crate) fn is_recording() -> bool {
    // SAFETY: takes nothing and changes nothing.
    unsafe { cluster_emulation_is_recording() != 0 }
}

/// Does `work`, or records it.
pub(crate) fn queue<W: FnMut() + 'static>(work: W) {
    extern "C" fn run<W: FnMut()>(work: *mut c_void) -> c_int {
        // SAFETY: made of a box of this type, by the only thread that runs it.
        let work = unsafe { &mut *work.cast::<W>() };
        work();
        0
    }
    extern "C" fn free<W>(work: *mut c_void) {
        // SAFETY: made of a box of this type, and ended once.
        drop(unsafe { Box::from_raw(work.cast::<W>()) });
    }
    let data = Box::into_raw(Box::new(work)).cast();
    // SAFETY: the functions are for what `data` is, and the recorder ends it. Work of this kind never fails.
    let _ = unsafe { cluster_emulation_queue(run::<W>, free::<W>, data) };
}

impl Graph {
    /// Does what was recorded. What a device would do in vain after an interruption ends here.
    pub(crate) fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        // SAFETY: what was recorded is there, and so is the memory it works on: the backend forgets it before.
        match unsafe { cluster_emulation_replay(self.0) } {
            0 => Ok(()),
            _ if device.stop().is_raised() => Err(DeviceError::Interrupted {
                device: device.name().to_owned(),
            }),
            code => Err(failed(device, &format!("does not replay ({code})"))),
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: handed over by the recorder and ended once.
        unsafe { cluster_emulation_free(self.0) };
    }
}

fn failed(device: &Device, reason: &str) -> DeviceError {
    DeviceError::Failed {
        device: device.name().to_owned(),
        reason: reason.to_owned(),
    }
}
