//! Mathematics on one device: a tensor, a backend, one file per operation.
//!
//! Knows nothing of networks, models or ranks. [`backend::Backend`] is the seam; [`batch`] says
//! what one step works on; `ops` holds each operation's formula, its slow reference and its
//! fast CPU path side by side; `cpu` is the backend made of them.

#![expect(
    clippy::inline_always,
    reason = "vector code must end up inside the function that enables the instructions"
)]

pub mod backend;
pub mod batch;
pub mod cpu;
mod ops;
pub mod sampling;
#[cfg(test)]
mod testing;
