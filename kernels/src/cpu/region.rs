//! Memory of a packed weight, of activations or to work in, on huge pages where it is large: reading them takes fewer
//! table walks.
//!
//! Invariant: it is aligned to a cache line, and zero until it is written.

use super::threads::Threads;
use crate::backend::DeviceError;
use bytemuck::{AnyBitPattern, Pod};
use memmap2::{Advice, MmapMut};

/// What huge pages are aligned to.
const HUGE_PAGE: usize = 2 << 20;

/// Progress is reported about this often, in bytes.
const PROGRESS_BYTES: usize = 8 << 20;

/// So many bytes.
#[derive(Debug)]
pub(crate) struct Region {
    memory: MmapMut,
    /// Where in `memory` it starts.
    start: usize,
    bytes: usize,
}

impl Region {
    /// Room for the product of `factors`, in bytes.
    pub(super) fn zeroed(factors: &[usize]) -> Result<Self, DeviceError> {
        let failed = |reason: String| DeviceError::Failed {
            device: "cpu".into(),
            reason,
        };
        let bytes = super::bytes(factors).and_then(|bytes| usize::try_from(bytes).ok());
        let bytes = bytes
            .ok_or_else(|| failed(format!("memory for {factors:?} is beyond any there is")))?;
        let is_huge = bytes >= HUGE_PAGE / 2;
        let room = if is_huge {
            bytes.next_multiple_of(HUGE_PAGE) + HUGE_PAGE
        } else {
            bytes.max(1) // a map of nothing is refused
        };
        let memory =
            MmapMut::map_anon(room).map_err(|e| failed(format!("taking {bytes} bytes: {e}")))?;
        let start = if is_huge {
            // A kernel without huge pages refuses, and the small ones do as well.
            #[cfg(target_os = "linux")]
            let _ = memory.advise(Advice::HugePage);
            memory.as_ptr().align_offset(HUGE_PAGE)
        } else {
            0
        };
        Ok(Self {
            memory,
            start,
            bytes,
        })
    }

    /// Fills it on all threads: `fill` gets the number and the memory of each panel of `panel` bytes. After some of
    /// them `progress` gets how many are done in all.
    pub(super) fn fill(
        &mut self,
        threads: &Threads,
        panel: usize,
        progress: &mut dyn FnMut(usize),
        fill: impl Fn(usize, &mut [u8]) + Sync,
    ) {
        let at_once = (PROGRESS_BYTES / panel).max(threads.count());
        let mut done = 0;
        for panels in self.as_bytes_mut().chunks_mut(at_once * panel) {
            threads.rows(panels, panel, panel, |i, panel| fill(done + i, panel));
            done += panels.len() / panel;
            progress(done);
        }
    }

    /// All of it.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.memory[self.start..][..self.bytes]
    }

    /// All of it, as what it holds.
    pub(super) fn as_slice<T: AnyBitPattern>(&self) -> &[T] {
        bytemuck::cast_slice(self.as_bytes())
    }

    /// The same, to be changed.
    pub(crate) fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.as_bytes_mut())
    }

    /// All of it, to be changed.
    pub(crate) fn as_bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.bytes]
    }
}
