//! `cluster shard --probe`: one line of JSON that says which GPUs this host has and whether NCCL is there.
//!
//! Asks driver and file system, and makes no context on any GPU. Invariant: standard output gets that line and
//! nothing else from here, also where the answer is a sentence about what is missing.

use std::io::{self, Write};
use std::process::ExitCode;
use topology::gpus::Probe;

/// Prints a [`Probe`]. 0 also where it is a sentence: that is an answer.
pub fn probe() -> ExitCode {
    let Ok(mut line) = serde_json::to_vec(&host()) else {
        return ExitCode::FAILURE;
    };
    line.push(b'\n');
    match io::stdout().write_all(&line) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

#[cfg(feature = "cuda")]
pub(crate) fn host() -> Probe {
    use topology::gpus::{Gpu, GpuHost};
    let gpus = kernels::cuda::gpus()?;
    let gpu = |info: kernels::cuda::GpuInfo| Gpu {
        name: info.name,
        total_bytes: info.total_bytes,
    };
    let visible = std::env::var_os("CUDA_VISIBLE_DEVICES");
    Ok(GpuHost {
        gpus: gpus.into_iter().map(gpu).collect(),
        visible: visible.map(|visible| visible.to_string_lossy().into_owned()),
        nccl: crate::comm::nccl::library::find().map(|file| file.display().to_string()),
    })
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn host() -> Probe {
    Err(crate::CPU_ONLY.to_owned())
}
