//! The twin of `device.rs` for machines without a GPU: device memory is the host's, the stream is nothing.
//!
//! Kernels compiled for emulation run when they are launched, so every call is done when it returns, and
//! what passes here may still be out of order on a device.
//!
//! Invariant: the same interface as `device.rs`, and the same checks of ranges.

#![expect(
    clippy::unnecessary_wraps,
    clippy::unused_self,
    reason = "the interface is device.rs's"
)]

use super::graph;
use super::source::TensorSource;
use super::stop::Stop;
use crate::backend::DeviceError;
use std::ffi::c_void;
use std::ops::Range;
use std::time::Instant;

/// What the emulated device says of its size: few, so that loops over blocks are met.
const MULTIPROCESSORS: usize = 4;

/// The host as a device.
#[derive(Debug)]
pub(crate) struct Device {
    name: String,
    stop: Stop,
}

/// Memory of the host, aligned as the driver aligns device memory.
#[derive(Debug)]
pub(crate) struct Memory {
    lines: Vec<Line>,
    bytes: usize,
}

/// Memory of the host.
#[derive(Debug)]
pub(crate) struct Pinned {
    memory: Memory,
}

#[derive(Clone, Copy, Debug)]
#[repr(C, align(256))]
struct Line([u8; 256]);

const LINE: usize = size_of::<Line>();

// SAFETY: plain bytes without padding: the alignment is the size.
#[expect(unsafe_code, reason = "lines are seen as bytes")]
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "lines are seen as bytes")]
unsafe impl bytemuck::Pod for Line {}

/// A point in time.
#[derive(Debug)]
pub(crate) struct Mark(Instant);

impl Mark {
    /// Microseconds from `start` to this mark.
    pub(crate) fn micros_since(&self, start: &Self) -> Result<Option<f32>, DeviceError> {
        let elapsed = self.0.duration_since(start.0);
        Ok(Some(elapsed.as_secs_f32() * 1e6))
    }
}

impl Device {
    /// Always there.
    pub(crate) fn open(ordinal: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            name: format!("emulated GPU {ordinal}"),
            stop: Stop::default(),
        })
    }

    /// The device as the operator would name it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Total and free bytes, of the host.
    pub(crate) fn memory(&self) -> (u64, u64) {
        crate::cpu::memory::total_and_free()
    }

    /// Nothing.
    pub(crate) fn stream(&self) -> *mut c_void {
        std::ptr::null_mut()
    }

    /// Zeroed memory.
    pub(crate) fn allocate(&self, what: &str, bytes: usize) -> Result<Memory, DeviceError> {
        let free = self.memory().1;
        if bytes as u64 > free {
            return Err(DeviceError::OutOfMemory {
                device: self.name.clone(),
                what: what.to_owned(),
                needed: bytes as u64,
                free,
            });
        }
        Ok(Memory {
            lines: vec![Line([0; LINE]); bytes.div_ceil(LINE).max(1)],
            bytes,
        })
    }

    /// No source has memory for an emulated device.
    pub(crate) fn allocate_from(
        &self,
        _: TensorSource,
        _: usize,
    ) -> Result<Option<Memory>, DeviceError> {
        Ok(None)
    }

    /// A buffer.
    pub(crate) fn pinned(&self, what: &str, bytes: usize) -> Result<Pinned, DeviceError> {
        let memory = self.allocate(what, bytes)?;
        Ok(Pinned { memory })
    }

    /// Copies the first `bytes` of `from` to `to`, beginning `at` bytes into it.
    pub(crate) fn upload(
        &self,
        from: &Pinned,
        bytes: usize,
        (to, at): (&mut Memory, usize),
    ) -> Result<(), DeviceError> {
        self.check_not_recorded()?;
        to.slice_mut(at..at + bytes)
            .copy_from_slice(from.memory.slice(0..bytes));
        Ok(())
    }

    /// Copies `bytes` of `from`, beginning `at` bytes into it, to the start of `to`.
    pub(crate) fn download(
        &self,
        (from, at): (&Memory, usize),
        bytes: usize,
        to: &mut Pinned,
    ) -> Result<(), DeviceError> {
        self.check_not_recorded()?;
        let target = to.memory.slice_mut(0..bytes);
        target.copy_from_slice(from.slice(at..at + bytes));
        Ok(())
    }

    /// Now: all that was queued is done.
    #[expect(
        clippy::disallowed_methods,
        reason = "it stands for an event of the device"
    )]
    pub(crate) fn mark_now(&self) -> Result<Mark, DeviceError> {
        Ok(Mark(Instant::now()))
    }

    /// A copy waits for the host's buffer, which a device refuses in a recording.
    fn check_not_recorded(&self) -> Result<(), DeviceError> {
        if !graph::is_recording() {
            return Ok(());
        }
        Err(DeviceError::Failed {
            device: self.name.clone(),
            reason: "cannot copy in a recording".to_owned(),
        })
    }

    /// The mark is passed, but `is_called` is asked first.
    pub(crate) fn wait_for(
        &self,
        _: &Mark,
        is_called: &mut dyn FnMut() -> bool,
    ) -> Result<bool, DeviceError> {
        Ok(!is_called())
    }

    /// Ends no wait, because there is none.
    pub(crate) fn stop(&self) -> &Stop {
        &self.stop
    }

    /// Nothing is ever left to do.
    pub(crate) fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// As Hopper has it, whose paths are to be met.
    pub(crate) fn capability(&self) -> i32 {
        90
    }

    /// A small device.
    pub(crate) fn multiprocessors(&self) -> usize {
        MULTIPROCESSORS
    }
}

impl Memory {
    /// Never: there is no other source.
    pub(crate) fn is_sourced(&self) -> bool {
        false
    }

    /// Size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first byte.
    pub(crate) fn pointer(&self) -> *const c_void {
        self.lines.as_ptr().cast()
    }

    /// The first byte, to be written.
    pub(crate) fn pointer_mut(&mut self) -> *mut c_void {
        self.lines.as_mut_ptr().cast()
    }

    /// The byte at `offset`.
    pub(crate) fn at(&self, offset: usize) -> *const c_void {
        self.slice(offset..self.bytes).as_ptr().cast()
    }

    /// The byte at `offset`, to be written.
    pub(crate) fn at_mut(&mut self, offset: usize) -> *mut c_void {
        let bytes = self.bytes;
        self.slice_mut(offset..bytes).as_mut_ptr().cast()
    }

    /// Bytes of a range.
    pub(crate) fn slice(&self, range: Range<usize>) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.bytes][range]
    }

    /// Bytes of a range, to be changed.
    pub(crate) fn slice_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.bytes][range]
    }
}

impl Pinned {
    fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// The contents.
    pub(crate) fn read(&self) -> Result<&[u8], DeviceError> {
        Ok(self.memory.slice(0..self.bytes()))
    }

    /// The contents, to be changed.
    pub(crate) fn write(&mut self) -> Result<&mut [u8], DeviceError> {
        let bytes = self.bytes();
        Ok(self.memory.slice_mut(0..bytes))
    }
}
