//! Fills decode steps up to sizes that come again, so that a device can replay what it recorded of one.
//!
//! The sizes are those that vLLM captures: close together where steps are short. Rows that are filled in compute token
//! 0 at position 0 with a block of their own, which no sequence is ever given, and nobody reads what comes of them.
//! Not here: what a backend makes of it.
//!
//! Invariant: what a step is filled up to follows from its plan alone, so all ranks do the same.

use kernels::batch::Batch;

/// Steps of more rows are computed as they are: their kernels take longer than their launches.
const LARGEST: usize = 512;

/// The size that a step of `rows` rows is filled up to, where at most `max_rows` fit a step.
pub(crate) fn size(rows: usize, max_rows: usize) -> Option<usize> {
    let size = match rows {
        0 => return None,
        1..=4 => rows.next_power_of_two(),
        5..=256 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(16),
    };
    let size = size.min(max_rows);
    (rows <= size && size <= LARGEST).then_some(size)
}

/// Where rows that are filled in keep their keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spare {
    /// A block that belongs to no sequence.
    pub(crate) block: u32,
    /// Its first slot.
    pub(crate) slot: u32,
}

impl Spare {
    /// The block behind the `blocks` that sequences use; `None` where slots cannot count that far.
    pub(crate) fn behind(blocks: usize, block_size: usize) -> Option<Self> {
        let slot = u32::try_from(blocks.checked_mul(block_size)?).ok()?;
        slot.checked_add(u32::try_from(block_size).ok()?)?;
        let block = u32::try_from(blocks).ok()?;
        Some(Self { block, slot })
    }
}

/// Whether every row has one new token.
pub(crate) fn is_decode(batch: &Batch) -> bool {
    batch.num_tokens() == batch.num_rows()
}

/// Adds rows to a decode step until it has `size` of them.
pub(crate) fn fill(batch: &mut Batch, size: usize, spare: Spare) {
    let (mut tokens, mut blocks) = (count(batch.num_tokens()), count(batch.blocks.len()));
    for _ in batch.num_rows()..size {
        batch.token_ids.push(0);
        batch.positions.push(0);
        batch.slots.push(spare.slot);
        batch.blocks.push(spare.block);
        batch.context_lens.push(1);
        tokens += 1;
        blocks += 1;
        batch.row_starts.push(tokens);
        batch.block_starts.push(blocks);
    }
}

fn count(items: usize) -> u32 {
    u32::try_from(items).expect("bounded by the limits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_hold_their_rows_and_are_few() {
        for max_rows in [1, 3, 4, 7, 16, 100, 256, 300, 512, 600] {
            let mut sizes = Vec::new();
            for rows in 1..=max_rows {
                let Some(size) = size(rows, max_rows) else {
                    assert!(rows > LARGEST || max_rows > LARGEST, "{rows} of {max_rows}");
                    continue;
                };
                assert!(rows <= size && size <= max_rows.min(LARGEST));
                assert!(size < 2 * rows, "{rows} in {size}");
                sizes.push(size);
            }
            assert!(sizes.is_sorted());
            sizes.dedup();
            assert!(sizes.len() <= 52, "{sizes:?}");
        }
        assert_eq!(size(0, 8), None);
        let first: Vec<_> = (1..=17).filter_map(|rows| size(rows, 64)).collect();
        assert_eq!(first[..9], [1, 2, 4, 4, 8, 8, 8, 8, 16]);
        assert_eq!(size(17, 64), Some(24));
    }

    #[test]
    fn rows_that_are_filled_in_touch_nothing_of_the_others() {
        let batch = Batch {
            token_ids: vec![5, 6],
            left: Vec::new(),
            positions: vec![9, 3],
            slots: vec![41, 7],
            row_starts: vec![0, 1, 2],
            context_lens: vec![10, 4],
            blocks: vec![3, 2, 10, 1],
            block_starts: vec![0, 3, 4],
            logit_tokens: vec![0, 1],
        };
        assert!(is_decode(&batch));
        let mut filled = batch.clone();
        let spare = Spare::behind(20, 4).unwrap();
        fill(&mut filled, 4, spare);
        assert!(is_decode(&filled));
        assert_eq!((filled.num_rows(), &filled.logit_tokens), (4, &vec![0, 1]));
        assert_eq!(filled.token_ids, [5, 6, 0, 0]);
        assert_eq!(filled.positions, [9, 3, 0, 0]);
        assert_eq!(filled.slots, [41, 7, 80, 80]);
        assert_eq!(filled.row_starts, [0, 1, 2, 3, 4]);
        assert_eq!(filled.context_lens, [10, 4, 1, 1]);
        assert_eq!(filled.blocks, [3, 2, 10, 1, 20, 20]);
        assert_eq!(filled.block_starts, [0, 3, 4, 5, 6]);
        assert_eq!(Spare::behind(1 << 30, 4), None);
    }
}
