//! Integer codes of 8 or 4 bits, in the order in which products read them.
//!
//! `[panels][steps][2]` cells of 64 bytes: a panel is 32 rows, as with other weights; a cell of 8-bit codes is four columns
//! of sixteen rows, `[16][4]`; one of 4-bit codes is eight, the first four in the low halves of its bytes. Codes have no
//! sign: an 8-bit code is stored 128 higher, and 128 is then its zero.
//!
//! Invariant: padding is zeros, which meet activations that are zero.

use super::columns::{Columns, Cut};
use super::scales::{PanelScales, Scales};
use crate::backend::DeviceError;
use crate::cpu::packed::PANEL_ROWS;
use crate::cpu::region::Region;
use crate::cpu::simd::{CODES, LANES};
use crate::cpu::threads::Threads;
use crate::quantized::{Code, HostQuantized};

/// Columns of a cell of 8-bit codes: one step of a product.
pub(crate) const QUAD: usize = 4;

/// Most columns of a segment, in which a row of activations has one scale. Products of so many bytes are below 2^24, and so
/// exact when converted to f32, too; shorter segments would be finer, and have products stop more often.
pub(crate) const SEGMENT: usize = 512;

const _: () = assert!(SEGMENT * 255 * 127 < 1 << 24);

const CUT: Cut = Cut {
    segment: SEGMENT,
    padding: 2 * QUAD,
    // 32 rows of 8-bit codes of so many columns take 32 KiB, which stays in a first-level cache.
    block: 1024,
};

/// A packed matrix `[rows, cols]`.
#[derive(Debug)]
pub(crate) struct Codes {
    memory: Region,
    scales: Scales,
    zeros: Zeros,
    code: Code,
    rows: usize,
    columns: Columns,
}

/// The codes that stand for zero.
#[derive(Debug)]
enum Zeros {
    /// The same for all.
    One(u8),
    /// For each row and group.
    Each(Scales),
}

impl Codes {
    /// Packs `parts`, stacked by rows, whose columns are alike. `progress` gets how many rows are done.
    pub(super) fn pack(
        threads: &Threads,
        parts: &[HostQuantized],
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self, DeviceError> {
        let first = &parts[0];
        let (code, columns) = (first.code, Columns::of(first, CUT));
        let groups = columns.groups();
        let rows = parts.iter().map(|part| part.rows).sum::<usize>();
        let scales: Vec<&[f32]> = parts
            .iter()
            .flat_map(|part| part.scales.chunks_exact(groups))
            .collect();
        let scales = Scales::pack(scales.into_iter(), groups)?;
        let zeros = Zeros::pack(parts, code, groups)?;
        let panel = panel_bytes(code, &columns);
        let mut memory = Region::zeroed(&[rows.div_ceil(PANEL_ROWS), panel])?;
        let mut done = |panels: usize| progress((panels * PANEL_ROWS).min(rows));
        memory.fill(threads, panel, &mut done, |i, cells| {
            let cells: &mut [[u8; CODES]] = bytemuck::cast_slice_mut(cells);
            let rows = rows_of(parts, i * PANEL_ROWS);
            // One segment after the other: what is written of all rows stays in a first-level cache.
            for segment in columns.segments() {
                for (lane, row) in rows.iter().enumerate().filter(|(_, row)| !row.is_empty()) {
                    let row = &row[segment.columns.clone()];
                    pack_segment(code, segment.padded.start, row, (lane, cells));
                }
            }
        });
        Ok(Self {
            memory,
            scales,
            zeros,
            code,
            rows,
            columns,
        })
    }

    /// Outputs.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// How its columns are cut.
    pub(crate) fn columns(&self) -> &Columns {
        &self.columns
    }

    /// How its elements are stored.
    pub(crate) fn code(&self) -> Code {
        self.code
    }

    /// The code that stands for zero in all rows and groups, if there is one.
    pub(crate) fn zero(&self) -> Option<u8> {
        match self.zeros {
            Zeros::One(zero) => Some(zero),
            Zeros::Each(_) => None,
        }
    }

    /// Cells of all panels.
    pub(crate) fn cells(&self) -> &[[u8; CODES]] {
        bytemuck::cast_slice(self.memory.as_bytes())
    }

    /// Cells of one panel.
    pub(crate) fn panel_cells(&self) -> usize {
        panel_bytes(self.code, &self.columns) / CODES
    }

    /// Where in a panel the cells of a padded column, the first of a segment, start.
    pub(crate) fn cell_of(&self, padded: usize) -> usize {
        padded / cell_columns(self.code) * (PANEL_ROWS / LANES)
    }

    /// Scales of one panel.
    #[inline(always)]
    pub(crate) fn scales(&self, panel: usize) -> PanelScales<'_> {
        self.scales.panel(panel)
    }

    /// What to add to codes of one panel so that they are as far from 0 as they should be, where that differs.
    #[inline(always)]
    pub(crate) fn offsets(&self, panel: usize) -> Option<PanelScales<'_>> {
        match &self.zeros {
            Zeros::One(_) => None,
            Zeros::Each(offsets) => Some(offsets.panel(panel)),
        }
    }

    /// What one row stands for, in the order of the inputs. `out: [cols]`
    pub(super) fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let (panel, lane) = (row / PANEL_ROWS, row % PANEL_ROWS);
        let cells = &self.cells()[panel * self.panel_cells()..][..self.panel_cells()];
        let per_cell = cell_columns(self.code);
        for segment in self.columns.segments() {
            let scale = self.scales.at(row, segment.group);
            let offset = match &self.zeros {
                Zeros::One(zero) => -f32::from(*zero),
                Zeros::Each(offsets) => offsets.at(row, segment.group),
            };
            for (column, at) in segment.columns.clone().zip(segment.padded.start..) {
                let cell = &cells[at / per_cell * (PANEL_ROWS / LANES) + lane / LANES];
                let byte = cell[lane % LANES * QUAD + at % QUAD];
                let code = match self.code {
                    Code::Int4 if at % per_cell < QUAD => byte & 15,
                    Code::Int4 => byte >> 4,
                    _ => byte,
                };
                out[self.columns.input(column)] = scale * (f32::from(code) + offset);
            }
        }
    }
}

impl Zeros {
    fn pack(parts: &[HostQuantized], code: Code, groups: usize) -> Result<Self, DeviceError> {
        let mut all = parts.iter().flat_map(|part| &part.zeros);
        match all.next() {
            _ if code == Code::Int8 => Ok(Self::One(SIGN)),
            None => Ok(Self::One(0)),
            Some(first) if all.all(|zero| zero == first) => Ok(Self::One(*first)),
            Some(_) => {
                let offset = |zero: &u8| -f32::from(*zero);
                let offsets: Vec<f32> = parts
                    .iter()
                    .flat_map(|part| &part.zeros)
                    .map(offset)
                    .collect();
                Scales::pack(offsets.chunks_exact(groups), groups).map(Self::Each)
            }
        }
    }
}

/// What is added to signed codes.
const SIGN: u8 = 0x80;

/// Columns of a cell.
fn cell_columns(code: Code) -> usize {
    match code {
        Code::Int4 => 2 * QUAD,
        Code::Int8 | Code::Fp8 => QUAD,
    }
}

fn panel_bytes(code: Code, columns: &Columns) -> usize {
    columns.padded() / cell_columns(code) * PANEL_ROWS * QUAD
}

/// The codes of the 32 rows of the stacked `parts` from row `first` on; nothing for those beyond the last.
pub(crate) fn rows_of(parts: &[HostQuantized], first: usize) -> [&[u8]; PANEL_ROWS] {
    let (mut rows, mut skipped) = ([&[][..]; PANEL_ROWS], 0);
    for part in parts {
        for row in first.max(skipped)..(first + PANEL_ROWS).min(skipped + part.rows) {
            rows[row - first] = &part.data[(row - skipped) * part.row_stride..][..part.cols];
        }
        skipped += part.rows;
    }
    rows
}

/// Puts a segment of one row, which starts at column `start`, into its lane of a panel's cells.
fn pack_segment(code: Code, start: usize, row: &[u8], (lane, cells): (usize, &mut [[u8; CODES]])) {
    let place = lane % LANES * QUAD;
    let cells = cells
        .iter_mut()
        .skip(start / cell_columns(code) * 2 + lane / LANES);
    for (codes, cell) in row.chunks(cell_columns(code)).zip(cells.step_by(2)) {
        let cell = &mut cell[place..place + QUAD];
        let (low, high) = codes.split_at(codes.len().min(QUAD));
        if code == Code::Int4 {
            cell[..low.len()].copy_from_slice(low);
            for (byte, code) in cell.iter_mut().zip(high) {
                *byte |= code << 4;
            }
        } else {
            for (byte, code) in cell.iter_mut().zip(low) {
                *byte = code ^ SIGN;
            }
        }
    }
}
