//! A quantised weight: its parts packed, each in its own layout, with outputs side by side.
//!
//! Neighbouring parts whose columns are alike (the same codes, groups and inputs) are packed as one matrix, as if
//! they had been stored as one. What is not here: products (`ops/linear`).

mod codes;
mod columns;
mod scales;

pub(crate) use codes::{Codes, QUAD, SEGMENT, rows_of};
pub(crate) use columns::{Chunk, Columns, Cut, Segment};
pub(crate) use scales::{PanelScales, Scales};

use super::element::F8;
use super::packed::Packed;
use super::threads::Threads;
use crate::backend::DeviceError;
use crate::quantized::{Code, HostQuantized};

/// The parts, stacked by rows.
#[derive(Debug)]
pub(crate) struct Quantized {
    parts: Vec<Part>,
    cols: usize,
}

/// Some rows of a matrix.
#[derive(Debug)]
pub(crate) enum Part {
    /// Products are integers.
    Codes(Codes),
    /// Products are floats.
    Floats(Packed),
}

impl Part {
    /// Outputs.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Codes(codes) => codes.rows(),
            Self::Floats(packed) => packed.rows(),
        }
    }
}

impl Quantized {
    /// Packs `parts`. `progress` gets the bytes of codes done since the last time.
    pub(super) fn load(
        threads: &Threads,
        parts: &[HostQuantized],
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, DeviceError> {
        let failed = |reason: String| DeviceError::Failed {
            device: "cpu".into(),
            reason,
        };
        for part in parts {
            part.check().map_err(failed)?;
        }
        let cols = parts.first().map_or(0, |part| part.cols);
        if cols == 0 || parts.iter().any(|part| part.cols != cols) {
            let widths: Vec<_> = parts.iter().map(|part| part.cols).collect();
            return Err(failed(format!("a weight of parts with {widths:?} columns")));
        }
        let mut packed = Vec::new();
        for alike in parts.chunk_by(are_alike) {
            let bits = cols * alike[0].code.bits();
            let mut reported = 0;
            let mut done = |rows: usize| {
                let bytes = (rows * bits / 8) as u64;
                progress(bytes - std::mem::replace(&mut reported, bytes));
            };
            packed.push(match alike[0].code {
                Code::Int4 | Code::Int8 => Part::Codes(Codes::pack(threads, alike, &mut done)?),
                Code::Fp8 => Part::Floats(Packed::pack_codes(threads, alike, &mut done)?),
            });
        }
        Ok(Self {
            parts: packed,
            cols,
        })
    }

    /// From the first rows to the last.
    pub(crate) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Outputs.
    pub(super) fn rows(&self) -> usize {
        self.parts.iter().map(Part::rows).sum()
    }

    /// Inputs.
    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    /// What one row stands for. `out: [cols]`
    pub(super) fn read_row(&self, mut row: usize, out: &mut [f32]) {
        for part in &self.parts {
            if row < part.rows() {
                return match part {
                    Part::Codes(codes) => codes.read_row(row, out),
                    Part::Floats(packed) => packed.read_row::<F8>(row, out),
                };
            }
            row -= part.rows();
        }
        panic!("a row beyond the weight's {}", self.rows());
    }
}

/// Whether two parts can be one matrix.
fn are_alike(one: &HostQuantized, other: &HostQuantized) -> bool {
    (one.code, &one.inputs, &one.group_ends) == (other.code, &other.inputs, &other.group_ends)
}
