//! Finds this rank's part of every weight in the checkpoint's files.
//!
//! Files are mapped, not read; a rank touches the pages of its own ranges only. Computes nothing with the values.
//!
//! Invariant: a part lies within its file, whatever the file says.

#![expect(
    unsafe_code,
    reason = "mapping the checkpoint's files is the crate's one mmap"
)]

use super::quantised::{QuantisedPart, Tensors};
use super::{Codes, DecoderWeights, HostWeight, LayerWeights, Linear, Source, element};
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use kernels::backend::{Element, HostMatrix};
use memmap2::Mmap;
use std::collections::HashMap;
use std::fs::File;
use topology::checkpoint::{Checkpoint, StoredDtype, StoredTensor};
use topology::model_files::ModelFiles;
use topology::model_shape::{Dtype, ModelShape};
use topology::partition::HEAD;
use topology::partition::{Partition, TensorSpec, tensors};
use topology::quantization::{Code, Scheme};

const EMBEDDING: &str = "model.embed_tokens.weight";

impl DecoderWeights<HostWeight> {
    /// Finds this rank's part of every weight. Reads nothing but the files' maps.
    ///
    /// Matrices are stored as `dtype`, but those of linear layers that the checkpoint has as codes, or that become codes
    /// `at_load`, and the head where that becomes some; norms and biases in f32, which costs nothing and keeps what the
    /// checkpoint says.
    ///
    /// # Errors
    /// If a file cannot be mapped or is shorter than `checkpoint` says.
    pub fn find(
        files: &ModelFiles,
        checkpoint: &Checkpoint,
        shape: &ModelShape,
        partition: &Partition,
        dtype: Dtype,
        (at_load, head_at_load): (Option<Code>, Option<Code>),
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
            at_load,
        };
        let layers = (0..shape.num_layers).map(|layer| finder.layer(shape, layer));
        Ok(Self {
            embedding: finder.vocab(EMBEDDING, None)?,
            layers: layers.collect::<Result<_>>()?,
            final_norm: finder.vector(&["model.norm.weight".to_owned()])?,
            head: match (shape.tie_word_embeddings, head_at_load) {
                (false, _) => Some(finder.vocab(HEAD, head_at_load)?),
                (true, Some(_)) => Some(finder.vocab(EMBEDDING, head_at_load)?),
                (true, None) => None,
            },
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

/// A part of a matrix.
enum Part {
    Numbers(HostMatrix),
    Codes(Codes),
}

impl Part {
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Numbers(matrix) => [matrix.rows, matrix.cols],
            Self::Codes(codes) => codes.shape(),
        }
    }
}

struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    partition: &'a Partition,
    maps: Vec<Bytes>,
    specs: HashMap<String, TensorSpec>,
    matrices: Element,
    at_load: Option<Code>,
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
        let parts = names.iter().map(|name| self.part(name, self.at_load));
        self.weight(parts.collect::<Result<_>>()?)
    }

    fn vector(&self, names: &[String]) -> Result<HostWeight> {
        let spec = |name: &String| self.spec(name).and_then(|spec| self.numbers(spec));
        Ok(HostWeight::Dense {
            parts: names.iter().map(spec).collect::<Result<_>>()?,
            store: Element::F32,
        })
    }

    /// Rows of embedding or head, padded with zeros so that all ranks have as many.
    fn vocab(&self, name: &str, at_load: Option<Code>) -> Result<HostWeight> {
        let present = self.part(name, at_load)?;
        let [rows, cols] = present.shape();
        let padding = self.partition.vocab_width as usize - rows;
        let zeros = match &present {
            Part::Numbers(matrix) => Part::Numbers(HostMatrix {
                data: Bytes::from(vec![0; padding * cols * matrix.element.bytes()]),
                rows: padding,
                row_stride: cols,
                ..*matrix
            }),
            Part::Codes(codes) => Part::Codes(Codes(Source::Zeros {
                code: codes.code(),
                rows: padding,
                cols,
            })),
        };
        let mut parts = vec![present, zeros];
        parts.retain(|part| part.shape()[0] > 0);
        self.weight(parts)
    }

    /// One weight of its parts: all numbers, or all codes.
    fn weight(&self, parts: Vec<Part>) -> Result<HostWeight> {
        let (mut numbers, mut codes) = (Vec::new(), Vec::new());
        for part in parts {
            match part {
                Part::Numbers(matrix) => numbers.push(matrix),
                Part::Codes(part) => codes.push(part),
            }
        }
        match (numbers.is_empty(), codes.is_empty()) {
            (_, true) => Ok(HostWeight::Dense {
                parts: numbers,
                store: self.matrices,
            }),
            (true, false) => Ok(HostWeight::Quantised(codes)),
            (false, false) => bail!("parts of one product are quantized and others are not"),
        }
    }

    fn spec(&self, name: &str) -> Result<&TensorSpec> {
        let spec = self.specs.get(name);
        spec.with_context(|| format!("the model has no tensor {name}"))
    }

    /// This rank's part of one matrix. Where it is stored as numbers it becomes codes `at_load`.
    fn part(&self, name: &str, at_load: Option<Code>) -> Result<Part> {
        let spec = self.spec(name)?;
        if let Some(scheme) = &spec.scheme {
            let codes = self.codes(spec, scheme)?;
            return Ok(Part::Codes(Codes(Source::Stored(Box::new(codes)))));
        }
        let matrix = self.numbers(spec)?;
        Ok(match at_load {
            Some(code) => Part::Codes(Codes(Source::Numbers {
                matrix,
                code,
                first_input: self.partition.part(spec).cols.start,
            })),
            None => Part::Numbers(matrix),
        })
    }

    /// This rank's part of a matrix that is stored as codes.
    fn codes(&self, spec: &TensorSpec, scheme: &Scheme) -> Result<QuantisedPart> {
        let mut tensors = Tensors::new();
        for stored in spec.stored() {
            match self.checkpoint.tensor(&stored.name) {
                Some(found) => {
                    // The check of the checkpoint said so before; here it keeps indices within the bytes.
                    ensure!(
                        stored.has_shape(&found.shape) && stored.accepted.takes(&found.dtype),
                        "{} is not stored as config.json says",
                        stored.name
                    );
                    tensors.insert(stored.role, self.bytes(&stored.name, found)?, &found.dtype);
                }
                None => ensure!(stored.optional, "there is no {}", stored.name),
            }
        }
        let part = self.partition.part(spec);
        QuantisedPart::new(spec, *scheme, &part, tensors)
    }

    /// All bytes of a tensor.
    fn bytes(&self, name: &str, stored: &StoredTensor) -> Result<Bytes> {
        let file = &self.maps[stored.file];
        let range = usize::try_from(stored.bytes.start)?..usize::try_from(stored.bytes.end)?;
        ensure!(
            range.end <= file.len(),
            "{name} goes beyond the end of its file"
        );
        Ok(file.slice(range))
    }

    /// This rank's part of a tensor of numbers: rows of it, or a column range of all rows.
    fn numbers(&self, spec: &TensorSpec) -> Result<HostMatrix> {
        let name = &spec.name;
        let stored = self.checkpoint.tensor(name);
        let stored = stored.with_context(|| format!("there is no {name}"))?;
        let tensor = self.bytes(name, stored)?;
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
        let range = first * element.bytes()..last * element.bytes();
        ensure!(
            range.end <= tensor.len(),
            "{name} is shorter than its shape"
        );
        Ok(HostMatrix {
            data: tensor.slice(range),
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
