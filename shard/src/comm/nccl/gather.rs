//! Puts gathered rows into their place: NCCL hands over one rank's after another's, and each row is wanted whole. And
//! gathers a word of each rank.
//!
//! Invariant: the memory in between is taken once and outlives what was queued with it.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use super::{Group, event};
use crate::comm::CommError;
use cudarc::driver::result as driver;
use cudarc::driver::sys::{self as driver_sys, CUDA_MEMCPY2D_v2, CUmemorytype};
use cudarc::nccl::sys::{self, ncclDataType_t, ncclRedOp_t};
use kernels::cuda::CudaBackend;
use std::ffi::c_void;
use std::mem::MaybeUninit;

/// Device memory for what is gathered and not yet in its place.
#[derive(Debug)]
pub(super) struct Scratch {
    start: u64,
    bytes: usize,
}

impl Group {
    /// `[world_size][rows][width]` in `scratch` to `[rows][world_size * width]` in `out`; widths in bytes.
    pub(super) fn interleave(
        &self,
        scratch: u64,
        (rows, width): (usize, usize),
        out: *mut c_void,
    ) -> Result<(), CommError> {
        let ranks = self.world_size as usize;
        for rank in 0..ranks {
            // SAFETY: a description in plain numbers, for which zeros mean nothing special.
            let mut copy: CUDA_MEMCPY2D_v2 = unsafe { MaybeUninit::zeroed().assume_init() };
            copy.srcMemoryType = CUmemorytype::CU_MEMORYTYPE_DEVICE;
            copy.srcDevice = scratch + (rank * rows * width) as u64;
            copy.srcPitch = width;
            copy.dstMemoryType = CUmemorytype::CU_MEMORYTYPE_DEVICE;
            copy.dstDevice = out as u64 + (rank * width) as u64;
            copy.dstPitch = ranks * width;
            copy.WidthInBytes = width;
            copy.Height = rows;
            // SAFETY: the caller's `out` and the scratch hold `ranks * rows * width` bytes each.
            let queued = unsafe { driver_sys::cuMemcpy2DAsync_v2(&raw const copy, self.stream.0) };
            queued
                .result()
                .map_err(|e| event::failed("copy gathered rows", e))?;
        }
        Ok(())
    }

    /// Whether all ranks say yes: their words are added up and waited for.
    pub(super) fn agree(&mut self, backend: &CudaBackend, mine: bool) -> Result<bool, CommError> {
        let words = self.scratch(size_of::<f32>())?;
        let word = f32::from(u8::from(mine)).to_bits();
        // SAFETY: the scratch holds one word.
        let set = unsafe { driver_sys::cuMemsetD32Async(words, word, 1, self.stream.0) };
        set.result().map_err(|e| event::failed("say a word", e))?;
        let at = words as *mut c_void;
        self.queue(backend, ("agree", size_of::<f32>()), |comm, stream| {
            let (float, sum) = (ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
            // SAFETY: the scratch holds one word, and is kept.
            unsafe { sys::ncclAllReduce(at, at, 1, float, sum, comm, stream) }
        })?;
        self.until(|| self.stream.is_done())?;
        let mut sum = 0.0_f32;
        let to = (&raw mut sum).cast();
        // SAFETY: there is room for one word, which the device is done with.
        let copied = unsafe { driver_sys::cuMemcpyDtoH_v2(to, words, size_of::<f32>()) };
        copied
            .result()
            .map_err(|e| event::failed("hear all words", e))?;
        // Numbers of ranks are exact.
        Ok(sum >= self.world_size as f32)
    }

    /// Device memory for `bytes`, taken once: `out` never grows.
    pub(super) fn scratch(&mut self, bytes: usize) -> Result<u64, CommError> {
        if let Some(scratch) = &self.scratch
            && scratch.bytes >= bytes
        {
            return Ok(scratch.start);
        }
        // SAFETY: every byte that is read was gathered there before.
        let start = unsafe { driver::malloc_sync(bytes) };
        let start = start.map_err(|e| event::failed("hold gathered rows", e))?;
        self.scratch = Some(Scratch { start, bytes });
        Ok(start)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: taken by this group and freed once. A device that failed takes nothing back.
        let _ = unsafe { driver::free_sync(self.start) };
    }
}
