//! Variables that a shard process needs for the libraries of its device.
//!
//! NCCL is configured by the environment alone, and before it is loaded. Names and values, nothing more. What
//! the operator has set on a host wins over a proposal; what the topology file says, over that. Invariant: the
//! same on all ranks of a GPU.

use crate::placement::Device;

/// For every shard on a GPU.
const GPU: [(&str, &str); 2] = [
    // Its mesh between ranks opens a port without authentication, and finds the dead after a minute:
    // the coordinator does within milliseconds.
    ("NCCL_RAS_ENABLE", "0"),
    // Activations are in windows of their own where that is of use; registering them with each recording would only take
    // another round among the ranks.
    ("NCCL_GRAPH_REGISTER", "0"),
];

/// For ranks that share a GPU. NCCL supports it as an experiment, from 2.30.3 on.
const SHARED_GPU: [(&str, &str); 3] = [
    ("NCCL_MULTI_RANK_GPU_ENABLE", "1"),
    // Kernels of all ranks must be on the card at the same time, or they wait for each other for ever.
    ("NCCL_MAX_CTAS", "2"),
    ("NCCL_NVLS_ENABLE", "0"),
];

/// Where NCCL's ranks meet and, without InfiniBand, talk: in clear.
const INTERFACE: &str = "NCCL_SOCKET_IFNAME";

/// A variable of a shard's environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// Its value.
    pub value: String,
    /// Whether what the host's own environment says of it comes first.
    pub is_proposal: bool,
}

/// The variables of a process that computes on `device`. `interface` is the one network interface that NCCL may
/// take; `None` leaves it to NCCL.
pub fn of(device: &Device, interface: Option<&str>) -> Vec<Variable> {
    let proposals = match device {
        Device::Cpu { .. } => return Vec::new(),
        Device::Gpu { ranks: 0 | 1, .. } => GPU.to_vec(),
        Device::Gpu { .. } => [&GPU[..], &SHARED_GPU].concat(),
    };
    let proposals = proposals.into_iter().map(|(name, value)| Variable {
        name,
        value: value.to_owned(),
        is_proposal: true,
    });
    // Without the mark `eth1` would be `eth10` too.
    let interface = interface.map(|interface| Variable {
        name: INTERFACE,
        value: format!("={interface}"),
        is_proposal: false,
    });
    interface.into_iter().chain(proposals).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_gpus_get_what_sharing_needs() {
        let names = |device, interface| {
            let variables = of(&device, interface).into_iter();
            variables.map(|it| it.name).collect::<Vec<_>>()
        };
        let gpu = |ranks| Device::Gpu { index: 0, ranks };
        let alone = ["NCCL_RAS_ENABLE", "NCCL_GRAPH_REGISTER"];
        assert_eq!(names(gpu(1), None), alone);
        assert_eq!(names(gpu(2), None).len(), 5);
        assert!(names(gpu(2), None).contains(&"NCCL_MULTI_RANK_GPU_ENABLE"));
        let (threads, cores) = (1, Vec::new());
        let cpu = Device::Cpu { threads, cores };
        assert_eq!(names(cpu, Some("eth0")), [""; 0], "there is no NCCL");
    }

    #[test]
    fn the_interface_is_exactly_that_one_whatever_the_host_says() {
        let gpu = Device::Gpu { index: 0, ranks: 1 };
        let variables = of(&gpu, Some("eth1"));
        let fixed: Vec<_> = variables.iter().filter(|it| !it.is_proposal).collect();
        assert_eq!(fixed.len(), 1);
        let Variable { name, value, .. } = fixed[0];
        assert_eq!((*name, value.as_str()), ("NCCL_SOCKET_IFNAME", "=eth1"));
    }
}
