//! What a checkpoint holds: names, types, shapes and byte ranges of its tensors, never their values.
//!
//! Reads `model.safetensors`, or `model.safetensors.index.json` and the parts it names. Every file is
//! taken as hostile: sizes are compared before anything is read, the headers are parsed by the
//! `safetensors` crate, and what comes out is checked against the files' true lengths.
//!
//! Invariant: the byte range of every tensor lies inside its file and is as long as shape and type
//! say. The range need not be aligned to the type.

use crate::model_files::{ModelFileError, ModelFiles};
use crate::model_shape::{Dtype, ModelShape};
use crate::partition::tensors;
use crate::quantization::StoredSpec;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

/// The one file of a small checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The list of the parts of a large one.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Largest header of a file in bytes. A header takes about 100 bytes for each tensor.
pub const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Most tensors of a checkpoint: more than 100 for each of the most layers.
pub const MAX_TENSORS: usize = 1 << 19;
/// Most parts of a checkpoint; large published ones have under 200.
pub const MAX_FILES: usize = 4096;

/// Bytes of the length that precedes a header.
const LENGTH_BYTES: u64 = 8;

/// A checkpoint's table of contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    files: Vec<CheckpointFile>,
    tensors: BTreeMap<String, StoredTensor>,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointFile {
    /// Its name in the model's directory.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// One tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// Type of its elements.
    pub dtype: StoredDtype,
    /// Outermost dimension first.
    pub shape: Vec<u64>,
    /// Where its elements are in the file, little endian and row-major. May be unaligned.
    pub bytes: Range<u64>,
}

/// Type of stored elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredDtype {
    /// One that this build computes with.
    Float(Dtype),
    /// 8 bits, signed.
    I8,
    /// 32 bits, signed.
    I32,
    /// 64 bits, signed.
    I64,
    /// 8 bits, a float with 4 bits of exponent and 3 of mantissa.
    F8E4m3,
    /// Another one, by its name in the file. Harmless in a tensor that the model does not need.
    Other(String),
}

impl fmt::Display for StoredDtype {
    /// As in the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Float(Dtype::Float32) => "F32",
            Self::Float(Dtype::Float16) => "F16",
            Self::Float(Dtype::Bfloat16) => "BF16",
            Self::I8 => "I8",
            Self::I32 => "I32",
            Self::I64 => "I64",
            Self::F8E4m3 => "F8_E4M3",
            Self::Other(name) => name,
        })
    }
}

/// Why a checkpoint cannot be loaded. Each is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Neither the single file nor an index is there.
    #[error(
        "{place} has neither {SINGLE_FILE} nor {INDEX_FILE}; weights must be in safetensors files"
    )]
    NoWeights {
        /// The directory, or the built-in model.
        place: String,
    },
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] ModelFileError),
    /// A file is shorter or longer than its header says.
    #[error(
        "{file} is {kind}: its header describes {expected} bytes, the file has {found}; copy it again"
    )]
    Length {
        /// The file's name.
        file: String,
        /// `truncated` or `too long`.
        kind: &'static str,
        /// Size by the header.
        expected: u64,
        /// True size.
        found: u64,
    },
    /// A file is not in the format.
    #[error("{file} is not a valid safetensors file: {reason}")]
    Header {
        /// The file's name.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The index is not in the format.
    #[error("{INDEX_FILE} is invalid: {0}")]
    Index(String),
    /// The index places a tensor in a file that lacks it.
    #[error("{INDEX_FILE} places {tensor} in {file}, which does not have it")]
    Misplaced {
        /// The tensor's name.
        tensor: String,
        /// The file's name.
        file: String,
    },
    /// The model needs tensors that are not there.
    #[error(
        "the checkpoint lacks {tensor} ({missing} of the {needed} tensors of {architecture} are missing); do config.json and weights belong together?"
    )]
    MissingTensor {
        /// The first that is missing.
        tensor: String,
        /// How many are missing.
        missing: usize,
        /// How many the model needs.
        needed: usize,
        /// Of the model.
        architecture: String,
    },
    /// A tensor has another shape than `config.json` implies.
    #[error("{tensor} has shape {found:?}, but by config.json it must be {expected:?}")]
    WrongShape {
        /// The tensor's name.
        tensor: String,
        /// By `config.json`.
        expected: Vec<u64>,
        /// In the file.
        found: Vec<u64>,
    },
    /// A tensor is not in a type that it can be read in.
    #[error("{tensor} is stored as {found}, but by config.json it must be {expected}")]
    WrongDtype {
        /// The tensor's name.
        tensor: String,
        /// The types that would do.
        expected: &'static str,
        /// Its type as the file names it.
        found: String,
    },
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Reads the headers of a model's weight files.
    ///
    /// # Errors
    /// [`CheckpointError`], whose `Display` is a sentence for the operator.
    pub fn open(files: &ModelFiles) -> Result<Self, CheckpointError> {
        let mut checkpoint = Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        if files.exists(SINGLE_FILE) {
            let found = checkpoint.read_header(files, SINGLE_FILE)?;
            checkpoint.tensors.extend(found);
            return Ok(checkpoint);
        }
        if !files.exists(INDEX_FILE) {
            let place = files.to_string();
            return Err(CheckpointError::NoWeights { place });
        }
        let index: Index = serde_json::from_slice(&files.read_json(INDEX_FILE)?)
            .map_err(|e| CheckpointError::Index(e.to_string()))?;
        let parts: BTreeSet<&String> = index.weight_map.values().collect();
        if parts.len() > MAX_FILES || index.weight_map.len() > MAX_TENSORS {
            return Err(CheckpointError::Index(format!(
                "it names {} files and {} tensors, more than {MAX_FILES} and {MAX_TENSORS}",
                parts.len(),
                index.weight_map.len()
            )));
        }
        for part in parts {
            let mut found = checkpoint.read_header(files, part)?;
            // The index decides: a tensor that a file has besides is not part of the model.
            for (name, _) in index.weight_map.iter().filter(|(_, file)| *file == part) {
                let tensor = found
                    .remove(name)
                    .ok_or_else(|| CheckpointError::Misplaced {
                        tensor: name.clone(),
                        file: part.clone(),
                    })?;
                checkpoint.tensors.insert(name.clone(), tensor);
            }
        }
        Ok(checkpoint)
    }

    /// The files, as [`StoredTensor::file`] counts them.
    pub fn files(&self) -> &[CheckpointFile] {
        &self.files
    }

    /// A tensor by its name.
    pub fn tensor(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    /// All tensors by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Whether everything that a model needs is there, in the right shape and a usable type.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`], [`CheckpointError::WrongShape`] or
    /// [`CheckpointError::WrongDtype`] for the first tensor, in the order of the forward pass.
    pub fn check(&self, shape: &ModelShape) -> Result<(), CheckpointError> {
        let needed = tensors(shape).into_iter().flat_map(|spec| spec.stored());
        let needed: Vec<StoredSpec> = needed.collect();
        let mut missing = needed
            .iter()
            .filter(|spec| !spec.optional && self.tensor(&spec.name).is_none());
        if let Some(first) = missing.next() {
            return Err(CheckpointError::MissingTensor {
                tensor: first.name.clone(),
                missing: 1 + missing.count(),
                needed: needed.len(),
                architecture: shape.architecture.clone(),
            });
        }
        needed.iter().try_for_each(|spec| self.check_tensor(spec))
    }

    fn check_tensor(&self, spec: &StoredSpec) -> Result<(), CheckpointError> {
        let Some(stored) = self.tensor(&spec.name) else {
            return Ok(());
        };
        let tensor = spec.name.clone();
        if !spec.has_shape(&stored.shape) {
            let (expected, found) = (spec.shape.clone(), stored.shape.clone());
            return Err(CheckpointError::WrongShape {
                tensor,
                expected,
                found,
            });
        }
        if spec.accepted.takes(&stored.dtype) {
            return Ok(());
        }
        Err(CheckpointError::WrongDtype {
            tensor,
            expected: spec.accepted.names(),
            found: stored.dtype.to_string(),
        })
    }

    /// Adds a file and returns its tensors.
    fn read_header(
        &mut self,
        files: &ModelFiles,
        name: &str,
    ) -> Result<BTreeMap<String, StoredTensor>, CheckpointError> {
        let bytes = files.len(name)?;
        let header = header(files, name, bytes)?;
        let data_start = LENGTH_BYTES + header.len() as u64;
        // Parsing checks that ranges follow each other without gap or overlap, and that each is as
        // long as type and shape say, in checked arithmetic.
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| invalid_header(name, &e.to_string()))?;
        let expected = data_start.saturating_add(metadata.data_len() as u64);
        if bytes != expected {
            let kind = if bytes < expected {
                "truncated"
            } else {
                "too long"
            };
            let file = name.to_owned();
            return Err(CheckpointError::Length {
                file,
                kind,
                expected,
                found: bytes,
            });
        }
        let file = self.files.len();
        self.files.push(CheckpointFile {
            name: name.to_owned(),
            bytes,
        });
        let tensors = metadata.tensors();
        if self.tensors.len() + tensors.len() > MAX_TENSORS {
            return Err(invalid_header(
                name,
                &format!("more than {MAX_TENSORS} tensors"),
            ));
        }
        let stored = tensors.into_iter().map(|(name, info)| {
            let (start, end) = info.data_offsets;
            let tensor = StoredTensor {
                file,
                dtype: stored_dtype(info.dtype),
                shape: info.shape.iter().map(|length| *length as u64).collect(),
                bytes: data_start + start as u64..data_start + end as u64,
            };
            (name, tensor)
        });
        Ok(stored.collect())
    }
}

/// The JSON of a file's header, its length checked first.
fn header(
    files: &ModelFiles,
    name: &str,
    bytes: u64,
) -> Result<std::borrow::Cow<'static, [u8]>, CheckpointError> {
    /// Where a repository was cloned without its large files, this is in their place.
    const LFS_POINTER: &[u8] = b"version https://git-lfs";
    if files
        .read_prefix(name, LFS_POINTER.len() as u64)?
        .starts_with(LFS_POINTER)
    {
        return Err(invalid_header(
            name,
            "it is a Git LFS pointer; run `git lfs pull`",
        ));
    }
    let prefix = files.read_prefix(name, LENGTH_BYTES)?;
    let Ok(prefix) = <[u8; 8]>::try_from(&*prefix) else {
        return Err(invalid_header(name, &format!("it has only {bytes} bytes")));
    };
    let length = u64::from_le_bytes(prefix);
    if length > MAX_HEADER_BYTES {
        let reason = format!("a header of {length} bytes is above the limit of {MAX_HEADER_BYTES}");
        return Err(invalid_header(name, &reason));
    }
    let end = LENGTH_BYTES + length;
    if end > bytes {
        let file = name.to_owned();
        let kind = "truncated";
        return Err(CheckpointError::Length {
            file,
            kind,
            expected: end,
            found: bytes,
        });
    }
    Ok(files.read_range(name, LENGTH_BYTES..end)?)
}

fn stored_dtype(dtype: safetensors::Dtype) -> StoredDtype {
    match dtype {
        safetensors::Dtype::F32 => StoredDtype::Float(Dtype::Float32),
        safetensors::Dtype::F16 => StoredDtype::Float(Dtype::Float16),
        safetensors::Dtype::BF16 => StoredDtype::Float(Dtype::Bfloat16),
        safetensors::Dtype::I8 => StoredDtype::I8,
        safetensors::Dtype::I32 => StoredDtype::I32,
        safetensors::Dtype::I64 => StoredDtype::I64,
        safetensors::Dtype::F8_E4M3 => StoredDtype::F8E4m3,
        other => StoredDtype::Other(other.to_string()),
    }
}

fn invalid_header(file: &str, reason: &str) -> CheckpointError {
    CheckpointError::Header {
        file: file.to_owned(),
        reason: reason.to_owned(),
    }
}
