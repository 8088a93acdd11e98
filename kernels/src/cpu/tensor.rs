//! An activation matrix in host memory.

use super::region::Region;
use crate::backend::DeviceError;

/// A matrix of f32, `[rows, width]`, with room for a fixed number of rows.
#[derive(Debug)]
pub struct CpuTensor {
    /// `[capacity, width]`
    values: Region,
    capacity: usize,
    rows: usize,
    width: usize,
}

impl CpuTensor {
    /// Zeros, with all rows in use.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub(crate) fn zeroed(rows: usize, width: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            values: Region::zeroed(&[rows, width, size_of::<f32>()])?,
            capacity: rows,
            rows,
            width,
        })
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

    /// The rows in use. `[rows, width]`
    pub fn values(&self) -> &[f32] {
        &self.values.as_slice()[..self.rows * self.width]
    }

    /// The rows in use, to be changed. `[rows, width]`
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values.as_mut_slice()[..self.rows * self.width]
    }

    /// One row. `[width]`
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.values()[row * self.width..][..self.width]
    }

    /// Sets the rows in use. Rows that come into use hold what was in them last.
    ///
    /// # Panics
    /// If there is no room for them.
    pub(crate) fn set_rows(&mut self, rows: usize) {
        let capacity = self.capacity();
        assert!(rows <= capacity, "{rows} rows in a tensor of {capacity}");
        self.rows = rows;
    }
}
