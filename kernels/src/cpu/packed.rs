//! A weight matrix in the order in which products read it.
//!
//! `[panels][pairs of columns][2]` cells: a panel is 32 rows (outputs) side by side, a cell two columns of sixteen of
//! them, so a product reads memory from one end to the other whatever its shape. Rows and columns are padded
//! with zeros, to 32 and 16. The copy is made once, when the weight is loaded, on all threads; the checkpoint's pages
//! are not needed after that.
//!
//! Invariant: padding is zero, and every other element has the bits of the stored one or, where it was to be
//! of another type, is it rounded to nearest even.

use super::element::{Stored, by_element};
use super::region::Region;
use super::simd::{CELL, LANES};
use super::threads::Threads;
use crate::backend::{DeviceError, Element, HostMatrix};

/// Rows of a panel: two cells.
pub(crate) const PANEL_ROWS: usize = 2 * LANES;

/// A packed matrix `[rows, cols]`.
#[derive(Debug)]
pub(crate) struct Packed {
    memory: Region,
    element: Element,
    rows: usize,
    cols: usize,
}

impl Packed {
    /// Packs `parts`, stacked by rows: `[rows, cols]` in all. `progress` gets the bytes done since the last time.
    pub(crate) fn pack(
        threads: &Threads,
        parts: &[HostMatrix],
        (store, rows, cols): (Element, usize, usize),
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, DeviceError> {
        let columns = cols.next_multiple_of(LANES);
        let panels = rows.div_ceil(PANEL_ROWS);
        let mut memory = Region::zeroed(&[panels, PANEL_ROWS, columns, store.bytes()])?;
        let mut reported = 0;
        let mut done = |panels: usize| {
            let bytes = ((panels * PANEL_ROWS).min(rows) * cols * store.bytes()) as u64;
            progress(bytes - std::mem::replace(&mut reported, bytes));
        };
        let panel = PANEL_ROWS * columns * store.bytes();
        memory.fill(threads, panel, &mut done, |i, panel| {
            by_element!(store, E => {
                pack_panel::<E>(parts, i * PANEL_ROWS, bytemuck::cast_slice_mut(panel));
            });
        });
        Ok(Self {
            memory,
            element: store,
            rows,
            cols,
        })
    }

    /// Inputs.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Its memory, padding included.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.memory.as_bytes()
    }

    /// All cells of all panels.
    ///
    /// # Panics
    /// If it is not stored as `E`.
    pub(crate) fn cells<E: Stored>(&self) -> &[[E; CELL]] {
        self.check::<E>();
        let elements: &[E] = bytemuck::cast_slice(self.as_bytes());
        elements.as_chunks().0
    }

    /// Cells of one panel.
    pub(crate) fn panel_cells(&self) -> usize {
        self.cols.next_multiple_of(LANES)
    }

    /// Widens one row. `[cols]`
    pub(crate) fn read_row<E: Stored>(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let (panel, lane) = (row / PANEL_ROWS, row % PANEL_ROWS);
        let cells = &self.cells::<E>()[panel * self.panel_cells()..][..self.panel_cells()];
        let places = [0, 1].map(|column| E::place(column, lane % LANES));
        let cells = cells.iter().skip(lane / LANES).step_by(2);
        for (values, cell) in out[..self.cols].chunks_mut(2).zip(cells) {
            for (value, place) in values.iter_mut().zip(places) {
                *value = cell[place].widen();
            }
        }
    }

    fn check<E: Stored>(&self) {
        assert!(
            self.element == E::ELEMENT,
            "{:?} read as {:?}",
            self.element,
            E::ELEMENT
        );
    }
}

/// Fills one panel, of zeros, with the rows from `first` on of the stacked `parts`.
fn pack_panel<E: Stored>(parts: &[HostMatrix], first: usize, panel: &mut [E]) {
    let (cells, _) = panel.as_chunks_mut::<CELL>();
    let mut skipped = 0;
    for part in parts {
        let rows = skipped..skipped + part.rows;
        skipped = rows.end;
        for row in first.max(rows.start)..(first + PANEL_ROWS).min(rows.end) {
            let start = (row - rows.start) * part.row_stride * part.element.bytes();
            let bytes = &part.data[start..][..part.cols * part.element.bytes()];
            let lane = row - first;
            let cells = cells.iter_mut().skip(lane / LANES).step_by(2);
            by_element!(part.element, From => {
                pack_row::<From, E>(bytes, lane % LANES, cells);
            });
        }
    }
}

/// Puts one row into its lane of the cells.
fn pack_row<'a, From: Stored, E: Stored>(
    bytes: &[u8],
    lane: usize,
    cells: impl Iterator<Item = &'a mut [E; CELL]>,
) {
    let width = size_of::<From>();
    // Equal types keep their bits: widening is exact.
    let value = |bytes: &[u8]| E::narrow(bytemuck::pod_read_unaligned::<From>(bytes).widen());
    let (first, second) = (E::place(0, lane), E::place(1, lane));
    for (pair, cell) in bytes.chunks(2 * width).zip(cells) {
        cell[first] = value(&pair[..width]);
        if pair.len() > width {
            cell[second] = value(&pair[width..]);
        }
    }
}
