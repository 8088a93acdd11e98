//! The CUDA backend: one GPU's memory, the kernels of `ops` on it, and cuBLASLt for the products.
//!
//! Operations are queued on one stream and return at once. What a launch refuses is remembered and told
//! by the next call that can fail; a device that has failed once does not come back. All memory is taken at start.
//! With the feature `cuda-emulation` the same code runs on the CPU: `device` is its twin, and the kernels are
//! compiled by the host's compiler.
//!
//! Invariant: one thread uses a backend at a time.

mod batch;
#[cfg_attr(feature = "cuda-emulation", path = "emulated_blas.rs")]
mod blas;
pub(crate) mod clock;
#[cfg_attr(feature = "cuda-emulation", path = "emulated.rs")]
pub(crate) mod device;
#[cfg(all(test, feature = "cuda-emulation"))]
mod emulation_test;
mod gpus;
#[cfg_attr(feature = "cuda-emulation", path = "emulated_graph.rs")]
mod graph;
mod graphs;
mod kv_cache;
pub(crate) mod launch;
pub mod libraries;
mod load;
mod operations;
pub(crate) mod product;
pub(crate) mod section;
mod source;
mod stop;
mod tensor;
#[cfg(test)]
pub(crate) mod testing;
mod transfer;
#[cfg_attr(
    all(feature = "cuda-emulation", not(test)),
    expect(dead_code, reason = "the emulated products have one algorithm")
)]
mod trials;
mod weight;
pub(crate) mod workspace;

pub use crate::ops::sample::cuda::CudaPending;
pub use batch::CudaBatch;
pub use gpus::{GpuInfo, gpus};
pub use kv_cache::CudaKvCache;
pub use source::TensorSource;
pub use tensor::CudaTensor;
pub use weight::CudaWeight;

use crate::backend::{DeviceError, Element};
use crate::ops::sample::cuda::Space as Sampler;
use blas::Blas;
use clock::Clock;
use device::Device;
use graphs::Graphs;
use product::Product;
use std::cell::{Cell, RefCell, RefMut};
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use transfer::Transfer;
use workspace::Workspace;

/// A GPU as a device.
#[derive(Debug)]
pub struct CudaBackend {
    pub(crate) device: Device,
    /// What activations are stored as.
    element: Element,
    /// Where matrices that collectives work on are taken from first.
    source: Option<TensorSource>,
    blas: Blas,
    /// There as soon as there are quantised weights.
    workspace: RefCell<Workspace>,
    transfer: RefCell<Transfer>,
    sampler: RefCell<Sampler>,
    graphs: Graphs,
    pub(crate) clock: Clock,
    /// The first failure of an operation.
    failure: RefCell<Option<String>>,
    /// Whether an operation was not queued because a wait before it was interrupted.
    interrupted: Cell<bool>,
}

impl CudaBackend {
    /// A backend on GPU `ordinal`, bound to the calling thread.
    ///
    /// # Errors
    /// If a library is missing, with a sentence that says how to get it; if there is no such GPU.
    pub fn new(ordinal: usize) -> Result<Self, DeviceError> {
        let device = Device::open(ordinal)?;
        Ok(Self {
            blas: Blas::new(&device)?,
            transfer: RefCell::new(Transfer::new(&device)?),
            sampler: RefCell::new(Sampler::new(&device)?),
            workspace: RefCell::default(),
            device,
            element: Element::F32,
            source: None,
            graphs: Graphs::default(),
            clock: Clock::default(),
            failure: RefCell::default(),
            interrupted: Cell::new(false),
        })
    }

    /// The stream that all work goes to, as C has it.
    pub fn stream(&self) -> *mut c_void {
        self.device.stream()
    }

    /// From now on, waits for the device end with [`DeviceError::Interrupted`] when `flag` is raised, for as
    /// long as its owner keeps it. What was queued still runs; ending that is up to whoever raises it.
    pub fn interrupt_with(&self, flag: &Arc<AtomicBool>) {
        self.device.stop().set(flag);
        self.interrupted.set(false);
    }

    /// From now on, takes the matrices that collectives work on from `source` where it has room.
    pub fn take_tensors_from(&mut self, source: TensorSource) {
        self.source = Some(source);
    }

    /// Waits until everything queued is done.
    ///
    /// # Errors
    /// [`DeviceError`], also where work that was queued earlier failed on the device.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.device.synchronize()
    }

    /// Whether what is queued now is recorded, to be done later and more than once.
    pub fn is_recording(&self) -> bool {
        self.graphs.is_recording()
    }

    /// What activations are stored as.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Waits for the end of a step, or until `is_called` says so. Whether the step has ended.
    pub(crate) fn wait_for(
        &self,
        pending: &CudaPending,
        is_called: &mut dyn FnMut() -> bool,
    ) -> Result<bool, DeviceError> {
        self.device.wait_for(pending.span().end(), is_called)
    }

    /// Memory for sampling.
    pub(crate) fn sampler(&self) -> RefMut<'_, Sampler> {
        self.sampler.borrow_mut()
    }

    /// Memory for products with quantised weights.
    pub(crate) fn workspace(&self) -> RefMut<'_, Workspace> {
        self.workspace.borrow_mut()
    }

    /// Queues the product. `false`, and nothing queued, where the library has no algorithm for factors of 8 bits.
    pub(crate) fn multiply(&self, product: &Product) -> bool {
        let queued = self.blas.multiply(&self.device, product);
        queued.unwrap_or_else(|reason| {
            self.fail(reason);
            true
        })
    }

    /// Remembers a launch that was refused: `code` is what the launcher of `kernel` returned.
    pub(crate) fn launched(&self, kernel: &str, code: c_int) {
        if code != 0 {
            self.fail(format!("kernel {kernel} was refused (CUDA error {code})"));
        }
    }

    /// Remembers why an operation was not queued. Only the first counts: those after it follow from it.
    pub(crate) fn fail(&self, reason: String) {
        self.failure.borrow_mut().get_or_insert(reason);
    }

    /// Remembers an error. An interruption ends the step it is in and not the device.
    pub(crate) fn fail_with(&self, error: DeviceError) {
        match error {
            DeviceError::Interrupted { .. } => self.interrupted.set(true),
            DeviceError::Failed { reason, .. } => self.fail(reason),
            error @ DeviceError::OutOfMemory { .. } => self.fail(error.to_string()),
        }
    }

    /// An error if an operation was refused since the start.
    ///
    /// # Errors
    /// [`DeviceError::Failed`], with the first reason; [`DeviceError::Interrupted`] if that was it, until the
    /// next [`Self::interrupt_with`].
    pub fn check(&self) -> Result<(), DeviceError> {
        if self.interrupted.get() {
            return Err(DeviceError::Interrupted {
                device: self.device.name().to_owned(),
            });
        }
        let failure = self.failure.borrow();
        failure.as_ref().map_or(Ok(()), |reason| {
            Err(DeviceError::Failed {
                device: self.device.name().to_owned(),
                reason: reason.clone(),
            })
        })
    }
}

/// The element's number in the launchers' C interface.
pub(crate) fn element_code(element: Element) -> c_int {
    match element {
        Element::F32 => 0,
        Element::Bf16 => 1,
        Element::F16 => 2,
        Element::Fp8 => 3,
    }
}
