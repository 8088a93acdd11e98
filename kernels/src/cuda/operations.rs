//! `Backend` on a GPU: memory from the device, operations from `ops` and cuBLASLt.
//!
//! Shapes are checked where the launches are. What an operation could not queue is remembered, because
//! operations return nothing, and said by [`Backend::upload`], [`Backend::read`], [`Backend::sample`] and
//! [`Backend::defer`].
//!
//! Invariant: an operation that was not queued is never taken for done: a step ends in one of those four.

use super::{
    CudaBackend, CudaBatch, CudaKvCache, CudaPending, CudaTensor, CudaWeight, TensorSource, graphs,
    load,
};
use crate::backend::{
    Activation, Attention, Backend, DeviceError, DeviceTime, Element, Heads, HostMatrix, KvLayout,
    Norm, Precision, Queued,
};
use crate::batch::Batch;
use crate::cpu::element::{Stored, by_element};
use crate::ops;
use crate::quantized::{Code, HostQuantized};
use crate::sampling::{SampleRequest, SampleResult};
use std::ops::Range;

impl CudaBackend {
    fn element_of(&self, precision: Precision) -> Element {
        match precision {
            Precision::Compute => self.element,
            Precision::F32 => Element::F32,
        }
    }

    /// A matrix in memory of `source` where that has some, of the driver otherwise.
    fn allocate_from(
        &self,
        source: Option<TensorSource>,
        (rows, width): (usize, usize),
        precision: Precision,
    ) -> Result<CudaTensor, DeviceError> {
        let element = self.element_of(precision);
        let what = format!("an activation matrix [{rows}, {width}]");
        let bytes = self.bytes(&what, &[rows, width, element.bytes()])?;
        let sourced = match source {
            Some(source) => self.device.allocate_from(source, bytes)?,
            None => None,
        };
        let memory = match sourced {
            Some(memory) => memory,
            None => self.device.allocate(&what, bytes)?,
        };
        Ok(CudaTensor::new(memory, element, (rows, width)))
    }

    /// Product of sizes; an error where it is beyond any memory.
    fn bytes(&self, what: &str, factors: &[usize]) -> Result<usize, DeviceError> {
        let product = factors
            .iter()
            .try_fold(1_usize, |product, &factor| product.checked_mul(factor));
        product.ok_or_else(|| DeviceError::OutOfMemory {
            device: self.name(),
            what: what.to_owned(),
            needed: u64::MAX,
            free: self.memory().1,
        })
    }
}

impl Backend for CudaBackend {
    type Tensor = CudaTensor;
    type Weight = CudaWeight;
    type KvCache = CudaKvCache;
    type DeviceBatch = CudaBatch;
    type Pending = CudaPending;

    fn name(&self) -> String {
        self.device.name().to_owned()
    }

    fn memory(&self) -> (u64, u64) {
        self.device.memory()
    }

    fn compute_in(&mut self, element: Element) {
        self.element = element;
    }

    fn element_bytes(&self, precision: Precision) -> usize {
        self.element_of(precision).bytes()
    }

    fn allocate(
        &self,
        rows: usize,
        width: usize,
        precision: Precision,
    ) -> Result<CudaTensor, DeviceError> {
        self.allocate_from(None, (rows, width), precision)
    }

    fn allocate_shared(
        &self,
        rows: usize,
        width: usize,
        precision: Precision,
    ) -> Result<CudaTensor, DeviceError> {
        self.allocate_from(self.source, (rows, width), precision)
    }

    fn load(
        &self,
        parts: &[HostMatrix],
        store: Element,
        progress: &mut dyn FnMut(u64),
    ) -> Result<CudaWeight, DeviceError> {
        let way = (&self.device, &mut *self.transfer.borrow_mut());
        load::load(way, parts, (store, self.element), progress)
    }

    fn takes(&self, code: Code) -> bool {
        match code {
            Code::Int4 | Code::Int8 | Code::Fp8 => true,
        }
    }

    fn load_quantized(
        &self,
        parts: &[HostQuantized],
        progress: &mut dyn FnMut(u64),
    ) -> Result<CudaWeight, DeviceError> {
        let way = (&self.device, &mut *self.transfer.borrow_mut());
        let weight = load::load_quantized(way, parts, self.element, progress)?;
        let sections = weight.sections().unwrap_or_default();
        let mut workspace = self.workspace();
        for section in sections {
            workspace.reserve(&self.device, section.plan(), self.element)?;
        }
        drop(workspace);
        Ok(weight)
    }

    fn kv_cache(&self, layout: KvLayout) -> Result<CudaKvCache, DeviceError> {
        let what = format!("{} KV blocks", layout.blocks);
        let bytes = self.bytes(&what, &[layout.block_bytes(), layout.blocks])?;
        let memory = self.device.allocate(&what, bytes)?;
        Ok(CudaKvCache::new(memory, layout))
    }

    fn batch(
        &self,
        max_tokens: usize,
        max_rows: usize,
        max_blocks: usize,
    ) -> Result<CudaBatch, DeviceError> {
        let sizes = (max_tokens, max_rows, max_blocks);
        CudaBatch::with_capacity(&self.device, sizes, self.element)
    }

    fn upload(&self, host: &Batch, device: &mut CudaBatch) -> Result<(), DeviceError> {
        self.check()?;
        // The first step of all is not to be late. That it is counted from the last `forget` keeps ranks together, some of
        // which may have computed before.
        self.blas.set_tries(self.graphs.begin());
        device.upload(&self.device, host, |request| self.sampler().place(request))
    }

    fn records(&self) -> bool {
        true
    }

    fn recording_bytes(&self) -> u64 {
        graphs::RESERVE_BYTES
    }

    fn queue<E: From<DeviceError>>(
        &self,
        rows: usize,
        batch: &CudaBatch,
        ops: impl FnMut() -> Result<(), E>,
    ) -> Result<Queued, E> {
        self.queue_step(rows, batch, ops)
    }

    fn stop_recording(&self, rows: usize) {
        self.graphs.end(rows);
    }

    fn is_recorded(&self, rows: usize) -> bool {
        self.graphs.holds(rows)
    }

    fn replay(&self, rows: usize, batch: &CudaBatch) -> Result<(), DeviceError> {
        self.replay_step(rows, batch)
    }

    fn forget(&self) {
        self.graphs.clear();
        self.blas.forget();
    }

    fn take_notice(&self) -> Option<String> {
        self.graphs.notice()
    }

    fn start_clock(&self) {
        self.clock.start(&self.device);
    }

    fn device_time(&self) -> Option<DeviceTime> {
        self.clock.last()
    }

    fn set_rows(&self, tensor: &mut CudaTensor, rows: usize) {
        tensor.set_rows(rows);
    }

    fn embed(
        &self,
        batch: &CudaBatch,
        table: &CudaWeight,
        first_token: u32,
        scale: f32,
        out: &mut CudaTensor,
    ) {
        ops::embed::cuda::embed(self, batch, (table, first_token), scale, out);
    }

    fn rms_norm(&self, x: &CudaTensor, weight: &CudaWeight, norm: Norm, out: &mut CudaTensor) {
        ops::rms_norm::cuda::rms_norm(self, x, (weight, norm), out);
    }

    fn add_rms_norm(
        &self,
        x: &CudaTensor,
        residual: &mut CudaTensor,
        weight: &CudaWeight,
        norm: Norm,
        out: &mut CudaTensor,
    ) {
        ops::rms_norm::cuda::add_rms_norm(self, x, residual, (weight, norm), out);
    }

    fn head_norm(
        &self,
        qkv: &mut CudaTensor,
        heads: Heads,
        weights: (&CudaWeight, &CudaWeight),
        norm: Norm,
    ) {
        ops::head_norm::cuda::head_norm(self, qkv, heads, weights, norm);
    }

    fn linear(
        &self,
        x: &CudaTensor,
        weight: &CudaWeight,
        bias: Option<&CudaWeight>,
        out: &mut CudaTensor,
    ) {
        ops::linear::cuda::linear(self, x, weight, bias, out);
    }

    fn rope(&self, batch: &CudaBatch, table: &CudaTensor, heads: Heads, qkv: &mut CudaTensor) {
        ops::rope::cuda::rope(self, batch, table, heads, qkv);
    }

    fn write_kv(
        &self,
        batch: &CudaBatch,
        layer: usize,
        qkv: &CudaTensor,
        heads: Heads,
        cache: &mut CudaKvCache,
    ) {
        ops::write_kv::cuda::write_kv(self, batch, layer, (qkv, heads), cache);
    }

    fn attend(
        &self,
        batch: &CudaBatch,
        attention: &Attention,
        qkv: &CudaTensor,
        cache: &CudaKvCache,
        out: &mut CudaTensor,
    ) {
        use ops::paged_attention::{cuda, flashinfer};
        match flashinfer::attend(self, batch, attention, (qkv, cache), out) {
            Ok(true) => {}
            Ok(false) => cuda::attend(self, batch, attention, (qkv, cache), out),
            Err(error) => self.fail_with(error),
        }
    }

    fn gated_activation(&self, activation: Activation, gate_up: &CudaTensor, out: &mut CudaTensor) {
        ops::gated_activation::cuda::gated_activation(self, activation, gate_up, out);
    }

    fn soft_cap(&self, cap: f32, x: &mut CudaTensor) {
        ops::soft_cap::cuda::soft_cap(self, cap, x);
    }

    fn gather_logit_rows(&self, batch: &CudaBatch, x: &CudaTensor, out: &mut CudaTensor) {
        ops::gather::cuda::gather(self, batch, x, out);
    }

    fn write(&self, values: &[f32], tensor: &mut CudaTensor) -> Result<(), DeviceError> {
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
        let bytes = tensor.bytes();
        by_element!(tensor.element(), E => {
            let fill = |range: Range<usize>, room: &mut [u8]| {
                let values = &values[range.start / size_of::<E>()..];
                for (to, from) in room.chunks_exact_mut(size_of::<E>()).zip(values) {
                    to.copy_from_slice(bytemuck::bytes_of(&E::narrow(*from)));
                }
            };
            let mut transfer = self.transfer.borrow_mut();
            transfer.write(&self.device, (tensor.memory_mut(), bytes), &fill, &mut |_| ())
        })
    }

    fn read(&self, tensor: &CudaTensor, values: &mut Vec<f32>) -> Result<(), DeviceError> {
        self.check()?;
        values.clear();
        by_element!(tensor.element(), E => {
            let mut take = |bytes: &[u8]| {
                let elements = bytes.chunks_exact(size_of::<E>());
                values.extend(elements.map(|e| bytemuck::pod_read_unaligned::<E>(e).widen()));
            };
            let mut transfer = self.transfer.borrow_mut();
            transfer.read(&self.device, (tensor.memory(), tensor.bytes()), &mut take)
        })
    }

    fn sample(
        &self,
        logits: &mut CudaTensor,
        vocab: usize,
        requests: &[SampleRequest],
    ) -> Result<Vec<SampleResult>, DeviceError> {
        self.check()?;
        ops::sample::cuda::sample(self, logits, vocab, requests)
    }

    fn defers(&self, requests: &[SampleRequest]) -> bool {
        ops::sample::cuda::defers(requests)
    }

    fn defer(
        &self,
        sampled: Option<(&mut CudaTensor, usize)>,
        requests: &[SampleRequest],
    ) -> Result<Option<CudaPending>, DeviceError> {
        self.check()?;
        ops::sample::cuda::defer(self, sampled, requests)
    }

    fn wait(
        &self,
        pending: &CudaPending,
        is_called: &mut dyn FnMut() -> bool,
    ) -> Result<bool, DeviceError> {
        self.wait_for(pending, is_called)
    }

    fn finish(&self, pending: CudaPending) -> Result<Vec<SampleResult>, DeviceError> {
        ops::sample::cuda::finish(self, pending)
    }
}
