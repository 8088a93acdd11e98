//! A weight: a packed matrix, a quantised one, or a vector as it was stored.
//!
//! Matrices are packed when they are loaded, whatever they are stored as; what uses vectors (norms, biases) reads
//! them in order. Invariant: a loaded weight keeps nothing of the checkpoint's bytes.

use super::element::{Stored, by_element};
use super::packed::Packed;
use super::quantized::Quantized;
use super::threads::Threads;
use crate::backend::{DeviceError, Element, HostMatrix};
use crate::quantized::HostQuantized;
use bytes::Bytes;

/// A matrix `[rows, cols]`, or a vector.
#[derive(Debug)]
pub struct CpuWeight {
    values: Values,
    element: Element,
    rows: usize,
    cols: usize,
}

/// What a weight is made of.
#[derive(Debug)]
pub(crate) enum Values {
    /// Of parts that are matrices.
    Matrix(Packed),
    /// Of parts that are codes.
    Quantized(Quantized),
    /// Of parts that have one row or one column each: aligned, without gaps.
    Vector(Bytes),
}

impl CpuWeight {
    /// Stacks `parts`. Vectors `[1, n]` of different lengths make one vector `[1, sum]`.
    pub(crate) fn load(
        threads: &Threads,
        parts: &[HostMatrix],
        store: Element,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, DeviceError> {
        let failed = |reason: String| DeviceError::Failed {
            device: "cpu".into(),
            reason,
        };
        let (rows, cols) = stacked_shape(parts).map_err(failed)?;
        if store == Element::Fp8 {
            return Err(failed(format!(
                "a weight [{rows}, {cols}] as {store:?} without scales"
            )));
        }
        let values = if are_vectors(parts) {
            let vector = by_element!(store, E => gathered::<E>(parts));
            progress((rows * cols * store.bytes()) as u64);
            Values::Vector(vector)
        } else {
            Values::Matrix(Packed::pack(threads, parts, (store, rows, cols), progress)?)
        };
        Ok(Self {
            values,
            element: store,
            rows,
            cols,
        })
    }

    /// Stacks quantised `parts`.
    pub(crate) fn load_quantized(
        threads: &Threads,
        parts: &[HostQuantized],
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, DeviceError> {
        let quantized = Quantized::load(threads, parts, progress)?;
        Ok(Self {
            rows: quantized.rows(),
            cols: quantized.cols(),
            element: Element::F32,
            values: Values::Quantized(quantized),
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

    /// Stored as; f32 if it is quantised, which is what codes stand for.
    pub fn element(&self) -> Element {
        self.element
    }

    /// What it is made of.
    pub(crate) fn values(&self) -> &Values {
        &self.values
    }

    /// Copies one row. `[cols]`
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        match &self.values {
            Values::Matrix(packed) => {
                by_element!(self.element, E => packed.read_row::<E>(row, out));
            }
            Values::Quantized(quantized) => quantized.read_row(row, out),
            Values::Vector(_) => by_element!(self.element, E => {
                let values = &self.vector::<E>()[row * self.cols..][..self.cols];
                for (to, from) in out.iter_mut().zip(values) {
                    *to = from.widen();
                }
            }),
        }
    }

    /// All elements of a vector. `[rows * cols]`
    ///
    /// # Panics
    /// If it is not stored as `E`, or is a matrix.
    #[inline]
    pub(crate) fn vector<E: Stored>(&self) -> &[E] {
        let Values::Vector(values) = &self.values else {
            panic!("a matrix in the place of a vector")
        };
        let stored = self.element;
        assert!(stored == E::ELEMENT, "{stored:?} read as {:?}", E::ELEMENT);
        bytemuck::cast_slice(values)
    }
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
    if *element == Element::Fp8 {
        return Err(format!(
            "a weight [{rows}, {cols}] of {element:?} without scales"
        ));
    }
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

/// A copy of `parts`, one after the other without gaps, stored as `E`.
fn gathered<E: Stored>(parts: &[HostMatrix]) -> Bytes {
    let mut all = Vec::<E>::with_capacity(parts.iter().map(|p| p.rows * p.cols).sum());
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
    Bytes::from_owner(Elements(all))
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

    fn load(parts: &[HostMatrix], store: Element) -> Result<CpuWeight, DeviceError> {
        let threads = Threads::start(1, None).unwrap();
        CpuWeight::load(&threads, parts, store, &mut |_| ())
    }

    #[test]
    fn rows_are_the_stored_values_whatever_the_alignment_and_type() {
        let mut rng = Rng::new(10);
        let mut threads = Threads::start(3, None).unwrap();
        threads.inline_cost = 0;
        for stored in ELEMENTS {
            for store in ELEMENTS {
                let (rows, cols) = (rng.within(1..60), rng.within(1..90));
                let values = rng.values(rows * cols);
                let parts = [
                    host_matrix(&mut rng, &values, cols, stored),
                    host_matrix(&mut rng, &values, cols, stored),
                ];
                let mut bytes = 0;
                let weight =
                    CpuWeight::load(&threads, &parts, store, &mut |done| bytes += done).unwrap();
                assert_eq!((weight.rows(), weight.cols()), (2 * rows, cols));
                assert_eq!(bytes, (2 * rows * cols * store.bytes()) as u64);
                let expected = rounded(&rounded(&values, stored), store);
                for row in 0..2 * rows {
                    let mut found = vec![f32::NAN; cols];
                    weight.read_row(row, &mut found);
                    assert_eq!(found, expected[row % rows * cols..][..cols]);
                }
            }
        }
    }

    /// Biases of query, key and value projections with as many heads.
    #[test]
    fn vectors_of_one_length_are_one_vector() {
        let mut rng = Rng::new(11);
        let parts = [(); 3].map(|()| {
            let values = rng.values(24);
            (host_matrix(&mut rng, &values, 24, Element::F32), values)
        });
        let matrices = parts.each_ref().map(|(matrix, _)| matrix.clone());
        let weight = load(&matrices, Element::F32).unwrap();
        let expected: Vec<f32> = parts.into_iter().flat_map(|(_, values)| values).collect();
        assert_eq!(weight.vector::<f32>(), expected);
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
            let refused = load(&[part(rows, cols, stride)], Element::F32);
            assert!(refused.is_err(), "[{rows}, {cols}] by {stride}");
        }
        assert!(load(&[], Element::F32).is_err());
        assert!(load(&[part(1, 5, 5), part(2, 2, 3)], Element::F32).is_err());
        assert!(load(&[part(1, 5, 5), part(2, 2, 3)], Element::Bf16).is_err());
        assert!(load(&[part(1, 5, 9)], Element::F32).is_ok());
    }
}
