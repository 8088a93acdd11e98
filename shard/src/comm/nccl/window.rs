//! Symmetric memory: tensors that all ranks of a communicator reach directly.
//!
//! From NCCL 2.27 on, small collectives over such memory take a faster path. It must be of NCCL's own making and
//! be registered by all ranks together. Where the GPUs or the operator (`NCCL_WIN_ENABLE=0`) do not allow
//! it, NCCL answers without a window and collectives take the ordinary path over the same memory. Some versions round
//! each piece of it up to what a multicast object takes, half a GB on some GPUs: only what is summed comes from here.
//!
//! Invariant: the place that NCCL writes a window to outlives the communicator.

#![expect(unsafe_code, reason = "NCCL's interface is C")]

use super::handle::Handle;
use super::library;
use crate::comm::CommError;
use cudarc::nccl::sys::{self, ncclResult_t, ncclWindow_t};
use kernels::cuda::{CudaTensor, TensorSource};
use std::ffi::c_int;
use std::time::Duration;

/// The first version that has symmetric memory.
const OLDEST: i32 = 22700;

/// `NCCL_WIN_COLL_SYMMETRIC`
const SYMMETRIC: c_int = 1;

/// NCCL's own device memory.
pub(super) const SOURCE: TensorSource = TensorSource { take, give_back };

/// Whether to try. Ranks that share a GPU are an experiment of NCCL's as it is.
pub(super) fn is_supported() -> bool {
    !library::shares_gpu() && library::load().is_ok_and(|version| version >= OLDEST)
}

fn take(bytes: usize) -> Option<u64> {
    let mut start = std::ptr::null_mut();
    // SAFETY: the library is loaded, or this source would not be used; `start` outlives the call.
    let code = unsafe { sys::ncclMemAlloc(&raw mut start, bytes) };
    (code == ncclResult_t::ncclSuccess && !start.is_null()).then_some(start as u64)
}

fn give_back(start: u64) {
    // SAFETY: taken above and given back once.
    let code = unsafe { sys::ncclMemFree(start as *mut _) };
    if code != ncclResult_t::ncclSuccess {
        tracing::warn!("NCCL does not take its memory back: {code:?}");
    }
}

/// What was registered with one communicator.
#[derive(Debug, Default)]
pub(super) struct Windows(Vec<Window>);

/// A tensor's address and, behind a pointer of its own, its window.
#[derive(Debug)]
struct Window {
    start: u64,
    place: Box<ncclWindow_t>,
}

// SAFETY: names of NCCL's objects; the communicator's handle sees to who uses them.
unsafe impl Send for Window {}

impl Windows {
    /// Registers a tensor of [`SOURCE`], the first time it comes.
    ///
    /// # Errors
    /// As [`Handle::call`].
    pub(super) fn share(
        &mut self,
        handle: &Handle,
        limit: (u32, Duration),
        tensor: &mut CudaTensor,
    ) -> Result<(), CommError> {
        let Some(bytes) = tensor.sourced_bytes() else {
            return Ok(());
        };
        let pointer = tensor.pointer_mut();
        let start = pointer as u64;
        if self.0.iter().any(|window| window.start == start) {
            return Ok(());
        }
        let place = Box::new(std::ptr::null_mut());
        self.0.push(Window { start, place });
        let window = self.0.last_mut().expect("just pushed");
        let place = &raw mut *window.place;
        handle.call("share activations", limit, |comm| {
            // SAFETY: the tensor's memory is NCCL's own, `bytes` long, and the place for the window stays.
            unsafe { sys::ncclCommWindowRegister(comm, pointer, bytes, place, SYMMETRIC) }
        })?;
        let is_direct = !window.place.is_null();
        tracing::info!(bytes, is_direct, "activations are shared");
        Ok(())
    }
}
