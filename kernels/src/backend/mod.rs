//! The seam between a decoder and a device.
//!
//! A backend owns memory and runs operations in order. Everything is taken at start
//! (`allocate`, `load`, `kv_cache`); the operations allocate nothing. Activations are
//! matrices `[rows, width]` whose capacity is fixed and whose rows in use are set for each step.
//! Operations are queued: they may return before the device is done; [`Backend::read`], [`Backend::sample`] and
//! [`Backend::finish`] wait for what they need.
//!
//! Invariant, on the CPU bit for bit: a row of a result depends on that row's inputs alone, never
//! on what else is in the batch or how a sequence was cut into steps.

mod layer;

pub use layer::{Activation, Attention, FeedForward, Heads, Norm};

use crate::batch::Batch;
use crate::quantized::{Code, HostQuantized};
use crate::sampling::{SampleRequest, SampleResult};
use bytes::Bytes;

/// Why a device cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Memory does not suffice.
    #[error("{device} has no room for {what}: {needed} bytes needed, {free} free")]
    OutOfMemory {
        /// The device.
        device: String,
        /// What was to be placed.
        what: String,
        /// Bytes asked for.
        needed: u64,
        /// Bytes there are.
        free: u64,
    },
    /// Whoever waits for the device was told not to; what was queued may still run.
    #[error("waiting for {device} was interrupted")]
    Interrupted {
        /// The device.
        device: String,
    },
    /// The device failed.
    #[error("{device} failed: {reason}")]
    Failed {
        /// The device.
        device: String,
        /// What it said.
        reason: String,
    },
}

/// Element type of stored weights and KV blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// A float with 4 bits of exponent and 3 of mantissa, without infinities (OCP's `E4M3`): of KV blocks alone. What is
    /// too large becomes the largest, 448.
    Fp8,
}

impl Element {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Fp8 => 1,
        }
    }
}

/// What an activation matrix is stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// What the backend computes in ([`Backend::compute_in`]).
    Compute,
    /// f32 on every backend: rotary tables, logits.
    F32,
}

/// What became of operations that a backend may record ([`Backend::queue`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queued {
    /// They are queued.
    Done,
    /// They are recorded, and nothing is queued: [`Backend::replay`] does that.
    Recorded,
    /// They could not be recorded, and nothing is queued.
    Refused,
}

/// A piece of a stored matrix, usually inside a memory map. Nothing is copied to describe it.
#[derive(Clone, Debug)]
pub struct HostMatrix {
    /// Bytes from the first element of the first row to the last of the last.
    pub data: Bytes,
    /// Element type of `data`.
    pub element: Element,
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs) that are used of each row.
    pub cols: usize,
    /// Elements from one row's start to the next one's; `>= cols`.
    pub row_stride: usize,
}

/// Shape of the KV blocks of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Decoder layers.
    pub layers: usize,
    /// Blocks in the pool.
    pub blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Key and value heads of this rank.
    pub local_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Stored as.
    pub element: Element,
}

impl KvLayout {
    /// Bytes that one block takes over all layers, keys and values.
    pub fn block_bytes(&self) -> usize {
        2 * self.layers
            * self.block_size
            * self.local_kv_heads
            * self.head_dim
            * self.element.bytes()
    }
}

/// Where the device's time in a step went, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceTime {
    /// From its first operation to its last.
    pub total_us: u64,
    /// The part of it spent sampling and scoring.
    pub sample_us: u64,
}

/// Memory and operations of one device.
///
/// In all operations `q`, `k`, `v` live side by side in one matrix `qkv` of width
/// `(local_heads + 2 * local_kv_heads) * head_dim`: all query heads, then keys, then values.
pub trait Backend: Send + 'static {
    /// An activation matrix in device memory.
    type Tensor: Send + std::fmt::Debug;
    /// A weight matrix `[out, in]`, or a vector as `[1, n]`.
    type Weight: Send + std::fmt::Debug;
    /// The KV block pool.
    type KvCache: Send + std::fmt::Debug;
    /// A batch's index arrays on the device.
    type DeviceBatch: Send + std::fmt::Debug;
    /// A step that is queued and was not waited for ([`Self::defer`]).
    type Pending: Send + std::fmt::Debug;

    /// The device as the operator would name it.
    fn name(&self) -> String;

    /// Total and free bytes of the device's memory.
    fn memory(&self) -> (u64, u64);

    /// Says what the model's matrices are stored as, which is what activations of [`Precision::Compute`] shall be.
    /// Comes before anything is taken. Sums are f32 in any case, and on the CPU activations are f32 throughout.
    fn compute_in(&mut self, element: Element);

    /// Bytes of one element of an activation matrix.
    fn element_bytes(&self, precision: Precision) -> usize;

    /// An activation matrix for up to `rows` rows of `width` elements, zeroed.
    fn allocate(
        &self,
        rows: usize,
        width: usize,
        precision: Precision,
    ) -> Result<Self::Tensor, DeviceError>;

    /// [`Self::allocate`] for what collectives work on: from where other devices reach it directly, if there is such
    /// memory. It may be dealt out in large pieces, so that few matrices should be had from here.
    ///
    /// # Errors
    /// As [`Self::allocate`].
    fn allocate_shared(
        &self,
        rows: usize,
        width: usize,
        precision: Precision,
    ) -> Result<Self::Tensor, DeviceError> {
        self.allocate(rows, width, precision)
    }

    /// Puts the `parts`, stacked by rows, on the device. On the CPU a part may stay where it is; its bytes are
    /// read all the same, so that loading is over when this returns.
    ///
    /// `store` asks for another element type than the parts have (rounding to nearest even). `progress` gets
    /// the bytes, as `store`, that have come since it was last called, every few MiB.
    fn load(
        &self,
        parts: &[HostMatrix],
        store: Element,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self::Weight, DeviceError>;

    /// Calls `work` on this thread and, at the same time, on as many others as the host has for this device; where one of them
    /// comes late, the others have to do its part. For what has to be done to weights before they are loaded.
    fn on_host(&self, work: &(dyn Fn() + Sync)) {
        /// More than these wait for memory.
        const MOST: usize = 16;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.min(MOST);
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
    }

    /// Whether [`Self::load_quantized`] takes matrices of such codes.
    fn takes(&self, code: Code) -> bool;

    /// Puts the `parts`, stacked by rows, on the device, in as many bits as their codes have. `progress` as with
    /// [`Self::load`].
    fn load_quantized(
        &self,
        parts: &[HostQuantized],
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self::Weight, DeviceError>;

    /// Takes memory for the KV blocks.
    fn kv_cache(&self, layout: KvLayout) -> Result<Self::KvCache, DeviceError>;

    /// Memory for the index arrays of the largest step.
    fn batch(
        &self,
        max_tokens: usize,
        max_rows: usize,
        max_blocks: usize,
    ) -> Result<Self::DeviceBatch, DeviceError>;

    /// Hands a step's index arrays to the device. Tokens that are left to it are those that it chose when sampling was
    /// deferred last.
    fn upload(&self, host: &Batch, device: &mut Self::DeviceBatch) -> Result<(), DeviceError>;

    /// Whether [`Self::queue`] records, so that filling a decode step up to a size that comes again pays.
    fn records(&self) -> bool {
        false
    }

    /// Bytes of the device's memory that recordings may take later.
    fn recording_bytes(&self) -> u64 {
        0
    }

    /// Calls `ops`, which queues operations over `batch`, a decode step of `rows` rows with one token each. `ops` queues
    /// the same operations for every batch of that size: a backend may record them instead of doing them. It neither
    /// reads from the device nor writes to it. When it tries to record follows from the steps since the last
    /// [`Self::forget`] alone, so that ranks which record collectives do so in the same step.
    ///
    /// # Errors
    /// What `ops` said, or the device.
    fn queue<E: From<DeviceError>>(
        &self,
        rows: usize,
        batch: &Self::DeviceBatch,
        mut ops: impl FnMut() -> Result<(), E>,
    ) -> Result<Queued, E> {
        let _ = (rows, batch);
        ops().map(|()| Queued::Done)
    }

    /// Drops the recording of a step of `rows` rows that [`Self::queue`] has just tried, and records nothing more.
    fn stop_recording(&self, rows: usize) {
        let _ = rows;
    }

    /// Whether [`Self::replay`] can stand for [`Self::queue`] with so many rows.
    fn is_recorded(&self, rows: usize) -> bool {
        let _ = rows;
        false
    }

    /// Queues what was recorded of a step of `rows` rows, over `batch`. Rows in use are not its business.
    ///
    /// # Errors
    /// [`DeviceError`]; also where there is no recording.
    fn replay(&self, rows: usize, batch: &Self::DeviceBatch) -> Result<(), DeviceError> {
        let _ = batch;
        Err(DeviceError::Failed {
            device: self.name(),
            reason: format!("has no recording of a step of {rows} rows"),
        })
    }

    /// Drops all recordings, before memory or a communicator that they use goes.
    fn forget(&self) {}

    /// Something that the operator should know, once.
    fn take_notice(&self) -> Option<String> {
        None
    }

    /// From here on, time that the device works is counted, with what is queued next.
    fn start_clock(&self) {}

    /// How long the device worked on the step that [`Self::finish`] or [`Self::sample`] waited for last, from
    /// [`Self::start_clock`] on; `None` where it does not count.
    fn device_time(&self) -> Option<DeviceTime> {
        None
    }

    /// Sets how many rows of `tensor` are in use.
    fn set_rows(&self, tensor: &mut Self::Tensor, rows: usize);

    /// `out[t] = scale * table[token_ids[t] - first_token]`, or zero where the token is not in this part of the table.
    /// `scale` is rounded to the table's element first.
    fn embed(
        &self,
        batch: &Self::DeviceBatch,
        table: &Self::Weight,
        first_token: u32,
        scale: f32,
        out: &mut Self::Tensor,
    );

    /// `out = x / rms(x) * (weight + weight_offset)`, by row; `rms(x) = sqrt(mean(x^2) + eps)`.
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Weight, norm: Norm, out: &mut Self::Tensor);

    /// `residual += x`, then `out = rms_norm(residual)`.
    fn add_rms_norm(
        &self,
        x: &Self::Tensor,
        residual: &mut Self::Tensor,
        weight: &Self::Weight,
        norm: Norm,
        out: &mut Self::Tensor,
    );

    /// RMSNorm over each head of the query and key parts of `qkv`, in place (Qwen3, Gemma 3).
    fn head_norm(
        &self,
        qkv: &mut Self::Tensor,
        heads: Heads,
        weights: (&Self::Weight, &Self::Weight),
        norm: Norm,
    );

    /// `out = x · weightᵀ (+ bias)`. `[rows, in] × [out, in] → [rows, out]`
    fn linear(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        bias: Option<&Self::Weight>,
        out: &mut Self::Tensor,
    );

    /// Rotates the query and key parts of `qkv` by the tokens' positions, halves paired (the layout of published
    /// checkpoints): `table` is `[positions, head_dim]`, cos of `head_dim / 2` frequencies and then sin.
    fn rope(
        &self,
        batch: &Self::DeviceBatch,
        table: &Self::Tensor,
        heads: Heads,
        qkv: &mut Self::Tensor,
    );

    /// Copies the key and value parts of `qkv` to the batch's slots of one layer.
    fn write_kv(
        &self,
        batch: &Self::DeviceBatch,
        layer: usize,
        qkv: &Self::Tensor,
        heads: Heads,
        cache: &mut Self::KvCache,
    );

    /// Causal attention of the query part of `qkv` over each row's blocks, the new tokens included.
    /// `out: [tokens, local_heads * head_dim]`
    fn attend(
        &self,
        batch: &Self::DeviceBatch,
        attention: &Attention,
        qkv: &Self::Tensor,
        cache: &Self::KvCache,
        out: &mut Self::Tensor,
    );

    /// `out = activation(gate) * up`, `gate_up: [rows, 2 * n]` holding gate then up. `out: [rows, n]`
    fn gated_activation(
        &self,
        activation: Activation,
        gate_up: &Self::Tensor,
        out: &mut Self::Tensor,
    );

    /// `out = activated · downᵀ (+ bias)`, `activated` being what [`Self::gated_activation`] gives of `x · gate_upᵀ (+ bias)`.
    /// `space` is for both results between, and need not hold them afterwards.
    fn feed_forward(
        &self,
        x: &Self::Tensor,
        layer: FeedForward<'_, Self::Weight>,
        (both, activated): (&mut Self::Tensor, &mut Self::Tensor),
        out: &mut Self::Tensor,
    ) {
        if !self.fused_feed_forward(x, &layer, activated, out) {
            self.linear(x, layer.gate_up.0, layer.gate_up.1, both);
            self.gated_activation(layer.activation, both, activated);
            self.linear(activated, layer.down.0, layer.down.1, out);
        }
    }

    /// The same with fewer operations and the same bits, where the device has one that is faster; `activated` is space.
    /// Otherwise it does nothing and answers `false`.
    fn fused_feed_forward(
        &self,
        _x: &Self::Tensor,
        _layer: &FeedForward<'_, Self::Weight>,
        _activated: &mut Self::Tensor,
        _out: &mut Self::Tensor,
    ) -> bool {
        false
    }

    /// `x = cap * tanh(x / cap)`, element by element, in place; `cap` is above 0.
    fn soft_cap(&self, cap: f32, x: &mut Self::Tensor);

    /// `out[i] = x[logit_tokens[i]]`.
    fn gather_logit_rows(
        &self,
        batch: &Self::DeviceBatch,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    );

    /// Copies a host matrix into `tensor`, `[rows, width]`, setting its rows (rotary tables, tests).
    fn write(&self, values: &[f32], tensor: &mut Self::Tensor) -> Result<(), DeviceError>;

    /// Waits for `tensor` and copies its rows in use to the host, `[rows, width]` (tests, host collectives).
    fn read(&self, tensor: &Self::Tensor, values: &mut Vec<f32>) -> Result<(), DeviceError>;

    /// Chooses and scores tokens: one request per entry, each naming its row of `logits` `[rows, width]`,
    /// of which the first `vocab` columns count. Waits for the result.
    fn sample(
        &self,
        logits: &mut Self::Tensor,
        vocab: usize,
        requests: &[SampleRequest],
    ) -> Result<Vec<SampleResult>, DeviceError>;

    /// Whether [`Self::defer`] takes such requests.
    fn defers(&self, requests: &[SampleRequest]) -> bool {
        let _ = requests;
        false
    }

    /// [`Self::sample`] from logits and a vocabulary, or nothing, as a step's last operation, without waiting: the next step
    /// may be queued behind it and name its tokens ([`Last::Chosen`](crate::sampling::Last::Chosen)), in its batch and in
    /// requests that are deferred themselves. Two steps at most wait for [`Self::finish`], in their order.
    ///
    /// `None`, and nothing queued, where the backend waits, for such requests or always.
    ///
    /// # Errors
    /// [`DeviceError`], also where a request names what is not there.
    fn defer(
        &self,
        sampled: Option<(&mut Self::Tensor, usize)>,
        requests: &[SampleRequest],
    ) -> Result<Option<Self::Pending>, DeviceError> {
        let _ = (sampled, requests);
        Ok(None)
    }

    /// Waits for the end of a step, or until `is_called`, which is asked first and between looks at the device. Whether
    /// the step has ended.
    fn wait(
        &self,
        pending: &Self::Pending,
        is_called: &mut dyn FnMut() -> bool,
    ) -> Result<bool, DeviceError>;

    /// Waits for the end of a step. What was sampled, by request.
    fn finish(&self, pending: Self::Pending) -> Result<Vec<SampleResult>, DeviceError>;
}
