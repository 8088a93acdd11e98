//! Memory that products with quantised weights share: elements that a weight stands for, rows of x in the order of a
//! weight's columns, and sums that are not results yet.
//!
//! Taken while weights are loaded, so that what is left for KV blocks is counted after it. What is in it is of use only
//! to the operations that one product queues. Invariant: it stays where it is once weights are loaded, as recordings need.

use super::device::{Device, Memory};
use super::section::Plan;
use crate::backend::{DeviceError, Element};

/// Rows and outputs of which there is always room for so many, and that pieces are multiples of: results of a piece
/// then begin where allocations may.
pub(crate) const PIECE: usize = 128;

/// Enough that products of a piece of a weight run as fast as those of the whole.
const WEIGHTS_BYTES: usize = if EMULATED { 64 << 10 } else { 64 << 20 };
/// 2,340 rows of 14,336 half-precision elements.
const INPUTS_BYTES: usize = if EMULATED { 64 << 10 } else { 64 << 20 };
/// What stays in the cache of a large device until it is read again.
const SUMS_BYTES: usize = if EMULATED { 64 << 10 } else { 32 << 20 };

/// Small pieces, so that tests meet several.
const EMULATED: bool = cfg!(feature = "cuda-emulation");

/// The three, none of them before the first quantised weight.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    pub(crate) weights: Area,
    pub(crate) inputs: Area,
    pub(crate) sums: Area,
}

/// One of them.
#[derive(Debug, Default)]
pub(crate) struct Area(Option<Memory>);

impl Workspace {
    /// Makes room for a product with such a section, by `element`s.
    pub(crate) fn reserve(
        &mut self,
        device: &Device,
        plan: &Plan,
        element: Element,
    ) -> Result<(), DeviceError> {
        let piece = PIECE * plan.columns * element.bytes();
        self.weights.reserve(device, piece.max(WEIGHTS_BYTES))?;
        // Codes take less than elements, and leave room for a scale of each row.
        self.inputs.reserve(device, piece.max(INPUTS_BYTES))?;
        let sums = PIECE * plan.outputs * size_of::<f32>();
        self.sums.reserve(device, sums.max(SUMS_BYTES))
    }
}

impl Area {
    fn reserve(&mut self, device: &Device, bytes: usize) -> Result<(), DeviceError> {
        if self.bytes() < bytes {
            // Not both at once.
            self.0 = None;
            self.0 = Some(device.allocate("products with quantised weights", bytes)?);
        }
        Ok(())
    }

    fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, Memory::bytes)
    }

    /// The memory.
    ///
    /// # Panics
    /// Before there is any.
    pub(crate) fn memory(&mut self) -> &mut Memory {
        self.0.as_mut().expect("loading a weight reserves it")
    }

    /// How many items of `bytes` there is room for: a multiple of [`PIECE`], and at least that.
    pub(crate) fn pieces_of(&self, bytes: usize) -> usize {
        let count = self.bytes() / bytes / PIECE * PIECE;
        assert!(count > 0, "loading a weight makes room for a piece of it");
        count
    }
}
