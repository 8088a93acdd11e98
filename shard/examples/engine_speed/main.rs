//! Measures steps of the engine without a coordinator: decode at several batch sizes, prefill of several lengths, and both
//! in one step.
//!
//!     cargo run --release -p shard --example engine_speed -- --model DIR [--device cpu|cuda:N] [--tp N]
//!         [--decode 1,8,64,256] [--prefill 512,2048,8192] [--context 512] [--steps 32] [--dtype auto]
//!         [--beside 64,128] [--quantization int8] [--kv-cache-dtype auto] [--cpu-isa auto] [--enforce-eager true]
//!
//! Prints one JSON object per line. With `--tp` it starts itself once per rank, all on the same GPU, or on the
//! CPU. Every rank makes the same plans by itself, so nothing but the collectives connects them.
//! Keys and values of the context are whatever the memory holds: what they are changes no time.
//!
//! Decode steps are queued as a shard does it where the next plan is there in time: one behind the other, each taking its
//! tokens from the one before. A few more wait for each other. Prompts are computed one by one.
//!
//! Invariant: what is timed is `Engine::begin` and `Engine::end`, which is what a shard does for each plan.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "it measures and prints"
)]

mod options;
mod ranks;

use anyhow::{Context, Result, ensure};
use kernels::backend::{Backend, Element};
use kernels::cpu::CpuBackend;
use options::{Device, Options};
use shard::comm::shm::ShmComm;
use shard::comm::{Abort, Comm, Seat};
use shard::engine::{Engine, Place};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use topology::ids::{BlockId, Epoch, Rank, Step};
use topology::model_files::ModelFiles;
use topology::model_shape::ModelShape;
use topology::quantization::{at_load, head_at_load};
use topology::wire::{Load, ModelLocation, PlanRow, Sampling, StepPlan};

/// Tokens per KV block.
const BLOCK_SIZE: u32 = 16;
/// Decode steps before the clock runs: ranks connect, algorithms are tried (24 for the head, once in a step), the
/// step is recorded.
const WARM_UP: u32 = 32;
/// Decode steps that wait for each other, whose times outside kernels are reported beside the others'.
const ALONE: u32 = 8;
/// Prompts before the clock runs.
const PREFILL_WARM_UP: u32 = 5;
/// Times a prompt is computed.
const PREFILLS: u32 = 5;
const JOIN_LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let ended = Options::parse(std::env::args().skip(1)).and_then(|options| match options.rank {
        None if options.tp > 1 => ranks::launch(&options),
        _ => choose(&options),
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("engine_speed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn choose(options: &Options) -> Result<()> {
    match options.device {
        Device::Cpu => {
            let threads = std::thread::available_parallelism()?.get() / options.tp as usize;
            let backend = CpuBackend::with_isa(threads.max(1), None, &options.cpu_isa)?;
            measure::<CpuBackend, ShmComm>(backend, Some(Element::F32), options)
        }
        #[cfg(feature = "cuda")]
        Device::Gpu(index) => {
            let backend = kernels::cuda::CudaBackend::new(index)?;
            measure::<kernels::cuda::CudaBackend, shard::comm::nccl::NcclComm>(
                backend, None, options,
            )
        }
        #[cfg(not(feature = "cuda"))]
        Device::Gpu(_) => anyhow::bail!("--device cuda needs a build with the feature `cuda`"),
    }
}

/// One rank's engine, and the number of its next step.
struct Bench<B: Backend, C: Comm<B>> {
    engine: Engine<B, C>,
    next: Step,
    speaks: bool,
    shape: ModelShape,
    /// Whether the head is read as a matrix of its own, and not as the embedding's.
    has_own_head: bool,
}

/// What a number of equal steps took.
struct Times {
    /// Microseconds, ascending.
    steps: Vec<f64>,
    collective_us: f64,
    outside_us: f64,
}

fn measure<B: Backend, C: Comm<B>>(
    backend: B,
    kv_element: Option<Element>,
    options: &Options,
) -> Result<()> {
    let files = ModelFiles::directory(&options.model)?;
    let shape = ModelShape::from_config(&files.read_json("config.json")?)?;
    let rank = options.rank.unwrap_or(0);
    let load = load(options);
    let quantised = at_load(&load.quantization, &shape).map_err(anyhow::Error::msg)?;
    let quantised_head = head_at_load(quantised).filter(|_| kv_element.is_some());
    let id = ranks::identity(options, || {
        let elements = load.max_num_batched_tokens as usize * shape.hidden_size as usize;
        Ok(C::new_id(options.tp, elements, None)?)
    })?;
    let place = Place {
        rank: Rank(rank),
        kv_element,
        quantises_head: kv_element.is_some(),
        interface: None,
    };
    let begun = Instant::now();
    let mut engine = Engine::<B, C>::load(backend, place, (&files, &load), &mut |_, _| ())?;
    let loaded_s = begun.elapsed().as_secs_f64();
    engine.allocate(blocks(options))?;
    let seat = Seat {
        id: &id,
        rank,
        world_size: options.tp,
        limit: JOIN_LIMIT,
        interface: None,
        abort: &Abort::default(),
    };
    let comm = C::join(engine.backend(), &seat).context("join the communicator")?;
    engine.enter(Epoch(0), comm);
    let mut bench = Bench {
        engine,
        next: Step(0),
        speaks: rank == 0,
        has_own_head: quantised_head.is_some() || !shape.tie_word_embeddings,
        shape,
    };
    bench.say(&serde_json::json!({
        "what": "load",
        "device": bench.engine.backend().name(),
        "ranks": options.tp,
        "weight_bytes": bench.engine.loaded().weight_bytes,
        "workspace_bytes": bench.engine.loaded().workspace_bytes,
        "seconds": loaded_s,
    }));
    for batch in &options.decode {
        bench.decode(*batch, options)?;
    }
    for tokens in &options.prefill {
        bench.prefill(*tokens)?;
    }
    for tokens in &options.beside {
        for batch in &options.decode {
            bench.mixed(*batch, *tokens, options)?;
        }
    }
    Ok(())
}

impl<B: Backend, C: Comm<B>> Bench<B, C> {
    /// Every sequence of the batch gets one token, step after step.
    fn decode(&mut self, batch: u32, options: &Options) -> Result<()> {
        let context = options.context;
        let per_sequence = decoded(options).div_ceil(BLOCK_SIZE);
        let row = |index: u32, step: u32| {
            let blocks = (0..per_sequence).map(|block| BlockId(index * per_sequence + block));
            let last_from = (step > 0).then_some(index);
            let first = last_from.map_or(token(&self.shape, index), |_| 0);
            PlanRow {
                last_from,
                ..row_of(&[first], context + step, blocks.collect())
            }
        };
        let step = |step| (0..batch).map(|index| row(index, step)).collect();
        let mut plans: Vec<Vec<PlanRow>> = (0..WARM_UP + options.steps + ALONE).map(step).collect();
        let alone = plans.split_off(plans.len() - ALONE as usize);
        let times = self.time(plans, WARM_UP as usize, true)?;
        let alone = self.time(alone, 1, false)?;
        let median = times.median();
        let loaded = self.engine.loaded();
        let kv = loaded.block_bytes as f64 / f64::from(BLOCK_SIZE)
            * f64::from(batch)
            * f64::from(context + options.steps / 2);
        self.say(&serde_json::json!({
            "what": "decode",
            "batch": batch,
            "context": context,
            "step_us": median,
            "fastest_us": times.steps[0],
            "tokens_per_s": f64::from(batch) / median * 1e6,
            "bytes_per_step": self.weight_bytes_of_a_step() + kv,
            "collective_us": times.collective_us,
            "outside_us": times.outside_us,
            "outside_alone_us": alone.outside_us,
        }));
        Ok(())
    }

    /// One prompt of so many tokens, again and again.
    fn prefill(&mut self, tokens: u32) -> Result<()> {
        let prompt: Vec<u32> = (0..tokens).map(|at| token(&self.shape, at)).collect();
        let blocks: Vec<BlockId> = (0..tokens.div_ceil(BLOCK_SIZE)).map(BlockId).collect();
        let row = row_of(&prompt, 0, blocks);
        let plans = (0..PREFILL_WARM_UP + PREFILLS).map(|_| vec![row.clone()]);
        let times = self.time(plans.collect(), PREFILL_WARM_UP as usize, false)?;
        let median = times.median();
        self.say(&serde_json::json!({
            "what": "prefill",
            "tokens": tokens,
            "step_us": median,
            "fastest_us": times.steps[0],
            "tokens_per_s": f64::from(tokens) / median * 1e6,
            "flops": self.flops(tokens),
            "collective_us": times.collective_us,
            "outside_us": times.outside_us,
        }));
        Ok(())
    }

    /// Each sequence of the batch gets one token, and beside them a prompt is computed, again and again.
    fn mixed(&mut self, batch: u32, tokens: u32, options: &Options) -> Result<()> {
        let per_sequence = decoded(options).div_ceil(BLOCK_SIZE);
        let blocks = |first: u32, tokens: u32| {
            (first..first + tokens.div_ceil(BLOCK_SIZE))
                .map(BlockId)
                .collect()
        };
        let decode = |index| {
            let blocks = blocks(index * per_sequence, options.context + 1);
            row_of(&[token(&self.shape, index)], options.context, blocks)
        };
        let mut rows: Vec<PlanRow> = (0..batch).map(decode).collect();
        let prompt: Vec<u32> = (0..tokens).map(|at| token(&self.shape, at)).collect();
        rows.push(row_of(&prompt, 0, blocks(batch * per_sequence, tokens)));
        let plans = vec![rows; (PREFILL_WARM_UP + options.steps) as usize];
        let times = self.time(plans, PREFILL_WARM_UP as usize, false)?;
        self.say(&serde_json::json!({
            "what": "mixed",
            "batch": batch,
            "tokens": tokens,
            "step_us": times.median(),
            "fastest_us": times.steps[0],
        }));
        Ok(())
    }

    /// Runs the plans, if `overlapped` each behind the one before where the device lets them, and times all but the
    /// first `warm_up`: from the end of one to that of the next.
    fn time(
        &mut self,
        plans: Vec<Vec<PlanRow>>,
        warm_up: usize,
        overlapped: bool,
    ) -> Result<Times> {
        let (mut steps, mut outside, mut collective_us) = (Vec::new(), Vec::new(), 0.0);
        let (mut plans, mut ended, mut last) = (plans.into_iter(), 0, Instant::now());
        while self.engine.is_under_way() || plans.len() > 0 {
            let waits = overlapped && self.engine.takes_another();
            let may_begin = waits || !self.engine.is_under_way();
            if may_begin && let Some(rows) = plans.next() {
                let plan = Box::new(StepPlan {
                    epoch: Epoch(0),
                    step: self.next,
                    rows,
                });
                self.next = self.next.next();
                let refused = self.engine.begin(plan)?;
                ensure!(refused.is_none(), "a step cannot be queued behind another");
                continue;
            }
            let ran = self.engine.end()?;
            let took = last.elapsed();
            last = Instant::now();
            ended += 1;
            if ended > warm_up {
                steps.push(took.as_secs_f64() * 1e6);
                outside.push(ran.timings.outside_us as f64);
                collective_us += ran.timings.collective_us as f64;
            }
        }
        collective_us /= steps.len().max(1) as f64;
        steps.sort_by(f64::total_cmp);
        outside.sort_by(f64::total_cmp);
        Ok(Times {
            outside_us: outside[outside.len() / 2],
            steps,
            collective_us,
        })
    }

    /// Bytes of weights that a decode step reads: all but the embedding, of which it reads a row per token.
    fn weight_bytes_of_a_step(&self) -> f64 {
        let loaded = self.engine.loaded().weight_bytes as f64;
        if !self.has_own_head {
            return loaded;
        }
        let table = f64::from(self.shape.vocab_size) * f64::from(self.shape.hidden_size);
        loaded - table * self.shape.dtype.bytes() as f64 / f64::from(self.engine.world_size())
    }

    /// Operations of a prompt on all ranks together: products, and attention to what came before.
    fn flops(&self, tokens: u32) -> f64 {
        let shape = &self.shape;
        let [hidden, head_dim, heads, kv_heads, wide, layers] = [
            shape.hidden_size,
            shape.head_dim,
            shape.num_heads,
            shape.num_kv_heads,
            shape.intermediate_size,
            shape.num_layers,
        ]
        .map(f64::from);
        let layer = hidden * head_dim * (2.0 * heads + 2.0 * kv_heads) + 3.0 * hidden * wide;
        let tokens = f64::from(tokens);
        let attention = 2.0 * tokens * tokens * heads * head_dim;
        layers * (2.0 * tokens * layer + attention)
    }

    fn say(&self, line: &serde_json::Value) {
        if self.speaks {
            println!("{line}");
        }
    }
}

fn row_of(tokens: &[u32], position: u32, blocks: Vec<BlockId>) -> PlanRow {
    let end = position + u32::try_from(tokens.len()).unwrap_or(u32::MAX);
    PlanRow {
        tokens: tokens.to_vec(),
        position,
        blocks,
        sampling: Some(Box::new(Sampling {
            position: end,
            ..Sampling::default()
        })),
        ..PlanRow::default()
    }
}

impl Times {
    fn median(&self) -> f64 {
        self.steps[self.steps.len() / 2]
    }
}

fn token(shape: &ModelShape, seed: u32) -> u32 {
    seed.wrapping_mul(2_654_435_761) % shape.vocab_size
}

fn most(list: &[u32]) -> u32 {
    list.iter().copied().max().unwrap_or(1)
}

fn load(options: &Options) -> Load {
    Load {
        model: ModelLocation::Directory(options.model.clone()),
        tensor_parallel_size: options.tp,
        dtype: options.dtype.clone(),
        quantization: options.quantization.clone(),
        kv_cache_dtype: options.kv_cache_dtype.clone(),
        block_size: BLOCK_SIZE,
        max_model_len: most(&options.prefill)
            .max(most(&options.beside))
            .max(decoded(options))
            + 1,
        max_num_batched_tokens: most(&options.prefill)
            .max(most(&options.decode) + options.beside.iter().max().copied().unwrap_or(0)),
        max_num_seqs: most(&options.decode) + u32::from(!options.beside.is_empty()),
        async_scheduling: true,
        enforce_eager: options.eager,
    }
}

/// Positions of a sequence when its decode steps are done.
fn decoded(options: &Options) -> u32 {
    options.context + WARM_UP + options.steps + ALONE
}

/// KV blocks for the largest case.
fn blocks(options: &Options) -> u32 {
    let per_sequence = decoded(options).div_ceil(BLOCK_SIZE);
    let decode = options.decode.iter().map(|batch| batch * per_sequence);
    let prefill = options
        .prefill
        .iter()
        .map(|tokens| tokens.div_ceil(BLOCK_SIZE));
    let beside = options.beside.iter().max().copied().unwrap_or(0);
    let beside = beside.div_ceil(BLOCK_SIZE);
    decode.chain(prefill).max().unwrap_or(1) + beside
}
