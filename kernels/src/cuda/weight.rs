//! A weight matrix in device memory.
//!
//! Vectors (norms, biases) are kept as asked for and, where that differs, in the element the backend
//! computes in as well: kernels take the one, the bias of a product has to be the other. They are small.

use super::device::Memory;
use crate::backend::Element;
use std::ffi::c_void;

/// A matrix `[rows, cols]` without gaps, or a vector `[1, n]`.
#[derive(Debug)]
pub struct CudaWeight {
    memory: Memory,
    element: Element,
    rows: usize,
    cols: usize,
    /// The same vector in another element.
    other: Option<(Memory, Element)>,
}

impl CudaWeight {
    /// Takes over memory that holds the matrix, and that which holds it in another element.
    pub(crate) fn new(
        (memory, element): (Memory, Element),
        (rows, cols): (usize, usize),
        other: Option<(Memory, Element)>,
    ) -> Self {
        Self {
            memory,
            element,
            rows,
            cols,
            other,
        }
    }

    /// The memory of what [`Self::pointer`] points to.
    #[cfg(test)]
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The first element, on the device.
    pub fn pointer(&self) -> *const c_void {
        self.memory.pointer()
    }

    /// The first element of the vector as `element`s, on the device.
    ///
    /// # Panics
    /// If it is not kept as such: vectors are, in f32 and in the element the backend computes in.
    pub fn pointer_as(&self, element: Element) -> *const c_void {
        match &self.other {
            _ if self.element == element => self.pointer(),
            Some((memory, other)) if *other == element => memory.pointer(),
            _ => panic!(
                "a weight of {:?} was asked for as {element:?}",
                self.element
            ),
        }
    }

    /// What [`Self::pointer`] points to.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs, or the vector's length.
    pub fn cols(&self) -> usize {
        self.cols
    }
}
