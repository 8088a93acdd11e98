//! Everything that can be found wrong before a process is started.
//!
//! Reads the model's small files and headers, places ranks, and does the memory's arithmetic; loads
//! nothing and starts nothing. Invariant: what comes out can be started, as far as can be known
//! here; every error is one sentence that says what to change.

use super::args::{CpuIsaArg, DtypeArg, QuantizationArg, Up};
use super::nodes;
use super::values::{self, AutoTokens};
use crate::builtin;
use crate::scheduler::{Scheduler, SchedulerConfig};
use crate::text::TextModel;
use crate::text::config::GenerationDefaults;
use anyhow::{Context, Result, bail, ensure};
use std::borrow::Cow;
use std::fs;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use topology::checkpoint::Checkpoint;
use topology::fit::{
    Asked, Elements, FitError, FitReport, GpuMemory, Memory, RankNeeds, Sizes, fit,
};
use topology::host::{HostCores, HostMemory};
use topology::ids::Rank;
use topology::launch::probe;
use topology::manifest;
use topology::model_files::ModelFiles;
use topology::model_shape::{Dtype, KvDtype, ModelShape};
use topology::partition::Partition;
use topology::placement::{Device, DeviceRequest, Placement, place};
use topology::quantization::at_load;
use topology::spec::cluster::Topology;
use topology::wire::{Load, Loaded, ModelLocation};

/// Most tokens in one step on CPUs: a step of this size takes a blink with a small model.
const CPU_BATCHED_TOKENS: u32 = 512;
/// The same on GPUs, and on GPUs of at least [`LARGE_GPU_BYTES`]: as in `vllm serve`.
const GPU_BATCHED_TOKENS: u32 = 2048;
const LARGE_GPU_BATCHED_TOKENS: u32 = 8192;
const LARGE_GPU_BYTES: u64 = 70 << 30;
/// Most sequences in one step, unless said otherwise.
const MAX_NUM_SEQS: u32 = 256;
/// `--max-model-len auto` is not lowered below this many tokens.
const LEAST_AUTO_LEN: u32 = 256;

/// A model's files and names.
#[derive(Clone, Debug)]
pub struct Model {
    /// Where they are read.
    pub files: ModelFiles,
    /// The same for shards.
    pub location: ModelLocation,
    /// What the API calls it; the first name is shown.
    pub names: Vec<String>,
    /// Its `config.json`.
    pub shape: ModelShape,
}

/// What `up` starts and `plan` shows.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The model.
    pub model: Model,
    /// Where ranks are.
    pub placement: Placement,
    /// The nodes, where a file names them.
    pub topology: Option<Topology>,
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
    /// Keys that clients must present; none: everyone is served.
    pub keys: Vec<String>,
    /// Where to serve.
    pub address: SocketAddr,
}

impl Prepared {
    /// Checks flags, files and memory.
    ///
    /// # Errors
    /// A sentence that says what to change.
    pub fn new(up: &Up) -> Result<Self> {
        Self::with_memory(up, None)
    }

    /// The same where `memory` was free before anything was loaded, if that is known better than by looking.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_memory(up: &Up, memory: Option<Memory>) -> Result<Self> {
        let keys = keys(up)?;
        let address = address(up, !keys.is_empty())?;
        let topology = nodes::read(up)?;
        let up = nodes::with_model(up, topology.as_ref());
        let up = up.as_ref();
        let placement = match &topology {
            Some(topology) => nodes::placement(topology),
            None => placement(up)?,
        };
        let is_cpu = |device: &Device| matches!(device, Device::Cpu { .. });
        ensure!(
            up.cpu_isa == CpuIsaArg::Auto || placement.devices.iter().any(is_cpu),
            "--cpu-isa is for CPU shards and all ranks are on GPUs; leave it out"
        );
        let model = Model::open(up)?;
        let world_size = placement.world_size();
        let partitions = Partition::all(&model.shape, world_size)?;
        let gpus = gpus(up, topology.is_some(), &placement)?;
        let memory = match (memory, &topology, &gpus) {
            (Some(known), ..) => known,
            (None, Some(topology), _) => nodes::memory(topology)?,
            (None, None, Some(gpus)) => gpus.usable(),
            (None, None, None) => Memory::Shared {
                free_bytes: HostMemory::read()
                    .context("ask for free memory")?
                    .free_bytes,
            },
        };
        let (sizes, report) = sizes(up, &model.shape, &partitions, (&memory, gpus.as_ref()))?;
        let load = Load {
            model: model.location.clone(),
            tensor_parallel_size: world_size,
            dtype: up.dtype.name().to_owned(),
            quantization: quantization(up).to_owned(),
            kv_cache_dtype: up.kv_cache_dtype.clone(),
            block_size: sizes.block_size,
            max_model_len: sizes.max_model_len,
            max_num_batched_tokens: sizes.max_num_batched_tokens,
            max_num_seqs: sizes.max_num_seqs,
            async_scheduling: up.async_scheduling,
            enforce_eager: up.enforce_eager,
        };
        let scheduler = scheduler_config(up, &report, model.shape.vocab_size);
        // Nothing is kept of it: it says whether the limits make sense together.
        Scheduler::new(scheduler.clone())?;
        Ok(Self {
            model,
            placement,
            topology,
            memory,
            gpus,
            report,
            load,
            scheduler,
            keys,
            address,
        })
    }

    /// How many KV blocks each rank gets, now that shards have said what they took; in rank order.
    ///
    /// # Errors
    /// A sentence with the arithmetic.
    pub fn choose_blocks(&self, up: &Up, loaded: &[Loaded]) -> Result<u32, FitError> {
        let ranks = (0..).map(Rank).zip(loaded);
        let mut needs: Vec<_> = ranks
            .map(|(rank, loaded)| RankNeeds::reported(rank, loaded))
            .collect();
        if let Some(gpus) = &self.gpus {
            needs = gpus.reported(needs, loaded);
        }
        let report = fit(&needs, &self.memory, asked(up), &self.report.sizes)?;
        Ok(report.num_blocks)
    }

    /// Reads tokenizer, template and defaults. Takes a second for the largest vocabularies.
    ///
    /// # Errors
    /// A sentence naming the file.
    pub fn load_text(&self, up: &Up) -> Result<TextModel> {
        let mut text = TextModel::load(
            &|name| self.text_file(up, name),
            &self.model.shape.eos_token_ids,
        )?;
        if up.generation_config == "vllm" {
            // The model's proposals are not wanted; its ends of text still are.
            text.defaults = GenerationDefaults::default();
        }
        Ok(text)
    }

    fn text_file(&self, up: &Up, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        let elsewhere = match name {
            "chat_template.jinja" => up.chat_template.clone(),
            "generation_config.json" if !["auto", "vllm"].contains(&&*up.generation_config) => {
                Some(Path::new(&up.generation_config).join(name))
            }
            _ => None,
        };
        if let Some(path) = elsewhere {
            let bytes =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            return Ok(Some(bytes.into()));
        }
        let files = &self.model.files;
        Ok(if files.exists(name) {
            Some(files.read(name)?)
        } else {
            None
        })
    }
}

impl Model {
    /// Finds the model and checks that its configuration, weights and tokenizer are there and fit
    /// each other.
    fn open(up: &Up) -> Result<Self> {
        let (name, files, location) = match up.model() {
            None => (
                builtin::NAME.to_owned(),
                ModelFiles::BuiltIn(builtin::FILES),
                ModelLocation::BuiltIn,
            ),
            Some(given) => {
                let (name, dir) = values::model(given);
                let files = ModelFiles::directory(dir)?;
                let path = fs::canonicalize(dir).with_context(|| format!("cannot open {dir}"))?;
                let text = path
                    .to_str()
                    .context("the model directory's name is not UTF-8")?;
                let last = path.file_name().and_then(|name| name.to_str());
                let name = name.or(last).unwrap_or(text).to_owned();
                (name, files, ModelLocation::Directory(text.to_owned()))
            }
        };
        let mut names = up.served_model_name.clone();
        if names.is_empty() {
            names.push(name);
            // As in `vllm serve`, the model also answers to what was typed.
            names.extend(up.model().map(|given| values::model(given).1.to_owned()));
        }
        names.dedup();
        if let Some(verified) = manifest::verify(&files)? {
            let (files, bytes) = (verified.files, verified.bytes);
            tracing::info!(files, bytes, "the model is what its SHA256SUMS lists");
        }
        let config = files.read_json("config.json")?;
        let shape = ModelShape::from_config(&config)
            .with_context(|| format!("{files} cannot be served"))?;
        let weights = Checkpoint::open(&files).and_then(|weights| weights.check(&shape));
        weights.with_context(|| format!("{files} cannot be served"))?;
        for note in shape.quantization.iter().flat_map(|stored| &stored.notes) {
            tracing::warn!("{note}");
        }
        ensure!(
            files.exists("tokenizer.json"),
            "{files} has no tokenizer.json; convert its tokenizer with `transformers` \
             (`AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`)"
        );
        for path in [&up.chat_template, &generation_config_dir(up)]
            .into_iter()
            .flatten()
        {
            ensure!(
                path.exists(),
                "{} does not exist; give a path that does",
                path.display()
            );
        }
        Ok(Self {
            files,
            location,
            names,
            shape,
        })
    }
}

fn generation_config_dir(up: &Up) -> Option<PathBuf> {
    let named = !["auto", "vllm"].contains(&&*up.generation_config);
    named.then(|| Path::new(&up.generation_config).join("generation_config.json"))
}

fn placement(up: &Up) -> Result<Placement> {
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
    Ok(place(&request, &cores)?)
}

/// The ranks' GPUs, as a child process finds them; `None` where ranks compute on CPU cores.
fn gpus(up: &Up, on_nodes: bool, placement: &Placement) -> Result<Option<GpuMemory>> {
    let is_gpu = |device: &Device| matches!(device, Device::Gpu { .. });
    if !placement.devices.iter().any(is_gpu) {
        return Ok(None);
    }
    ensure!(
        !on_nodes,
        "GPUs of a topology file cannot be used yet; give its nodes cpus, or use --gpus on one machine"
    );
    ensure!(
        cfg!(feature = "cuda"),
        "--gpus needs a build with CUDA, and this one computes on the CPU only; leave out --gpus, \
         or give --cpus"
    );
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let probed = probe::gpus(program.as_os_str(), ["shard", "--probe"])?;
    let host = probed.map_err(|why| anyhow::anyhow!("--gpus cannot be used: {why}"))?;
    let total_bytes = host
        .memory_of(&placement.devices)
        .map_err(anyhow::Error::msg)?;
    Ok(Some(GpuMemory {
        devices: placement.devices.clone(),
        total_bytes,
        utilization: up.gpu_memory_utilization,
    }))
}

/// Most tokens in one step, where the operator does not say.
fn batched_tokens(gpus: Option<&GpuMemory>) -> u32 {
    match gpus {
        None => CPU_BATCHED_TOKENS,
        Some(gpus)
            if gpus
                .total_bytes
                .iter()
                .all(|total| *total >= LARGE_GPU_BYTES) =>
        {
            LARGE_GPU_BATCHED_TOKENS
        }
        Some(_) => GPU_BATCHED_TOKENS,
    }
}

/// Sizes of the server, and what fits with them. `--max-model-len auto` gives way to the memory.
fn sizes(
    up: &Up,
    shape: &ModelShape,
    partitions: &[Partition],
    (memory, gpus): (&Memory, Option<&GpuMemory>),
) -> Result<(Sizes, FitReport)> {
    let longest = shape.max_position_embeddings;
    let (max_model_len, may_shrink) = match up.max_model_len {
        AutoTokens::Auto => (longest, true),
        AutoTokens::Tokens(tokens) if tokens <= longest => (tokens, false),
        AutoTokens::Tokens(tokens) => bail!(
            "--max-model-len {tokens} is more than the {longest} positions the model was made for; \
             lower it to {longest} or less"
        ),
    };
    let max_num_batched_tokens = up
        .max_num_batched_tokens
        .unwrap_or_else(|| batched_tokens(gpus));
    let mut sizes = Sizes {
        block_size: up.block_size,
        max_model_len,
        max_num_batched_tokens,
        max_num_seqs: up
            .max_num_seqs
            .unwrap_or(MAX_NUM_SEQS.min(max_num_batched_tokens)),
    };
    let elements = elements(up, shape, gpus.is_some())?;
    loop {
        let needs = partitions
            .iter()
            .map(|partition| RankNeeds::estimate(shape, partition, elements, &sizes));
        let mut needs: Vec<RankNeeds> = needs.collect();
        if let Some(gpus) = gpus {
            needs = gpus.estimated(needs);
        }
        match fit(&needs, memory, asked(up), &sizes) {
            Ok(report) => return Ok((sizes, report)),
            Err(FitError::Sequence { .. })
                if may_shrink && sizes.max_model_len > LEAST_AUTO_LEN =>
            {
                sizes.max_model_len = (sizes.max_model_len / 2).max(LEAST_AUTO_LEN);
            }
            Err(refused) => return Err(refused.into()),
        }
    }
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
    Ok(Elements {
        dtype,
        at_load: at_load(quantization(up), shape).map_err(anyhow::Error::msg)?,
        compute,
        kv: kv.unwrap_or(KvDtype::Float(compute)),
    })
}

/// What is to be had instead of what fits; a number of blocks is the more exact wish.
fn asked(up: &Up) -> Option<Asked> {
    let blocks = up.num_gpu_blocks_override.map(Asked::Blocks);
    blocks.or(up.kv_cache_memory_bytes.map(Asked::Bytes))
}

fn scheduler_config(up: &Up, report: &FitReport, vocab_size: u32) -> SchedulerConfig {
    let sizes = &report.sizes;
    SchedulerConfig {
        num_blocks: report.num_blocks,
        block_size: sizes.block_size,
        max_num_seqs: sizes.max_num_seqs,
        max_num_batched_tokens: sizes.max_num_batched_tokens,
        max_model_len: sizes.max_model_len,
        vocab_size,
        max_num_queued_reqs: up.max_num_queued_reqs as usize,
        max_num_queued_tokens: up.max_num_queued_tokens as usize,
        long_prefill_token_threshold: up.long_prefill_token_threshold,
        enable_prefix_caching: up.enable_prefix_caching,
        async_scheduling: up.async_scheduling,
    }
}

/// Keys of the command line and of the file.
fn keys(up: &Up) -> Result<Vec<String>> {
    let mut keys = up.api_key.clone();
    if let Some(file) = &up.api_key_file {
        let text = fs::read_to_string(file)
            .with_context(|| format!("cannot read --api-key-file {}", file.display()))?;
        let lines = text.lines().map(str::trim);
        let found: Vec<&str> = lines
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .collect();
        ensure!(
            !found.is_empty(),
            "--api-key-file {} holds no key; write one on a line of its own",
            file.display()
        );
        keys.extend(found.into_iter().map(str::to_owned));
    }
    ensure!(
        keys.iter().all(|key| !key.is_empty()),
        "an API key is empty; leave it out or give one"
    );
    Ok(keys)
}

/// Where to serve; other machines are served only with a key, or on demand.
fn address(up: &Up, have_keys: bool) -> Result<SocketAddr> {
    let resolved = match up.host.parse::<IpAddr>() {
        Ok(ip) => Some(SocketAddr::new(ip, up.port)),
        Err(_) => (&*up.host, up.port)
            .to_socket_addrs()
            .with_context(|| format!("--host {} is neither an address nor a known name", up.host))?
            .next(),
    };
    let address = resolved.with_context(|| format!("--host {} has no address", up.host))?;
    ensure!(
        address.ip().is_loopback() || have_keys || up.insecure_no_api_key,
        "--host {} lets other machines in, and no API key is set; give --api-key or --api-key-file, \
         or --insecure-no-api-key if everyone who can reach it may use it",
        up.host
    );
    Ok(address)
}
