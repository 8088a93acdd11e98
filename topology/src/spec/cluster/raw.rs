//! The topology file as it is written, and how its parts become values.
//!
//! Every value that can be wrong keeps its place in the text, so that what is said of it can name the
//! line. Invariant: an unknown key is an error, never ignored.

use super::super::{CpuSpec, GpuSpec, SpecError};
use super::{ModelSpec, Node, Topology};
use crate::host::HostCores;
use crate::launch::ssh::Target;
use crate::partition::MAX_WORLD_SIZE;
use crate::placement::{Device, DeviceRequest, place};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use toml::{Spanned, Value};

/// Where the program is put on a node that does not say otherwise; in the home directory, which is
/// where `ssh` begins and nobody else may write.
const WORK_DIR: &str = ".cache/cluster";
/// Longest name of a node or network interface.
const MAX_NAME: usize = 64;

/// What is wrong, and at which byte.
pub(super) struct Wrong {
    pub(super) at: usize,
    pub(super) reason: String,
}

fn at<T>(value: &Spanned<T>, reason: impl Into<String>) -> Wrong {
    Wrong {
        at: value.span().start,
        reason: reason.into(),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawFile {
    coordinator: RawCoordinator,
    #[serde(default)]
    node: Vec<Spanned<RawNode>>,
    #[serde(default)]
    model: Vec<Spanned<RawModel>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCoordinator {
    address: Spanned<IpAddr>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    name: Spanned<String>,
    address: Spanned<IpAddr>,
    interface: Option<Spanned<String>>,
    ssh: Option<RawSsh>,
    work_dir: Option<Spanned<String>>,
    cpus: Option<Spanned<Value>>,
    shards: Option<Spanned<u32>>,
    gpus: Option<Spanned<Value>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSsh {
    host: Option<Spanned<String>>,
    user: Option<String>,
    port: Option<u16>,
    identity: Option<PathBuf>,
    jump: Option<String>,
    config: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawModel {
    name: Option<String>,
    path: Option<Spanned<String>>,
    devices: Spanned<Vec<Spanned<String>>>,
}

impl RawFile {
    pub(super) fn check(self) -> Result<Topology, Wrong> {
        let address = &self.coordinator.address;
        if address.get_ref().is_unspecified() {
            let reason = "`address`: give the one address of this machine that all nodes reach";
            return Err(at(address, reason));
        }
        let coordinator = *address.get_ref();
        let mut nodes: Vec<Node> = Vec::new();
        for raw in self.node {
            let name = raw.get_ref().name.clone();
            let node = raw.into_inner().check()?;
            if nodes.iter().any(|known| known.name == node.name) {
                let reason = format!("`name`: there are two nodes named {}", node.name);
                return Err(at(&name, reason));
            }
            nodes.push(node);
        }
        let mut models = self.model.into_iter();
        let model = match (models.next(), models.next()) {
            (None, _) => whole_cluster(&nodes)?,
            (Some(model), None) => model.into_inner().check(&nodes)?,
            (Some(_), Some(second)) => {
                let reason = "`model`: one cluster serves one model so far; keep one [[model]]";
                return Err(at(&second, reason));
            }
        };
        Ok(Topology {
            coordinator,
            nodes,
            model,
        })
    }
}

/// Where the file names no model: the command line does, and it takes everything.
fn whole_cluster(nodes: &[Node]) -> Result<ModelSpec, Wrong> {
    let ranks = nodes.iter().enumerate();
    let ranks =
        ranks.flat_map(|(index, node)| node.devices.iter().map(move |d| (index, d.clone())));
    let ranks: Vec<_> = ranks.collect();
    match ranks.len() {
        0 => Err(Wrong {
            at: 0,
            reason: "`node`: there is none; add a [[node]] with `name`, `address` and `cpus`"
                .into(),
        }),
        count if count > MAX_WORLD_SIZE as usize => Err(Wrong {
            at: 0,
            reason: too_many(count),
        }),
        _ => Ok(ModelSpec {
            name: None,
            path: None,
            ranks,
        }),
    }
}

fn too_many(count: usize) -> String {
    format!("`devices`: {count} ranks are too many; a model takes {MAX_WORLD_SIZE} at most")
}

impl RawNode {
    fn check(self) -> Result<Node, Wrong> {
        let is_plain = |name: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            (1..=MAX_NAME).contains(&name.len()) && name.chars().all(plain)
        };
        for (key, value) in [
            ("name", Some(&self.name)),
            ("interface", self.interface.as_ref()),
        ] {
            if let Some(value) = value.filter(|value| !is_plain(value.get_ref())) {
                let reason =
                    format!("`{key}`: use letters, digits, `-`, `_` and `.`, at least one");
                return Err(at(value, reason));
            }
        }
        if self.address.get_ref().is_unspecified() {
            let reason = "`address`: give the one address at which other nodes reach this one";
            return Err(at(&self.address, reason));
        }
        if let Some(dir) = &self.work_dir
            && !dir.get_ref().starts_with('/')
        {
            return Err(at(
                dir,
                "`work_dir`: give an absolute path, as /opt/cluster",
            ));
        }
        let devices = self.devices()?;
        let address = *self.address.get_ref();
        Ok(Node {
            name: self.name.into_inner(),
            address,
            interface: self.interface.map(Spanned::into_inner),
            ssh: self.ssh.map(|ssh| ssh.check(address)).transpose()?,
            work_dir: self
                .work_dir
                .map_or_else(|| WORK_DIR.into(), Spanned::into_inner),
            devices,
        })
    }

    fn devices(&self) -> Result<Vec<Device>, Wrong> {
        let (gpus, cpus) = (&self.gpus, &self.cpus);
        match (gpus, cpus) {
            (Some(gpus), Some(_)) => {
                let reason = "`gpus`: a node's shards compute on GPUs or on cores; keep one of \
                              `gpus` and `cpus`";
                Err(at(gpus, reason))
            }
            (Some(gpus), None) => {
                if let Some(shards) = &self.shards {
                    return Err(at(
                        shards,
                        "`shards`: there is one for each GPU; leave it out",
                    ));
                }
                let GpuSpec(list) = listed(gpus, "gpus")?;
                Ok(list
                    .into_iter()
                    .map(|index| Device::Gpu { index, ranks: 1 })
                    .collect())
            }
            (None, Some(cpus)) => {
                let spec: CpuSpec = listed(cpus, "cpus")?;
                let shards = self.shards.as_ref().map_or(1, |shards| *shards.get_ref());
                // What the node has is known to the node; here all that is named is believed.
                let allowed = match &spec {
                    CpuSpec::Count(count) => (0..*count).collect(),
                    CpuSpec::Cores(cores) => cores.clone(),
                };
                let host = HostCores {
                    parallelism: u32::try_from(allowed.len()).unwrap_or(u32::MAX),
                    allowed,
                };
                let request = DeviceRequest {
                    gpus: None,
                    cpus: Some(spec),
                    tensor_parallel_size: Some(shards),
                };
                let placed = place(&request, &host).map_err(|_| {
                    let blamed = self.shards.as_ref().map_or(cpus.span(), Spanned::span);
                    Wrong {
                        at: blamed.start,
                        reason: format!("`shards`: {shards} is not from 1 to the number of cores"),
                    }
                })?;
                Ok(placed.devices)
            }
            (None, None) => Err(at(
                &self.name,
                "`cpus`: say which cores (or `gpus`) this node gives",
            )),
        }
    }
}

/// A list of devices: a number, or text as on the command line.
fn listed<T: std::str::FromStr<Err = SpecError>>(
    value: &Spanned<Value>,
    key: &str,
) -> Result<T, Wrong> {
    let text = match value.get_ref() {
        Value::Integer(number) => number.to_string(),
        Value::String(text) => text.clone(),
        _ => {
            return Err(at(
                value,
                format!("`{key}`: give a number or a text such as \"0-3\""),
            ));
        }
    };
    let parsed = text.parse();
    parsed.map_err(|e: SpecError| at(value, format!("`{key}`: {e}")))
}

impl RawSsh {
    fn check(self, address: IpAddr) -> Result<Target, Wrong> {
        let host = match self.host {
            None => address.to_string(),
            Some(host) if host.get_ref().trim().is_empty() => {
                return Err(at(
                    &host,
                    "`host`: give a name or an address, or leave it out",
                ));
            }
            Some(host) => host.into_inner(),
        };
        Ok(Target {
            host,
            user: self.user,
            port: self.port,
            identity: self.identity,
            jump: self.jump,
            config: self.config,
        })
    }
}

impl RawModel {
    fn check(self, nodes: &[Node]) -> Result<ModelSpec, Wrong> {
        if let Some(path) = &self.path
            && !path.get_ref().starts_with('/')
        {
            let reason = "`path`: give an absolute path; it is the same on all machines";
            return Err(at(path, reason));
        }
        // Devices of one node go together, whatever the order: neighbours in rank are then near.
        let mut chosen: BTreeMap<usize, Vec<(u32, Device)>> = BTreeMap::new();
        let mut order: Vec<usize> = Vec::new();
        for named in self.devices.get_ref() {
            let (index, devices) = select(named, nodes)?;
            if !order.contains(&index) {
                order.push(index);
            }
            let taken = chosen.entry(index).or_default();
            for (number, device) in devices {
                if taken.iter().any(|(known, _)| *known == number) {
                    let node = &nodes[index].name;
                    let reason = format!("`devices`: device {number} of {node} is named twice");
                    return Err(at(named, reason));
                }
                taken.push((number, device));
            }
        }
        let node_ranks = |index| chosen[&index].iter().map(move |(_, d)| (index, d.clone()));
        let ranks: Vec<_> = order.into_iter().flat_map(node_ranks).collect();
        match ranks.len() {
            0 => Err(at(&self.devices, "`devices`: name at least one node")),
            count if count > MAX_WORLD_SIZE as usize => Err(at(&self.devices, too_many(count))),
            _ => Ok(ModelSpec {
                name: self.name,
                path: self.path.map(Spanned::into_inner),
                ranks,
            }),
        }
    }
}

/// What `NODE`, `NODE:2` or `NODE:0-3` means: the node, and its devices with their numbers.
fn select(named: &Spanned<String>, nodes: &[Node]) -> Result<(usize, Vec<(u32, Device)>), Wrong> {
    let (name, list) = match named.get_ref().split_once(':') {
        Some((name, list)) => (name, Some(list)),
        None => (named.get_ref().as_str(), None),
    };
    let found = nodes.iter().position(|node| node.name == name);
    let index = found.ok_or_else(|| {
        let known: Vec<_> = nodes.iter().map(|node| node.name.as_str()).collect();
        let known = known.join(", ");
        at(
            named,
            format!("`devices`: there is no node {name}; there are: {known}"),
        )
    })?;
    let numbered = (0..).zip(&nodes[index].devices).map(|(place, device)| {
        let number = match device {
            Device::Gpu { index, .. } => *index,
            Device::Cpu { .. } => place,
        };
        (number, device.clone())
    });
    let all: Vec<_> = numbered.collect();
    let Some(list) = list else {
        return Ok((index, all));
    };
    let GpuSpec(wanted) = list
        .parse()
        .map_err(|e| at(named, format!("`devices`: {e}")))?;
    let one = |number: u32| {
        let device = all.iter().find(|(known, _)| *known == number);
        device.cloned().ok_or_else(|| {
            let range: Vec<_> = all.iter().map(|(known, _)| known.to_string()).collect();
            let range = range.join(", ");
            at(
                named,
                format!("`devices`: {name} has no device {number}; it has {range}"),
            )
        })
    };
    let devices: Result<_, Wrong> = wanted.into_iter().map(one).collect();
    Ok((index, devices?))
}
