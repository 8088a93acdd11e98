//! A quantised matrix on the host: codes of few bits, and what they stand for.
//!
//! One form for everything that is published: whoever reads a checkpoint brings its layout into this one, a backend
//! packs this one into its own. What is kept per tensor, per output or per block is spread to scales `[rows, groups]`.
//!
//! Invariant: after [`HostQuantized::check`], every element has a code, a group with a scale, and an input.

mod at_load;
mod e4m3;

pub use at_load::{Quantiser, RowOfCodes};
pub use e4m3::{e4m3, to_e4m3};

use bytes::Bytes;

/// How one element is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// 4 bits, `0..=15`; stands for `scale * (code - zero)`.
    Int4,
    /// 8 bits, signed; stands for `scale * code`.
    Int8,
    /// 8 bits, a float with 4 bits of exponent and 3 of mantissa, without infinities (OCP's `E4M3`); stands for
    /// `scale * code`.
    Fp8,
}

impl Code {
    /// Bits that a device keeps of each element, beside scales and zeros.
    pub fn bits(self) -> usize {
        match self {
            Self::Int4 => 4,
            Self::Int8 | Self::Fp8 => 8,
        }
    }
}

/// A piece of a quantised matrix `[rows, cols]`.
#[derive(Clone, Debug)]
pub struct HostQuantized {
    /// How elements are stored.
    pub code: Code,
    /// A byte for each code, from the first of the first row to the last of the last.
    pub data: Bytes,
    /// Rows (outputs).
    pub rows: usize,
    /// Columns that are used of each row.
    pub cols: usize,
    /// Codes from one row's start to the next one's; `>= cols`.
    pub row_stride: usize,
    /// Which input each column is multiplied with, where that is not its own number: a permutation of `0..cols`.
    pub inputs: Option<Vec<u32>>,
    /// Where each group of columns ends: ascending, the last is `cols`.
    pub group_ends: Vec<usize>,
    /// `[rows, groups]`
    pub scales: Vec<f32>,
    /// `[rows, groups]`, `0..=16`, of [`Code::Int4`] only. (A layout that stores zeros less one reaches 16.)
    pub zeros: Vec<u8>,
}

impl HostQuantized {
    /// Whether the parts are what the shape says.
    ///
    /// # Errors
    /// A sentence about what is not.
    pub fn check(&self) -> Result<(), String> {
        let Self { rows, cols, .. } = self;
        let shape = format!("a weight [{rows}, {cols}] of {:?} codes", self.code);
        let bytes = rows
            .checked_sub(1)
            .and_then(|rows| rows.checked_mul(self.row_stride))
            .and_then(|start| start.checked_add(*cols))
            .filter(|_| *cols > 0 && self.row_stride >= *cols);
        if bytes != Some(self.data.len()) {
            let (stride, found) = (self.row_stride, self.data.len());
            return Err(format!("{shape} with row stride {stride} in {found} bytes"));
        }
        let ascend = self.group_ends.is_sorted_by(|one, other| one < other);
        if !ascend || self.group_ends.first() == Some(&0) || self.group_ends.last() != Some(cols) {
            return Err(format!("{shape} whose groups do not end in order"));
        }
        let needed = rows.checked_mul(self.group_ends.len());
        let zeros = match self.code {
            Code::Int4 => needed,
            Code::Int8 | Code::Fp8 => Some(0),
        };
        if needed != Some(self.scales.len()) || zeros != Some(self.zeros.len()) {
            let (scales, zeros) = (self.scales.len(), self.zeros.len());
            let groups = self.group_ends.len();
            return Err(format!(
                "{shape} in {groups} groups with {scales} scales and {zeros} zeros"
            ));
        }
        let is_bad_int4 = |row: &[u8]| row.iter().any(|code| *code > 15);
        if self.code == Code::Int4
            && (self.zeros.iter().any(|zero| *zero > 16)
                || self
                    .data
                    .chunks(self.row_stride)
                    .any(|row| is_bad_int4(&row[..*cols])))
        {
            return Err(format!("{shape} with codes of more than 4 bits"));
        }
        match &self.inputs {
            Some(inputs) if !is_permutation(inputs, *cols) => {
                Err(format!("{shape} whose columns are not each input once"))
            }
            _ => Ok(()),
        }
    }

    /// What one row stands for, in the order of the inputs. `out: [cols]`
    ///
    /// The definition, and slow.
    ///
    /// # Panics
    /// If [`Self::check`] fails, there is no such row, or `out` has another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a value for each column");
        let codes = &self.data[row * self.row_stride..][..self.cols];
        let groups = self.group_ends.len();
        let mut group = 0;
        for (column, code) in codes.iter().enumerate() {
            if column == self.group_ends[group] {
                group += 1;
            }
            let place = row * groups + group;
            let value = match self.code {
                Code::Int4 => f32::from(*code) - f32::from(self.zeros[place]),
                Code::Int8 => f32::from(code.cast_signed()),
                Code::Fp8 => e4m3(*code),
            };
            let input = match &self.inputs {
                Some(inputs) => inputs[column] as usize,
                None => column,
            };
            out[input] = self.scales[place] * value;
        }
    }
}

fn is_permutation(inputs: &[u32], count: usize) -> bool {
    let mut seen = vec![false; count];
    inputs.len() == count
        && inputs.iter().all(|input| {
            let seen = seen.get_mut(*input as usize);
            seen.is_some_and(|seen| !std::mem::replace(seen, true))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_groups() -> HostQuantized {
        HostQuantized {
            code: Code::Int4,
            data: Bytes::from_static(&[0, 5, 15, 99, 8, 9, 10]),
            rows: 2,
            cols: 3,
            row_stride: 4,
            inputs: Some(vec![2, 0, 1]),
            group_ends: vec![2, 3],
            scales: vec![0.5, 2.0, 1.0, -1.0],
            zeros: vec![8, 15, 8, 16],
        }
    }

    #[test]
    fn a_row_is_scale_times_code_less_zero_at_its_input() {
        let weight = two_groups();
        weight.check().unwrap();
        let mut row = [0.0; 3];
        weight.read_row(0, &mut row);
        assert_eq!(row.to_vec(), [-1.5, 0.0, -4.0]);
        weight.read_row(1, &mut row);
        assert_eq!(row.to_vec(), [1.0, 6.0, 0.0]);
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let wrong: [fn(&mut HostQuantized); 8] = [
            |w| w.rows = 3,
            |w| w.row_stride = 2,
            |w| w.group_ends = vec![2, 2, 3],
            |w| w.group_ends = vec![2],
            |w| w.scales.truncate(3),
            |w| w.zeros[1] = 17,
            |w| w.inputs = Some(vec![0, 0, 1]),
            |w| w.data = Bytes::from_static(&[0, 5, 16, 0, 8, 9, 10]),
        ];
        for wrong in wrong {
            let mut weight = two_groups();
            wrong(&mut weight);
            println!("{}", weight.check().unwrap_err());
        }
    }
}
