//! Large copies between host and device, in pieces through two pinned buffers.
//!
//! While one buffer is copied by the device the other is filled by several threads, so a load runs at the
//! speed of the slower of the two: page faults of a memory map wait for the disk in all threads at once.
//!
//! Invariant: nothing is allocated after the start, and a buffer is not touched before its last copy is over.

use super::device::{Device, Memory, Pinned};
use crate::backend::DeviceError;
use rayon::prelude::*;
use std::ops::Range;

/// Long enough that a piece's copy hides what starting it costs; two of them are pinned for good.
const PIECE_BYTES: usize = 16 << 20;
/// What one thread fills at a time. A multiple of every element's size.
const SLICE_BYTES: usize = 1 << 20;
/// More threads than this do not read faster from one disk or one memory.
const MAX_READERS: usize = 8;

/// Two buffers and the threads that fill them.
#[derive(Debug)]
pub(crate) struct Transfer {
    buffers: [Pinned; 2],
    /// The buffer that is next.
    turn: usize,
    readers: rayon::ThreadPool,
}

impl Transfer {
    /// Pins the buffers and starts the threads.
    pub(crate) fn new(device: &Device) -> Result<Self, DeviceError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let readers = rayon::ThreadPoolBuilder::new()
            .num_threads(cores.min(MAX_READERS))
            .thread_name(|index| format!("reader-{index}"))
            .build();
        let readers = readers.map_err(|error| DeviceError::Failed {
            device: device.name().to_owned(),
            reason: format!("cannot start the threads that read weights ({error})"),
        })?;
        let pinned = || device.pinned("copies to the device", PIECE_BYTES);
        Ok(Self {
            buffers: [pinned()?, pinned()?],
            turn: 0,
            readers,
        })
    }

    /// Queues the copy of the bytes that `fill` writes to the first `bytes` of `to`. `fill` gets a range of them and
    /// room for it, on any thread; ranges begin at multiples of [`SLICE_BYTES`]. `progress` gets the bytes of
    /// each piece when it is queued.
    pub(crate) fn write(
        &mut self,
        device: &Device,
        (to, bytes): (&mut Memory, usize),
        fill: &(impl Fn(Range<usize>, &mut [u8]) + Sync),
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), DeviceError> {
        for start in (0..bytes).step_by(PIECE_BYTES) {
            let length = PIECE_BYTES.min(bytes - start);
            let buffer = &mut self.buffers[self.turn];
            self.turn = 1 - self.turn;
            let room = &mut buffer.write()?[..length];
            if length <= SLICE_BYTES {
                fill(start..start + length, room);
            } else {
                let slices = room.par_chunks_mut(SLICE_BYTES).enumerate();
                self.readers.install(|| {
                    slices.for_each(|(index, slice)| {
                        let start = start + index * SLICE_BYTES;
                        fill(start..start + slice.len(), slice);
                    });
                });
            }
            device.upload(buffer, length, (to, start))?;
            progress(length as u64);
        }
        Ok(())
    }

    /// Waits for the first `bytes` of `from` and hands them to `take` in order, in pieces of whole elements.
    pub(crate) fn read(
        &mut self,
        device: &Device,
        (from, bytes): (&Memory, usize),
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<(), DeviceError> {
        let starts = (0..bytes).step_by(PIECE_BYTES);
        let mut waiting: Option<usize> = None;
        for start in starts {
            let length = PIECE_BYTES.min(bytes - start);
            device.download((from, start), length, &mut self.buffers[self.turn])?;
            // The piece before this one is taken while this one is copied.
            if waiting.replace(length).is_some() {
                take(self.buffers[1 - self.turn].read()?);
            }
            self.turn = 1 - self.turn;
        }
        if let Some(length) = waiting {
            take(&self.buffers[1 - self.turn].read()?[..length]);
        }
        Ok(())
    }
}
