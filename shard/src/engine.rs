//! One rank's part of the engine: loads its weights, holds its KV blocks, computes steps (`steps.rs`).
//!
//! Synchronous; one thread owns it. It is told everything and remembers nothing about requests, so
//! it can be thrown away at any moment. Weights and KV memory outlive epochs: after a fault only the
//! communicator goes.
//!
//! Invariant: whatever happens to an epoch, weights and KV memory are there for the next.

use crate::batch::{Batcher, Limits, PlanError};
use crate::clock;
use crate::comm::{Comm, CommError};
use crate::ladder::Spare;
use crate::models::decoder::Decoder;
use crate::steps::Group;
use crate::weights::{self, DecoderWeights};
use anyhow::{Context, Result, ensure};
use kernels::backend::{Backend, DeviceError, Element, KvLayout};
use std::net::IpAddr;
use topology::checkpoint::Checkpoint;
use topology::fit::{Sizes, StepSize};
use topology::ids::{Epoch, Rank, Step};
use topology::model_files::ModelFiles;
use topology::model_shape::{Dtype, KvDtype, ModelShape};
use topology::partition::Partition;
use topology::quantization::{at_load, head_at_load};
use topology::wire::{Load, Loaded};

/// Why a step gave no result.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The plan belongs to an epoch that this rank is not in. It changes nothing.
    #[error("a plan of epoch {plan} arrived in {}", match .current {
        Some(epoch) => format!("epoch {epoch}"),
        None => "no epoch".to_owned(),
    })]
    Stale {
        /// The plan's.
        plan: Epoch,
        /// This rank's, while it has a communicator.
        current: Option<Epoch>,
    },
    /// Plans arrived out of order.
    #[error("step {found} arrived where step {expected} was due")]
    Order {
        /// The plan's number.
        found: Step,
        /// The number due.
        expected: Step,
    },
    /// The plan cannot be computed.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A collective did not finish.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Steps came before the KV blocks.
    #[error("a plan arrived before the KV blocks were allocated")]
    NoBlocks,
}

/// Which rank this is and how its backend stores keys and values.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// This rank.
    pub rank: Rank,
    /// Where `--kv-cache-dtype` is `auto`. `None`: as the weights.
    pub kv_element: Option<Element>,
    /// Whether what is quantised at load has a quantised head, see [`head_at_load`].
    pub quantises_head: bool,
    /// This host's address on the network between the hosts; `None` where the group is on one host.
    pub interface: Option<IpAddr>,
}

/// One rank: a device, a model on it, and at times KV blocks and a communicator.
#[derive(Debug)]
pub struct Engine<B: Backend, C> {
    pub(crate) backend: B,
    pub(crate) decoder: Decoder<B>,
    pub(crate) partition: Partition,
    pub(crate) batch: B::DeviceBatch,
    /// Block count and blocks are filled in by [`Self::allocate`].
    pub(crate) limits: Limits,
    /// Whether plans may leave tokens to this rank, so that it samples whether it reports or not.
    pub(crate) keeps_tokens: bool,
    layout: KvLayout,
    /// Whether steps are queued one operation after the other, always.
    eager: bool,
    hidden_size: usize,
    loaded: Loaded,
    pub(crate) pool: Option<Pool<B>>,
    pub(crate) group: Option<Group<B::Pending, C>>,
}

#[derive(Debug)]
pub(crate) struct Pool<B: Backend> {
    pub(crate) cache: B::KvCache,
    pub(crate) batcher: Batcher,
    /// Where decode steps are filled up.
    pub(crate) spare: Option<Spare>,
}

impl<B: Backend, C: Comm<B>> Engine<B, C> {
    /// Puts this rank's weights, and workspace for the largest step, on the device.
    ///
    /// `progress` gets the bytes in place and the bytes in all.
    ///
    /// # Errors
    /// A sentence for the operator: the model's files are wrong, it cannot be split so, or does not fit.
    pub fn load(
        mut backend: B,
        place: Place,
        (files, load): (&ModelFiles, &Load),
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let start = clock::now();
        let shape = ModelShape::from_config(&files.read_json("config.json")?)?;
        let checkpoint = Checkpoint::open(files)?;
        checkpoint.check(&shape)?;
        let partition = Partition::new(&shape, place.rank, load.tensor_parallel_size)?;
        let dtype = resolve_dtype(&load.dtype, &shape)?;
        let (limits, size) = limits(load, &shape)?;
        backend.compute_in(weights::element(dtype));
        C::prepare(&mut backend, load.tensor_parallel_size);

        let at_load = at_load(&load.quantization, &shape).map_err(anyhow::Error::msg)?;
        let kv_element = kv_element(&load.kv_cache_dtype, place, dtype)?;
        let head = head_at_load(at_load).filter(|_| place.quantises_head);
        let codes = (at_load, head);
        let weights = DecoderWeights::find(files, &checkpoint, &shape, &partition, dtype, codes)?;
        weights.refuse_unknown_codes(&backend.name(), |code| backend.takes(code))?;
        let weight_bytes = weights.bytes();
        let workspace_bytes = Decoder::workspace_bytes(&backend, &shape, &partition, size);
        let fits = refuse_what_does_not_fit(&backend, weight_bytes, workspace_bytes);
        fits.context("load the model")?;
        progress(0, weight_bytes);
        let weights = weights.load(&backend, &mut |done| progress(done, weight_bytes))?;
        progress(weight_bytes, weight_bytes);

        let blocks = (0, limits.block_size);
        let layout = Decoder::<B>::kv_layout(&shape, &partition, blocks, kv_element);
        let hidden_size = shape.hidden_size as usize;
        let batch = backend.batch(limits.max_tokens, limits.max_rows, limits.max_blocks())?;
        let decoder = Decoder::new(&backend, shape, &partition, weights, size)?;
        let loaded = Loaded {
            weight_bytes,
            workspace_bytes,
            block_bytes: layout.block_bytes() as u64,
            recording_bytes: recording_bytes(&backend, load, &layout),
            free_bytes: backend.memory().1,
            load_us: clock::micros_since(start),
        };
        Ok(Self {
            backend,
            decoder,
            partition,
            batch,
            limits,
            keeps_tokens: load.async_scheduling,
            layout,
            eager: load.enforce_eager,
            hidden_size,
            loaded,
            pool: None,
            group: None,
        })
    }

    /// What [`Self::load`] took and left.
    pub fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// Takes memory for the KV blocks and returns its size in bytes.
    ///
    /// # Errors
    /// If they do not fit, or there are none.
    pub fn allocate(&mut self, num_blocks: u32) -> Result<u64> {
        let blocks = num_blocks as usize;
        ensure!(blocks > 0, "a pool of no KV blocks was asked for");
        let slots = u64::from(num_blocks) * self.limits.block_size as u64;
        ensure!(
            u32::try_from(slots).is_ok(),
            "{num_blocks} KV blocks are more than slots can count"
        );
        // The old pool goes first: both may not fit.
        self.backend.forget();
        self.pool = None;
        let spare = if self.eager || !self.backend.records() {
            None
        } else {
            Spare::behind(blocks, self.limits.block_size)
        };
        let layout = KvLayout {
            blocks: blocks + usize::from(spare.is_some()),
            ..self.layout
        };
        let limits = Limits {
            num_blocks: blocks,
            ..self.limits
        };
        let cache = self.backend.kv_cache(layout)?;
        self.pool = Some(Pool {
            cache,
            batcher: Batcher::new(limits),
            spare,
        });
        Ok(layout.block_bytes() as u64 * u64::from(num_blocks))
    }

    /// Makes the identity of a communicator for this group, on rank 0.
    ///
    /// # Errors
    /// [`CommError::Failed`].
    pub fn new_comm_id(&self, interface: Option<IpAddr>) -> Result<Vec<u8>, CommError> {
        C::new_id(
            self.partition.world_size,
            self.limits.max_tokens * self.hidden_size,
            interface,
        )
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Number of ranks.
    pub fn world_size(&self) -> u32 {
        self.partition.world_size
    }

    /// Enters an epoch with its communicator; its first plan will be step 0.
    pub fn enter(&mut self, epoch: Epoch, comm: C) {
        self.backend.forget();
        self.group = Some(Group::new(epoch, comm));
    }

    /// Drops the communicator of `epoch` and of any before it. Weights and KV memory stay.
    pub fn leave(&mut self, epoch: Epoch) {
        // First: NCCL's abort waits until nothing recorded names the communicator.
        self.backend.forget();
        self.group.take_if(|group| group.epoch <= epoch);
    }
}

/// `auto` is the checkpoint's own type. `vllm serve` has it so but for f32, which it would round to
/// 16 bits; here nothing is rounded that nobody asked for.
fn resolve_dtype(dtype: &str, shape: &ModelShape) -> Result<Dtype> {
    if dtype == "auto" {
        return Ok(shape.dtype);
    }
    Dtype::ALL
        .into_iter()
        .find(|d| d.name() == dtype)
        .with_context(|| {
            format!("--dtype is {dtype}; it must be auto, float32, bfloat16 or float16")
        })
}

/// What keys and values are stored as: what was asked for, else as the backend computes, else as the weights.
fn kv_element(asked: &str, place: Place, dtype: Dtype) -> Result<Element> {
    match KvDtype::parse(asked).map_err(anyhow::Error::msg)? {
        None => Ok(place.kv_element.unwrap_or(weights::element(dtype))),
        Some(KvDtype::Float(dtype)) => Ok(weights::element(dtype)),
        Some(KvDtype::Fp8) => Ok(Element::Fp8),
    }
}

fn limits(load: &Load, shape: &ModelShape) -> Result<(Limits, StepSize)> {
    ensure!(load.block_size > 0, "a KV block holds no token");
    ensure!(
        load.max_model_len > 0,
        "the longest sequence holds no token"
    );
    ensure!(load.max_num_seqs > 0, "a step holds no row");
    ensure!(load.max_num_batched_tokens > 0, "a step holds no token");
    let size = StepSize::of(&Sizes {
        block_size: load.block_size,
        max_model_len: load.max_model_len,
        max_num_batched_tokens: load.max_num_batched_tokens,
        max_num_seqs: load.max_num_seqs,
    });
    let limits = Limits {
        max_tokens: size.max_tokens,
        max_rows: size.max_rows,
        max_positions: size.max_positions,
        block_size: load.block_size as usize,
        num_blocks: 0,
        vocab_size: shape.vocab_size as usize,
    };
    Ok((limits, size))
}

/// What recordings of steps may take later, with the block that fills them up.
fn recording_bytes<B: Backend>(backend: &B, load: &Load, layout: &KvLayout) -> u64 {
    if load.enforce_eager || !backend.records() {
        return 0;
    }
    backend.recording_bytes() + layout.block_bytes() as u64
}

/// Before anything is read: the whole at once, with the arithmetic.
fn refuse_what_does_not_fit<B: Backend>(
    backend: &B,
    weight_bytes: u64,
    workspace_bytes: u64,
) -> Result<(), DeviceError> {
    let (_, free) = backend.memory();
    let needed = weight_bytes + workspace_bytes;
    if needed <= free {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    Err(DeviceError::OutOfMemory {
        device: backend.name(),
        what: format!(
            "weights of {:.2} GiB and workspace of {:.2} GiB",
            gib(weight_bytes),
            gib(workspace_bytes)
        ),
        needed,
        free,
    })
}
