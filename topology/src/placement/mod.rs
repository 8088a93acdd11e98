//! Which device each rank of a host computes on.
//!
//! From what the operator wrote and what the host has, one [`Device`] for each rank of each model: devices
//! are dealt out in the order they were named, the first model's ranks first, as many to each model. Models
//! that are to have different numbers of ranks need a topology file. Pure: the host
//! is an argument. Whether a GPU exists and this build can use it is known to the shard only.
//!
//! Invariant: ranks are placed in the order devices were named; every rank has at least one thread.

use crate::host::HostCores;
use crate::ids::Rank;
use crate::partition::MAX_WORLD_SIZE;
use crate::spec::{CpuSpec, GpuSpec};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Ranks where the operator says nothing and there are cores for them: enough to be a cluster. More where a host has
/// more NUMA nodes, each of which computes best with the memory beside it.
const DEFAULT_CPU_RANKS: u32 = 2;

/// What the operator wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceRequest {
    /// `--gpus`
    pub gpus: Option<GpuSpec>,
    /// `--cpus`
    pub cpus: Option<CpuSpec>,
    /// `--tensor-parallel-size`
    pub tensor_parallel_size: Option<u32>,
}

/// What one rank computes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// A share of the CPU cores.
    Cpu {
        /// Threads to compute with, at least 1.
        threads: u32,
        /// As many as threads: each thread is pinned to one. More: all threads are confined to them, as to a NUMA
        /// node. Empty leaves it to the operating system.
        cores: Vec<u32>,
    },
    /// A GPU.
    Gpu {
        /// Its number among those that the process may see, as CUDA counts them.
        index: u32,
        /// Ranks that compute on it: 1, or more in tests.
        ranks: u32,
    },
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gpu { index, .. } => write!(f, "GPU {index}"),
            Self::Cpu { threads: 1, cores } if cores.is_empty() => f.write_str("CPU, 1 thread"),
            Self::Cpu { threads, cores } if cores.is_empty() => write!(f, "CPU, {threads} threads"),
            Self::Cpu { threads, cores } => {
                let noun = if cores.len() == 1 { "core" } else { "cores" };
                write!(f, "CPU {noun} {}", ranges(cores))?;
                match threads {
                    _ if cores.len() <= *threads as usize => Ok(()),
                    1 => f.write_str(", 1 thread"),
                    _ => write!(f, ", {threads} threads"),
                }
            }
        }
    }
}

/// A device for each rank of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// In rank order; never empty.
    pub devices: Vec<Device>,
}

/// A placement for each model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placements {
    /// In the operator's order.
    pub models: Vec<Placement>,
    /// Sentences for the operator about what will be slow but works.
    pub warnings: Vec<String>,
}

/// Ranks of all models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranks {
    /// Models, at least 1.
    pub models: u32,
    /// Ranks of each.
    pub each: u32,
}

impl Ranks {
    fn total(self) -> u32 {
        self.models.saturating_mul(self.each)
    }
}

impl fmt::Display for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { models, each } = self;
        match models {
            1 => write!(f, "{each} ranks"),
            _ => write!(f, "{models} models of {each} ranks ({})", self.total()),
        }
    }
}

impl Placement {
    /// Number of ranks.
    pub fn world_size(&self) -> u32 {
        u32::try_from(self.devices.len()).unwrap_or(MAX_WORLD_SIZE)
    }

    /// The ranks with their devices.
    pub fn ranks(&self) -> impl Iterator<Item = (Rank, &Device)> {
        (0..).map(Rank).zip(&self.devices)
    }
}

/// Why devices cannot be given to ranks. A sentence that says what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// Both kinds of devices.
    #[error("--gpus and --cpus cannot be given together; a cluster computes on one kind of device")]
    BothKinds,
    /// No or too many ranks.
    #[error("--tensor-parallel-size is {0}; it must be from 1 to {MAX_WORLD_SIZE}")]
    WorldSize(u32),
    /// The number of GPUs is not the number of ranks.
    #[error(
        "--gpus names {gpus} GPUs but --tensor-parallel-size makes {ranks}; each rank takes one GPU, \
         so leave --tensor-parallel-size out or name {}", .ranks.total()
    )]
    GpuCount {
        /// GPUs named.
        gpus: usize,
        /// Ranks asked for.
        ranks: Ranks,
    },
    /// GPUs that cannot be shared out.
    #[error(
        "--gpus names {gpus} GPUs for {models} models, and each takes as many; name a multiple of \
         {models}, or say in a --topology file which model takes which"
    )]
    GpusPerModel {
        /// GPUs named.
        gpus: usize,
        /// Models.
        models: u32,
    },
    /// More GPUs than there can be ranks.
    #[error("--gpus names {0} GPUs for one model; at most {MAX_WORLD_SIZE} can work together")]
    TooManyGpus(usize),
    /// A GPU that two models would share.
    #[error(
        "--gpus names GPU {0} for two models, which do not know what memory the other takes; name it for \
         one of them"
    )]
    GpuOfTwoModels(u32),
    /// Fewer named cores than ranks.
    #[error(
        "--cpus names {cores} cores for {ranks}; name at least one for each rank, or lower \
         --tensor-parallel-size"
    )]
    TooFewCores {
        /// Cores named.
        cores: usize,
        /// Ranks asked for.
        ranks: Ranks,
    },
    /// A named core is not there.
    #[error("core {core} of --cpus is not available to this process; there are {available}")]
    NoSuchCore {
        /// The core.
        core: u32,
        /// Those that are, as ranges.
        available: String,
    },
}

/// Gives every rank of `models` models its device.
///
/// GPUs: one rank on each, or as many as it is named times. CPU: the cores are divided among the ranks, the first ranks taking what
/// does not divide. Where cores are counted and not named, each rank is confined to one NUMA node, or to several where
/// there are fewer ranks: what a thread touches first is memory of its node, so weights lie where they are read.
/// Without `--tensor-parallel-size` GPUs are divided among the models, and each has two ranks on CPUs, a power of two
/// where there are more nodes, or one where there are not as many cores.
///
/// # Errors
/// [`PlacementError`] if the request contradicts itself or names cores that are not there.
pub fn place(
    request: &DeviceRequest,
    models: u32,
    host: &HostCores,
) -> Result<Placements, PlacementError> {
    let asked = request.tensor_parallel_size;
    if let Some(ranks) = asked.filter(|ranks| !(1..=MAX_WORLD_SIZE).contains(ranks)) {
        return Err(PlacementError::WorldSize(ranks));
    }
    let nodes = u32::try_from(host.nodes.len()).unwrap_or(1).max(1);
    let by_default = DEFAULT_CPU_RANKS
        .max(1 << nodes.ilog2())
        .min(MAX_WORLD_SIZE);
    let on_cores = |count: u32| Ranks {
        models,
        each: asked.unwrap_or((count / models).clamp(1, by_default)),
    };
    let (devices, warnings) = match (&request.gpus, &request.cpus) {
        (Some(_), Some(_)) => return Err(PlacementError::BothKinds),
        (Some(GpuSpec(gpus)), None) => place_gpus(gpus, models, asked)?,
        (None, Some(CpuSpec::Cores(cores))) => {
            let count = u32::try_from(cores.len()).unwrap_or(u32::MAX);
            place_cores(cores, on_cores(count), host)?
        }
        (None, Some(CpuSpec::Count(count))) => place_threads(*count, on_cores(*count), host),
        (None, None) => place_threads(host.parallelism, on_cores(host.parallelism), host),
    };
    let each = devices.len() / models as usize;
    let models = devices.chunks(each).map(|devices| Placement {
        devices: devices.to_vec(),
    });
    Ok(Placements {
        models: models.collect(),
        warnings,
    })
}

type Placed = (Vec<Device>, Vec<String>);

fn place_gpus(gpus: &[u32], models: u32, asked: Option<u32>) -> Result<Placed, PlacementError> {
    let count = gpus.len();
    if let Some(each) = asked {
        let ranks = Ranks { models, each };
        if ranks.total() as usize != count {
            return Err(PlacementError::GpuCount { gpus: count, ranks });
        }
    }
    if !count.is_multiple_of(models as usize) {
        let gpus = count;
        return Err(PlacementError::GpusPerModel { gpus, models });
    }
    let each = count / models as usize;
    if each > MAX_WORLD_SIZE as usize {
        return Err(PlacementError::TooManyGpus(each));
    }
    let mut warnings = Vec::new();
    let mut devices = Vec::new();
    for (at, index) in gpus.iter().enumerate() {
        let first = gpus[..at].iter().position(|other| other == index);
        if first.is_some_and(|first| first / each != at / each) {
            return Err(PlacementError::GpuOfTwoModels(*index));
        }
        let ranks = gpus.iter().filter(|other| *other == index).count();
        let ranks = u32::try_from(ranks).unwrap_or(MAX_WORLD_SIZE);
        if ranks > 1 && first.is_none() {
            warnings.push(format!(
                "--gpus names GPU {index} {ranks} times: its ranks share it, which is meant for tests"
            ));
        }
        let index = *index;
        devices.push(Device::Gpu { index, ranks });
    }
    Ok((devices, warnings))
}

fn place_cores(cores: &[u32], ranks: Ranks, host: &HostCores) -> Result<Placed, PlacementError> {
    if let Some(core) = cores.iter().find(|core| !host.allowed.contains(core)) {
        return Err(PlacementError::NoSuchCore {
            core: *core,
            available: ranges(&host.allowed),
        });
    }
    let count = u32::try_from(cores.len()).unwrap_or(u32::MAX);
    if count < ranks.total() {
        let cores = cores.len();
        return Err(PlacementError::TooFewCores { cores, ranks });
    }
    let mut rest = cores;
    let mut warnings = Vec::new();
    let devices = shares(count, ranks.total()).zip(0..).map(|(threads, rank)| {
        let (own, others) = rest.split_at(threads as usize);
        rest = others;
        let touched = |node: &&Vec<u32>| node.iter().any(|core| own.contains(core));
        if ranks.total() > 1 && host.nodes.iter().filter(touched).count() > 1 {
            warnings.push(format!(
                "cores {} of rank {rank} lie on several NUMA nodes, and some read its weights from the memory of \
                 another; name each rank's cores so that they lie on one",
                ranges(own)
            ));
        }
        Device::Cpu {
            threads,
            cores: own.to_vec(),
        }
    });
    Ok((devices.collect(), warnings))
}

fn place_threads(count: u32, ranks: Ranks, host: &HostCores) -> Placed {
    let mut warnings = Vec::new();
    let available = host.parallelism;
    if count > available {
        warnings.push(format!(
            "--cpus {count} is more than the {available} cores of this machine: ranks will wait for \
             each other"
        ));
    } else if ranks.total() > available {
        warnings.push(format!(
            "{ranks} share {available} cores: ranks will wait for each other"
        ));
    }
    // Not pinned to one core each: two clusters on one host would otherwise crowd the same ones.
    let (total, nodes) = (ranks.total() as usize, host.nodes.len());
    let cpu = |(threads, rank): (u32, usize)| {
        let first = rank * nodes / total;
        let end = ((rank + 1) * nodes / total).max(first + 1);
        let is_whole = end - first >= nodes;
        let cores = if is_whole {
            Vec::new()
        } else {
            host.nodes[first..end].concat()
        };
        let most = u32::try_from(cores.len()).unwrap_or(u32::MAX);
        // More threads than its nodes have cores: they are better off anywhere.
        let cores = if threads > most { Vec::new() } else { cores };
        Device::Cpu {
            threads: threads.max(1),
            cores,
        }
    };
    let shares = shares(count, ranks.total()).zip(0..);
    (shares.map(cpu).collect(), warnings)
}

/// `count` in `ranks` parts that differ by at most one, the larger ones first.
fn shares(count: u32, ranks: u32) -> impl Iterator<Item = u32> {
    (0..ranks).map(move |rank| count / ranks + u32::from(rank < count % ranks))
}

/// `[0, 1, 2, 5]` as `0-2,5`.
fn ranges(cores: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for core in cores {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == *core => *last = *core,
            _ => parts.push((*core, *core)),
        }
    }
    let part = |(first, last): (u32, u32)| {
        if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        }
    };
    parts.into_iter().map(part).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests;
