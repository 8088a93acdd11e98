//! `--topology FILE`: from nodes in a file to devices, memory and places to start ranks.
//!
//! Reads the file and asks nodes for their memory; starts nothing. What is wrong in the file
//! or with the way to a node is one sentence. Invariant: ranks, sites and shares of memory are in the
//! same order, that of the model's devices.

use super::args::Up;
use crate::fleet::RankSite;
use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use topology::fit::{HostShare, Memory};
use topology::host::HostMemory;
use topology::launch::ssh::{self, Image, Remote};
use topology::placement::{Device, Placement};
use topology::spec::cluster::{Node, Topology};

/// Reads the topology file, if one was given.
///
/// # Errors
/// A sentence with file, line and key, or naming the flag that contradicts it.
pub fn read(up: &Up) -> Result<Option<Topology>> {
    let Some(file) = &up.topology else {
        return Ok(None);
    };
    for (flag, given) in [
        ("--gpus", up.gpus.is_some()),
        ("--cpus", up.cpus.is_some()),
        ("--tensor-parallel-size", up.tensor_parallel_size.is_some()),
    ] {
        ensure!(
            !given,
            "{flag} and --topology contradict each other; the file says what each node gives, so leave \
             out {flag}"
        );
    }
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("cannot read --topology {}", file.display()))?;
    let topology = Topology::parse(file, &text)?;
    ensure!(
        topology.model.path.is_none() || up.model().is_none(),
        "{} names a model (`path`), and --model does too; keep one of them",
        file.display()
    );
    Ok(Some(topology))
}

/// The flags, with the model that the file names.
pub fn with_model<'a>(up: &'a Up, topology: Option<&Topology>) -> Cow<'a, Up> {
    let Some(model) = topology.map(|topology| &topology.model) else {
        return Cow::Borrowed(up);
    };
    let mut up = up.clone();
    match (&model.path, &model.name) {
        (Some(path), Some(name)) => up.model = Some(format!("{name}={path}")),
        (Some(path), None) => up.model = Some(path.clone()),
        (None, Some(name)) if up.served_model_name.is_empty() && up.model().is_none() => {
            up.served_model_name = vec![name.clone()];
        }
        (None, _) => {}
    }
    Cow::Owned(up)
}

/// A device for each rank.
pub fn placement(topology: &Topology) -> Placement {
    let devices = topology.model.ranks.iter();
    Placement {
        devices: devices.map(|(_, device)| device.clone()).collect(),
        warnings: Vec::new(),
    }
}

/// What `plan` says of where a rank is.
pub fn describe(topology: &Topology, rank: usize) -> Option<String> {
    let (node, _) = topology.model.ranks.get(rank)?;
    let node = &topology.nodes[*node];
    let interface = node.interface.as_deref();
    let interface = interface.map_or_else(String::new, |name| format!(", NCCL over {name}"));
    Some(match &node.ssh {
        Some(target) => format!("node {} (ssh {target}{interface})", node.name),
        None => format!("node {} (this machine{interface})", node.name),
    })
}

/// Asks every node with ranks how much memory is free.
///
/// # Errors
/// A sentence that names the node and says what to change.
pub fn memory(topology: &Topology) -> Result<Memory> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.context("cannot start a thread")?;
    let share = async |(node, ranks): (&Node, usize)| -> Result<HostShare> {
        let memory = match &node.ssh {
            None => HostMemory::read().context("ask for free memory")?,
            Some(target) => {
                let said = ssh::meminfo(target).await?;
                HostMemory::from_meminfo(&said)
                    .with_context(|| format!("node {}: it is no Linux machine", node.name))?
            }
        };
        Ok(HostShare {
            name: node.name.clone(),
            free_bytes: memory.free_bytes,
            ranks,
        })
    };
    let shares = try_join_all(topology.hosts().into_iter().map(share));
    runtime.block_on(shares).map(Memory::Hosts)
}

/// Where ranks are started. Reads `program` once if any of them is on another node.
///
/// # Errors
/// If it cannot be read.
pub fn sites(topology: &Topology, program: &Path) -> Result<Vec<RankSite>> {
    let is_one_host = topology.is_one_host();
    let mut nodes = topology.hosts().into_iter().map(|(node, _)| node);
    let image = nodes
        .any(|node| node.ssh.is_some())
        .then(|| Image::read(program))
        .transpose()?;
    let mut remotes: BTreeMap<usize, Arc<Remote>> = BTreeMap::new();
    let site = |(index, device): &(usize, Device)| {
        let node = &topology.nodes[*index];
        let remote = node.ssh.as_ref().zip(image.as_ref());
        let remote = remote.map(|(target, image)| {
            let (target, work_dir) = (target.clone(), node.work_dir.clone());
            let new = || Arc::new(Remote::new(target, work_dir, image.clone()));
            remotes.entry(*index).or_insert_with(new).clone()
        });
        RankSite {
            device: device.clone(),
            remote,
            interface: (!is_one_host).then_some(node.address),
        }
    };
    Ok(topology.model.ranks.iter().map(site).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = include_str!("../../../scripts/cluster.toml");

    #[test]
    fn sites_are_in_rank_order_and_share_their_nodes() {
        let topology = Topology::parse(Path::new("cluster.toml"), TEXT).unwrap();
        let program = std::env::current_exe().unwrap();
        let sites = sites(&topology, &program).unwrap();
        let [a, b, c, d] = sites.as_slice() else {
            panic!("{sites:?}");
        };
        assert!(a.remote.is_none() && b.remote.is_none());
        let (c, d) = (c.remote.as_ref().unwrap(), d.remote.as_ref().unwrap());
        assert!(Arc::ptr_eq(c, d), "the program is copied once");
        let addresses: Vec<_> = sites.iter().map(|site| site.interface.unwrap()).collect();
        assert_eq!(addresses[0].to_string(), "10.77.0.1");
        assert_eq!(addresses[3].to_string(), "10.77.0.2");
        // On one host nothing listens on a network.
        let one = TEXT.replace("[\"here\", \"there\"]", "[\"there\"]");
        let one = Topology::parse(Path::new("cluster.toml"), &one).unwrap();
        let sites = super::sites(&one, &program).unwrap();
        assert!(
            sites
                .iter()
                .all(|site| site.interface.is_none() && site.remote.is_some())
        );
        assert!(
            describe(&topology, 2)
                .unwrap()
                .contains("ssh cluster@10.77.0.2, NCCL over eth0")
        );
        assert_eq!(describe(&topology, 4), None);
    }
}
