//! The decoder: Llama, Mistral, Qwen2, Qwen3, Gemma 2 and Gemma 3 are this with other numbers.
//!
//! ```text
//! x = embed(tokens) * scale                               all-reduce
//! for each layer:
//!     h = norm(x);  q, k, v = h · Wqkv;  (norm of q and k heads);  rotate;  write k, v
//!     x += (norm of) attend(q) · Wo                       all-reduce
//!     h = norm(x)
//!     x += (norm of) (activation(h · Wgate) * (h · Wup)) · Wdown    all-reduce
//! logits = (soft cap of) norm(x)[wanted] · Whead          all-gather
//! ```
//!
//! Allocates at start only. Knows no sequence and no request: the batch says what to compute.
//!
//! Invariant: all ranks make the same collectives in the same order, which the plan alone decides.

use super::rope;
use crate::comm::{Comm, CommError};
use crate::layers::{
    column_parallel, gated_parallel, row_parallel, vocab_parallel_embedding, vocab_parallel_head,
};
use crate::weights::{DecoderWeights, LayerWeights};
use kernels::backend::{
    Activation, Attention, Backend, DeviceError, Element, Heads, KvLayout, Norm, Precision,
};
use topology::fit::{StepSize, Workspace as Numbers};
use topology::model_shape::{self, ModelShape, Rope};
use topology::partition::Partition;

/// Widths of the activations on one rank.
#[derive(Clone, Copy, Debug)]
struct Widths {
    hidden: usize,
    qkv: usize,
    attention: usize,
    intermediate: usize,
    vocab: usize,
    gathered_vocab: usize,
    head_dim: usize,
}

/// One rank's decoder on a device.
#[derive(Debug)]
pub struct Decoder<B: Backend> {
    weights: DecoderWeights<B::Weight>,
    shape: ModelShape,
    heads: Heads,
    first_token: u32,
    rope: B::Tensor,
    /// The table of the layers with a window, where it is another one.
    local_rope: Option<B::Tensor>,
    space: Workspace<B>,
    logit_rows: usize,
}

/// Activations of one step.
#[derive(Debug)]
struct Workspace<B: Backend> {
    /// The residual stream. `[tokens, hidden]`
    residual: B::Tensor,
    /// What a sublayer gets. `[tokens, hidden]`
    normed: B::Tensor,
    /// What a sublayer gave, to be added to the residual. `[tokens, hidden]`
    delta: B::Tensor,
    qkv: B::Tensor,
    attention: B::Tensor,
    gate_up: B::Tensor,
    activated: B::Tensor,
    /// `[logit rows, hidden]`
    last: B::Tensor,
    /// Where there are other ranks. `[logit rows, vocab_width]`
    part: Option<B::Tensor>,
    /// `[logit rows, world_size * vocab_width]`
    logits: B::Tensor,
}

impl<B: Backend> Decoder<B> {
    /// Takes the workspace for the largest step and computes the rotary table.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if it does not fit.
    pub fn new(
        backend: &B,
        shape: ModelShape,
        partition: &Partition,
        weights: DecoderWeights<B::Weight>,
        size: StepSize,
    ) -> Result<Self, DeviceError> {
        let widths = Widths::of(&shape, partition);
        let logit_rows = size.logit_rows(partition);
        let table = |rope: &Rope| {
            let values = rope::table(rope, widths.head_dim, size.max_positions);
            let mut table =
                backend.allocate(size.max_positions, widths.head_dim, Precision::F32)?;
            backend.write(&values, &mut table)?;
            Ok::<_, DeviceError>(table)
        };
        let rope = table(&shape.rope)?;
        let local_rope = shape.local_rope.as_ref().map(table).transpose()?;
        let tokens = |width| backend.allocate(size.max_tokens, width, Precision::Compute);
        // What is summed over ranks: the embedding's and the layers' outputs, which may change places with the norms'.
        let summed = || backend.allocate_shared(size.max_tokens, widths.hidden, Precision::Compute);
        let logits = |width| backend.allocate(logit_rows, width, Precision::F32);
        let space = Workspace {
            residual: summed()?,
            normed: summed()?,
            delta: summed()?,
            qkv: tokens(widths.qkv)?,
            attention: tokens(widths.attention)?,
            gate_up: tokens(2 * widths.intermediate)?,
            activated: tokens(widths.intermediate)?,
            last: backend.allocate(logit_rows, widths.hidden, Precision::Compute)?,
            part: (partition.world_size > 1)
                .then(|| logits(widths.vocab))
                .transpose()?,
            logits: logits(widths.gathered_vocab)?,
        };
        Ok(Self {
            heads: heads(&shape, partition),
            first_token: partition.vocab.start,
            weights,
            shape,
            rope,
            local_rope,
            space,
            logit_rows,
        })
    }

    /// Bytes of workspace and rotary tables that [`Self::new`] takes.
    pub fn workspace_bytes(
        backend: &B,
        shape: &ModelShape,
        partition: &Partition,
        size: StepSize,
    ) -> u64 {
        Numbers::of(shape, partition, size).bytes(backend.element_bytes(Precision::Compute))
    }

    /// The KV blocks this decoder needs on one rank.
    pub fn kv_layout(
        shape: &ModelShape,
        partition: &Partition,
        (blocks, block_size): (usize, usize),
        element: Element,
    ) -> KvLayout {
        KvLayout {
            layers: shape.num_layers as usize,
            blocks,
            block_size,
            local_kv_heads: partition.local_kv_heads() as usize,
            head_dim: shape.head_dim as usize,
            element,
        }
    }

    /// Most rows of [`Self::logits`] at a time.
    pub fn logit_rows(&self) -> usize {
        self.logit_rows
    }

    /// Says how many `tokens` the next [`Self::forward`] has.
    pub fn set_tokens(&mut self, backend: &B, tokens: usize) {
        let space = &mut self.space;
        let per_token = [
            &mut space.residual,
            &mut space.normed,
            &mut space.delta,
            &mut space.qkv,
            &mut space.attention,
            &mut space.gate_up,
            &mut space.activated,
        ];
        for tensor in per_token {
            backend.set_rows(tensor, tokens);
        }
    }

    /// Computes the tokens of `batch` up to the norm before the head and writes their keys and values. Only queues
    /// operations, the same for every batch of so many tokens: this may be recorded.
    ///
    /// # Errors
    /// [`CommError`] if a collective did not finish; keys and values of this step are then undefined.
    pub fn forward<C: Comm<B>>(
        &mut self,
        backend: &B,
        comm: &mut C,
        batch: &B::DeviceBatch,
        cache: &mut B::KvCache,
    ) -> Result<(), CommError> {
        let space = &mut self.space;
        let scale = self.shape.embedding_scale;
        let table = (&self.weights.embedding, self.first_token, scale);
        vocab_parallel_embedding((backend, &mut *comm), batch, table, &mut space.residual)?;
        let norm = norm(&self.shape);
        let activation = activation(&self.shape);
        for (index, layer) in self.weights.layers.iter().enumerate() {
            if index == 0 {
                backend.rms_norm(&space.residual, &layer.input_norm, norm, &mut space.normed);
            } else {
                let (delta, residual) = (&space.delta, &mut space.residual);
                backend.add_rms_norm(delta, residual, &layer.input_norm, norm, &mut space.normed);
            }
            let sliding_window = self.shape.sliding_window[index];
            let local_rope = self
                .local_rope
                .as_ref()
                .filter(|_| sliding_window.is_some());
            let sublayer = Sublayer {
                heads: self.heads,
                norm,
                rope: local_rope.unwrap_or(&self.rope),
            };
            let attention = Attention {
                layer: index,
                local_heads: self.heads.local_heads,
                scale: self.shape.attention_scale,
                sliding_window,
                logit_soft_cap: self.shape.attention_soft_cap,
            };
            space.attend(
                (backend, &mut *comm),
                layer,
                (&sublayer, &attention),
                batch,
                cache,
            )?;
            space.feed_forward((backend, &mut *comm), layer, (norm, activation))?;
        }
        let (delta, residual) = (&space.delta, &mut space.residual);
        let weight = &self.weights.final_norm;
        backend.add_rms_norm(delta, residual, weight, norm, &mut space.normed);
        Ok(())
    }

    /// Logits of the batch's `rows` wanted tokens, after [`Self::forward`] with a batch of the same tokens.
    /// `[rows, world_size * vocab_width]`, of which the first `vocab_size` columns count.
    ///
    /// # Errors
    /// [`CommError`] if the gather did not finish.
    pub fn logits<C: Comm<B>>(
        &mut self,
        backend: &B,
        comm: &mut C,
        (batch, rows): (&B::DeviceBatch, usize),
    ) -> Result<&mut B::Tensor, CommError> {
        let space = &mut self.space;
        let part = space.part.iter_mut();
        for tensor in part.chain([&mut space.last, &mut space.logits]) {
            backend.set_rows(tensor, rows);
        }
        backend.gather_logit_rows(batch, &space.normed, &mut space.last);
        let head = self
            .weights
            .head
            .as_ref()
            .unwrap_or(&self.weights.embedding);
        let head = (head, self.shape.logit_soft_cap);
        let out = (space.part.as_mut(), &mut space.logits);
        vocab_parallel_head((backend, comm), head, &space.last, out)?;
        Ok(&mut space.logits)
    }
}

/// What a layer's attention needs beside its weights and the kernel's parameters.
struct Sublayer<'a, B: Backend> {
    heads: Heads,
    norm: Norm,
    rope: &'a B::Tensor,
}

impl<B: Backend> Workspace<B> {
    /// `normed` → `delta`, through attention.
    fn attend<C: Comm<B>>(
        &mut self,
        (backend, comm): (&B, &mut C),
        layer: &LayerWeights<B::Weight>,
        (sublayer, attention): (&Sublayer<'_, B>, &Attention),
        batch: &B::DeviceBatch,
        cache: &mut B::KvCache,
    ) -> Result<(), CommError> {
        let heads = sublayer.heads;
        column_parallel(backend, &layer.qkv, &self.normed, &mut self.qkv);
        if let Some((query, key)) = &layer.qk_norm {
            backend.head_norm(&mut self.qkv, heads, (query, key), sublayer.norm);
        }
        backend.rope(batch, sublayer.rope, heads, &mut self.qkv);
        backend.write_kv(batch, attention.layer, &self.qkv, heads, cache);
        backend.attend(batch, attention, &self.qkv, cache, &mut self.attention);
        row_parallel(
            (backend, comm),
            &layer.output,
            &self.attention,
            &mut self.delta,
        )?;
        self.norm_delta(backend, layer.attention_norm.as_ref(), sublayer.norm);
        Ok(())
    }

    /// Norms `delta`, where the model has a norm there. Its old place becomes that of the next sublayer's input.
    fn norm_delta(&mut self, backend: &B, weight: Option<&B::Weight>, norm: Norm) {
        if let Some(weight) = weight {
            backend.rms_norm(&self.delta, weight, norm, &mut self.normed);
            std::mem::swap(&mut self.delta, &mut self.normed);
        }
    }

    /// Adds `delta` to the residual, and computes the feed-forward layer's `delta`.
    fn feed_forward<C: Comm<B>>(
        &mut self,
        (backend, comm): (&B, &mut C),
        layer: &LayerWeights<B::Weight>,
        (norm, activation): (Norm, Activation),
    ) -> Result<(), CommError> {
        let residual = &mut self.residual;
        backend.add_rms_norm(
            &self.delta,
            residual,
            &layer.post_norm,
            norm,
            &mut self.normed,
        );
        gated_parallel(
            (backend, comm),
            (&layer.gate_up, activation, &layer.down),
            &self.normed,
            (&mut self.gate_up, &mut self.activated),
            &mut self.delta,
        )?;
        self.norm_delta(backend, layer.feed_forward_norm.as_ref(), norm);
        Ok(())
    }
}

impl Widths {
    fn of(shape: &ModelShape, partition: &Partition) -> Self {
        let heads = heads(shape, partition);
        let vocab = partition.vocab_width as usize;
        Self {
            hidden: shape.hidden_size as usize,
            qkv: heads.qkv_width(),
            attention: heads.local_heads * heads.head_dim,
            intermediate: partition.local_intermediate() as usize,
            vocab,
            gathered_vocab: vocab * partition.world_size as usize,
            head_dim: heads.head_dim,
        }
    }
}

fn norm(shape: &ModelShape) -> Norm {
    Norm {
        eps: shape.rms_norm_eps,
        weight_offset: shape.norm_weight_offset,
    }
}

fn activation(shape: &ModelShape) -> Activation {
    match shape.activation {
        model_shape::Activation::Silu => Activation::Silu,
        model_shape::Activation::GeluTanh => Activation::GeluTanh,
    }
}

fn heads(shape: &ModelShape, partition: &Partition) -> Heads {
    Heads {
        local_heads: partition.local_heads() as usize,
        local_kv_heads: partition.local_kv_heads() as usize,
        head_dim: shape.head_dim as usize,
    }
}
