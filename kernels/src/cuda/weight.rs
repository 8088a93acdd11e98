//! A weight matrix in device memory.
//!
//! Vectors (norms, biases) are kept as asked for and, where that differs, in the element the backend
//! computes in as well: kernels take the one, the bias of a product has to be the other. They are small.
//! Quantised matrices are [`Section`]s, which only products take.
//!
//! Invariant: sections hold each output once, in order.

use super::device::Memory;
use super::section::Section;
use crate::backend::Element;
use std::ffi::c_void;

/// A matrix `[rows, cols]` without gaps, or a vector `[1, n]`.
#[derive(Debug)]
pub struct CudaWeight {
    values: Values,
    element: Element,
    rows: usize,
    cols: usize,
}

#[derive(Debug)]
enum Values {
    Dense {
        memory: Memory,
        /// The same vector in another element.
        other: Option<(Memory, Element)>,
    },
    Quantized(Vec<Section>),
}

impl CudaWeight {
    /// Takes over memory that holds the matrix, and that which holds it in another element.
    pub(crate) fn new(
        (memory, element): (Memory, Element),
        (rows, cols): (usize, usize),
        other: Option<(Memory, Element)>,
    ) -> Self {
        Self {
            values: Values::Dense { memory, other },
            element,
            rows,
            cols,
        }
    }

    /// A quantised matrix, to be multiplied with `element`s.
    pub(crate) fn quantized(
        sections: Vec<Section>,
        (rows, cols): (usize, usize),
        element: Element,
    ) -> Self {
        let outputs = sections.iter().map(|section| section.plan().outputs);
        assert_eq!(outputs.sum::<usize>(), rows, "each output is there");
        Self {
            values: Values::Quantized(sections),
            element,
            rows,
            cols,
        }
    }

    /// The sections of a quantised matrix.
    pub(crate) fn sections(&self) -> Option<&[Section]> {
        match &self.values {
            Values::Dense { .. } => None,
            Values::Quantized(sections) => Some(sections),
        }
    }

    /// The memory of what [`Self::pointer`] points to.
    pub(crate) fn memory(&self) -> &Memory {
        match &self.values {
            Values::Dense { memory, .. } => memory,
            Values::Quantized(_) => panic!("a quantised weight was asked for its elements"),
        }
    }

    /// The first element, on the device.
    ///
    /// # Panics
    /// If the matrix is quantised.
    pub fn pointer(&self) -> *const c_void {
        self.memory().pointer()
    }

    /// The first element of the vector as `element`s, on the device.
    ///
    /// # Panics
    /// If it is not kept as such: vectors are, in f32 and in the element the backend computes in.
    pub fn pointer_as(&self, element: Element) -> *const c_void {
        match &self.values {
            _ if self.element == element => self.pointer(),
            Values::Dense {
                other: Some((memory, other)),
                ..
            } if *other == element => memory.pointer(),
            _ => panic!(
                "a weight of {:?} was asked for as {element:?}",
                self.element
            ),
        }
    }

    /// What [`Self::pointer`] points to; what a quantised matrix is multiplied with.
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
