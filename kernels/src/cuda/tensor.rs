//! An activation matrix in device memory.
//!
//! Invariant: `rows <= capacity`, and the memory holds `capacity * width` elements.

use super::device::Memory;
use crate::backend::Element;
use std::ffi::c_void;

/// A matrix `[rows, width]` of one element type, with room for a fixed number of rows.
#[derive(Debug)]
pub struct CudaTensor {
    memory: Memory,
    element: Element,
    rows: usize,
    capacity: usize,
    width: usize,
}

impl CudaTensor {
    /// Takes over `memory`, which holds `capacity * width` elements; all rows are in use.
    pub(crate) fn new(memory: Memory, element: Element, (capacity, width): (usize, usize)) -> Self {
        assert!(
            memory.bytes() >= capacity * width * element.bytes(),
            "the memory holds the matrix"
        );
        Self {
            memory,
            element,
            rows: capacity,
            capacity,
            width,
        }
    }

    /// The first element, on the device.
    pub fn pointer(&self) -> *const c_void {
        self.memory.pointer()
    }

    /// The first element, on the device, to be written.
    pub fn pointer_mut(&mut self) -> *mut c_void {
        self.memory.pointer_mut()
    }

    /// The memory, of which the rows in use are the first [`Self::bytes`].
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The memory, to be written.
    pub(crate) fn memory_mut(&mut self) -> &mut Memory {
        &mut self.memory
    }

    /// All bytes of its memory, where that came from the backend's [`TensorSource`](super::TensorSource).
    pub fn sourced_bytes(&self) -> Option<usize> {
        self.memory.is_sourced().then(|| self.memory.bytes())
    }

    /// What an element is stored as.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Rows in use.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Bytes of the rows in use.
    pub fn bytes(&self) -> usize {
        self.rows * self.width * self.element.bytes()
    }

    /// Sets the rows in use. Rows that come into use hold what was in them last.
    ///
    /// # Panics
    /// If there is no room for them.
    pub(crate) fn set_rows(&mut self, rows: usize) {
        let capacity = self.capacity;
        assert!(rows <= capacity, "{rows} rows in a tensor of {capacity}");
        self.rows = rows;
    }
}
