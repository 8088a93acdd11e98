//! The process that owns one device: one rank's weights, KV blocks, forward pass and collectives.
//!
//! Knows nothing of requests, HTTP or tokenizers and takes no decision by the clock: each step it
//! is told exactly what to compute.

pub mod batch;
mod clock;
pub mod comm;
pub mod engine;
mod layers;
pub mod models;
pub mod sampler;
#[cfg(test)]
mod testing;
pub mod weights;
