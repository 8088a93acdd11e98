//! Which memory each model may take: that of its GPUs, or its part of what hosts have free.
//!
//! Asks this machine and, over `ssh`, nodes; loads nothing. Models on cores of one host share its memory:
//! each may take what it needs and an equal part of what all leave. Invariant: what models may take of a
//! host is together no more than is free there.

use super::Draft;
use crate::cli::nodes;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use topology::fit::{Bytes, GpuMemory, HostShare, Memory, share};
use topology::gpus::GpuHost;
use topology::host::HostMemory;
use topology::launch::probe;
use topology::placement::{Device, Placement};
use topology::spec::cluster::Topology;

/// How a host is called where there is only one.
const THIS_HOST: &str = "this host";

fn is_gpu(device: &Device) -> bool {
    matches!(device, Device::Gpu { .. })
}

/// GPUs of all hosts that ranks compute on; by node, or 0 for this machine.
pub(super) fn gpu_hosts(
    topology: Option<&Topology>,
    placements: &[Placement],
) -> Result<BTreeMap<usize, GpuHost>> {
    let mut devices = placements.iter().flat_map(|placement| &placement.devices);
    if !devices.any(is_gpu) {
        return Ok(BTreeMap::new());
    }
    if let Some(topology) = topology {
        return nodes::gpus(topology);
    }
    ensure!(
        cfg!(feature = "cuda"),
        "--gpus needs a build with CUDA, and this one computes on the CPU only; leave out --gpus, \
         or give --cpus"
    );
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let probed = probe::gpus(program.as_os_str(), ["shard", "--probe"])?;
    let host = probed.map_err(|why| anyhow::anyhow!("--gpus cannot be used: {why}"))?;
    Ok(BTreeMap::from([(0, host)]))
}

/// The GPUs of one model's ranks, `hosts` being their hosts with their numbers of ranks; `None` where they
/// compute on cores.
pub(super) fn gpus_of(
    placement: &Placement,
    hosts: &[(usize, usize)],
    (known, utilization): (&BTreeMap<usize, GpuHost>, f64),
    name_of: impl Fn(usize) -> String,
) -> Result<Option<GpuMemory>> {
    let devices = &placement.devices;
    if !devices.iter().any(is_gpu) {
        return Ok(None);
    }
    let is_alone = devices.len() == 1;
    let (mut total_bytes, mut host_of) = (Vec::new(), Vec::new());
    let mut rest = devices.as_slice();
    for (host, ranks) in hosts {
        let (own, others) = rest.split_at(*ranks);
        rest = others;
        let gpus = known
            .get(host)
            .context("a host was not asked for its GPUs")?;
        let bytes = gpus.memory_of(own, is_alone);
        total_bytes.extend(bytes.map_err(|why| anyhow::anyhow!("{}: {why}", name_of(*host)))?);
        host_of.extend(std::iter::repeat_n(*host, *ranks));
    }
    Ok(Some(GpuMemory {
        devices: devices.clone(),
        hosts: host_of,
        total_bytes,
        utilization,
    }))
}

/// What each of `drafts` may take, in their order.
///
/// # Errors
/// A sentence with the arithmetic where models do not fit on a host beside each other.
pub(super) fn of_models(topology: Option<&Topology>, drafts: &[&Draft]) -> Result<Vec<Memory>> {
    let free = match topology {
        // GPUs have memory of their own.
        _ if drafts.iter().all(|draft| draft.gpus.is_some()) => BTreeMap::new(),
        Some(topology) => nodes::free_memory(topology)?,
        None => {
            let memory = HostMemory::read().context("ask for free memory")?;
            BTreeMap::from([(0, memory.free_bytes)])
        }
    };
    let mut shares: BTreeMap<(usize, usize), u64> = BTreeMap::new(); // by host and model
    for (host, free) in &free {
        let claims = drafts.iter().enumerate().filter_map(|(index, draft)| {
            let claim = draft.claim_on(*host)?;
            Some((index, claim))
        });
        let (models, claims): (Vec<usize>, Vec<u64>) = claims.unzip();
        let parts = match claims.as_slice() {
            [] => continue,
            // Alone, its own arithmetic says what is missing.
            [_] => vec![*free],
            _ => share(*free, &claims).ok_or_else(|| {
                too_much(&place(topology, *host), *free, drafts, (&models, &claims))
            })?,
        };
        for (model, part) in models.into_iter().zip(parts) {
            shares.insert((*host, model), part);
        }
    }
    let memory = |(index, draft): (usize, &&Draft)| {
        if let Some(gpus) = &draft.gpus {
            return Ok(gpus.usable());
        }
        let part = |host: usize| {
            let part = shares.get(&(host, index)).copied();
            part.with_context(|| format!("the memory of {} is not known", place(topology, host)))
        };
        let Some(topology) = topology else {
            return Ok(Memory::Shared {
                free_bytes: part(0)?,
            });
        };
        let hosts = draft.hosts.iter().map(|(host, ranks)| {
            Ok(HostShare {
                name: topology.nodes[*host].name.clone(),
                free_bytes: part(*host)?,
                ranks: *ranks,
            })
        });
        Ok(Memory::Hosts(hosts.collect::<Result<_>>()?))
    };
    drafts.iter().enumerate().map(memory).collect()
}

/// As the operator calls a host.
pub(super) fn place(topology: Option<&Topology>, host: usize) -> String {
    topology.map_or_else(
        || THIS_HOST.to_owned(),
        |topology| format!("node {}", topology.nodes[host].name),
    )
}

fn too_much(
    place: &str,
    free: u64,
    drafts: &[&Draft],
    (models, claims): (&[usize], &[u64]),
) -> anyhow::Error {
    let claims = models.iter().zip(claims);
    let claims = claims.map(|(model, claim)| {
        let name = drafts[*model].model.name();
        format!("{name} takes {}", Bytes(*claim))
    });
    let claims = claims.collect::<Vec<_>>().join(", ");
    let advice = "leave out a model, use smaller ones, a smaller --max-model-len, or a host with more memory";
    anyhow::anyhow!(
        "the models do not fit beside each other on {place}: without room for KV blocks that was not asked \
         for, {claims}, and {} is free; {advice}",
        Bytes(free)
    )
}
