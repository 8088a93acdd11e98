//! This rank's weights: views of the checkpoint's bytes, and their way onto the device.
//!
//! Files are mapped, not read; a rank touches the pages of its own ranges only. Which ranges those
//! are is `topology::partition`'s; this file turns them into matrices and stacks what one product
//! can compute: q, k and v, and gate and up. It computes nothing with the values.
//!
//! Invariant: the bytes that [`DecoderWeights::bytes`] counts before loading are those that loading
//! reports as done.

#![expect(
    unsafe_code,
    reason = "mapping the checkpoint's files is the crate's one mmap"
)]

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use kernels::backend::{Backend, Element, HostMatrix};
use memmap2::Mmap;
use std::collections::HashMap;
use std::fs::File;
use topology::checkpoint::{Checkpoint, StoredDtype};
use topology::model_files::ModelFiles;
use topology::model_shape::{Dtype, ModelShape};
use topology::partition::{Partition, TensorSpec, tensors};

/// Progress is reported about this often, in bytes.
const PROGRESS_BYTES: u64 = 16 << 20;

/// The backend's name for a type.
pub fn element(dtype: Dtype) -> Element {
    match dtype {
        Dtype::Float32 => Element::F32,
        Dtype::Bfloat16 => Element::Bf16,
        Dtype::Float16 => Element::F16,
    }
}

/// A weight and the bias that goes with it.
#[derive(Clone, Debug)]
pub struct Linear<W> {
    /// `[out, in]`
    pub weight: W,
    /// `[out]`. Of a row-parallel layer on rank 0 only, because it is added once.
    pub bias: Option<W>,
}

/// The weights of one decoder layer, as one rank has them.
#[derive(Clone, Debug)]
pub struct LayerWeights<W> {
    /// RMSNorm before attention. `[hidden]`
    pub input_norm: W,
    /// Column-parallel, stacked: query, key and value heads of this rank.
    pub qkv: Linear<W>,
    /// RMSNorm of query and key heads (Qwen3, Gemma 3). `[head_dim]` each
    pub qk_norm: Option<(W, W)>,
    /// Row-parallel.
    pub output: Linear<W>,
    /// RMSNorm of what attention gives (Gemma). `[hidden]`
    pub attention_norm: Option<W>,
    /// RMSNorm before the feed-forward layer. `[hidden]`
    pub post_norm: W,
    /// Column-parallel, stacked: gate, then up.
    pub gate_up: Linear<W>,
    /// Row-parallel.
    pub down: Linear<W>,
    /// RMSNorm of what the feed-forward layer gives (Gemma). `[hidden]`
    pub feed_forward_norm: Option<W>,
}

/// All weights of a decoder, as one rank has them: on the host (`W` = [`HostWeight`]) or a device.
#[derive(Clone, Debug)]
pub struct DecoderWeights<W> {
    /// Vocab-parallel. `[vocab_width, hidden]`
    pub embedding: W,
    /// In the order of the forward pass.
    pub layers: Vec<LayerWeights<W>>,
    /// RMSNorm before the head. `[hidden]`
    pub final_norm: W,
    /// Vocab-parallel. `[vocab_width, hidden]`; `None` where it is the embedding.
    pub head: Option<W>,
}

/// A weight that is still in the checkpoint.
#[derive(Clone, Debug)]
pub struct HostWeight {
    parts: Vec<HostMatrix>,
    store: Element,
}

impl HostWeight {
    /// Bytes it will take on the device.
    fn bytes(&self) -> u64 {
        let elements = self.parts.iter().map(|part| (part.rows * part.cols) as u64);
        elements.sum::<u64>() * self.store.bytes() as u64
    }
}

impl DecoderWeights<HostWeight> {
    /// Finds this rank's part of every weight. Reads nothing but the files' maps.
    ///
    /// Matrices are stored as `dtype`; norms and biases in f32, which costs nothing and keeps what
    /// the checkpoint says.
    ///
    /// # Errors
    /// If a file cannot be mapped or is shorter than `checkpoint` says.
    pub fn find(
        files: &ModelFiles,
        checkpoint: &Checkpoint,
        shape: &ModelShape,
        partition: &Partition,
        dtype: Dtype,
    ) -> Result<Self> {
        let finder = Finder {
            checkpoint,
            partition,
            maps: map_files(files, checkpoint)?,
            specs: tensors(shape)
                .into_iter()
                .map(|spec| (spec.name.clone(), spec))
                .collect(),
            matrices: element(dtype),
        };
        let layers = (0..shape.num_layers).map(|layer| finder.layer(shape, layer));
        Ok(Self {
            embedding: finder.vocab("model.embed_tokens.weight")?,
            layers: layers.collect::<Result<_>>()?,
            final_norm: finder.vector(&["model.norm.weight".to_owned()])?,
            head: (!shape.tie_word_embeddings)
                .then(|| finder.vocab("lm_head.weight"))
                .transpose()?,
        })
    }

    /// Bytes of all weights on the device.
    pub fn bytes(&self) -> u64 {
        let mut bytes = 0;
        let counted = self.clone().try_map(&mut |weight| {
            bytes += weight.bytes();
            Ok(())
        });
        counted.map_or(0, |_: DecoderWeights<()>| bytes)
    }

    /// Puts all weights on the device. `progress` gets the bytes done so far.
    ///
    /// # Errors
    /// If the device refuses a weight.
    pub fn load<B: Backend>(
        self,
        backend: &B,
        progress: &mut dyn FnMut(u64),
    ) -> Result<DecoderWeights<B::Weight>> {
        let (mut done, mut reported) = (0, 0);
        self.try_map(&mut |weight| {
            let mut passed = |bytes| {
                done += bytes;
                if done - reported >= PROGRESS_BYTES {
                    reported = done;
                    progress(done);
                }
            };
            Ok(backend.load(&weight.parts, weight.store, &mut passed)?)
        })
    }
}

impl<W> DecoderWeights<W> {
    /// Turns every weight into another, in the order of the forward pass.
    fn try_map<V>(self, f: &mut dyn FnMut(W) -> Result<V>) -> Result<DecoderWeights<V>> {
        fn linear<W, V>(linear: Linear<W>, f: &mut dyn FnMut(W) -> Result<V>) -> Result<Linear<V>> {
            Ok(Linear {
                weight: f(linear.weight)?,
                bias: linear.bias.map(f).transpose()?,
            })
        }
        let embedding = f(self.embedding)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in self.layers {
            layers.push(LayerWeights {
                input_norm: f(layer.input_norm)?,
                qkv: linear(layer.qkv, f)?,
                qk_norm: match layer.qk_norm {
                    Some((query, key)) => Some((f(query)?, f(key)?)),
                    None => None,
                },
                output: linear(layer.output, f)?,
                attention_norm: layer.attention_norm.map(&mut *f).transpose()?,
                post_norm: f(layer.post_norm)?,
                gate_up: linear(layer.gate_up, f)?,
                down: linear(layer.down, f)?,
                feed_forward_norm: layer.feed_forward_norm.map(&mut *f).transpose()?,
            });
        }
        let final_norm = f(self.final_norm)?;
        let head = self.head.map(f).transpose()?;
        Ok(DecoderWeights {
            embedding,
            layers,
            final_norm,
            head,
        })
    }
}

/// Maps every weight file of the model.
fn map_files(files: &ModelFiles, checkpoint: &Checkpoint) -> Result<Vec<Bytes>> {
    let mut maps = Vec::new();
    for stored in checkpoint.files() {
        let name = &stored.name;
        let bytes = match files.path(name) {
            Some(path) => {
                let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
                // SAFETY: the map is only read. Whoever truncates or rewrites a model's file under a running
                // server kills or corrupts it; this is documented, as every server that maps weights has it.
                let map = unsafe { Mmap::map(&file) };
                Bytes::from_owner(map.with_context(|| format!("map {}", path.display()))?)
            }
            None => match files.read(name)? {
                std::borrow::Cow::Borrowed(built_in) => Bytes::from_static(built_in),
                std::borrow::Cow::Owned(read) => Bytes::from(read),
            },
        };
        ensure!(
            bytes.len() as u64 == stored.bytes,
            "{name} changed while it was being loaded; load it again when it is complete"
        );
        maps.push(bytes);
    }
    Ok(maps)
}

struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    partition: &'a Partition,
    maps: Vec<Bytes>,
    specs: HashMap<String, TensorSpec>,
    matrices: Element,
}

impl Finder<'_> {
    fn layer(&self, shape: &ModelShape, layer: u32) -> Result<LayerWeights<HostWeight>> {
        let name = |name: &str| format!("model.layers.{layer}.{name}");
        let norm = |which: &str| self.vector(&[name(&format!("{which}.weight"))]);
        let column = |modules: &[&str], biased: bool| {
            let names = |kind: &str| -> Vec<_> {
                modules
                    .iter()
                    .map(|module| name(&format!("{module}.{kind}")))
                    .collect()
            };
            let bias = biased.then(|| self.vector(&names("bias"))).transpose()?;
            anyhow::Ok(Linear {
                weight: self.matrix(&names("weight"))?,
                bias,
            })
        };
        // The bias of a row-parallel layer is added once, so only rank 0 has it.
        let row =
            |module: &str, biased: bool| column(&[module], biased && self.partition.rank.0 == 0);
        let qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
        let qk_norm = if shape.qk_norm {
            Some((norm("self_attn.q_norm")?, norm("self_attn.k_norm")?))
        } else {
            None
        };
        // Where attention's result has a norm, that one has the name of the norm after it in other families.
        let (attention_norm, post_norm, feed_forward_norm) = if shape.output_norms {
            (
                Some(norm("post_attention_layernorm")?),
                norm("pre_feedforward_layernorm")?,
                Some(norm("post_feedforward_layernorm")?),
            )
        } else {
            (None, norm("post_attention_layernorm")?, None)
        };
        Ok(LayerWeights {
            input_norm: norm("input_layernorm")?,
            qkv: column(&qkv, shape.qkv_bias)?,
            qk_norm,
            output: row("self_attn.o_proj", shape.output_bias)?,
            attention_norm,
            post_norm,
            gate_up: column(&["mlp.gate_proj", "mlp.up_proj"], shape.mlp_bias)?,
            down: row("mlp.down_proj", shape.mlp_bias)?,
            feed_forward_norm,
        })
    }

    fn matrix(&self, names: &[String]) -> Result<HostWeight> {
        let parts = names
            .iter()
            .map(|name| self.part(name))
            .collect::<Result<_>>()?;
        Ok(HostWeight {
            parts,
            store: self.matrices,
        })
    }

    fn vector(&self, names: &[String]) -> Result<HostWeight> {
        let parts = names
            .iter()
            .map(|name| self.part(name))
            .collect::<Result<_>>()?;
        Ok(HostWeight {
            parts,
            store: Element::F32,
        })
    }

    /// Rows of embedding or head, padded with zeros so that all ranks have as many.
    fn vocab(&self, name: &str) -> Result<HostWeight> {
        let present = self.part(name)?;
        let width = self.partition.vocab_width as usize;
        let padding = width - present.rows;
        let mut parts = Vec::with_capacity(2);
        if padding > 0 {
            let bytes = padding * present.cols * present.element.bytes();
            parts.push(HostMatrix {
                data: Bytes::from(vec![0; bytes]),
                rows: padding,
                row_stride: present.cols,
                ..present
            });
        }
        if present.rows > 0 {
            parts.insert(0, present);
        }
        Ok(HostWeight {
            parts,
            store: self.matrices,
        })
    }

    /// This rank's part of one tensor: rows of it, or a column range of all rows.
    fn part(&self, name: &str) -> Result<HostMatrix> {
        let spec = self
            .specs
            .get(name)
            .with_context(|| format!("the model has no tensor {name}"))?;
        let stored = self
            .checkpoint
            .tensor(name)
            .with_context(|| format!("there is no {name}"))?;
        let file = &self.maps[stored.file];
        let StoredDtype::Float(dtype) = stored.dtype else {
            bail!("{name} is not stored as floating-point numbers");
        };
        let element = element(dtype);
        let part = self.partition.part(spec);
        let (rows, cols) = (to_usize(&part.rows), to_usize(&part.cols));
        // A vector is one row; stored tensors are contiguous, `[rows, cols]`.
        let stride = if spec.is_vector { spec.rows } else { spec.cols } as usize;
        let (rows, cols) = if spec.is_vector {
            (0..1, rows)
        } else {
            (rows, cols)
        };
        let first = rows.start * stride + cols.start;
        let last = if rows.is_empty() || cols.is_empty() {
            first
        } else {
            (rows.end - 1) * stride + cols.end
        };
        let base = usize::try_from(stored.bytes.start)?;
        let range = base + first * element.bytes()..base + last * element.bytes();
        ensure!(
            range.end <= file.len(),
            "{name} goes beyond the end of its file"
        );
        Ok(HostMatrix {
            data: file.slice(range),
            element,
            rows: rows.len(),
            cols: cols.len(),
            row_stride: stride,
        })
    }
}

fn to_usize(range: &std::ops::Range<u32>) -> std::ops::Range<usize> {
    range.start as usize..range.end as usize
}
