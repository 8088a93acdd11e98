//! Mathematics on one device: a tensor, a backend, one file per operation.
//!
//! Knows nothing of networks, models or ranks. [`backend::Backend`] is the seam; [`batch`] says
//! what one step works on; `ops` holds each operation's formula, its slow reference and its
//! fast CPU path side by side, and its CUDA kernel with its launch; `cpu` and `cuda` are the backends made of them.

#![expect(
    clippy::inline_always,
    reason = "vector code must end up inside the function that enables the instructions"
)]
#![cfg_attr(
    test,
    expect(
        clippy::cast_possible_truncation,
        reason = "the sizes in tests are small; the library itself is checked without this"
    )
)]

pub mod backend;
pub mod batch;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod ops;
pub mod quantized;
pub mod sampling;
#[cfg(test)]
mod testing;
