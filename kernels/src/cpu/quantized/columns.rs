//! How the columns of a matrix are cut for products.
//!
//! A segment is a run of columns that have one scale in each output, if they have any; where activations are quantised, a
//! row of them has one scale for it, too. A block is some segments, which products go through for some outputs and all rows before
//! they come to the next block. What is not here: the codes.
//!
//! Invariant: how columns are cut depends on the weight alone. Segments are in order, each is padded by itself, and
//! none crosses the end of a group.

use crate::quantized::HostQuantized;
use std::ops::Range;

/// How to cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    /// Most columns of a segment.
    pub(crate) segment: usize,
    /// What a segment is padded to a multiple of.
    pub(crate) padding: usize,
    /// Most columns of a block, padding included.
    pub(crate) block: usize,
}

/// A run of columns.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    /// Among those that are stored.
    pub(crate) columns: Range<usize>,
    /// Where it lies when segments are padded.
    pub(crate) padded: Range<usize>,
    /// Its group of columns.
    pub(crate) group: usize,
}

/// What matrix tiles multiply at once: some columns of one group.
#[derive(Clone, Debug)]
pub(crate) struct Chunk {
    /// Among those that are stored.
    pub(crate) columns: Range<usize>,
    /// Where they lie when segments are padded; fewer than a chunk's if no more is there.
    pub(crate) padded: Range<usize>,
    /// Their group.
    pub(crate) group: usize,
    /// Whether the group starts, and ends, with it.
    pub(crate) starts: bool,
    pub(crate) ends: bool,
}

/// The columns of a matrix.
#[derive(Debug)]
pub(crate) struct Columns {
    segments: Vec<Segment>,
    /// Ranges of segments.
    blocks: Vec<Range<usize>>,
    inputs: Option<Vec<u32>>,
    groups: usize,
}

impl Columns {
    /// Those of `part`, and of all that are stacked with it.
    pub(crate) fn of(part: &HostQuantized, cut: Cut) -> Self {
        // A permutation that moves nothing costs time for nothing.
        let inputs = part.inputs.clone().filter(|inputs| !is_identity(inputs));
        Self::cut(&part.group_ends, inputs, cut)
    }

    /// So many columns, in one group and in order.
    pub(crate) fn plain(count: usize, cut: Cut) -> Self {
        Self::cut(&[count], None, cut)
    }

    fn cut(group_ends: &[usize], inputs: Option<Vec<u32>>, cut: Cut) -> Self {
        let mut segments: Vec<Segment> = Vec::new();
        let mut blocks = Vec::new();
        let (mut start, mut block_start) = (0, 0);
        let mut column = 0;
        for (group, &group_end) in group_ends.iter().enumerate() {
            while column < group_end {
                let columns = column..group_end.min(column + cut.segment);
                let padded = start..start + columns.len().next_multiple_of(cut.padding);
                let is_full = padded.end - block_start > cut.block && padded.start > block_start;
                if is_full || blocks.is_empty() {
                    blocks.push(segments.len()..segments.len());
                    block_start = padded.start;
                }
                (column, start) = (columns.end, padded.end);
                segments.push(Segment {
                    columns,
                    padded,
                    group,
                });
                if let Some(block) = blocks.last_mut() {
                    block.end = segments.len();
                }
            }
        }
        Self {
            segments,
            blocks,
            inputs,
            groups: group_ends.len(),
        }
    }

    /// All, in order.
    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// All, in chunks of at most `size` columns, of which segments have as many as fill them.
    pub(crate) fn chunks(&self, size: usize) -> Vec<Chunk> {
        let mut chunks: Vec<Chunk> = Vec::new();
        for segment in &self.segments {
            for start in (0..segment.columns.len()).step_by(size) {
                let [columns, padded] = [&segment.columns, &segment.padded]
                    .map(|all| all.start + start..all.end.min(all.start + start + size));
                let starts = chunks.last().is_none_or(|last| last.group != segment.group);
                if let Some(last) = chunks.last_mut() {
                    last.ends = starts;
                }
                chunks.push(Chunk {
                    columns,
                    padded,
                    group: segment.group,
                    starts,
                    ends: true,
                });
            }
        }
        chunks
    }

    /// The segments of each block, by number.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        self.blocks.iter().cloned()
    }

    /// How many there are with padding.
    pub(crate) fn padded(&self) -> usize {
        self.segments.last().map_or(0, |last| last.padded.end)
    }

    /// Groups of columns that have one scale in each output.
    pub(crate) fn groups(&self) -> usize {
        self.groups
    }

    /// Which input each column is multiplied with, where that is not its own number.
    pub(crate) fn inputs(&self) -> Option<&[u32]> {
        self.inputs.as_deref()
    }

    /// The input of one column.
    pub(crate) fn input(&self, column: usize) -> usize {
        let inputs = self.inputs.as_ref();
        inputs.map_or(column, |inputs| inputs[column] as usize)
    }

    /// Copies what some columns are multiplied with out of a row of activations. `to: [columns]`
    #[inline(always)]
    pub(crate) fn gather(&self, columns: Range<usize>, row: &[f32], to: &mut [f32]) {
        match &self.inputs {
            None => to.copy_from_slice(&row[columns]),
            Some(inputs) => {
                for (to, input) in to.iter_mut().zip(&inputs[columns]) {
                    *to = row[*input as usize];
                }
            }
        }
    }
}

fn is_identity(inputs: &[u32]) -> bool {
    inputs
        .iter()
        .zip(0..)
        .all(|(input, column)| *input == column)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantized::Code;
    use crate::testing::Rng;

    #[test]
    fn every_column_is_in_one_segment_of_its_group_and_one_block() {
        let mut rng = Rng::new(62);
        for _ in 0..200 {
            let cols = rng.within(1..3000);
            let mut group_ends: Vec<usize> = (0..rng.within(0..9))
                .map(|_| rng.within(1..cols + 1))
                .collect();
            group_ends.push(cols);
            group_ends.sort_unstable();
            group_ends.dedup();
            let part = HostQuantized {
                code: Code::Int8,
                data: bytes::Bytes::new(),
                rows: 0,
                cols,
                row_stride: cols,
                inputs: Some((0..cols as u32).collect()),
                group_ends: group_ends.clone(),
                scales: Vec::new(),
                zeros: Vec::new(),
            };
            let cut = Cut {
                segment: rng.pick(&[128, 512]),
                padding: 8,
                block: rng.pick(&[64, 512, 1024]),
            };
            let columns = Columns::of(&part, cut);
            assert!(columns.inputs().is_none());
            let (mut column, mut padded) = (0, 0);
            for segment in columns.blocks().flatten() {
                let segment = &columns.segments()[segment];
                assert_eq!(
                    (segment.columns.start, segment.padded.start),
                    (column, padded)
                );
                (column, padded) = (segment.columns.end, segment.padded.end);
                assert!(segment.columns.len() <= cut.segment);
                assert_eq!(
                    segment.padded.len(),
                    segment.columns.len().next_multiple_of(8)
                );
                let first = segment
                    .group
                    .checked_sub(1)
                    .map_or(0, |before| group_ends[before]);
                assert!(first <= segment.columns.start && column <= group_ends[segment.group]);
            }
            assert_eq!((column, padded), (cols, columns.padded()));
            for block in columns.blocks() {
                let block = &columns.segments()[block];
                let length = block.last().unwrap().padded.end - block[0].padded.start;
                assert!(length <= cut.block || block.len() == 1, "{length}");
            }
        }
    }
}
