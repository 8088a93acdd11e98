//! This rank's weights: views of the checkpoint's bytes, and their way onto the device.
//!
//! Which ranges of the files are this rank's is `topology::partition`'s to say; `find` turns them into parts of matrices and
//! stacks what one product can compute: q, k and v, and gate and up. What is quantised is brought into the backends' one
//! form here (`quantised`), and what shall be is quantised (`at_load`), one product at a time, so that no more than that
//! is held twice.
//!
//! Invariant: the bytes that [`DecoderWeights::bytes`] counts before loading are those that loading
//! reports as done.

mod at_load;
mod find;
mod quantised;
#[cfg(test)]
mod tests;

use anyhow::Result;
use bytes::Bytes;
use kernels::backend::{Backend, Element, HostMatrix};
use kernels::quantized::{self, HostQuantized};
use quantised::QuantisedPart;
use std::sync::{Mutex, PoisonError};
use topology::model_shape::Dtype;
use topology::quantization::{Code, Grouping, device_bytes};

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

/// The backend's name for a code.
pub fn code(code: Code) -> quantized::Code {
    match code {
        Code::Int4 => quantized::Code::Int4,
        Code::Int8 => quantized::Code::Int8,
        Code::Fp8 => quantized::Code::Fp8,
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
pub enum HostWeight {
    /// Numbers, stacked by rows.
    Dense {
        /// Where they are.
        parts: Vec<HostMatrix>,
        /// What the device keeps them as.
        store: Element,
    },
    /// Codes, stacked by rows.
    Quantised(Vec<Codes>),
}

/// A part of a weight that the device keeps as codes.
#[derive(Clone, Debug)]
pub struct Codes(Source);

#[derive(Clone, Debug)]
enum Source {
    /// The checkpoint has codes.
    Stored(Box<QuantisedPart>),
    /// The checkpoint has numbers. The first column is this input of the whole weight.
    Numbers {
        matrix: HostMatrix,
        code: Code,
        first_input: u32,
    },
    /// Rows that stand for zeros.
    Zeros {
        code: Code,
        rows: usize,
        cols: usize,
    },
}

impl Codes {
    fn code(&self) -> Code {
        match &self.0 {
            Source::Stored(part) => part.code(),
            Source::Numbers { code, .. } | Source::Zeros { code, .. } => *code,
        }
    }

    /// `[rows, cols]`
    fn shape(&self) -> [usize; 2] {
        match &self.0 {
            Source::Stored(part) => part.shape(),
            Source::Numbers { matrix, .. } => [matrix.rows, matrix.cols],
            Source::Zeros { rows, cols, .. } => [*rows, *cols],
        }
    }

    /// Bytes it will take on the device.
    fn bytes(&self) -> u64 {
        let groups = match &self.0 {
            Source::Stored(part) => part.groups(),
            Source::Numbers {
                matrix,
                code,
                first_input,
            } => {
                let inputs = *first_input..first_input + to_u32(matrix.cols);
                Grouping::at_load(*code).groups_in(&inputs)
            }
            Source::Zeros { .. } => 1,
        };
        let shape = self.shape().map(|length| length as u64);
        device_bytes(self.code(), shape, groups.into())
    }

    fn read(&self, workers: Workers<'_>) -> Result<HostQuantized> {
        match &self.0 {
            Source::Stored(part) => part.read(workers),
            Source::Numbers {
                matrix,
                code,
                first_input,
            } => at_load::quantise(workers, matrix, *code, *first_input),
            Source::Zeros { code, rows, cols } => Ok(HostQuantized {
                code: self::code(*code),
                data: Bytes::from(vec![0; rows * cols]),
                rows: *rows,
                cols: *cols,
                row_stride: *cols,
                inputs: None,
                group_ends: vec![*cols],
                scales: vec![1.0; *rows],
                zeros: vec![0; if *code == Code::Int4 { *rows } else { 0 }],
            }),
        }
    }
}

/// Calls what it is given on some threads at once ([`Backend::on_host`]).
type Workers<'a> = &'a dyn Fn(&(dyn Fn() + Sync));

/// Does `work` for each row of `cols` elements, on all `workers` if there is enough.
fn over_threads<T: Send>(workers: Workers<'_>, rows: Vec<T>, cols: usize, work: impl Fn(T) + Sync) {
    /// Elements that a thread takes at a time, and fewest that are worth waking others for.
    const AT_ONCE: usize = 1 << 16;
    const LEAST: usize = 1 << 19;
    if rows.len() * cols < LEAST {
        return rows.into_iter().for_each(work);
    }
    let count = AT_ONCE.div_ceil(cols);
    let left = Mutex::new(rows.into_iter());
    workers(&|| {
        let next = || {
            let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
            left.by_ref().take(count).collect::<Vec<T>>()
        };
        let mut rows = next();
        while !rows.is_empty() {
            rows.into_iter().for_each(&work);
            rows = next();
        }
    });
}

/// A dimension, which the configuration's limits keep below 2^32.
fn to_u32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

impl HostWeight {
    /// Bytes it will take on the device.
    fn bytes(&self) -> u64 {
        match self {
            Self::Dense { parts, store } => {
                let elements = parts.iter().map(|part| (part.rows * part.cols) as u64);
                elements.sum::<u64>() * store.bytes() as u64
            }
            Self::Quantised(parts) => parts.iter().map(Codes::bytes).sum(),
        }
    }

    /// Puts it on the device. `progress` gets bytes as the backend counts them.
    fn load<B: Backend>(self, backend: &B, progress: &mut dyn FnMut(u64)) -> Result<B::Weight> {
        match self {
            Self::Dense { parts, store } => Ok(backend.load(&parts, store, progress)?),
            Self::Quantised(parts) => {
                let workers: Workers<'_> = &|work| backend.on_host(work);
                let parts = parts.iter().map(|part| part.read(workers));
                let parts = parts.collect::<Result<Vec<_>>>()?;
                Ok(backend.load_quantized(&parts, progress)?)
            }
        }
    }
}

impl DecoderWeights<HostWeight> {
    /// Whether `device` takes every code there is.
    ///
    /// # Errors
    /// A sentence that names one which it does not.
    pub fn refuse_unknown_codes(
        &self,
        device: &str,
        takes: impl Fn(quantized::Code) -> bool,
    ) -> Result<()> {
        let refuse = |found: Code| {
            let name = found.name();
            anyhow::anyhow!(
                "{device} cannot compute with {name} weights; use a checkpoint that is not quantized, without \
                 --quantization, or another device"
            )
        };
        let checked = self.clone().try_map(&mut |weight| match weight {
            HostWeight::Dense { .. } => Ok(()),
            HostWeight::Quantised(parts) => {
                let mut codes = parts.iter().map(Codes::code);
                let unknown = codes.find(|found| !takes(code(*found)));
                unknown.map_or(Ok(()), |found| Err(refuse(found)))
            }
        });
        checked.map(|_: DecoderWeights<()>| ())
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
            // A backend may count what it packs otherwise than `bytes` does: a weight ends where that says.
            let end = done + weight.bytes();
            let mut passed = |bytes| {
                done = end.min(done + bytes);
                if done - reported >= PROGRESS_BYTES {
                    reported = done;
                    progress(done);
                }
            };
            let loaded = weight.load(backend, &mut passed)?;
            done = end;
            Ok(loaded)
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
