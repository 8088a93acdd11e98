//! What machines, devices, ranks and partitions there are; every control message and the link
//! that carries it; how shard processes are started.
//!
//! Knows nothing of tensor values, HTTP or requests. Reading order: [`ids`], [`model_shape`],
//! [`quantization`], [`partition`], [`checkpoint`], [`manifest`] for models; [`spec`], [`placement`], [`gpus`], [`fit`], [`examine`] for
//! machines; [`wire`], [`link`], [`launch`] for processes.

pub mod checkpoint;
pub mod examine;
pub mod fit;
pub mod gpus;
pub mod host;
pub mod ids;
pub mod launch;
mod layer_config;
pub mod link;
pub mod manifest;
pub mod model_config;
pub mod model_files;
pub mod model_shape;
pub mod partition;
pub mod placement;
pub mod quantization;
mod rope_config;
pub mod spec;
mod tensors;
pub mod wire;

#[cfg(test)]
#[path = "../tests/common/random.rs"]
mod random;
#[cfg(test)]
mod testing;
