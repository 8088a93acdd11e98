//! The command line.

pub mod args;
pub mod layers;
pub mod values;

/// What `cluster --version` says beyond the number.
pub const LONG_VERSION: &str = env!("CARGO_PKG_VERSION");
