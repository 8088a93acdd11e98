//! The process that owns one device: one rank's weights, KV blocks, forward pass and collectives.
//!
//! Knows nothing of requests, HTTP or tokenizers and takes no decision by the clock: each step it
//! is told exactly what to compute.

pub mod comm;
