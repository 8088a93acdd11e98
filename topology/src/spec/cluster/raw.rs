//! The topology file as it is written, and how its parts become values.
//!
//! Every value that can be wrong keeps its place in the text, so that what is said of it can name the
//! line. Invariant: an unknown key is an error, never ignored.

use super::super::{CpuSpec, GpuSpec, SpecError};
use super::{ModelSpec, Node, Setting, Topology};
use crate::host::HostCores;
use crate::launch::ssh::Target;
use crate::partition::MAX_WORLD_SIZE;
use crate::placement::{Device, DeviceRequest, place};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
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
    name: Option<Spanned<Value>>,
    path: Option<Spanned<String>>,
    devices: Spanned<Vec<Spanned<String>>>,
    dtype: Option<Spanned<Value>>,
    max_model_len: Option<Spanned<Value>>,
    generation_config: Option<Spanned<Value>>,
    chat_template: Option<Spanned<Value>>,
    gpu_memory_utilization: Option<Spanned<Value>>,
    kv_cache_memory_bytes: Option<Spanned<Value>>,
    num_gpu_blocks_override: Option<Spanned<Value>>,
    scheduling_policy: Option<Spanned<Value>>,
    max_num_seqs: Option<Spanned<Value>>,
    max_mixed_prefill_tokens: Option<Spanned<Value>>,
    max_num_batched_tokens: Option<Spanned<Value>>,
    enforce_eager: Option<Spanned<Value>>,
}

impl RawFile {
    /// `line` is that of a place in the text.
    pub(super) fn check(self, line: &dyn Fn(usize) -> usize) -> Result<Topology, Wrong> {
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
        let mut models = Vec::new();
        if self.model.is_empty() {
            models.push(whole_cluster(&nodes)?);
        }
        let mut taken = BTreeSet::new();
        for raw in self.model {
            models.push(raw.into_inner().check((&nodes, &mut taken), line)?);
        }
        Ok(Topology {
            coordinator,
            nodes,
            models,
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
        _ => {
            let model = ModelSpec {
                ranks,
                ..ModelSpec::default()
            };
            let unfit = |reason| Wrong { at: 0, reason };
            fits_together(&model, nodes).map_err(unfit)?;
            Ok(model)
        }
    }
}

/// What ranks of one model need of each other, beyond being there.
fn fits_together(model: &ModelSpec, nodes: &[Node]) -> Result<(), String> {
    let is_gpu = |(_, device): &(usize, Device)| matches!(device, Device::Gpu { .. });
    if !model.ranks.iter().any(is_gpu) {
        return Ok(());
    }
    if !model.ranks.iter().all(is_gpu) {
        return Err(
            "`devices`: a model computes on GPUs or on cores; name nodes of one kind".into(),
        );
    }
    if model.is_one_host() {
        return Ok(());
    }
    let mut hosts = model.hosts().into_iter().map(|(node, _)| &nodes[node]);
    match hosts.find(|node| node.interface.is_none()) {
        None => Ok(()),
        Some(Node { name, .. }) => Err(format!(
            "`devices`: between nodes NCCL sends activations in clear and admits whoever asks, over whatever \
             network it finds; give node {name} an `interface` (as in `ip link`) on a private network"
        )),
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
                let count = u32::try_from(allowed.len()).unwrap_or(u32::MAX);
                let host = HostCores::of_one_node(allowed, count);
                let request = DeviceRequest {
                    gpus: None,
                    cpus: Some(spec),
                    tensor_parallel_size: Some(shards),
                };
                let mut placed = place(&request, 1, &host).map_err(|_| {
                    let blamed = self.shards.as_ref().map_or(cpus.span(), Spanned::span);
                    Wrong {
                        at: blamed.start,
                        reason: format!("`shards`: {shards} is not from 1 to the number of cores"),
                    }
                })?;
                Ok(placed.models.swap_remove(0).devices)
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
    /// `others` are the devices of the models before it: node, and number there.
    fn check(
        self,
        (nodes, others): (&[Node], &mut BTreeSet<(usize, u32)>),
        line: &dyn Fn(usize) -> usize,
    ) -> Result<ModelSpec, Wrong> {
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
                if others.contains(&(index, number)) {
                    let node = &nodes[index].name;
                    let reason = format!(
                        "`devices`: device {number} of {node} is another model's; each takes its own"
                    );
                    return Err(at(named, reason));
                }
                taken.push((number, device));
            }
        }
        let node_ranks = |index| chosen[&index].iter().map(move |(_, d)| (index, d.clone()));
        let ranks: Vec<_> = order.into_iter().flat_map(node_ranks).collect();
        let numbers = chosen.iter().flat_map(|(index, taken)| {
            let numbers = taken.iter().map(|(number, _)| *number);
            numbers.map(move |number| (*index, number))
        });
        others.extend(numbers);
        if ranks.is_empty() {
            return Err(at(&self.devices, "`devices`: name at least one node"));
        }
        if ranks.len() > MAX_WORLD_SIZE as usize {
            return Err(at(&self.devices, too_many(ranks.len())));
        }
        let model = ModelSpec {
            names: self.names()?,
            settings: self.settings(line)?,
            path: self.path.map(Spanned::into_inner),
            ranks,
        };
        fits_together(&model, nodes).map_err(|reason| at(&self.devices, reason))?;
        Ok(model)
    }

    fn names(&self) -> Result<Vec<String>, Wrong> {
        let Some(given) = &self.name else {
            return Ok(Vec::new());
        };
        let texts = match given.get_ref() {
            Value::Array(items) => items.iter().map(Value::as_str).collect(),
            value => value.as_str().map(|text| vec![text]),
        };
        let texts: Option<Vec<&str>> = texts;
        let texts = texts.filter(|texts| !texts.is_empty() && !texts.contains(&""));
        let reason = "`name`: give a text, or a list of texts of which the first is shown";
        let texts = texts.ok_or_else(|| at(given, reason))?;
        Ok(texts.into_iter().map(str::to_owned).collect())
    }

    /// Flags of the command line that are this model's alone.
    fn settings(&self, line: &dyn Fn(usize) -> usize) -> Result<Vec<Setting>, Wrong> {
        let given = [
            ("dtype", &self.dtype),
            ("max_model_len", &self.max_model_len),
            ("generation_config", &self.generation_config),
            ("chat_template", &self.chat_template),
            ("gpu_memory_utilization", &self.gpu_memory_utilization),
            ("kv_cache_memory_bytes", &self.kv_cache_memory_bytes),
            ("num_gpu_blocks_override", &self.num_gpu_blocks_override),
            ("scheduling_policy", &self.scheduling_policy),
            ("max_num_seqs", &self.max_num_seqs),
            ("max_mixed_prefill_tokens", &self.max_mixed_prefill_tokens),
            ("max_num_batched_tokens", &self.max_num_batched_tokens),
            ("enforce_eager", &self.enforce_eager),
        ];
        let given = given
            .into_iter()
            .filter_map(|(key, value)| Some((key, value.as_ref()?)));
        let setting = |(key, value): (&'static str, &Spanned<Value>)| {
            let text = match value.get_ref() {
                Value::String(text) => text.clone(),
                Value::Integer(_) | Value::Float(_) | Value::Boolean(_) => {
                    value.get_ref().to_string()
                }
                _ => {
                    let reason = format!("`{key}`: give a text, a number, true or false");
                    return Err(at(value, reason));
                }
            };
            Ok(Setting {
                key,
                value: text,
                line: line(value.span().start),
            })
        };
        given.map(setting).collect()
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
