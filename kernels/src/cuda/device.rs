//! One GPU: its context, the one stream that all work goes to, memory, and pinned host buffers.
//!
//! Work on the stream runs in the order it was queued, which is all the ordering that operations need. What
//! the host shares with the device are [`Pinned`] buffers alone: each remembers its last copy, and
//! cannot be read or written before that copy is over. `emulated.rs` is this file's twin for machines
//! without a GPU.
//!
//! Invariant: everything that holds device memory also holds the context, so it is freed in time.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use super::libraries;
use super::source::TensorSource;
use super::stop::{Stop, Waited};
use crate::backend::DeviceError;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

/// A GPU and its stream.
#[derive(Debug)]
pub(crate) struct Device {
    stream: Arc<CudaStream>,
    name: String,
    stop: Stop,
}

/// Device memory, freed when dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    context: Arc<CudaContext>,
    start: u64,
    bytes: usize,
    /// Where it came from; `None`: the driver.
    source: Option<TensorSource>,
}

/// Host memory that the device copies from and to at full speed.
#[derive(Debug)]
pub(crate) struct Pinned {
    start: u64,
    bytes: usize,
    /// The last copy that uses it.
    copied: CudaEvent,
    stop: Stop,
}

/// A point in the stream's work, for waiting and for measuring time.
#[derive(Debug)]
pub(crate) struct Mark(CudaEvent);

impl Mark {
    /// Microseconds of the device from `start` to this mark; `None` while it has not come to it.
    pub(crate) fn micros_since(&self, start: &Self) -> Result<Option<f32>, DeviceError> {
        let fails = |error| failed("the device", "cannot measure time", error);
        if !self.is_passed().map_err(fails)? {
            return Ok(None);
        }
        // SAFETY: both events were recorded, and are done: the start comes before the end.
        let elapsed = unsafe { result::event::elapsed(start.0.cu_event(), self.0.cu_event()) };
        elapsed.map(|ms| Some(ms * 1e3)).map_err(fails)
    }

    fn is_passed(&self) -> Result<bool, DriverError> {
        // SAFETY: the event lives as long as `self`.
        is_done(unsafe { sys::cuEventQuery(self.0.cu_event()) })
    }
}

impl Device {
    /// Opens GPU `ordinal` and binds it to this thread, which is the one that will use it.
    pub(crate) fn open(ordinal: usize) -> Result<Self, DeviceError> {
        let fails = |what: &'static str| {
            move |error: DriverError| failed(&format!("GPU {ordinal}"), what, error)
        };
        libraries::check_driver(ordinal)?;
        let context = CudaContext::new(ordinal).map_err(fails("cannot be opened"))?;
        let name = context.name().map_err(fails("does not say its name"))?;
        let stream = context.new_stream().map_err(fails("gives no stream"))?;
        Ok(Self {
            stream,
            name: format!("{name} (GPU {ordinal})"),
            stop: Stop::default(),
        })
    }

    /// The device as the operator would name it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Total and free bytes. Zeros after the device has failed.
    pub(crate) fn memory(&self) -> (u64, u64) {
        let (free, total) = self.context().mem_get_info().unwrap_or_default();
        (total as u64, free as u64)
    }

    /// The stream as C has it.
    pub(crate) fn stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    /// Zeroed memory.
    pub(crate) fn allocate(&self, what: &str, bytes: usize) -> Result<Memory, DeviceError> {
        self.bind()?;
        // The driver gives none for no bytes; a pointer is wanted all the same.
        let bytes = bytes.max(1);
        // SAFETY: the memory is filled below, before anything reads it.
        let start = unsafe { result::malloc_sync(bytes) };
        let start = start.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => DeviceError::OutOfMemory {
                device: self.name.clone(),
                what: what.to_owned(),
                needed: bytes as u64,
                free: self.memory().1,
            },
            _ => self.failed(&format!("gives no memory for {what}"), error),
        })?;
        let memory = Memory {
            context: self.context().clone(),
            start,
            bytes,
            source: None,
        };
        self.clear(memory)
    }

    /// Zeroed memory of another source, where it has some.
    pub(crate) fn allocate_from(
        &self,
        source: TensorSource,
        bytes: usize,
    ) -> Result<Option<Memory>, DeviceError> {
        self.bind()?;
        let bytes = bytes.max(1);
        let memory = (source.take)(bytes).map(|start| Memory {
            context: self.context().clone(),
            start,
            bytes,
            source: Some(source),
        });
        memory.map(|memory| self.clear(memory)).transpose()
    }

    fn clear(&self, memory: Memory) -> Result<Memory, DeviceError> {
        let (start, bytes) = (memory.start, memory.bytes);
        // SAFETY: the memory is `bytes` long and outlives the fill: freeing waits for the device.
        let filled = unsafe { result::memset_d8_async(start, 0, bytes, self.stream.cu_stream()) };
        filled.map_err(|error| self.failed("cannot clear memory", error))?;
        Ok(memory)
    }

    /// A pinned buffer.
    pub(crate) fn pinned(&self, what: &str, bytes: usize) -> Result<Pinned, DeviceError> {
        self.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: the memory is zeroed below, before anything reads it.
        let start = unsafe { result::malloc_host(bytes, 0) };
        let start = start.map_err(|error| {
            let what = format!("cannot pin {bytes} bytes of host memory for {what}");
            self.failed(&what, error)
        })?;
        // SAFETY: the memory is `bytes` long and nobody else knows of it.
        unsafe { std::ptr::write_bytes(start.cast::<u8>(), 0, bytes) };
        Ok(Pinned {
            start: start as u64,
            bytes,
            copied: (self.context().new_event(None))
                .map_err(|error| self.failed("gives no event", error))?,
            stop: self.stop.clone(),
        })
    }

    /// Queues the copy of the first `bytes` of `from` to `to`, beginning `at` bytes into it.
    pub(crate) fn upload(
        &self,
        from: &Pinned,
        bytes: usize,
        (to, at): (&mut Memory, usize),
    ) -> Result<(), DeviceError> {
        self.bind()?;
        let from_bytes = &from.bytes_now()[..bytes];
        let to = to.range(at..at + bytes);
        // SAFETY: both ranges were checked; `from` is neither freed nor changed before its event.
        let copied = unsafe { result::memcpy_htod_async(to, from_bytes, self.stream.cu_stream()) };
        copied
            .and_then(|()| from.copied.record(&self.stream))
            .map_err(|error| self.failed("cannot copy to the device", error))
    }

    /// Queues the copy of `bytes` of `from`, beginning `at` bytes into it, to the start of `to`.
    pub(crate) fn download(
        &self,
        (from, at): (&Memory, usize),
        bytes: usize,
        to: &mut Pinned,
    ) -> Result<(), DeviceError> {
        self.bind()?;
        let from = from.range(at..at + bytes);
        let stream = self.stream.cu_stream();
        let to_bytes = &mut to.write()?[..bytes];
        // SAFETY: both ranges were checked; `to` is neither freed nor read before its event.
        let copied = unsafe { result::memcpy_dtoh_async(to_bytes, from, stream) };
        copied
            .and_then(|()| to.copied.record(&self.stream))
            .map_err(|error| self.failed("cannot copy from the device", error))
    }

    /// Marks what is queued so far.
    pub(crate) fn mark_now(&self) -> Result<Mark, DeviceError> {
        let timed = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let mark = self.context().new_event(Some(timed)).and_then(|event| {
            event.record(&self.stream)?;
            Ok(Mark(event))
        });
        mark.map_err(|error| self.failed("cannot mark time", error))
    }

    /// Waits until the device has come to `mark`, or `is_called` says that the caller is wanted, which is asked first.
    /// Whether it has come to the mark.
    pub(crate) fn wait_for(
        &self,
        mark: &Mark,
        is_called: &mut dyn FnMut() -> bool,
    ) -> Result<bool, DeviceError> {
        let mut called = false;
        let waited = self.stop.wait(|| {
            called = is_called();
            Ok(called || mark.is_passed()?)
        });
        ended(waited, &self.name, "did not finish a step").map(|()| !called)
    }

    /// What ends waits early.
    pub(crate) fn stop(&self) -> &Stop {
        &self.stop
    }

    /// Waits until everything queued is done.
    pub(crate) fn synchronize(&self) -> Result<(), DeviceError> {
        let stream = self.stream.cu_stream();
        // SAFETY: the stream lives as long as `self`.
        let waited = self
            .stop
            .wait(|| is_done(unsafe { sys::cuStreamQuery(stream) }));
        ended(waited, &self.name, "did not finish its work")
    }

    /// How many blocks of threads run at the same time, at least.
    pub(crate) fn multiprocessors(&self) -> usize {
        use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count = (self.context()).attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
        count
            .ok()
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(1)
    }

    /// What the device can do, as 10 times the major number of its compute capability and the minor one.
    pub(crate) fn capability(&self) -> i32 {
        let capability = self.context().compute_capability();
        capability.map_or(0, |(major, minor)| 10 * major + minor)
    }

    /// The stream.
    pub(super) fn cuda_stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    fn context(&self) -> &Arc<CudaContext> {
        self.stream.context()
    }

    /// Makes the context this thread's. A backend may have been made on another one; a step begins with an
    /// upload, so launches find it there.
    fn bind(&self) -> Result<(), DeviceError> {
        let bound = self.context().bind_to_thread();
        bound.map_err(|error| self.failed("cannot be used by this thread", error))
    }

    fn failed(&self, what: &str, error: DriverError) -> DeviceError {
        failed(&self.name, what, error)
    }
}

/// What a query of a stream or event says.
fn is_done(status: sys::CUresult) -> Result<bool, DriverError> {
    match status {
        sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        status => status.result().map(|()| true),
    }
}

/// The result of a wait.
fn ended(waited: Result<Waited, DriverError>, device: &str, what: &str) -> Result<(), DeviceError> {
    match waited {
        Ok(Waited::Done) => Ok(()),
        Ok(Waited::Stopped) => Err(DeviceError::Interrupted {
            device: device.to_owned(),
        }),
        Err(error) => Err(failed(device, what, error)),
    }
}

fn failed(device: &str, what: &str, error: DriverError) -> DeviceError {
    DeviceError::Failed {
        device: device.to_owned(),
        reason: format!("{what} ({error})"),
    }
}

impl Memory {
    /// Whether it came from a source other than the driver.
    pub(crate) fn is_sourced(&self) -> bool {
        self.source.is_some()
    }

    /// Size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first byte, on the device.
    pub(crate) fn pointer(&self) -> *const c_void {
        self.start as *const c_void
    }

    /// The first byte, on the device, to be written.
    pub(crate) fn pointer_mut(&mut self) -> *mut c_void {
        self.start as *mut c_void
    }

    /// The byte at `offset`, on the device.
    pub(crate) fn at(&self, offset: usize) -> *const c_void {
        self.range(offset..offset) as *const c_void
    }

    /// The byte at `offset`, on the device, to be written.
    pub(crate) fn at_mut(&mut self, offset: usize) -> *mut c_void {
        self.range(offset..offset) as *mut c_void
    }

    fn range(&self, range: Range<usize>) -> u64 {
        let bytes = self.bytes;
        assert!(
            range.start <= range.end && range.end <= bytes,
            "bytes {range:?} of {bytes} on the device"
        );
        self.start + range.start as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A device that failed gives nothing back, and the process that holds it is about to end.
        let _ = self.context.bind_to_thread();
        if let Some(source) = self.source {
            return (source.give_back)(self.start);
        }
        // SAFETY: `start` came from the allocation and is freed once; the driver waits for work that uses it.
        let _ = unsafe { result::free_sync(self.start) };
    }
}

impl Pinned {
    /// The contents, after the last copy.
    pub(crate) fn read(&self) -> Result<&[u8], DeviceError> {
        self.wait()?;
        Ok(self.bytes_now())
    }

    /// The contents, after the last copy, to be changed.
    pub(crate) fn write(&mut self) -> Result<&mut [u8], DeviceError> {
        self.wait()?;
        // SAFETY: the memory is `bytes` long, this is the only reference, and the device is done with it.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.start as *mut u8, self.bytes) })
    }

    fn bytes_now(&self) -> &[u8] {
        // SAFETY: the memory is `bytes` long; a copy that is under way only reads it, because a copy into it
        // borrows it mutably and every later borrow waits.
        unsafe { std::slice::from_raw_parts(self.start as *const u8, self.bytes) }
    }

    fn wait(&self) -> Result<(), DeviceError> {
        let event = self.copied.cu_event();
        // SAFETY: the event lives as long as `self`.
        let waited = self
            .stop
            .wait(|| is_done(unsafe { sys::cuEventQuery(event) }));
        ended(waited, "the device", "did not finish a copy")
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.copied.context().bind_to_thread();
        let _ = self.copied.synchronize();
        // SAFETY: `start` came from the allocation and is freed once, after its last copy.
        let _ = unsafe { result::free_host(self.start as *mut c_void) };
    }
}
