//! Weights on their way to the device: from stored bytes, usually a memory map, through pinned buffers.
//!
//! The parts of a weight are taken as one sequence of elements, part after part and row after row without the
//! gaps between rows. Any range of it can be written by any thread, so nothing is put together on the host first.
//! The system is told which pages come next, so that the disk is busy while a piece is copied.
//!
//! Invariant: what arrives is what the CPU backend's `gathered` makes of the same parts.

#![expect(
    unsafe_code,
    reason = "the system is told about ranges of memory by address"
)]

use super::CudaWeight;
use super::device::Device;
use super::section;
use super::transfer::Transfer;
use crate::backend::{DeviceError, Element, HostMatrix};
use crate::cpu::element::{Stored, by_element};
use crate::cpu::weight::{are_vectors, stacked_shape};
use crate::quantized::HostQuantized;
use rustix::mm::Advice;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// How far ahead of the copy the system is told to read. Two pieces: one being read, one to come.
const AHEAD_BYTES: usize = 32 << 20;

/// Puts the stacked parts on the device as `store`, and vectors as `compute` too.
pub(crate) fn load(
    (device, transfer): (&Device, &mut Transfer),
    parts: &[HostMatrix],
    (store, compute): (Element, Element),
    progress: &mut dyn FnMut(u64),
) -> Result<CudaWeight, DeviceError> {
    let (rows, cols) = stacked_shape(parts).map_err(|reason| DeviceError::Failed {
        device: device.name().to_owned(),
        reason,
    })?;
    let mut place = |element: Element, progress: &mut dyn FnMut(u64)| {
        let bytes = rows * cols * element.bytes();
        let mut memory = device.allocate("a weight", bytes)?;
        let source = Source::new(parts, element);
        source.fetch(0..AHEAD_BYTES);
        let fill = |range: Range<usize>, room: &mut [u8]| source.copy(range, room);
        let mut queued = 0;
        let mut next = |bytes| {
            progress(bytes);
            queued += usize::try_from(bytes).unwrap_or(usize::MAX);
            source.fetch(queued..queued + AHEAD_BYTES);
        };
        transfer.write(device, (&mut memory, bytes), &fill, &mut next)?;
        Ok((memory, element))
    };
    let memory = place(store, progress)?;
    let other = (are_vectors(parts) && store != compute)
        .then(|| place(compute, &mut |_| ()))
        .transpose()?;
    Ok(CudaWeight::new(memory, (rows, cols), other))
}

/// Puts the stacked parts on the device in as many bits as their codes have, to be multiplied with `compute`.
pub(crate) fn load_quantized(
    (device, transfer): (&Device, &mut Transfer),
    parts: &[HostQuantized],
    compute: Element,
    progress: &mut dyn FnMut(u64),
) -> Result<CudaWeight, DeviceError> {
    let failed = |reason: String| DeviceError::Failed {
        device: device.name().to_owned(),
        reason,
    };
    let first = parts.first();
    let first = first.ok_or_else(|| failed("a weight without parts".to_owned()))?;
    for part in parts {
        part.check().map_err(failed)?;
        if part.cols != first.cols {
            let widths = (first.cols, part.cols);
            return Err(failed(format!("a weight of parts with {widths:?} columns")));
        }
    }
    let mut sections = Vec::new();
    for stack in section::stacks(parts) {
        let bytes = stack.plan().bytes();
        let mut memory = device.allocate("a quantised weight", bytes)?;
        stack.sources(0..AHEAD_BYTES, announce);
        let is_broken = AtomicBool::new(false);
        let fill = |range: Range<usize>, room: &mut [u8]| {
            if stack.copy(range, room).is_err() {
                is_broken.store(true, Ordering::Relaxed);
            }
        };
        let mut queued = 0;
        let mut next = |bytes| {
            progress(bytes);
            queued += usize::try_from(bytes).unwrap_or(usize::MAX);
            stack.sources(queued..queued + AHEAD_BYTES, announce);
        };
        transfer.write(device, (&mut memory, bytes), &fill, &mut next)?;
        if is_broken.into_inner() {
            return Err(failed(
                "a weight in fp8 has codes that stand for no number; get the checkpoint again"
                    .to_owned(),
            ));
        }
        sections.push(stack.into_section(memory));
    }
    let rows = parts.iter().map(|part| part.rows).sum();
    Ok(CudaWeight::quantized(sections, (rows, first.cols), compute))
}

/// Tells the system that `bytes`, perhaps of a memory map, are wanted soon.
fn announce(bytes: &[u8]) {
    let start = bytes.as_ptr() as usize;
    let page = start / PAGE * PAGE;
    // SAFETY: the advice changes no contents, whatever memory this is. A refusal costs speed alone.
    let _ = unsafe {
        let length = bytes.len() + start - page;
        rustix::mm::madvise(page as *mut _, length, Advice::WillNeed)
    };
}

/// The elements of all parts, one after the other, as bytes of `store`.
struct Source<'a> {
    parts: &'a [HostMatrix],
    store: Element,
}

impl<'a> Source<'a> {
    fn new(parts: &'a [HostMatrix], store: Element) -> Self {
        Self { parts, store }
    }

    /// Writes the elements that are the bytes `range` of the whole.
    fn copy(&self, range: Range<usize>, room: &mut [u8]) {
        let width = self.store.bytes();
        let elements = range.start / width..range.end / width;
        let mut room = room;
        self.runs(elements, |part, bytes| {
            let count = bytes.len() / part.element.bytes();
            let target = room
                .split_off_mut(..count * width)
                .expect("ranges and rooms agree");
            if part.element == self.store {
                target.copy_from_slice(bytes);
            } else {
                by_element!(part.element, From => by_element!(self.store, To => {
                    let values = bytes.chunks_exact(size_of::<From>());
                    for (to, from) in target.chunks_exact_mut(size_of::<To>()).zip(values) {
                        let value = bytemuck::pod_read_unaligned::<From>(from).widen();
                        to.copy_from_slice(bytemuck::bytes_of(&To::narrow(value)));
                    }
                }));
            }
        });
    }

    /// Tells the system that the elements behind the bytes `range` of the whole are wanted soon.
    fn fetch(&self, range: Range<usize>) {
        let width = self.store.bytes();
        self.parts_of(range.start / width..range.end / width, |part, elements| {
            let first = element_at(part, elements.start);
            let end = element_at(part, elements.end - 1) + part.element.bytes();
            announce(&part.data[first..end]);
        });
    }

    /// Calls `take` with each part that has some of the `elements` of the whole, and which of its own those are.
    fn parts_of(&self, elements: Range<usize>, mut take: impl FnMut(&HostMatrix, Range<usize>)) {
        let mut before = 0;
        for part in self.parts {
            let count = part.rows * part.cols;
            let own = elements.start.saturating_sub(before).min(count)
                ..elements.end.saturating_sub(before).min(count);
            if !own.is_empty() {
                take(part, own);
            }
            before += count;
        }
    }

    /// Calls `take` with the bytes of `elements` of the whole, in runs that lie side by side.
    fn runs(&self, elements: Range<usize>, mut take: impl FnMut(&HostMatrix, &[u8])) {
        self.parts_of(elements, |part, own| {
            let width = part.element.bytes();
            let mut next = own.start;
            while next < own.end {
                let whole = part.row_stride == part.cols;
                let row_end = (next / part.cols + 1) * part.cols;
                let end = if whole { own.end } else { row_end.min(own.end) };
                let start = element_at(part, next);
                take(part, &part.data[start..start + (end - next) * width]);
                next = end;
            }
        });
    }
}

const PAGE: usize = 4096;

/// Where element `index` of the part, counted without gaps, is in its bytes.
fn element_at(part: &HostMatrix, index: usize) -> usize {
    (index / part.cols * part.row_stride + index % part.cols) * part.element.bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::cuda::CudaBackend;
    use crate::cuda::device::Memory;
    use crate::cuda::testing::each_element;
    use crate::testing::{ELEMENTS, Rng, host_matrix, rounded};

    #[test]
    fn any_cut_of_the_parts_gives_the_same_bytes() {
        let mut rng = Rng::new(40);
        for stored in ELEMENTS {
            for store in ELEMENTS {
                let cols = rng.within(1..30);
                let mut values = Vec::new();
                let mut parts = Vec::new();
                for _ in 0..rng.within(1..4) {
                    let count = rng.within(1..20);
                    let part = rng.values(count * cols);
                    parts.push(host_matrix(&mut rng, &part, cols, stored));
                    values.extend(rounded(&rounded(&part, stored), store));
                }
                let expected: Vec<u8> = by_element!(store, E => {
                    values.iter().flat_map(|v| bytemuck::bytes_of(&E::narrow(*v)).to_vec()).collect()
                });
                let source = Source::new(&parts, store);
                source.fetch(0..expected.len());
                let mut found = vec![0; expected.len()];
                let mut start = 0;
                while start < found.len() {
                    let step = rng.within(1..40) * store.bytes();
                    let end = (start + step).min(found.len());
                    source.copy(start..end, &mut found[start..end]);
                    start = end;
                }
                assert_eq!(found, expected, "{stored:?} as {store:?}");
            }
        }
    }

    /// More than two pieces, so that buffers are used again while they are copied.
    #[test]
    fn a_large_weight_arrives_whole_with_its_progress_and_its_copy_for_biases() {
        each_element(42, |cuda, rng| {
            let (rows, cols) = (2 * cuda.element().bytes() + 1, 5 << 20);
            let stored: Vec<u8> = (0..=250).cycle().take(rows * cols).collect();
            let part = |element: Element| HostMatrix {
                data: bytes::Bytes::from(stored.clone()),
                element,
                rows,
                cols: cols / element.bytes(),
                row_stride: cols / element.bytes(),
            };
            let element = cuda.element();
            let mut done = 0;
            let weight = cuda
                .load(&[part(element)], element, &mut |bytes| done += bytes)
                .unwrap();
            assert_eq!(done, stored.len() as u64);
            assert!(
                bytes_of(cuda, weight.memory()) == stored,
                "the bytes are the stored ones"
            );

            let short = rng.values(1000);
            let vector = host_matrix(rng, &short, 1000, Element::F32);
            let vector = cuda.load(&[vector], Element::F32, &mut |_| ()).unwrap();
            assert_eq!(vector.element(), Element::F32);
            let whole = bytes_of(cuda, vector.memory());
            assert_eq!(whole, bytemuck::cast_slice::<f32, u8>(&short));
            assert_eq!(
                element == Element::F32,
                vector.pointer_as(element) == vector.pointer()
            );
        });
    }

    fn bytes_of(cuda: &CudaBackend, memory: &Memory) -> Vec<u8> {
        let mut found = Vec::new();
        let mut take = |bytes: &[u8]| found.extend_from_slice(bytes);
        let mut transfer = cuda.transfer.borrow_mut();
        (transfer.read(&cuda.device, (memory, memory.bytes()), &mut take)).unwrap();
        found
    }
}
