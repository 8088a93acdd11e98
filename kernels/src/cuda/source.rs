//! Where the activation matrices that collectives work on come from, if not from the driver.
//!
//! Some collectives are faster over memory of their library's own making. This crate knows no collectives,
//! so whoever does hands over two functions. Invariant: what was taken is given back to the same source, once.

/// A source of device memory on the current thread's GPU.
#[derive(Clone, Copy, Debug)]
pub struct TensorSource {
    /// So many bytes, at least one; `None` where there are none, and the driver is asked instead.
    pub take: fn(usize) -> Option<u64>,
    /// Takes them back. The device is done with them.
    pub give_back: fn(u64),
}
