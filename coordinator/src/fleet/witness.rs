//! Who is told of shard processes as they come and go, and of every line they print.
//!
//! For the operator's eyes: nothing the fleet does depends on it. Invariant: what is said of a process
//! names the [`Source`] it was launched as, so that the end of an old one is not taken for its
//! successor's.

use super::inbox::Source;
use std::fmt;
use topology::ids::Rank;
use topology::wire::Hello;

/// Hears of processes. Its methods may be called from any thread, and must not wait for anything but a
/// file.
pub trait Witness: fmt::Debug + Send + Sync {
    /// A process was started; `pid` is this machine's, of the shard or of the `ssh` it is behind.
    fn launched(&self, source: Source, pid: u32);

    /// It was admitted; `hello` has its process id on its own machine.
    fn admitted(&self, hello: &Hello);

    /// It is gone.
    fn ended(&self, source: Source, how: &str);

    /// It printed a line.
    fn line(&self, rank: Rank, line: &str);
}

/// Nobody is told.
impl Witness for () {
    fn launched(&self, _: Source, _: u32) {}
    fn admitted(&self, _: &Hello) {}
    fn ended(&self, _: Source, _: &str) {}
    fn line(&self, _: Rank, _: &str) {}
}
