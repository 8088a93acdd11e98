//! Quantised weights in device memory: outputs whose codes have the same layout, packed as the kernels read them.
//!
//! Columns are put in an order in which every group begins at a multiple of [`chunk_columns`], and are as many as fill
//! whole stretches: what is left over belongs to no input. Where that order is not that of the inputs, the section has a
//! list of the input of each column, and the rows of x are arranged by it before a product. `codes.cuh` says how the
//! codes of a stretch lie. Group sizes that are published fill their chunks, so that nothing is added.
//!
//! Invariant: a section's memory holds codes, scales, zeros, the group of each chunk and the list, each from a multiple
//! of 256 bytes on.

use super::device::Memory;
use crate::backend::Element;
use crate::quantized::{Code, HostQuantized};
use std::ffi::c_void;
use std::ops::Range;

/// A column that no input belongs to.
pub(crate) const NO_INPUT: u32 = u32::MAX;

/// Bytes of codes that a lane loads at once.
const UNIT_BYTES: usize = 16;

const ALIGNMENT: usize = 256;

/// Outputs of one layout.
#[derive(Debug)]
pub(crate) struct Section {
    memory: Memory,
    plan: Plan,
}

/// Sizes of a section, and where its arrays begin.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) code: Code,
    /// The first output among those of the whole weight.
    pub(crate) first: usize,
    pub(crate) outputs: usize,
    /// Columns with those that no input belongs to.
    pub(crate) columns: usize,
    pub(crate) groups: usize,
    /// What scales are stored as: half precision where that holds them all.
    pub(crate) scale_element: Element,
    has_inputs: bool,
    codes_bytes: usize,
}

/// Columns of a stretch, which 4 lanes take at once.
pub(crate) fn stretch_columns(code: Code) -> usize {
    4 * UNIT_BYTES * 8 / code.bits()
}

/// Columns that always share a group.
pub(crate) fn chunk_columns(code: Code) -> usize {
    match code {
        Code::Int4 => 32,
        Code::Int8 | Code::Fp8 => 64,
    }
}

/// The code's number in the launchers' C interface.
pub(crate) fn code_number(code: Code) -> i32 {
    match code {
        Code::Int4 => 0,
        Code::Int8 => 1,
        Code::Fp8 => 2,
    }
}

/// Stacked parts that have the same layout, and the order of their columns on the device.
#[derive(Debug)]
pub(crate) struct Stack<'a> {
    parts: &'a [HostQuantized],
    plan: Plan,
    /// For each column of the device, that of the host; `None` where there is none.
    columns: Vec<Option<u32>>,
    /// Arrays behind the codes, as they are on the device.
    tail: Vec<u8>,
}

/// Cuts `parts` where the layout of columns changes.
pub(crate) fn stacks(parts: &[HostQuantized]) -> Vec<Stack<'_>> {
    let same = |a: &HostQuantized, b: &HostQuantized| {
        a.code == b.code && a.group_ends == b.group_ends && a.inputs == b.inputs
    };
    let mut first = 0;
    let mut all = Vec::new();
    for parts in parts.chunk_by(same) {
        let stack = Stack::new(parts, first);
        first += stack.plan.outputs;
        all.push(stack);
    }
    all
}

impl<'a> Stack<'a> {
    fn new(parts: &'a [HostQuantized], first: usize) -> Self {
        let HostQuantized {
            code,
            group_ends,
            inputs,
            cols,
            ..
        } = &parts[0];
        let outputs = parts.iter().map(|part| part.rows).sum();
        let (chunk, stretch) = (chunk_columns(*code), stretch_columns(*code));
        let mut columns: Vec<Option<u32>> = Vec::new();
        let mut chunk_groups: Vec<u32> = Vec::new();
        let mut start = 0;
        for (group, &end) in group_ends.iter().enumerate() {
            columns.extend((start..end).map(|column| Some(small(column))));
            columns.resize(columns.len().next_multiple_of(chunk), None);
            chunk_groups.resize(columns.len() / chunk, small(group));
            start = end;
        }
        columns.resize(columns.len().next_multiple_of(stretch), None);
        // Codes that stand for nothing are multiplied with zero, so any group will do.
        chunk_groups.resize(columns.len() / chunk, small(group_ends.len() - 1));

        let is_plain = inputs.is_none() && columns.len() == *cols;
        let input_of = |column: &Option<u32>| match (column, inputs) {
            (None, _) => NO_INPUT,
            (Some(column), None) => *column,
            (Some(column), Some(inputs)) => inputs[*column as usize],
        };
        let list: Vec<u32> = columns.iter().map(input_of).collect();
        let scales = by_group(parts, |part| &part.scales);
        let zeros = by_group(parts, |part| &part.zeros);
        // Scales of 8-bit floats go to the library as they are.
        let halved = |scale: f32| half::f16::from_f32(scale).to_f32();
        let holds = |scale: &f32| halved(*scale).to_bits() == scale.to_bits();
        let is_half = *code != Code::Fp8 && scales.iter().all(holds);
        let plan = Plan {
            code: *code,
            first,
            outputs,
            columns: columns.len(),
            groups: group_ends.len(),
            scale_element: if is_half { Element::F16 } else { Element::F32 },
            has_inputs: !is_plain,
            codes_bytes: outputs * columns.len() * code.bits() / 8,
        };
        let mut tail = Vec::new();
        if is_half {
            let halves: Vec<_> = scales.iter().map(|s| half::f16::from_f32(*s)).collect();
            append(&mut tail, bytemuck::cast_slice(&halves));
        } else {
            append(&mut tail, bytemuck::cast_slice(&scales));
        }
        append(&mut tail, &zeros);
        append(&mut tail, bytemuck::cast_slice(&chunk_groups));
        if !is_plain {
            append(&mut tail, bytemuck::cast_slice(&list));
        }
        debug_assert_eq!(tail.len(), plan.bytes() - plan.scales_at());
        Self {
            parts,
            plan,
            columns,
            tail,
        }
    }

    /// Its sizes.
    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Takes over memory that holds the stack's bytes.
    pub(crate) fn into_section(self, memory: Memory) -> Section {
        assert_eq!(memory.bytes(), self.plan.bytes(), "the memory holds it");
        Section {
            memory,
            plan: self.plan,
        }
    }

    /// The host's memory with the codes behind the bytes `range` of the whole, a run for each part of it.
    pub(crate) fn sources(&self, range: Range<usize>, mut take: impl FnMut(&[u8])) {
        let row_bytes = self.plan.row_bytes();
        let end = range.end.min(self.plan.codes_bytes).div_ceil(row_bytes);
        let mut before = 0;
        for part in self.parts {
            let rows = (range.start / row_bytes).clamp(before, before + part.rows) - before
                ..end.clamp(before, before + part.rows) - before;
            if !rows.is_empty() {
                let last = (rows.end - 1) * part.row_stride + part.cols;
                take(&part.data[rows.start * part.row_stride..last]);
            }
            before += part.rows;
        }
    }

    /// Writes the bytes `range` of the whole, which begins at a multiple of 16.
    ///
    /// # Errors
    /// If there are codes that stand for no number.
    pub(crate) fn copy(&self, range: Range<usize>, room: &mut [u8]) -> Result<(), ()> {
        let codes_end = self.plan.codes_bytes;
        let codes = range.end.min(codes_end).saturating_sub(range.start);
        let (codes, rest) = room.split_at_mut(codes);
        let mut at = range.start;
        let mut codes = codes;
        while !codes.is_empty() {
            let (row, start) = (at / self.plan.row_bytes(), at % self.plan.row_bytes());
            let length = codes.len().min(self.plan.row_bytes() - start);
            let target = codes.split_off_mut(..length).expect("no longer than it is");
            self.copy_row(row, start, target)?;
            at += length;
        }
        // The codes' end is a multiple of a unit and not of the alignment: what is between stays zero.
        let start = range.end - rest.len();
        for (byte, at) in rest.iter_mut().zip(start..) {
            let in_tail = at.checked_sub(self.plan.scales_at());
            *byte = in_tail.map_or(0, |at| self.tail[at]);
        }
        Ok(())
    }

    /// Writes units of the row's codes, from byte `start` on.
    fn copy_row(&self, row: usize, start: usize, target: &mut [u8]) -> Result<(), ()> {
        let mut row = row;
        let mut parts = self.parts.iter();
        let codes = loop {
            let part = parts.next().expect("no row is beyond the last");
            if row < part.rows {
                break &part.data[row * part.row_stride..][..part.cols];
            }
            row -= part.rows;
        };
        if self.plan.code != Code::Int4 {
            let chunks = target.chunks_mut(chunk_columns(self.plan.code));
            for (chunk, first) in chunks.zip((start..).step_by(chunk_columns(self.plan.code))) {
                self.gather(codes, first, chunk);
                if self.plan.code == Code::Fp8 && chunk.iter().any(|code| code & 0x7f == 0x7f) {
                    return Err(());
                }
            }
            return Ok(());
        }
        for (word, index) in target.chunks_exact_mut(4).zip(start / 4..) {
            // Sixteen words are a stretch: those of a lane lie side by side, each 32 columns after the one before it.
            let (stretch, lane, portion) = (index / 16, index % 16 / 4, index % 4);
            let mut eight = [0; 8];
            self.gather(codes, 128 * stretch + 32 * portion + 8 * lane, &mut eight);
            let place = |i: usize| i / 2 * 4 + i % 2 * 16;
            let bits = eight.iter().enumerate();
            let bits = bits.fold(0, |bits, (i, code)| bits | u32::from(*code) << place(i));
            word.copy_from_slice(&bits.to_le_bytes());
        }
        Ok(())
    }

    /// Codes of the device's columns from `first` on.
    fn gather(&self, codes: &[u8], first: usize, target: &mut [u8]) {
        let columns = &self.columns[first..first + target.len()];
        // Columns ascend, so that these two say whether there is a gap.
        if let (Some(start), Some(last)) = (columns[0], columns[columns.len() - 1])
            && (last - start) as usize == target.len() - 1
        {
            return target.copy_from_slice(&codes[start as usize..=last as usize]);
        }
        for (code, column) in target.iter_mut().zip(columns) {
            *code = column.map_or(0, |column| codes[column as usize]);
        }
    }
}

/// `[rows, groups]` of each part as `[groups, outputs]`.
fn by_group<T: Copy>(parts: &[HostQuantized], of: impl Fn(&HostQuantized) -> &[T]) -> Vec<T> {
    let groups = parts[0].group_ends.len();
    let column = |group| {
        let of = &of;
        let rows = parts
            .iter()
            .flat_map(move |part| of(part).chunks_exact(groups));
        rows.map(move |row| row[group])
    };
    (0..groups).flat_map(column).collect()
}

/// Appends `bytes` and what fills them up to the next array's start.
fn append(tail: &mut Vec<u8>, bytes: &[u8]) {
    tail.extend_from_slice(bytes);
    tail.resize(tail.len().next_multiple_of(ALIGNMENT), 0);
}

fn small(index: usize) -> u32 {
    u32::try_from(index).expect("columns stay below 2^32")
}

impl Plan {
    fn row_bytes(&self) -> usize {
        self.columns * self.code.bits() / 8
    }

    /// Where the codes, scales, zeros, groups and inputs end, filled up.
    fn ends(&self) -> [usize; 5] {
        let zeros = usize::from(self.code == Code::Int4);
        let lengths = [
            self.codes_bytes,
            self.groups * self.outputs * self.scale_element.bytes(),
            self.groups * self.outputs * zeros,
            self.columns / chunk_columns(self.code) * size_of::<u32>(),
            usize::from(self.has_inputs) * self.columns * size_of::<u32>(),
        ];
        let mut end = 0;
        lengths.map(|length| {
            end += length.next_multiple_of(ALIGNMENT);
            end
        })
    }

    fn scales_at(&self) -> usize {
        self.ends()[0]
    }

    /// Bytes of the whole.
    pub(crate) fn bytes(&self) -> usize {
        self.ends()[4]
    }
}

impl Section {
    /// Its sizes.
    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// `[outputs, columns]`
    pub(crate) fn codes(&self) -> *const c_void {
        self.memory.pointer()
    }

    /// `[groups, outputs]`, as `scale_element`.
    pub(crate) fn scales(&self) -> *const c_void {
        self.memory.at(self.plan.ends()[0])
    }

    /// `[groups, outputs]` of 4-bit codes; of others there are none.
    pub(crate) fn zeros(&self) -> *const u8 {
        self.memory.at(self.plan.ends()[1]).cast()
    }

    /// The group of each chunk of columns.
    pub(crate) fn chunk_groups(&self) -> *const u32 {
        self.memory.at(self.plan.ends()[2]).cast()
    }

    /// The input of each column; `None` where each is its own.
    pub(crate) fn inputs(&self) -> Option<*const u32> {
        let at = self.plan.ends()[3];
        self.plan.has_inputs.then(|| self.memory.at(at).cast())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn part(code: Code, (rows, cols): (usize, usize), group_ends: Vec<usize>) -> HostQuantized {
        let groups = group_ends.len();
        HostQuantized {
            code,
            data: Bytes::from(vec![3; rows * cols]),
            rows,
            cols,
            row_stride: cols,
            inputs: None,
            scales: vec![0.25; rows * groups],
            zeros: if code == Code::Int4 {
                vec![8; rows * groups]
            } else {
                Vec::new()
            },
            group_ends,
        }
    }

    #[test]
    fn layouts_that_are_published_take_their_codes_and_scales_and_no_list() {
        let (rows, cols) = (128, 1024);
        let by = |size: usize| (size..=cols).step_by(size).collect::<Vec<_>>();
        for (code, group, scale_bytes) in [
            (Code::Int4, 32, 2),
            (Code::Int4, 128, 2),
            (Code::Int8, cols, 2),
            (Code::Fp8, 128, 4),
        ] {
            let parts = [part(code, (rows, cols), by(group))];
            let stacks = stacks(&parts);
            let [stack] = &stacks[..] else {
                panic!("one layout is one stack");
            };
            let plan = stack.plan();
            assert_eq!((plan.columns, plan.has_inputs), (cols, false), "{code:?}");
            let zeros = usize::from(code == Code::Int4);
            let of_groups = rows * cols / group * (scale_bytes + zeros);
            let chunks = cols / chunk_columns(code) * 4;
            let expected = rows * cols * code.bits() / 8 + of_groups + chunks.next_multiple_of(256);
            assert_eq!(plan.bytes(), expected, "{code:?} in groups of {group}");
        }
    }

    #[test]
    fn parts_are_stacked_while_their_columns_are_alike() {
        let one = |rows| part(Code::Int4, (rows, 64), vec![32, 64]);
        let mut permuted = one(5);
        permuted.inputs = Some((0..64).rev().collect());
        let parts = [
            one(3),
            one(4),
            permuted,
            part(Code::Int8, (2, 64), vec![64]),
        ];
        let stacks = stacks(&parts);
        let found = stacks.iter().map(|s| (s.plan.first, s.plan.outputs));
        assert_eq!(found.collect::<Vec<_>>(), [(0, 7), (7, 5), (12, 2)]);
        assert!(stacks[1].plan.has_inputs);
    }

    /// A group that ends anywhere is filled up; so is the last stretch, by columns that no input belongs to.
    #[test]
    fn groups_begin_where_lanes_can_take_them() {
        let parts = [part(Code::Int4, (1, 40), vec![5, 40])];
        let plan = stacks(&parts).remove(0);
        assert_eq!(plan.columns.len(), 128);
        let input = |at: usize| plan.columns[at];
        assert_eq!((input(4), input(5), input(31)), (Some(4), None, None));
        assert_eq!((input(32), input(66), input(67)), (Some(5), Some(39), None));
    }
}
