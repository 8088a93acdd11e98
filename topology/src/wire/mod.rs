//! Every message between the coordinator and a shard.
//!
//! This file is the architecture of the control plane: who may say what, in which order. The
//! bytes are in [`codec`], the plan of a step in [`plan`]. Pure: no I/O, no clock. No type here
//! is recursive, so that no hostile frame can exhaust the stack (a test asserts it).
//!
//! Order of a connection, the coordinator being the QUIC server:
//!
//! ```text
//! shard ── Preamble ─▶ coordinator     fixed layout: magic, wire version, build; checked first
//! shard ── Hello ────▶                 who am I, which device
//!       ◀─ Welcome ───                 admitted
//! shard ── Held ─────▶                 only from one that lost its coordinator and keeps its weights: what it has;
//!                                      Load and Allocate are behind it then
//!       ◀─ Load ──────                 model, partition, KV blocks per this rank's budget
//! shard ── Progress* ▶ Loaded ─▶       bytes read so far; then what fits
//!       ◀─ Allocate ──                 the number of KV blocks, the minimum over ranks
//! shard ── Allocated ▶
//!       ◀─ MakeComm ──  (rank 0 only)  ── CommMade ─▶
//!       ◀─ JoinComm ──                 ── Joined ───▶
//!       ◀─ Run(plan) ─                 ── Ran ──────▶   one per step; the next plan may come before it
//!       ◀─ Abort ─────                 ── Aborted ──▶   at any time: leave the collective
//!       ◀─ Stop ──────                 the shard exits with 0
//! ```

pub mod codec;
pub mod plan;
mod words;

use crate::ids::{Epoch, Rank, Step};
use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

pub use codec::{Preamble, WireError, build_text, decode, digest_of_tokens, encode};
pub use plan::{
    LogitBias, PlanDigest, PlanRow, RowOutput, Sampling, ScoredToken, StepPlan, TokenScore,
    penalises_generated, penalises_prompt,
};

/// Raised with every change of a message's meaning or layout.
pub const WIRE_VERSION: u32 = 2;

/// Largest frame in bytes. A plan of 1,024 rows with 32,768 positions each in blocks of 16 is
/// about 8 MB; logits never travel this way.
pub const MAX_FRAME_BYTES: usize = 16 << 20;

/// What the coordinator tells a shard.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum ToShard {
    /// The shard is admitted to the cluster under this rank.
    Welcome {
        /// Number of ranks in the group.
        world_size: u32,
        /// Counts the coordinators of this launch, from 0: a shard that lost one serves only a later one.
        generation: u32,
        /// The coordinator's process id, which means something on its own machine only.
        pid: u32,
    },
    /// Read the weights of one partition.
    Load(Load),
    /// Take memory for this many KV blocks.
    Allocate {
        /// Blocks in the pool; ids are `0..num_blocks`.
        num_blocks: u32,
    },
    /// Make the identity that all ranks need to form a communicator.
    MakeComm {
        /// The epoch it will serve.
        epoch: Epoch,
    },
    /// Form the communicator.
    JoinComm {
        /// The epoch it serves.
        epoch: Epoch,
        /// What rank 0 answered to [`ToShard::MakeComm`]; opaque to the coordinator.
        comm_id: Vec<u8>,
    },
    /// Compute one step.
    Run(Box<StepPlan>),
    /// Leave whatever collective of this epoch is under way and drop its communicator.
    Abort {
        /// The epoch that ends.
        epoch: Epoch,
    },
    /// Exit with 0.
    Stop,
}

/// What a shard tells the coordinator.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum FromShard {
    /// First message after the preamble.
    Hello(Hello),
    /// Loading goes on.
    Progress {
        /// Bytes of this rank's weights that are in place.
        bytes_done: u64,
        /// Bytes of this rank's weights in all.
        bytes_total: u64,
    },
    /// The weights are in place.
    Loaded(Loaded),
    /// The KV blocks and workspace are in place.
    Allocated {
        /// Bytes taken for KV blocks on this rank.
        kv_bytes: u64,
    },
    /// Answer to [`ToShard::MakeComm`].
    CommMade {
        /// The epoch asked for.
        epoch: Epoch,
        /// At most [`MAX_COMM_ID_BYTES`].
        comm_id: Vec<u8>,
    },
    /// Answer to [`ToShard::JoinComm`].
    Joined {
        /// The epoch joined.
        epoch: Epoch,
    },
    /// Answer to [`ToShard::Run`].
    Ran(Box<Ran>),
    /// Answer to [`ToShard::Abort`].
    Aborted {
        /// The epoch that ended.
        epoch: Epoch,
    },
    /// The shard cannot go on; it exits after this message.
    Failed {
        /// A sentence for the operator.
        reason: String,
    },
    /// What a shard kept while it had no coordinator; its first message after being welcomed again.
    Held(Box<Held>),
}

/// Largest communicator identity in bytes (NCCL's is 128).
pub const MAX_COMM_ID_BYTES: usize = 256;

/// Longest name of a device in bytes.
pub const MAX_DEVICE_BYTES: usize = 256;

/// Who a shard is.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// The rank it was launched as.
    pub rank: Rank,
    /// Its process id, for the operator.
    pub pid: u32,
    /// What it computes on, as the operator would name it: `cpu cores 0-1`, `NVIDIA H100 80GB`.
    pub device: String,
    /// Memory of the device in bytes that is free before loading.
    pub free_bytes: u64,
    /// Memory of the device in bytes.
    pub total_bytes: u64,
}

impl Hello {
    /// Whether a shard can be what it says; which rank it is, and which process, is for whoever started it to know.
    ///
    /// # Errors
    /// What is wrong, with the field's name.
    pub fn check(&self) -> Result<(), String> {
        let Self {
            rank: _,
            pid,
            device,
            free_bytes,
            total_bytes,
        } = self;
        if *pid == 0 {
            return Err("its `pid` is 0, which no process has".to_owned());
        }
        // It is shown on terminals and in logs.
        let is_line = (1..=MAX_DEVICE_BYTES).contains(&device.len());
        if !is_line || device.chars().any(char::is_control) {
            return Err(format!(
                "its `device` is not one line of 1 to {MAX_DEVICE_BYTES} bytes"
            ));
        }
        if free_bytes > total_bytes {
            return Err(format!(
                "its `free_bytes` are {free_bytes}, more than its `total_bytes`, {total_bytes}"
            ));
        }
        Ok(())
    }
}

/// What to load and how it is cut.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Load {
    /// Where the model is, as the shard's node sees it.
    pub model: ModelLocation,
    /// Number of ranks the weights are partitioned over.
    pub tensor_parallel_size: u32,
    /// `auto`, `float32`, `bfloat16` or `float16`, as given; the shard resolves `auto` from `config.json`.
    pub dtype: String,
    /// `--quantization` as given, or `auto`; the shard resolves it from `config.json`.
    pub quantization: String,
    /// `--kv-cache-dtype` as given; `auto` is what the device computes in.
    pub kv_cache_dtype: String,
    /// Tokens per KV block.
    pub block_size: u32,
    /// Longest sequence in tokens; rotary tables and block-table workspace are sized by it.
    pub max_model_len: u32,
    /// Most tokens in one step.
    pub max_num_batched_tokens: u32,
    /// Most rows in one step.
    pub max_num_seqs: u32,
    /// A plan may be sent while the one before it is computed, and may leave tokens to it
    /// ([`PlanRow::last_from`]): every rank samples then, not the first alone.
    pub async_scheduling: bool,
    /// `--enforce-eager`: no step is recorded and replayed.
    pub enforce_eager: bool,
}

/// Where a model's files are.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub enum ModelLocation {
    /// The model inside the binary.
    BuiltIn,
    /// A directory on the shard's node.
    Directory(String),
}

/// What a rank has after loading.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Loaded {
    /// Bytes of weights on this rank.
    pub weight_bytes: u64,
    /// Bytes of workspace for the largest step.
    pub workspace_bytes: u64,
    /// Bytes one KV block takes on this rank.
    pub block_bytes: u64,
    /// Bytes that recordings of steps may take later.
    pub recording_bytes: u64,
    /// Memory of the device in bytes that is free now.
    pub free_bytes: u64,
    /// Time spent, in microseconds.
    pub load_us: u64,
}

/// What a shard still has of a coordinator that is gone. It is in no epoch.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Held {
    /// As it was told.
    pub load: Load,
    /// As it answered.
    pub loaded: Loaded,
    /// Blocks in its pool, whose content means nothing any more.
    pub num_blocks: u32,
    /// Bytes they take on this rank.
    pub kv_bytes: u64,
    /// The last epoch it heard of; it takes part in later ones only.
    pub epoch: Epoch,
}

/// What one rank did in one step.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Ran {
    /// The plan's epoch.
    pub epoch: Epoch,
    /// The plan's step.
    pub step: Step,
    /// Digest of the plan this rank computed; the coordinator compares all ranks'.
    pub digest: PlanDigest,
    /// Rank 0: one entry for each row of the plan, in order. Other ranks: empty.
    pub outputs: Vec<RowOutput>,
    /// Digest of the tokens that this rank chose, if it samples; the coordinator compares all ranks'.
    pub chosen: Option<PlanDigest>,
    /// Where the time went.
    pub timings: StepTimings,
}

/// Where the time of a step went on one rank, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct StepTimings {
    /// From the plan's arrival at the device thread, or from the end of the step before where that came later, to its end.
    pub step_us: u64,
    /// From the end of the step before to this one's begin, while the device had nothing to do; 0 for the
    /// first of an epoch.
    pub idle_us: u64,
    /// Inside collectives, waiting for other ranks included.
    pub collective_us: u64,
    /// The part of `collective_us` spent waiting for a slower rank.
    pub wait_us: u64,
    /// Sampling and scoring.
    pub sample_us: u64,
    /// The part of `step_us` that the device was not given: before the first kernel and after the last. 0 where the
    /// device does not measure.
    pub outside_us: u64,
}
