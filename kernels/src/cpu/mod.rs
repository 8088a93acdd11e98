//! The CPU backend: host memory, the operations of `ops` on it, and the threads that run them.
//!
//! Everything is done when a call returns. No operation allocates, except that sampling returns its results.
//! Invariant: results do not depend on the number of threads or on what else is in the batch.

mod batch;
pub(crate) mod element;
pub(crate) mod exp;
pub(crate) mod kv_cache;
pub(crate) mod matrix;
pub(crate) mod memory;
pub(crate) mod packed;
mod pool;
mod probe;
pub(crate) mod quantized;
mod region;
pub(crate) mod scratch;
pub(crate) mod simd;
pub(crate) mod tanh;
mod tensor;
pub(crate) mod threads;
pub(crate) mod weight;

pub use batch::CpuBatch;
pub use kv_cache::CpuKvCache;
pub use tensor::CpuTensor;
pub use weight::CpuWeight;

use crate::backend::{
    Activation, Attention, Backend, DeviceError, Element, FeedForward, Heads, HostMatrix, KvLayout,
    Norm, Precision,
};
use crate::batch::Batch;
use crate::ops;
use crate::quantized::{Code, HostQuantized};
use crate::sampling::{SampleRequest, SampleResult};
use scratch::Scratch;
use simd::Isa;
use std::convert::Infallible;
use threads::Threads;

/// A share of the machine's cores as a device.
#[derive(Debug)]
pub struct CpuBackend {
    pub(crate) threads: Threads,
    pub(crate) scratch: Scratch,
    pub(crate) isa: Isa,
    /// What the model's matrices are stored as ([`Backend::compute_in`]).
    pub(crate) element: Element,
}

impl CpuBackend {
    /// A backend that computes with `threads` threads.
    ///
    /// Where `cores` are given, thread i is pinned to `cores[i % cores.len()]`, or to all of them where there are more than
    /// threads, and the calling thread, which should be the one that will use the backend, is confined to those that no
    /// other is pinned to. With one thread the work runs on whichever thread calls. An error where there are no threads, or no such core.
    pub fn new(threads: usize, cores: Option<&[usize]>) -> Result<Self, DeviceError> {
        Self::of(threads, cores, Isa::detect())
    }

    /// The same with a certain instruction set: `amx`, `avx512vnni`, `avx512`, `avx2`, `portable`, or `auto` for the best
    /// there is.
    ///
    /// An error also where this CPU lacks it, or nothing is called so.
    pub fn with_isa(
        threads: usize,
        cores: Option<&[usize]>,
        isa: &str,
    ) -> Result<Self, DeviceError> {
        let isa = Isa::named(isa).map_err(|reason| DeviceError::Failed {
            device: "cpu".into(),
            reason,
        })?;
        Self::of(threads, cores, isa)
    }

    /// Cores of this host that the process may use: more than the thread that started the backend may, if that is pinned.
    pub fn host_cores(&self) -> usize {
        self.threads.host_cores
    }

    pub(crate) fn of(
        threads: usize,
        cores: Option<&[usize]>,
        isa: Isa,
    ) -> Result<Self, DeviceError> {
        // Asking for tiles comes before any thread is started, which then may use them too.
        let mut scratch = Scratch::of(threads);
        if isa.has_tiles() {
            scratch = scratch.with_tiles()?;
        }
        Ok(Self {
            threads: Threads::start(threads, cores)?,
            scratch,
            isa,
            element: Element::F32,
        })
    }

    /// Refuses what does not fit into the memory that is free now.
    fn reserve(&self, what: &str, needed: Option<u64>) -> Result<(), DeviceError> {
        let (_, free) = self.memory();
        match needed {
            Some(needed) if needed <= free => Ok(()),
            _ => Err(DeviceError::OutOfMemory {
                device: self.name(),
                what: what.to_owned(),
                needed: needed.unwrap_or(u64::MAX),
                free,
            }),
        }
    }
}

/// Product of sizes as a number of bytes; `None` when it is beyond any memory.
fn bytes(factors: &[usize]) -> Option<u64> {
    factors
        .iter()
        .try_fold(1_u64, |product, &factor| product.checked_mul(factor as u64))
        .filter(|&bytes| isize::try_from(bytes).is_ok())
}

impl Backend for CpuBackend {
    type Tensor = CpuTensor;
    type Weight = CpuWeight;
    type KvCache = CpuKvCache;
    type DeviceBatch = CpuBatch;
    /// Nothing is deferred: a step is computed when it is queued.
    type Pending = Infallible;

    fn name(&self) -> String {
        let count = self.threads.count();
        let plural = if count == 1 { "" } else { "s" };
        format!("cpu ({count} thread{plural}, {})", self.isa.name())
    }

    fn memory(&self) -> (u64, u64) {
        memory::total_and_free()
    }

    // f32, whatever the weights are stored as: narrower activations would be slower here. Products and attention on tiles,
    // for those who have bfloat16, round them as they lay them out.
    fn compute_in(&mut self, element: Element) {
        self.element = element;
    }

    fn element_bytes(&self, _precision: Precision) -> usize {
        size_of::<f32>()
    }

    fn allocate(
        &self,
        rows: usize,
        width: usize,
        _precision: Precision,
    ) -> Result<CpuTensor, DeviceError> {
        let what = format!("an activation matrix [{rows}, {width}]");
        self.reserve(&what, bytes(&[rows, width, size_of::<f32>()]))?;
        CpuTensor::zeroed(rows, width)
    }

    fn load(
        &self,
        parts: &[HostMatrix],
        store: Element,
        progress: &mut dyn FnMut(u64),
    ) -> Result<CpuWeight, DeviceError> {
        let packed = parts
            .iter()
            .map(|part| bytes(&[part.rows, part.cols, store.bytes()]));
        self.reserve("a weight", packed.sum())?;
        let weight = CpuWeight::load(&self.threads, parts, store, progress)?;
        Ok(weight)
    }

    fn on_host(&self, work: &(dyn Fn() + Sync)) {
        self.threads.all(work);
    }

    fn takes(&self, _code: Code) -> bool {
        true
    }

    fn load_quantized(
        &self,
        parts: &[HostQuantized],
        progress: &mut dyn FnMut(u64),
    ) -> Result<CpuWeight, DeviceError> {
        let packed = parts
            .iter()
            .map(|part| bytes(&[part.rows, part.cols, part.code.bits()]));
        self.reserve("a weight", packed.sum::<Option<u64>>().map(|bits| bits / 8))?;
        CpuWeight::load_quantized(&self.threads, parts, progress)
    }

    fn kv_cache(&self, layout: KvLayout) -> Result<CpuKvCache, DeviceError> {
        let KvLayout {
            layers,
            blocks,
            block_size,
            local_kv_heads,
            head_dim,
            element,
        } = layout;
        let what = format!("{blocks} KV blocks");
        let factors = [
            2,
            layers,
            blocks,
            block_size,
            local_kv_heads,
            head_dim,
            element.bytes(),
        ];
        self.reserve(&what, bytes(&factors))?;
        Ok(CpuKvCache::zeroed(layout))
    }

    fn batch(
        &self,
        max_tokens: usize,
        max_rows: usize,
        max_blocks: usize,
    ) -> Result<CpuBatch, DeviceError> {
        // Five arrays of tokens, three of rows, one of blocks.
        let elements = [(5, max_tokens), (3, max_rows), (1, max_blocks)];
        let needed = elements
            .into_iter()
            .try_fold(0_u64, |sum, (arrays, length)| {
                sum.checked_add(bytes(&[arrays, length, size_of::<u32>()])?)
            });
        self.reserve("the index arrays of a step", needed)?;
        Ok(CpuBatch::with_capacity(max_tokens, max_rows, max_blocks))
    }

    fn upload(&self, host: &Batch, device: &mut CpuBatch) -> Result<(), DeviceError> {
        assert!(host.left.is_empty(), "nothing is deferred, so all is known");
        device.upload(host)
    }

    fn set_rows(&self, tensor: &mut CpuTensor, rows: usize) {
        tensor.set_rows(rows);
    }

    fn embed(
        &self,
        batch: &CpuBatch,
        table: &CpuWeight,
        first_token: u32,
        scale: f32,
        out: &mut CpuTensor,
    ) {
        ops::embed::embed(self, batch, (table, first_token), scale, out);
    }

    fn rms_norm(&self, x: &CpuTensor, weight: &CpuWeight, norm: Norm, out: &mut CpuTensor) {
        ops::rms_norm::rms_norm(self, x, (weight, norm), out);
    }

    fn add_rms_norm(
        &self,
        x: &CpuTensor,
        residual: &mut CpuTensor,
        weight: &CpuWeight,
        norm: Norm,
        out: &mut CpuTensor,
    ) {
        ops::rms_norm::add_rms_norm(self, x, residual, (weight, norm), out);
    }

    fn head_norm(
        &self,
        qkv: &mut CpuTensor,
        heads: Heads,
        weights: (&CpuWeight, &CpuWeight),
        norm: Norm,
    ) {
        ops::head_norm::head_norm(self, qkv, heads, weights, norm);
    }

    fn linear(
        &self,
        x: &CpuTensor,
        weight: &CpuWeight,
        bias: Option<&CpuWeight>,
        out: &mut CpuTensor,
    ) {
        ops::linear::linear(self, x, weight, bias, out);
    }

    fn rope(&self, batch: &CpuBatch, table: &CpuTensor, heads: Heads, qkv: &mut CpuTensor) {
        ops::rope::rope(self, batch, table, heads, qkv);
    }

    fn write_kv(
        &self,
        batch: &CpuBatch,
        layer: usize,
        qkv: &CpuTensor,
        heads: Heads,
        cache: &mut CpuKvCache,
    ) {
        ops::write_kv::write_kv(batch, layer, qkv, heads, cache);
    }

    fn attend(
        &self,
        batch: &CpuBatch,
        attention: &Attention,
        qkv: &CpuTensor,
        cache: &CpuKvCache,
        out: &mut CpuTensor,
    ) {
        ops::paged_attention::attend(self, batch, attention, (qkv, cache), out);
    }

    fn gated_activation(&self, activation: Activation, gate_up: &CpuTensor, out: &mut CpuTensor) {
        ops::gated_activation::gated_activation(self, activation, gate_up, out);
    }

    fn fused_feed_forward(
        &self,
        x: &CpuTensor,
        layer: &FeedForward<'_, CpuWeight>,
        activated: &mut CpuTensor,
        out: &mut CpuTensor,
    ) -> bool {
        ops::linear::feed_forward(self, x, layer, activated, out)
    }

    fn soft_cap(&self, cap: f32, x: &mut CpuTensor) {
        ops::soft_cap::soft_cap(self, cap, x);
    }

    fn gather_logit_rows(&self, batch: &CpuBatch, x: &CpuTensor, out: &mut CpuTensor) {
        ops::gather::gather(self, batch, x, out);
    }

    fn write(&self, values: &[f32], tensor: &mut CpuTensor) -> Result<(), DeviceError> {
        let (width, capacity) = (tensor.width(), tensor.capacity());
        if width == 0 || !values.len().is_multiple_of(width) || values.len() / width > capacity {
            return Err(DeviceError::Failed {
                device: self.name(),
                reason: format!(
                    "{} values for a tensor of [{capacity}, {width}]",
                    values.len()
                ),
            });
        }
        tensor.set_rows(values.len() / width);
        tensor.values_mut().copy_from_slice(values);
        Ok(())
    }

    fn read(&self, tensor: &CpuTensor, values: &mut Vec<f32>) -> Result<(), DeviceError> {
        values.clear();
        values.extend_from_slice(tensor.values());
        Ok(())
    }

    fn sample(
        &self,
        logits: &mut CpuTensor,
        vocab: usize,
        requests: &[SampleRequest],
    ) -> Result<Vec<SampleResult>, DeviceError> {
        ops::sample::sample(self, logits, vocab, requests)
    }

    fn wait(&self, pending: &Infallible, _: &mut dyn FnMut() -> bool) -> Result<bool, DeviceError> {
        match *pending {}
    }

    fn finish(&self, pending: Infallible) -> Result<Vec<SampleResult>, DeviceError> {
        match pending {}
    }
}
