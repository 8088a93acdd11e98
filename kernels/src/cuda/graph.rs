//! Work that was recorded instead of done, to be queued as a whole: the driver's graphs.
//!
//! Recording concerns this thread and the one stream: other threads, NCCL's among them, may do as they like meanwhile.
//! `emulated_graph.rs` is this file's twin for machines without a GPU.
//!
//! Invariant: a recording that was begun is ended, whatever was queued in it.

use super::device::Device;
use crate::backend::DeviceError;
use cudarc::driver::{CudaGraph, DriverError, sys};
use std::fmt;

/// Recorded work. Addresses and sizes are those of the time of recording; contents are those of each launch.
pub(crate) struct Graph(CudaGraph);

// SAFETY: names of the driver's objects, bound to no thread; one thread at a time uses them, since `Graph` is not
// `Sync`.
#[expect(unsafe_code, reason = "the driver's objects are raw pointers")]
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Graph").field(&self.0.cu_graph()).finish()
    }
}

/// From now on, what this thread queues is recorded.
pub(crate) fn begin(device: &Device) -> Result<(), DeviceError> {
    // What must not be called meanwhile is an error in this thread alone.
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let begun = device.cuda_stream().begin_capture(mode);
    begun.map_err(|error| failed(device, "does not record", error))
}

/// Ends the recording and readies what was recorded.
pub(crate) fn end(device: &Device) -> Result<Graph, DeviceError> {
    let flags = sys::CUgraphInstantiate_flags(0);
    let ended = device.cuda_stream().end_capture(flags);
    let fails = |error| failed(device, "does not take a recording", error);
    let graph = ended.map_err(fails)?.ok_or_else(|| DeviceError::Failed {
        device: device.name().to_owned(),
        reason: "lost a recording".to_owned(),
    })?;
    // What it takes of the device's memory is taken now, and not with its first launch.
    graph.upload().map_err(fails)?;
    Ok(Graph(graph))
}

impl Graph {
    /// Queues what was recorded.
    pub(crate) fn launch(&self, device: &Device) -> Result<(), DeviceError> {
        let launched = self.0.launch();
        launched.map_err(|error| failed(device, "does not replay a recording", error))
    }
}

fn failed(device: &Device, what: &str, error: DriverError) -> DeviceError {
    DeviceError::Failed {
        device: device.name().to_owned(),
        reason: format!("{what} ({error})"),
    }
}
