//! The CUDA backend: one GPU's memory, the kernels of `ops` on it, and cuBLASLt for the products.
//!
//! Operations are queued on one stream and return at once. What a launch refuses is remembered and told
//! by the next call that can fail; a device that has failed once does not come back. All memory is taken at start.
//! With the feature `cuda-emulation` the same code runs on the CPU: `device` is its twin, and the kernels are
//! compiled by the host's compiler.
//!
//! Invariant: one thread uses a backend, the one that made it.

mod batch;
#[cfg_attr(feature = "cuda-emulation", path = "emulated.rs")]
pub(crate) mod device;
mod kv_cache;
pub mod libraries;
mod tensor;
mod weight;

pub use batch::CudaBatch;
pub use kv_cache::CudaKvCache;
pub use tensor::CudaTensor;
pub use weight::CudaWeight;

use crate::backend::{DeviceError, Element};
use device::Device;
use std::cell::OnceCell;
use std::ffi::{c_int, c_void};

/// A GPU as a device.
#[derive(Debug)]
pub struct CudaBackend {
    pub(crate) device: Device,
    /// What activations are stored as.
    element: Element,
    /// The first failure of a launch.
    failure: OnceCell<String>,
}

impl CudaBackend {
    /// A backend on GPU `ordinal`, bound to the calling thread.
    ///
    /// # Errors
    /// If a library is missing, with a sentence that says how to get it; if there is no such GPU.
    pub fn new(ordinal: usize) -> Result<Self, DeviceError> {
        let device = Device::open(ordinal)?;
        Ok(Self {
            device,
            element: Element::F32,
            failure: OnceCell::new(),
        })
    }

    /// The stream that all work goes to, as C has it.
    pub fn stream(&self) -> *mut c_void {
        self.device.stream()
    }

    /// What activations are stored as.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Remembers a launch that was refused: `code` is what the launcher of `kernel` returned.
    pub(crate) fn launched(&self, kernel: &str, code: c_int) {
        if code != 0 {
            // Only the first counts: those after it follow from it.
            let _ = self
                .failure
                .set(format!("kernel {kernel} was refused (CUDA error {code})"));
        }
    }

    /// An error if a launch was refused since the start.
    ///
    /// # Errors
    /// [`DeviceError::Failed`], naming the first kernel.
    pub fn check(&self) -> Result<(), DeviceError> {
        self.failure.get().map_or(Ok(()), |reason| {
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
    }
}
