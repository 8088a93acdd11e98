//! A step's index arrays on the device.
//!
//! All arrays go through one pinned buffer in one copy. They stand one after the other, each beginning at a
//! multiple of [`ALIGN`] bytes, in an order that puts the one whose length varies most last: where all begin
//! depends on the numbers of tokens and rows alone, so that a step of the same size finds them where a recorded one did.
//!
//! Invariant: an upload changes nothing before it has checked the arrays against each other and the memory.

use super::device::{Device, Memory, Pinned};
use crate::backend::{DeviceError, Element};
use crate::batch::Batch;
use crate::cpu::CpuBatch;
use crate::ops::paged_attention::flashinfer::{FlashInfer, Planned};
use crate::ops::sample::cuda::not_deferred;
use std::cell::{RefCell, RefMut};
use std::ops::Range;

/// Arrays begin at multiples of this many bytes, for wide loads.
const ALIGN: usize = 16;
const ARRAYS: usize = 9;
const LOGIT_TOKENS: usize = 7;

/// Marks a token id that is a place among the results of sampling, as in `embed.cu`.
const LEFT: u32 = 1 << 31;

/// A [`Batch`] in device memory taken at start, and what follows from it.
#[derive(Debug)]
pub struct CudaBatch {
    /// The same arrays on the host, checked.
    host: CpuBatch,
    memory: Memory,
    pinned: Pinned,
    /// Where each array is, in bytes.
    ranges: [Range<usize>; ARRAYS],
    uploads: u64,
    /// Where attention keeps what it derives from the arrays; `None` where no shape of this element type is compiled.
    flashinfer: RefCell<Option<FlashInfer>>,
}

impl CudaBatch {
    /// Memory for the largest step.
    pub(crate) fn with_capacity(
        device: &Device,
        (max_tokens, max_rows, max_blocks): (usize, usize, usize),
        element: Element,
    ) -> Result<Self, DeviceError> {
        // Five arrays of tokens, three of rows (two of them with one more), one of blocks.
        let elements = 5 * max_tokens + 3 * max_rows + 2 + max_blocks;
        let bytes = elements * size_of::<u32>() + ARRAYS * ALIGN;
        let what = "the index arrays of a step";
        let flashinfer = FlashInfer::is_for(element)
            .then(|| FlashInfer::new(device, max_tokens, max_rows))
            .transpose()?;
        Ok(Self {
            host: CpuBatch::with_capacity(max_tokens, max_rows, max_blocks),
            memory: device.allocate(what, bytes)?,
            pinned: device.pinned(what, bytes)?,
            ranges: std::array::from_fn(|_| 0..0),
            uploads: 0,
            flashinfer: RefCell::new(flashinfer),
        })
    }

    /// Copies `from`. Tokens that are left to the device are named by their `place` among the results of sampling. An
    /// error where one has none, or where the arrays are larger than the memory or contradict each other.
    pub(crate) fn upload(
        &mut self,
        device: &Device,
        from: &Batch,
        place: impl Fn(u32) -> Option<u32>,
    ) -> Result<(), DeviceError> {
        for &(_, request) in &from.left {
            place(request).ok_or_else(|| DeviceError::Failed {
                device: device.name().to_owned(),
                reason: not_deferred(request),
            })?;
        }
        self.host.upload(from)?;
        let host = &self.host.host;
        let arrays: [&[u32]; ARRAYS] = [
            &host.token_ids,
            &host.positions,
            &host.slots,
            &self.host.token_rows,
            &host.row_starts,
            &host.context_lens,
            &host.block_starts,
            &host.logit_tokens,
            &host.blocks,
        ];
        let bytes = self.pinned.write()?;
        let mut end = 0;
        for (index, (array, range)) in arrays.into_iter().zip(&mut self.ranges).enumerate() {
            let source: &[u8] = bytemuck::cast_slice(array);
            *range = end..end + source.len();
            bytes[range.clone()].copy_from_slice(source);
            let room = match index {
                // As many as there could be: how many are wanted is not to move what follows.
                LOGIT_TOKENS => size_of_val(host.token_ids.as_slice()),
                _ => source.len(),
            };
            end = (end + room).next_multiple_of(ALIGN);
        }
        let token_ids: &mut [u32] = bytemuck::cast_slice_mut(&mut bytes[self.ranges[0].clone()]);
        for &(token, request) in &host.left {
            token_ids[token as usize] = LEFT | place(request).unwrap_or_default();
        }
        let used = self.ranges[ARRAYS - 1].end;
        device.upload(&self.pinned, used, (&mut self.memory, 0))?;
        self.uploads += 1;
        Ok(())
    }

    /// Where attention keeps its plans of the current step.
    pub(crate) fn flashinfer(&self) -> RefMut<'_, Option<FlashInfer>> {
        self.flashinfer.borrow_mut()
    }

    /// The plans of attention that were made for the current step.
    pub(crate) fn plans(&self) -> Vec<Planned> {
        let space = self.flashinfer();
        (space.as_ref()).map_or_else(Vec::new, |space| space.planned(self.uploads))
    }

    /// Makes `plans` for the current step, where a step of the same size had them.
    pub(crate) fn prepare(&self, device: &Device, plans: &[Planned]) -> Result<(), DeviceError> {
        match self.flashinfer().as_mut() {
            Some(space) => space.prepare(plans, device, self),
            None => Ok(()),
        }
    }

    /// The arrays on the host.
    pub fn host(&self) -> &Batch {
        &self.host.host
    }

    /// How often [`upload`](crate::backend::Backend::upload) has filled this: what was derived from one is
    /// out of date after the next.
    pub fn uploads(&self) -> u64 {
        self.uploads
    }

    /// New tokens of all rows.
    pub fn num_tokens(&self) -> usize {
        self.host().num_tokens()
    }

    /// Sequences.
    pub fn num_rows(&self) -> usize {
        self.host().num_rows()
    }

    /// Rows of logits that are wanted.
    pub fn num_logit_rows(&self) -> usize {
        self.host().logit_tokens.len()
    }

    /// Token ids, or where those are that the step before chose, on the device. `[tokens]`
    pub fn token_ids(&self) -> *const u32 {
        self.array(0)
    }

    /// Position of each token in its sequence, on the device. `[tokens]`
    pub fn positions(&self) -> *const u32 {
        self.array(1)
    }

    /// Where each token's key and value go, on the device. `[tokens]`
    pub fn slots(&self) -> *const u32 {
        self.array(2)
    }

    /// The row that each token belongs to, on the device. `[tokens]`
    pub fn token_rows(&self) -> *const u32 {
        self.array(3)
    }

    /// First token of each row, and the end, on the device. `[rows + 1]`
    pub fn row_starts(&self) -> *const u32 {
        self.array(4)
    }

    /// Tokens of each row's sequence after this step, on the device. `[rows]`
    pub fn context_lens(&self) -> *const u32 {
        self.array(5)
    }

    /// First block of each row, and the end, on the device. `[rows + 1]`
    pub fn block_starts(&self) -> *const u32 {
        self.array(6)
    }

    /// Tokens whose logits are wanted, on the device. `[logit rows]`
    pub fn logit_tokens(&self) -> *const u32 {
        self.array(LOGIT_TOKENS)
    }

    /// Block ids of all rows, on the device. `[sum of blocks]`
    pub fn blocks(&self) -> *const u32 {
        self.array(8)
    }

    fn array(&self, index: usize) -> *const u32 {
        self.memory.at(self.ranges[index].start).cast()
    }
}
