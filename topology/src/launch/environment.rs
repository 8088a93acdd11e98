//! Variables that a shard process needs for the libraries of its device.
//!
//! NCCL is configured by the environment alone, and before it is loaded. Names and values, nothing more;
//! what the operator has set wins, which is up to the caller. Invariant: the same on all ranks of a GPU.

use crate::placement::Device;

/// For every shard on a GPU.
const GPU: [(&str, &str); 2] = [
    // Its mesh between ranks opens a port without authentication, and finds the dead after a minute:
    // the coordinator does within milliseconds.
    ("NCCL_RAS_ENABLE", "0"),
    // Recording a collective is each rank's own business then, and need not happen on all of them at once.
    ("NCCL_GRAPH_REGISTER", "0"),
];

/// For ranks that share a GPU. NCCL supports it as an experiment, from 2.30.3 on.
const SHARED_GPU: [(&str, &str); 3] = [
    ("NCCL_MULTI_RANK_GPU_ENABLE", "1"),
    // Kernels of all ranks must be on the card at the same time, or they wait for each other for ever.
    ("NCCL_MAX_CTAS", "2"),
    ("NCCL_NVLS_ENABLE", "0"),
];

/// The variables of a process that computes on `device`.
pub(super) fn of(device: &Device) -> Vec<(&'static str, &'static str)> {
    match device {
        Device::Cpu { .. } => Vec::new(),
        Device::Gpu { ranks: 0 | 1, .. } => GPU.to_vec(),
        Device::Gpu { .. } => [&GPU[..], &SHARED_GPU].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_gpus_get_what_sharing_needs() {
        let names = |device| {
            of(&device)
                .into_iter()
                .map(|(name, _)| name)
                .collect::<Vec<_>>()
        };
        let gpu = |ranks| names(Device::Gpu { index: 0, ranks });
        assert_eq!(gpu(1), ["NCCL_RAS_ENABLE", "NCCL_GRAPH_REGISTER"]);
        assert_eq!(gpu(2).len(), 5);
        assert!(gpu(2).contains(&"NCCL_MULTI_RANK_GPU_ENABLE"));
        let (threads, cores) = (1, Vec::new());
        assert_eq!(names(Device::Cpu { threads, cores }), [""; 0]);
    }
}
