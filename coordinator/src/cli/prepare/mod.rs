//! Everything that can be found wrong before a process is started.
//!
//! Reads the models' small files and headers, places ranks, and does the memory's arithmetic; loads
//! nothing and starts nothing. Reading order: [`model`], `memory`, here. Invariant: what comes out can be
//! started, as far as can be known here; every error is one sentence that says what to change.

mod access;
mod memory;
pub mod model;
mod scheduling;

use super::args::{CpuIsaArg, DtypeArg, QuantizationArg, Up};
use super::nodes;
use super::values::{self, AutoTokens};
use crate::scheduler::{Scheduler, SchedulerConfig};
use crate::text::TextModel;
use anyhow::{Context, Result, bail, ensure};
use model::Model;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use topology::fit::{
    Asked, Elements, FitError, FitReport, GpuMemory, Memory, RankNeeds, Sizes, fit,
};
use topology::host::HostCores;
use topology::ids::Rank;
use topology::model_shape::{Dtype, KvDtype, ModelShape};
use topology::partition::Partition;
use topology::placement::{Device, DeviceRequest, Placement, Placements, place};
use topology::quantization::{at_load, head_at_load};
use topology::spec::cluster::Topology;
use topology::wire::{Load, Loaded};

/// `--max-model-len auto` is not lowered below this many tokens.
const LEAST_AUTO_LEN: u32 = 256;

/// What `up` starts and `plan` shows.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The models, in the operator's order; at least one.
    pub models: Vec<PreparedModel>,
    /// The nodes, where a file names them.
    pub topology: Option<Topology>,
    /// Sentences about what will be slow but works.
    pub warnings: Vec<String>,
    /// Keys that clients must present; none: everyone is served.
    pub keys: Vec<String>,
    /// Where to serve.
    pub address: SocketAddr,
}

/// A model, and what its group of shards is made of.
#[derive(Clone, Debug)]
pub struct PreparedModel {
    /// The flags, with what is this model's own.
    up: Up,
    /// Its files and names.
    pub model: Model,
    /// Where ranks are.
    pub placement: Placement,
    /// Memory before loading.
    pub memory: Memory,
    /// The ranks' GPUs, where they compute on those.
    pub gpus: Option<GpuMemory>,
    /// What fits, by estimate.
    pub report: FitReport,
    /// What shards load.
    pub load: Load,
    /// Limits of the scheduler; `num_blocks` is the estimate.
    pub scheduler: SchedulerConfig,
}

impl Prepared {
    /// Checks flags, files and memory.
    ///
    /// # Errors
    /// A sentence that says what to change.
    pub fn new(up: &Up) -> Result<Self> {
        Drafts::new(up, |_| false)?.prepared(BTreeMap::new())
    }

    /// The model whose name is shown where there is room for one.
    pub fn first(&self) -> &PreparedModel {
        &self.models[0]
    }
}

/// What is to be started, before anybody asked for memory that is free.
#[derive(Debug)]
pub struct Drafts {
    models: Vec<Draft>,
    /// As [`Prepared::topology`].
    pub topology: Option<Topology>,
    warnings: Vec<String>,
    keys: Vec<String>,
    address: SocketAddr,
}

impl Drafts {
    /// Checks flags and files, but not the weights of models, by number, that `are_loaded`.
    ///
    /// # Errors
    /// A sentence that says what to change.
    pub fn new(up: &Up, are_loaded: impl Fn(usize) -> bool) -> Result<Self> {
        let keys = access::keys(up)?;
        let address = access::address(up, !keys.is_empty())?;
        let topology = nodes::read(up)?;
        let topology = topology.as_ref();
        let ups = match topology {
            Some(topology) => nodes::of_models(up, topology)?,
            None => of_models(up)?,
        };
        let placed = match topology {
            Some(topology) => nodes::placements(topology),
            None => placements(up, ups.len())?,
        };
        let mut devices = placed.models.iter().flat_map(|model| &model.devices);
        ensure!(
            up.cpu_isa == CpuIsaArg::Auto
                || devices.any(|device| matches!(device, Device::Cpu { .. })),
            "--cpu-isa is for CPU shards and all ranks are on GPUs; leave it out"
        );
        let gpus = memory::gpu_hosts(topology, &placed.models)?;
        let mut drafts = Vec::new();
        for (index, (up, placement)) in ups.iter().zip(placed.models).enumerate() {
            let hosts = match topology {
                Some(topology) => topology.models[index].hosts(),
                None => vec![(0, placement.devices.len())],
            };
            let known = (&gpus, up.gpu_memory_utilization);
            let name_of = |host| memory::place(topology, host);
            let gpus = memory::gpus_of(&placement, &hosts, known, name_of)?;
            let model = Model::open(up, are_loaded(index))?;
            drafts.push(Draft::new(up, model, placement, (hosts, gpus))?);
        }
        tell_apart(&mut drafts)?;
        Ok(Self {
            models: drafts,
            topology: topology.cloned(),
            warnings: placed.warnings,
            keys,
            address,
        })
    }

    /// The models, in the operator's order.
    pub fn models(&self) -> Vec<&Model> {
        self.models.iter().map(|draft| &draft.model).collect()
    }

    /// Number of the first shard of model `index`, among those of all models.
    pub fn first_shard(&self, index: usize) -> u32 {
        let before = self.models.iter().take(index);
        before.map(|draft| draft.placement.world_size()).sum()
    }

    /// Model number `index`, where `memory` was free before it was loaded.
    ///
    /// # Errors
    /// A sentence with the arithmetic.
    pub fn model(&self, index: usize, memory: Memory) -> Result<PreparedModel> {
        let draft = self.models[index].clone();
        let name = draft.model.name().to_owned();
        let prepared = draft.with(memory);
        // Where there is one, everybody knows which is meant.
        if self.models.len() == 1 {
            prepared
        } else {
            prepared.with_context(|| format!("model {name}"))
        }
    }

    /// All models: those that are `known` by number, and the others with what is free beside them now.
    ///
    /// # Errors
    /// A sentence with the arithmetic.
    pub fn prepared(self, mut known: BTreeMap<usize, PreparedModel>) -> Result<Prepared> {
        let others = (0..self.models.len()).filter(|index| !known.contains_key(index));
        let others: Vec<usize> = others.collect();
        let drafts: Vec<&Draft> = others.iter().map(|index| &self.models[*index]).collect();
        let memories = memory::of_models(self.topology.as_ref(), &drafts)?;
        for (index, memory) in others.into_iter().zip(memories) {
            known.insert(index, self.model(index, memory)?);
        }
        Ok(Prepared {
            models: known.into_values().collect(),
            topology: self.topology,
            warnings: self.warnings,
            keys: self.keys,
            address: self.address,
        })
    }
}

/// A model whose memory is not known yet.
#[derive(Clone, Debug)]
struct Draft {
    up: Up,
    model: Model,
    placement: Placement,
    /// In rank order: hosts, and how many ranks each has.
    hosts: Vec<(usize, usize)>,
    gpus: Option<GpuMemory>,
    partitions: Vec<Partition>,
    elements: Elements,
    sizes: Sizes,
}

impl Draft {
    fn new(
        up: &Up,
        model: Model,
        placement: Placement,
        (hosts, gpus): (Vec<(usize, usize)>, Option<GpuMemory>),
    ) -> Result<Self> {
        let partitions = Partition::all(&model.shape, placement.world_size())
            .with_context(|| format!("model {}", model.name()))?;
        let longest = model.shape.max_position_embeddings;
        let max_model_len = match up.max_model_len {
            AutoTokens::Auto => longest,
            AutoTokens::Tokens(tokens) if tokens <= longest => tokens,
            AutoTokens::Tokens(tokens) => bail!(
                "--max-model-len {tokens} is more than the {longest} positions {} was made for; \
                 lower it to {longest} or less",
                model.name()
            ),
        };
        let sizes = scheduling::sizes(up, max_model_len, gpus.as_ref());
        Ok(Self {
            up: up.clone(),
            elements: elements(up, &model.shape, gpus.is_some())?,
            model,
            placement,
            hosts,
            gpus,
            partitions,
            sizes,
        })
    }

    fn needs(&self) -> Vec<RankNeeds> {
        let shape = &self.model.shape;
        let needs = self
            .partitions
            .iter()
            .map(|partition| RankNeeds::estimate(shape, partition, self.elements, &self.sizes));
        let needs = needs.collect();
        match &self.gpus {
            Some(gpus) => gpus.estimated(needs),
            None => needs,
        }
    }

    /// Bytes that its ranks on a host cannot do without; `None` if it has none there.
    fn claim_on(&self, host: usize) -> Option<u64> {
        let place = self.hosts.iter().position(|(other, _)| *other == host)?;
        let before: usize = self.hosts[..place].iter().map(|(_, ranks)| ranks).sum();
        let needs = self.needs();
        let own = &needs[before..before + self.hosts[place].1];
        let asked = asked(&self.up).map_or(0, |asked| asked.bytes(own));
        let fixed = own
            .iter()
            .map(RankNeeds::fixed)
            .fold(asked, u64::saturating_add);
        Some(fixed)
    }

    /// What fits in `memory`. `--max-model-len auto` gives way to it.
    fn with(mut self, memory: Memory) -> Result<PreparedModel> {
        let may_shrink = self.up.max_model_len == AutoTokens::Auto;
        let report = loop {
            let sizes = self.sizes;
            match fit(&self.needs(), &memory, asked(&self.up), &sizes) {
                Ok(report) => break report,
                Err(FitError::Sequence { .. })
                    if may_shrink && sizes.max_model_len > LEAST_AUTO_LEN =>
                {
                    self.sizes.max_model_len = (sizes.max_model_len / 2).max(LEAST_AUTO_LEN);
                }
                Err(refused) => return Err(refused.into()),
            }
        };
        let (up, sizes) = (self.up, self.sizes);
        let load = Load {
            model: self.model.location.clone(),
            tensor_parallel_size: self.placement.world_size(),
            dtype: up.dtype.name().to_owned(),
            quantization: quantization(&up).to_owned(),
            kv_cache_dtype: up.kv_cache_dtype.clone(),
            block_size: sizes.block_size,
            max_model_len: sizes.max_model_len,
            max_num_batched_tokens: sizes.max_num_batched_tokens,
            max_num_seqs: sizes.max_num_seqs,
            async_scheduling: up.scheduling.async_scheduling,
            enforce_eager: up.enforce_eager,
        };
        let scheduler = scheduling::config(
            &up,
            &report,
            (self.model.shape.vocab_size, self.gpus.is_some()),
        );
        // Nothing is kept of it: it says whether the limits make sense together.
        Scheduler::new(scheduler.clone())?;
        Ok(PreparedModel {
            up,
            model: self.model,
            placement: self.placement,
            memory,
            gpus: self.gpus,
            report,
            load,
            scheduler,
        })
    }
}

impl PreparedModel {
    /// `--num-gpu-blocks-override` and `--kv-cache-memory-bytes`, as this model has them.
    pub fn kv_cache_asked(&self) -> (Option<u32>, Option<u64>) {
        let up = &self.up;
        (up.num_gpu_blocks_override, up.kv_cache_memory_bytes)
    }

    /// Whether its requests may have priorities.
    pub fn has_priorities(&self) -> bool {
        scheduling::has_priorities(&self.up)
    }

    /// `--cpu-isa`.
    pub fn cpu_isa(&self) -> &'static str {
        self.up.cpu_isa.name()
    }

    /// How many KV blocks each rank gets, now that shards have said what they took; in rank order.
    ///
    /// # Errors
    /// A sentence with the arithmetic.
    pub fn choose_blocks(&self, loaded: &[Loaded]) -> Result<u32, FitError> {
        let ranks = (0..).map(Rank).zip(loaded);
        let mut needs: Vec<_> = ranks
            .map(|(rank, loaded)| RankNeeds::reported(rank, loaded))
            .collect();
        if let Some(gpus) = &self.gpus {
            needs = gpus.reported(needs, loaded);
        }
        let report = fit(&needs, &self.memory, asked(&self.up), &self.report.sizes)?;
        Ok(report.num_blocks)
    }

    /// Reads tokenizer, template and defaults. Takes a second for the largest vocabularies.
    ///
    /// # Errors
    /// A sentence naming the file.
    pub fn load_text(&self) -> Result<TextModel> {
        self.model.load_text(&self.up)
    }
}

/// The flags for each model of the command line.
fn of_models(up: &Up) -> Result<Vec<Up>> {
    let models = up.models();
    ensure!(
        models.len() <= 1 || up.served_model_name.is_empty(),
        "--served-model-name is for one model, and there are {}; name each as --model NAME=DIR",
        models.len()
    );
    let with = |model: Option<&str>| {
        let mut up = up.clone();
        up.model_positional = None;
        up.model = model.map(str::to_owned).into_iter().collect();
        up
    };
    if models.is_empty() {
        return Ok(vec![with(None)]);
    }
    Ok(models.into_iter().map(|model| with(Some(model))).collect())
}

/// No two models answer to one name. A directory that two models were given as is a name of neither.
fn tell_apart(drafts: &mut [Draft]) -> Result<()> {
    let all: Vec<Vec<String>> = drafts.iter().map(|it| it.model.names.clone()).collect();
    for (index, draft) in drafts.iter_mut().enumerate() {
        let others = all.iter().enumerate().filter(|(other, _)| *other != index);
        let others: Vec<&String> = others.flat_map(|(_, names)| names).collect();
        let typed = draft.up.model.first().map(|given| values::model(given).1);
        let first = draft.model.name().to_owned();
        let names = &mut draft.model.names;
        names.retain(|name| {
            *name == first || typed != Some(name.as_str()) || !others.contains(&name)
        });
        let twice = names.iter().find(|name| {
            let shown = all.iter().filter_map(|names| names.first());
            // The other one gives way where it is but what was typed.
            others.contains(name) && (**name != first || shown.filter(|it| it == name).count() > 1)
        });
        if let Some(name) = twice {
            bail!(
                "two models are called {name}; name one of them otherwise (--model NAME=DIR, or `name` of \
                 its [[model]])"
            );
        }
    }
    Ok(())
}

fn placements(up: &Up, models: usize) -> Result<Placements> {
    let gpus = up
        .gpus
        .as_deref()
        .map(str::parse)
        .transpose()
        .context("--gpus")?;
    let cpus = up
        .cpus
        .as_deref()
        .map(str::parse)
        .transpose()
        .context("--cpus")?;
    let request = DeviceRequest {
        gpus,
        cpus,
        tensor_parallel_size: up.tensor_parallel_size,
    };
    let cores = HostCores::read().context("ask which cores may be used")?;
    let models = u32::try_from(models).unwrap_or(u32::MAX);
    Ok(place(&request, models, &cores)?)
}

fn quantization(up: &Up) -> &'static str {
    up.quantization.map_or("auto", QuantizationArg::name)
}

/// What the ranks keep numbers as.
fn elements(up: &Up, shape: &ModelShape, on_gpus: bool) -> Result<Elements> {
    let dtype = match up.dtype {
        DtypeArg::Auto => shape.dtype,
        DtypeArg::Float32 => Dtype::Float32,
        DtypeArg::Bfloat16 => Dtype::Bfloat16,
        DtypeArg::Float16 => Dtype::Float16,
    };
    // CPU shards compute in 32 bits, GPUs in the weights' type; keys and values are kept as they are computed.
    let compute = if on_gpus { dtype } else { Dtype::Float32 };
    let kv = KvDtype::parse(&up.kv_cache_dtype).map_err(anyhow::Error::msg)?;
    let at_load = at_load(quantization(up), shape).map_err(anyhow::Error::msg)?;
    Ok(Elements {
        dtype,
        at_load,
        head_at_load: head_at_load(at_load).filter(|_| !on_gpus),
        compute,
        kv: kv.unwrap_or(KvDtype::Float(compute)),
    })
}

/// What is to be had instead of what fits; a number of blocks is the more exact wish.
fn asked(up: &Up) -> Option<Asked> {
    let blocks = up.num_gpu_blocks_override.map(Asked::Blocks);
    blocks.or(up.kv_cache_memory_bytes.map(Asked::Bytes))
}
