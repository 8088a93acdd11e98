//! A matrix that several threads write to, each its own rows or columns.
//!
//! Who has which part is for `threads.rs` to decide. Invariant: nothing outside the rows and columns of a panel is
//! reached through it.

use super::simd::LANES;
use std::marker::PhantomData;
use std::ops::Range;

/// A mutable matrix that several threads write to, each its own rows or columns.
#[derive(Debug)]
pub(super) struct Matrix<T> {
    base: *mut T,
    pub(super) rows: usize,
    width: usize,
}

impl<T> Matrix<T> {
    pub(super) fn of(values: &mut [T], width: usize) -> Self {
        Self {
            base: values.as_mut_ptr(),
            rows: values.len() / width,
            width,
        }
    }

    /// For one thread. Whoever asks for several keeps what is used of them disjoint.
    pub(super) fn panel<'a>(self, rows: Range<usize>, columns: Range<usize>) -> Panel<'a, T> {
        assert!(
            rows.end <= self.rows && columns.end <= self.width,
            "rows {rows:?} and columns {columns:?} of [{}, {}]",
            self.rows,
            self.width
        );
        Panel {
            matrix: self,
            rows,
            columns,
            lifetime: PhantomData,
        }
    }
}

impl<T> Clone for Matrix<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Matrix<T> {}

#[expect(unsafe_code, reason = "threads write disjoint parts of one matrix")]
// SAFETY: the pointer comes from a `&mut [T]` held for the whole of `Threads::rows` or `Threads::panels`, and is
// used only through `Panel`s, of which each thread uses rows or columns that no other does.
unsafe impl<T: Send> Sync for Matrix<T> {}

/// Some rows and columns of a matrix, in the hands of one thread.
#[derive(Debug)]
pub(crate) struct Panel<'a, T = f32> {
    matrix: Matrix<T>,
    rows: Range<usize>,
    columns: Range<usize>,
    lifetime: PhantomData<&'a mut [T]>,
}

impl<'a, T> Panel<'a, T> {
    /// All of a matrix that one thread has.
    pub(crate) fn whole(values: &'a mut [T], width: usize) -> Self {
        let matrix = Matrix::of(values, width);
        matrix.panel(0..matrix.rows, 0..width)
    }

    /// Its columns in the whole matrix.
    pub(crate) fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// Its rows in the whole matrix.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// The panel's part of a row of the matrix.
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(self.rows.contains(&row), "row {row} of {:?}", self.rows);
        let start = row * self.matrix.width + self.columns.start;
        #[expect(
            unsafe_code,
            reason = "a panel is a strided view, which slices cannot express"
        )]
        // SAFETY: `start` is inside the slice that `base` was taken from.
        let first = unsafe { self.matrix.base.add(start) };
        #[expect(
            unsafe_code,
            reason = "a panel is a strided view, which slices cannot express"
        )]
        // SAFETY: `rows` and `columns` are within the matrix, so the range lies in the slice that `base` was
        // taken from; no other thread has these columns of this row, and `&mut self` keeps this one's rows apart.
        unsafe {
            std::slice::from_raw_parts_mut(first, self.columns.len())
        }
    }
}

impl Panel<'_> {
    /// `N` vectors of each of `M` rows from `row` on, from `column` of the panel on; `None` where the panel ends in them.
    #[inline(always)]
    pub(crate) fn block<const M: usize, const N: usize>(
        &mut self,
        row: usize,
        column: usize,
    ) -> Option<Block<'_, M, N>> {
        assert!(
            self.rows.start <= row && row + M <= self.rows.end,
            "{M} rows from {row} on of {:?}",
            self.rows
        );
        if column + N * LANES > self.columns.len() {
            return None;
        }
        let start = row * self.matrix.width + self.columns.start + column;
        #[expect(
            unsafe_code,
            reason = "a panel is a strided view, which slices cannot express"
        )]
        // SAFETY: the panel has these rows and columns, so it is inside the slice that `base` was taken from.
        let first = unsafe { self.matrix.base.add(start) };
        Some(Block {
            first,
            width: self.matrix.width,
            lifetime: PhantomData,
        })
    }

    /// The columns of two vectors, from `column` of the panel on, of some rows; `None` where the panel ends in them.
    pub(crate) fn strip(&mut self, rows: Range<usize>, column: usize) -> Option<Strip<'_>> {
        let is_within = self.rows.start <= rows.start && rows.end <= self.rows.end;
        if !is_within || column + 2 * LANES > self.columns.len() {
            return None;
        }
        let start = rows.start * self.matrix.width + self.columns.start + column;
        #[expect(
            unsafe_code,
            reason = "a panel is a strided view, which slices cannot express"
        )]
        // SAFETY: the panel has these rows and columns, so it is inside the slice that `base` was taken from.
        let first = unsafe { self.matrix.base.add(start) };
        Some(Strip {
            first,
            width: self.matrix.width,
            rows: rows.len(),
            lifetime: PhantomData,
        })
    }
}

/// Two vectors of each of some rows of a panel, all within it.
#[derive(Debug)]
pub(crate) struct Strip<'a> {
    first: *mut f32,
    width: usize,
    rows: usize,
    lifetime: PhantomData<&'a mut f32>,
}

impl Strip<'_> {
    /// How many.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The first of its elements. They are the caller's alone: [`Self::rows`] times two vectors, [`Self::width`] elements
    /// after each other.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.first
    }

    /// Elements from one row to the next.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// The two vectors of a row.
    #[inline(always)]
    pub(crate) fn row(&mut self, row: usize) -> &mut [[f32; LANES]; 2] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // The panel has this row, so that nothing wraps.
        let first = self.first.wrapping_add(row.wrapping_mul(self.width));
        #[expect(
            unsafe_code,
            reason = "a panel is a strided view, which slices cannot express"
        )]
        // SAFETY: the panel has this row and these columns, so they are in the slice that `base` was taken from, and no other
        // thread has them.
        unsafe {
            &mut *first.cast()
        }
    }
}

/// `N` vectors of each of `M` rows of a panel, all within it.
#[derive(Debug)]
pub(crate) struct Block<'a, const M: usize, const N: usize> {
    first: *mut f32,
    width: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

impl<const M: usize, const N: usize> Block<'_, M, N> {
    /// Those of one row.
    #[inline(always)]
    pub(crate) fn row(&mut self, m: usize) -> &mut [[f32; LANES]; N] {
        assert!(m < M, "row {m} of {M}");
        #[expect(
            unsafe_code,
            reason = "a panel is a strided view, which slices cannot express"
        )]
        // SAFETY: the panel has these rows, so their beginnings are inside the slice that `base` was taken from.
        let first = unsafe { self.first.add(m * self.width) };
        #[expect(
            unsafe_code,
            reason = "a panel is a strided view, which slices cannot express"
        )]
        // SAFETY: so are these columns. No other thread has these columns of these rows, and `&mut self` keeps this one
        // from having them twice.
        unsafe {
            &mut *first.cast()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_those_rows_and_columns_or_nothing() {
        let mut values: Vec<f32> = (0..6 * 40_u8).map(f32::from).collect();
        let mut panel = Matrix::of(&mut values, 40).panel(1..5, 3..40);
        let mut block = panel.block::<2, 1>(2, 21).unwrap();
        for m in 0..2 {
            let first = (2 + m) * 40 + 3 + 21;
            let expected = std::array::from_fn(|lane| (first + lane) as f32);
            assert_eq!(*block.row(m), [expected]);
        }
        assert!(panel.block::<2, 1>(2, 22).is_none());
        assert!(panel.block::<4, 2>(1, 5).is_some());
        let beyond = std::panic::AssertUnwindSafe(|| panel.block::<4, 1>(2, 0).is_some());
        assert!(std::panic::catch_unwind(beyond).is_err());
    }
}
