//! Whole groups of engines on the CPU backend: against references, and against themselves.
//!
//! Processes, links and the coordinator are not here; `tests/processes.rs` and the coordinator's
//! tests have those.

#[cfg(feature = "cuda")]
mod cuda;
mod equivalences;
mod loading;
mod quantised;
mod reference;
mod references;
mod support;
#[path = "../../src/testing.rs"]
mod testing;
