//! A step's index arrays, where the CPU operations read them.

use crate::backend::DeviceError;
use crate::batch::Batch;

/// A copy of a [`Batch`] in memory taken at start, and what follows from it.
#[derive(Debug)]
pub struct CpuBatch {
    pub(crate) host: Batch,
    /// The row that each token belongs to. `[tokens]`
    pub(crate) token_rows: Vec<u32>,
    max_tokens: usize,
    max_rows: usize,
    max_blocks: usize,
}

impl CpuBatch {
    /// Memory for the largest step.
    pub(crate) fn with_capacity(max_tokens: usize, max_rows: usize, max_blocks: usize) -> Self {
        let host = Batch {
            token_ids: Vec::with_capacity(max_tokens),
            left: Vec::with_capacity(max_rows),
            positions: Vec::with_capacity(max_tokens),
            slots: Vec::with_capacity(max_tokens),
            row_starts: Vec::with_capacity(max_rows + 1),
            context_lens: Vec::with_capacity(max_rows),
            blocks: Vec::with_capacity(max_blocks),
            block_starts: Vec::with_capacity(max_rows + 1),
            logit_tokens: Vec::with_capacity(max_tokens),
        };
        let token_rows = Vec::with_capacity(max_tokens);
        Self {
            host,
            token_rows,
            max_tokens,
            max_rows,
            max_blocks,
        }
    }

    /// Copies `from`. An error where it is larger than the memory or its arrays contradict each other.
    pub(crate) fn upload(&mut self, from: &Batch) -> Result<(), DeviceError> {
        let failed = |reason: String| DeviceError::Failed {
            device: "cpu".into(),
            reason,
        };
        for (what, length, limit) in [
            ("tokens", from.num_tokens(), self.max_tokens),
            ("rows", from.num_rows(), self.max_rows),
            ("blocks", from.blocks.len(), self.max_blocks),
        ] {
            if length > limit {
                return Err(failed(format!(
                    "a step of {length} {what} where {limit} fit"
                )));
            }
        }
        check(from).map_err(|what| failed(format!("a step whose {what} do not match")))?;

        let Batch {
            token_ids,
            left,
            positions,
            slots,
            row_starts,
            context_lens,
            blocks,
            block_starts,
            logit_tokens,
        } = &mut self.host;
        for (to, from) in [
            (token_ids, &from.token_ids),
            (positions, &from.positions),
            (slots, &from.slots),
            (row_starts, &from.row_starts),
            (context_lens, &from.context_lens),
            (blocks, &from.blocks),
            (block_starts, &from.block_starts),
            (logit_tokens, &from.logit_tokens),
        ] {
            to.clone_from(from);
        }
        left.clone_from(&from.left);
        self.token_rows.clear();
        for (row, bounds) in (0_u32..).zip(self.host.row_starts.windows(2)) {
            self.token_rows.resize(bounds[1] as usize, row);
        }
        Ok(())
    }

    /// The blocks of `row`, in the order of positions.
    #[inline]
    pub(crate) fn row_blocks(&self, row: usize) -> &[u32] {
        let starts = &self.host.block_starts;
        &self.host.blocks[starts[row] as usize..starts[row + 1] as usize]
    }
}

/// Names the arrays that contradict each other.
fn check(batch: &Batch) -> Result<(), &'static str> {
    let tokens = batch.num_tokens();
    let covers = |starts: &[u32], length: usize| {
        starts.len() == batch.num_rows() + 1
            && starts.first() == Some(&0)
            && starts.last().is_some_and(|&last| last as usize == length)
            && starts.is_sorted()
    };
    if batch.positions.len() != tokens || batch.slots.len() != tokens {
        return Err("tokens, positions and slots");
    }
    if !covers(&batch.row_starts, tokens) {
        return Err("rows and tokens");
    }
    let is_token = |(token, _): &(u32, u32)| (*token as usize) < tokens;
    if batch.left.len() > batch.num_rows() || !batch.left.iter().all(is_token) {
        return Err("tokens that are left to the device");
    }
    if !covers(&batch.block_starts, batch.blocks.len()) {
        return Err("rows and blocks");
    }
    if batch.logit_tokens.len() > tokens || batch.logit_tokens.iter().any(|&t| t as usize >= tokens)
    {
        return Err("logit rows and tokens");
    }
    Ok(())
}
