//! A weight matrix: views of stored bytes, stacked by rows.
//!
//! Weights usually stay where they are, in a memory map of the checkpoint. Copies are made only of
//! what cannot be read in place: another element type is wanted, the bytes are not aligned to
//! their elements, or a vector comes in several pieces.

use super::element::{Stored, by_element};
use crate::backend::{DeviceError, Element, HostMatrix};
use bytes::Bytes;

/// Progress is reported about this often.
const PROGRESS_BYTES: usize = 1 << 20;
const PAGE: usize = 4096;

/// A matrix `[rows, cols]`, or a vector.
#[derive(Debug)]
pub struct CpuWeight {
    /// Stacked by rows; all of `element`.
    parts: Vec<HostMatrix>,
    element: Element,
    rows: usize,
    cols: usize,
}

impl CpuWeight {
    /// Stacks `parts`. Vectors `[1, n]` of different lengths make one vector `[1, sum]`.
    pub(crate) fn load(parts: &[HostMatrix], store: Element) -> Result<Self, DeviceError> {
        let failed = |reason: String| DeviceError::Failed {
            device: "cpu".into(),
            reason,
        };
        let (rows, cols) = stacked_shape(parts).map_err(failed)?;
        let first = &parts[0];
        let vectors = are_vectors(parts);

        let scattered = parts.len() > 1 || first.row_stride != first.cols;
        let parts = if vectors && scattered {
            vec![by_element!(store, E => gathered::<E>(parts))]
        } else {
            let as_stored = |p: &HostMatrix| {
                let in_place = p.element == store
                    && by_element!(store, E => bytemuck::try_cast_slice::<u8, E>(&p.data).is_ok());
                if in_place {
                    p.clone()
                } else {
                    by_element!(store, E => gathered::<E>(std::slice::from_ref(p)))
                }
            };
            parts.iter().map(as_stored).collect()
        };
        Ok(Self {
            parts,
            element: store,
            rows,
            cols,
        })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Stored as.
    pub fn element(&self) -> Element {
        self.element
    }

    /// One row. `[cols]`
    #[inline]
    pub(crate) fn row<E: Stored>(&self, row: usize) -> &[E] {
        let mut row = row;
        let mut parts = self.parts.iter();
        let part = loop {
            let part = parts.next().expect("the row is below `rows`");
            match row.checked_sub(part.rows) {
                Some(rest) => row = rest,
                None => break part,
            }
        };
        &elements::<E>(part)[row * part.row_stride..][..part.cols]
    }

    /// All elements of a vector. `[rows * cols]`
    ///
    /// # Panics
    /// If it is not stored as `E`, or is a matrix with gaps.
    #[inline]
    pub(crate) fn vector<E: Stored>(&self) -> &[E] {
        let [part] = self.parts.as_slice() else {
            panic!("a matrix in the place of a vector")
        };
        assert!(
            part.rows == 1 || part.row_stride == part.cols,
            "a matrix in the place of a vector"
        );
        &elements::<E>(part)[..part.rows * part.cols]
    }
}

/// The elements of a part that is known to be aligned.
#[inline]
fn elements<E: Stored>(part: &HostMatrix) -> &[E] {
    assert!(
        part.element == E::ELEMENT,
        "{:?} read as {:?}",
        part.element,
        E::ELEMENT
    );
    bytemuck::cast_slice(&part.data)
}

/// Whether the bytes are what the shape says.
fn check(part: &HostMatrix) -> Result<(), String> {
    let HostMatrix {
        data,
        element,
        rows,
        cols,
        row_stride,
    } = part;
    let needed = rows
        .checked_sub(1)
        .and_then(|rows| rows.checked_mul(*row_stride))
        .and_then(|start| start.checked_add(*cols))
        .and_then(|elements| elements.checked_mul(element.bytes()))
        .filter(|_| *cols > 0 && row_stride >= cols);
    if needed == Some(data.len()) {
        return Ok(());
    }
    Err(format!(
        "a weight [{rows}, {cols}] of {element:?} with row stride {row_stride} in {} bytes",
        data.len()
    ))
}

/// Whether the parts make one vector when stacked.
pub(crate) fn are_vectors(parts: &[HostMatrix]) -> bool {
    parts.iter().all(|p| p.rows == 1) || parts.iter().all(|p| p.cols == 1)
}

/// The shape of `parts` stacked by rows: `(rows, cols)`. Vectors `[1, n]` of different lengths make one vector `[1, sum]`.
///
/// An error where bytes and shape of a part disagree, or the parts do not fit together.
pub(crate) fn stacked_shape(parts: &[HostMatrix]) -> Result<(usize, usize), String> {
    let first = parts.first().ok_or("a weight without parts")?;
    for part in parts {
        check(part)?;
    }
    if parts.iter().all(|p| p.cols == first.cols) {
        Ok((parts.iter().map(|p| p.rows).sum(), first.cols))
    } else if are_vectors(parts) {
        Ok((1, parts.iter().map(|p| p.cols).sum()))
    } else {
        let widths: Vec<_> = parts.iter().map(|p| p.cols).collect();
        Err(format!("a weight of parts with {widths:?} columns"))
    }
}

/// Reads one byte of each page of `part`, so that loading is over when it says so and not during the first
/// step. `progress` gets the bytes passed, as `store`.
pub(crate) fn touch(part: &HostMatrix, store: Element, progress: &mut dyn FnMut(u64)) {
    let width = part.element.bytes();
    let mut passed = 0;
    for row in 0..part.rows {
        let start = row * part.row_stride * width;
        for page in part.data[start..start + part.cols * width].chunks(PAGE) {
            std::hint::black_box(page[0]);
        }
        passed += part.cols * store.bytes();
        if passed >= PROGRESS_BYTES {
            progress(passed as u64);
            passed = 0;
        }
    }
    progress(passed as u64);
}

/// A copy of `parts`, one after the other without gaps, stored as `E`.
fn gathered<E: Stored>(parts: &[HostMatrix]) -> HostMatrix {
    let cols = parts[0].cols;
    let total = parts.iter().map(|p| p.rows * p.cols).sum();
    let mut all = Vec::<E>::with_capacity(total);
    for part in parts {
        by_element!(part.element, From => {
            let width = size_of::<From>();
            for row in 0..part.rows {
                let start = row * part.row_stride * width;
                let bytes = &part.data[start..start + part.cols * width];
                let values = bytes.chunks_exact(width).map(bytemuck::pod_read_unaligned::<From>);
                // Equal types keep their bits: widening is exact.
                all.extend(values.map(|value| E::narrow(value.widen())));
            }
        });
    }
    let (rows, cols) = if total % cols == 0 {
        (total / cols, cols)
    } else {
        (1, total)
    };
    HostMatrix {
        data: Bytes::from_owner(Elements(all)),
        element: E::ELEMENT,
        rows,
        cols,
        row_stride: cols,
    }
}

/// Elements as the owner of their bytes; unlike `Vec<u8>`, aligned.
struct Elements<E>(Vec<E>);

impl<E: Stored> AsRef<[u8]> for Elements<E> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ELEMENTS, Rng, host_matrix, rounded};

    #[test]
    fn bytes_that_can_be_read_in_place_are_not_copied() {
        let element = Element::Bf16;
        let data = Bytes::from_owner(Elements(vec![half::bf16::ONE; 40]));
        let at = data.as_ptr();
        let part = HostMatrix {
            data,
            element,
            rows: 4,
            cols: 7,
            row_stride: 11,
        };
        let weight = CpuWeight::load(&[part], element).unwrap();
        assert_eq!(weight.row::<half::bf16>(0).as_ptr().cast(), at);
        assert_eq!(weight.row::<half::bf16>(3), [half::bf16::ONE; 7]);
    }

    #[test]
    fn rows_are_the_stored_values_whatever_the_alignment_and_type() {
        let mut rng = Rng::new(10);
        for stored in ELEMENTS {
            for store in ELEMENTS {
                let (rows, cols) = (rng.within(2..9), rng.within(2..40));
                let values = rng.values(rows * cols);
                let parts = [
                    host_matrix(&mut rng, &values, cols, stored),
                    host_matrix(&mut rng, &values, cols, stored),
                ];
                let weight = CpuWeight::load(&parts, store).unwrap();
                assert_eq!((weight.rows(), weight.cols()), (2 * rows, cols));
                let expected = rounded(&rounded(&values, stored), store);
                for row in 0..2 * rows {
                    let expected = &expected[row % rows * cols..][..cols];
                    by_element!(store, E => {
                        let row: Vec<f32> =
                            weight.row::<E>(row).iter().map(|value| value.widen()).collect();
                        assert_eq!(row, expected);
                    });
                }
            }
        }
    }

    #[test]
    fn bytes_that_are_not_the_shape_are_refused() {
        let data = Bytes::from(vec![0; 20]);
        let part = |rows, cols, row_stride| HostMatrix {
            data: data.clone(),
            element: Element::F32,
            rows,
            cols,
            row_stride,
        };
        for (rows, cols, stride) in [
            (5, 1, 2),
            (1, 6, 6),
            (2, 3, 2),
            (0, 5, 5),
            (1, 0, 5),
            (usize::MAX, 5, usize::MAX),
        ] {
            let refused = CpuWeight::load(&[part(rows, cols, stride)], Element::F32);
            assert!(refused.is_err(), "[{rows}, {cols}] by {stride}");
        }
        assert!(CpuWeight::load(&[], Element::F32).is_err());
        assert!(CpuWeight::load(&[part(1, 5, 5), part(2, 2, 3)], Element::F32).is_err());
        assert!(CpuWeight::load(&[part(1, 5, 5), part(2, 2, 3)], Element::Bf16).is_err());
        assert!(CpuWeight::load(&[part(1, 5, 9)], Element::F32).is_ok());
    }
}
