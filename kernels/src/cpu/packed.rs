//! A weight matrix in the order in which products read it.
//!
//! `[panels][pairs of columns][2]` cells: a panel is 32 rows (outputs) side by side, a cell two columns of sixteen of
//! them, so a product reads memory from one end to the other whatever its shape. Rows and columns are padded
//! with zeros, to 32 and 16. The copy is made once, when the weight is loaded, on all threads; the checkpoint's pages
//! are not needed after that.
//!
//! Floats of 8 bits have scales beside them, and columns cut as those want it (`quantized/columns.rs`).
//!
//! Invariant: padding is zero, and every other element has the bits of the stored one or, where it was to be
//! of another type, is it rounded to nearest even.

use super::element::{F8, Stored, by_element};
use super::quantized::{Chunk, Columns, Cut, PanelScales, Scales, rows_of};
use super::region::Region;
use super::simd::{CELL, LANES};
use super::threads::Threads;
use crate::backend::{DeviceError, Element, HostMatrix};
use crate::quantized::HostQuantized;

/// Rows of a panel: two cells.
pub(crate) const PANEL_ROWS: usize = 2 * LANES;

/// Columns whose products are summed before they are added to the rest. 32 rows of bfloat16 weights of so many
/// columns take 32 KiB, which stays in a first-level cache while rows of activations come by.
pub(crate) const BLOCK: usize = 512;

const CUT: Cut = Cut {
    segment: BLOCK,
    padding: LANES,
    block: BLOCK,
};

/// A packed matrix `[rows, cols]`.
#[derive(Debug)]
pub(crate) struct Packed {
    memory: Region,
    element: Element,
    rows: usize,
    columns: Columns,
    scales: Option<Box<ProductScales>>,
}

/// Scales of codes.
#[derive(Debug)]
struct ProductScales {
    /// What elements stand for.
    stored: Scales,
    /// Where there are codes that are no numbers: the same, but no number for their groups. Products do
    /// not look at each code, and any number times none is none.
    products: Option<Scales>,
    /// The columns as matrix tiles take them.
    chunks: Vec<Chunk>,
}

impl Packed {
    /// Packs `parts`, stacked by rows: `[rows, cols]` in all. `progress` gets the bytes done since the last time.
    pub(crate) fn pack(
        threads: &Threads,
        parts: &[HostMatrix],
        (store, rows, cols): (Element, usize, usize),
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, DeviceError> {
        let columns = Columns::plain(cols, CUT);
        let panels = rows.div_ceil(PANEL_ROWS);
        let mut memory = Region::zeroed(&[panels, PANEL_ROWS, columns.padded(), store.bytes()])?;
        let mut reported = 0;
        let mut done = |panels: usize| {
            let bytes = ((panels * PANEL_ROWS).min(rows) * cols * store.bytes()) as u64;
            progress(bytes - std::mem::replace(&mut reported, bytes));
        };
        let panel = PANEL_ROWS * columns.padded() * store.bytes();
        memory.fill(threads, panel, &mut done, |i, panel| {
            by_element!(store, E => {
                pack_panel::<E>(parts, i * PANEL_ROWS, bytemuck::cast_slice_mut(panel));
            });
        });
        Ok(Self {
            memory,
            element: store,
            rows,
            columns,
            scales: None,
        })
    }

    /// Packs `parts` of floats of 8 bits whose columns are alike. `progress` gets how many rows are done.
    pub(super) fn pack_codes(
        threads: &Threads,
        parts: &[HostQuantized],
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self, DeviceError> {
        let columns = Columns::of(&parts[0], CUT);
        let rows = parts.iter().map(|part| part.rows).sum::<usize>();
        let panel = PANEL_ROWS * columns.padded();
        let mut memory = Region::zeroed(&[rows.div_ceil(PANEL_ROWS), panel])?;
        let mut done = |panels: usize| progress((panels * PANEL_ROWS).min(rows));
        memory.fill(threads, panel, &mut done, |i, panel| {
            let cells = bytemuck::cast_slice_mut::<u8, F8>(panel)
                .as_chunks_mut::<CELL>()
                .0;
            let rows = rows_of(parts, i * PANEL_ROWS);
            for segment in columns.segments() {
                transpose(&mut cells[segment.padded.clone()], |lane, start, out| {
                    if let Some(row) = rows[lane].get(segment.columns.clone()) {
                        convert::<F8, F8>(row, start, out);
                    }
                });
            }
        });
        Ok(Self {
            memory,
            element: Element::Fp8,
            rows,
            scales: Some(Box::new(ProductScales::pack(parts, &columns)?)),
            columns,
        })
    }

    /// Outputs.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// How its columns are cut: products of a segment are summed before they are added to the rest.
    pub(crate) fn columns(&self) -> &Columns {
        &self.columns
    }

    /// The columns of floats of 8 bits in chunks of [`CELL`], each of one group.
    pub(crate) fn chunks(&self) -> &[Chunk] {
        self.scales.as_ref().map_or(&[], |scales| &scales.chunks)
    }

    /// What products of a segment are multiplied with, for one panel.
    #[inline(always)]
    pub(crate) fn scales(&self, panel: usize) -> Option<PanelScales<'_>> {
        let scales = self.scales.as_ref()?;
        Some(
            scales
                .products
                .as_ref()
                .unwrap_or(&scales.stored)
                .panel(panel),
        )
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
        self.columns.padded()
    }

    /// Widens one row, in the order of the inputs. `out: [cols]`
    pub(crate) fn read_row<E: Stored>(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let (panel, lane) = (row / PANEL_ROWS, row % PANEL_ROWS);
        let cells = &self.cells::<E>()[panel * self.panel_cells()..][..self.panel_cells()];
        let places = [0, 1].map(|column| E::place(column, lane % LANES));
        for segment in self.columns.segments() {
            let scale = self
                .scales
                .as_ref()
                .map_or(1.0, |all| all.stored.at(row, segment.group));
            let cells = &cells[segment.padded.clone()];
            let cells = cells.iter().skip(lane / LANES).step_by(2);
            let values = cells.flat_map(|cell| places.map(|place| cell[place]));
            for (column, value) in segment.columns.clone().zip(values) {
                out[self.columns.input(column)] = scale * value.widen();
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

impl ProductScales {
    fn pack(parts: &[HostQuantized], columns: &Columns) -> Result<Self, DeviceError> {
        let groups = columns.groups();
        let rows = || {
            parts
                .iter()
                .flat_map(|part| (0..part.rows).map(move |row| (part, row)))
        };
        let stored: Vec<&[f32]> = rows()
            .map(|(part, row)| &part.scales[row * groups..][..groups])
            .collect();
        let mut products = Vec::new();
        let mut has_nan = false;
        for ((part, row), stored) in rows().zip(&stored) {
            let codes = &part.data[row * part.row_stride..][..part.cols];
            let mut start = 0;
            for (end, scale) in part.group_ends.iter().zip(*stored) {
                let bad = codes[start..*end].iter().any(|code| code & 0x7f == 0x7f);
                has_nan |= bad;
                products.push(if bad { f32::NAN } else { *scale });
                start = *end;
            }
        }
        Ok(Self {
            stored: Scales::pack(stored.into_iter(), groups)?,
            products: has_nan
                .then(|| Scales::pack(products.chunks_exact(groups), groups))
                .transpose()?,
            chunks: columns.chunks(CELL),
        })
    }
}

/// Fills one panel, of zeros, with the rows from `first` on of the stacked `parts`.
fn pack_panel<E: Stored>(parts: &[HostMatrix], first: usize, panel: &mut [E]) {
    let (cells, _) = panel.as_chunks_mut::<CELL>();
    let (mut rows, mut skipped) = ([None; PANEL_ROWS], 0);
    for part in parts {
        for row in first.max(skipped)..(first + PANEL_ROWS).min(skipped + part.rows) {
            let bytes = part.element.bytes();
            let data = &part.data[(row - skipped) * part.row_stride * bytes..];
            rows[row - first] = Some((part.element, &data[..part.cols * bytes]));
        }
        skipped += part.rows;
    }
    transpose(cells, |lane, columns, out| {
        let Some((element, row)) = rows[lane] else {
            return;
        };
        by_element!(element, From => convert::<From, E>(row, columns, out));
    });
}

/// Columns that are transposed at once: a cache line or two of each row.
const COLUMNS_AT_ONCE: usize = 32;

/// Fills `cells`, those of both halves of a panel in turn, some columns at a time: what is read and written meanwhile
/// stays in a first-level cache. `read` gives elements of a row from a column on, and leaves what there is none of.
fn transpose<E: Stored>(
    cells: &mut [[E; CELL]],
    read: impl Fn(usize, usize, &mut [E; COLUMNS_AT_ONCE]),
) {
    for (i, cells) in cells.chunks_mut(COLUMNS_AT_ONCE).enumerate() {
        for half in 0..2 {
            let mut rows = [[E::zeroed(); COLUMNS_AT_ONCE]; LANES];
            for (lane, row) in rows.iter_mut().enumerate() {
                read(half * LANES + lane, i * COLUMNS_AT_ONCE, row);
            }
            for (pair, cell) in cells.iter_mut().skip(half).step_by(2).enumerate() {
                for (lane, row) in rows.iter().enumerate() {
                    cell[E::place(0, lane)] = row[2 * pair];
                    cell[E::place(1, lane)] = row[2 * pair + 1];
                }
            }
        }
    }
}

/// Reads elements of a stored row, from column `start` on, as another type.
fn convert<From: Stored, E: Stored>(row: &[u8], start: usize, out: &mut [E; COLUMNS_AT_ONCE]) {
    let width = size_of::<From>();
    let row = &row[(start * width).min(row.len())..];
    let row = &row[..row.len().min(COLUMNS_AT_ONCE * width)];
    if From::ELEMENT == E::ELEMENT {
        bytemuck::bytes_of_mut(out)[..row.len()].copy_from_slice(row);
        return;
    }
    for (out, value) in out.iter_mut().zip(row.chunks_exact(width)) {
        *out = E::narrow(bytemuck::pod_read_unaligned::<From>(value).widen());
    }
}
