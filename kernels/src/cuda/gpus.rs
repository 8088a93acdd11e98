//! Which GPUs there are, without opening one: no context is made and no memory taken.
//!
//! For a process that only asks. Invariant: an error is a sentence that says what is missing.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use super::libraries;
use crate::backend::DeviceError;
use cudarc::driver::{DriverError, result};

/// One GPU of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// As the driver names it.
    pub name: String,
    /// Its memory in bytes.
    pub total_bytes: u64,
}

/// The GPUs that this process may use, by number.
///
/// # Errors
/// A library is missing, or the driver does not answer. No GPU at all is an empty list where the driver says
/// so, as it does where `CUDA_VISIBLE_DEVICES` hides all.
pub fn gpus() -> Result<Vec<GpuInfo>, String> {
    let sentence = |error: DeviceError| match error {
        DeviceError::Failed { reason, .. } => reason,
        other => other.to_string(),
    };
    libraries::check_driver(0).map_err(sentence)?;
    libraries::check_cublaslt("GPU").map_err(sentence)?;
    list().map_err(|error| {
        format!("the NVIDIA driver does not answer ({error}); `nvidia-smi` may say more")
    })
}

fn list() -> Result<Vec<GpuInfo>, DriverError> {
    use cudarc::driver::sys::CUresult::CUDA_ERROR_NO_DEVICE;
    match result::init() {
        Err(DriverError(CUDA_ERROR_NO_DEVICE)) => return Ok(Vec::new()),
        done => done?,
    }
    let describe = |ordinal| {
        let device = result::device::get(ordinal)?;
        // SAFETY: the driver has just named this device.
        let total = unsafe { result::device::total_mem(device) }?;
        Ok(GpuInfo {
            name: result::device::get_name(device)?,
            total_bytes: total as u64,
        })
    };
    (0..result::device::get_count()?).map(describe).collect()
}
