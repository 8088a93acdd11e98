//! A shard without mathematics, which trusts no plan.
//!
//! Each slot of its key-value memory remembers the token, the position and the whole prefix that
//! was written. Before a row is computed, every slot that it would read is checked.

use crate::oracle::{EMPTY, VOCAB_SIZE, chain, choose, score};
use std::collections::{BTreeMap, BTreeSet};
use topology::ids::BlockId;
use topology::wire::{PlanRow, RowOutput, Sampling, StepPlan};

/// What one slot holds.
#[derive(Clone, Copy, Debug)]
struct Slot {
    token: u32,
    position: usize,
    /// All tokens up to this one.
    prefix: u64,
}

/// Key-value memory and its checks.
#[derive(Debug)]
pub(crate) struct Shard {
    block_size: usize,
    slots: Vec<Option<Slot>>,
    /// What the last step chose, by row.
    chosen: Vec<Option<u32>>,
}

/// What a row turned out to be.
#[derive(Debug)]
pub(crate) struct Row {
    /// All tokens from the first to the last that the row computes.
    pub(crate) tokens: Vec<u32>,
    pub(crate) output: RowOutput,
    /// How its token was chosen, with what the plan left to the step before.
    pub(crate) sampling: Option<Sampling>,
}

impl Shard {
    pub(crate) fn new(num_blocks: u32, block_size: u32) -> Self {
        let (blocks, block_size) = (num_blocks as usize, block_size as usize);
        Self {
            block_size,
            slots: vec![None; blocks * block_size],
            chosen: Vec::new(),
        }
    }

    /// The memory's content is lost.
    pub(crate) fn wipe(&mut self) {
        self.slots.fill(None);
        self.chosen.clear();
    }

    /// Computes a plan; panics where it asks for what no shard could do.
    pub(crate) fn run(&mut self, plan: &StepPlan) -> Vec<Row> {
        check_writers(plan, self.block_size);
        let plan = &self.known(plan);
        // All rows read before any writes: nothing may lean on this very step.
        let prefixes: Vec<Vec<u32>> = plan.rows.iter().map(|row| self.read(row)).collect();
        let rows = plan.rows.iter().zip(prefixes);
        let rows: Vec<Row> = rows
            .map(|(row, prefix)| self.compute(row, prefix))
            .collect();
        let sampled = rows.iter().map(|row| row.output.sampled.as_ref());
        self.chosen = sampled.map(|sampled| sampled.map(|s| s.token)).collect();
        rows
    }

    /// The plan with the tokens that it leaves to the step before.
    fn known(&self, plan: &StepPlan) -> StepPlan {
        let mut plan = plan.clone();
        for row in &mut plan.rows {
            let Some(from) = row.last_from else {
                continue;
            };
            let token = self.chosen.get(from as usize).copied().flatten();
            let token = token.unwrap_or_else(|| panic!("row {from} chose no token: {row:?}"));
            *row.tokens.last_mut().expect("a row has tokens") = token;
            if let Some(sampling) = row.sampling.as_mut().filter(|s| s.penalises_generated()) {
                sampling.generated.push(token);
            }
        }
        plan
    }

    /// The tokens before a row's, from the memory.
    fn read(&self, row: &PlanRow) -> Vec<u32> {
        let end = row.position as usize + row.tokens.len();
        assert!(!row.tokens.is_empty(), "S3: a row without tokens");
        assert_eq!(row.blocks.len(), end.div_ceil(self.block_size), "K4");
        let distinct: BTreeSet<BlockId> = row.blocks.iter().copied().collect();
        assert_eq!(
            distinct.len(),
            row.blocks.len(),
            "a block is twice in one table"
        );
        let mut before = EMPTY;
        let slots = (0..row.position as usize).map(|position| {
            let slot = self.slots[self.slot(row, position)]
                .unwrap_or_else(|| panic!("position {position} was never written: {row:?}"));
            before = chain(before, slot.token);
            assert_eq!(
                (slot.position, slot.prefix),
                (position, before),
                "position {position} holds another prefix's token: {row:?}"
            );
            slot.token
        });
        slots.collect()
    }

    fn compute(&mut self, row: &PlanRow, mut tokens: Vec<u32>) -> Row {
        let mut prefix = crate::oracle::prefix_of(&tokens);
        let mut targets = Vec::new();
        assert!(
            row.targets.len() <= row.tokens.len(),
            "more targets than tokens"
        );
        for (index, token) in row.tokens.iter().enumerate() {
            assert!(*token < VOCAB_SIZE);
            prefix = chain(prefix, *token);
            let position = tokens.len();
            let slot = self.slot(row, position);
            self.slots[slot] = Some(Slot {
                token: *token,
                position,
                prefix,
            });
            tokens.push(*token);
            if let Some(target) = row.targets.get(index) {
                targets.push(score(prefix, *target, row.target_alternatives));
            }
        }
        let output = RowOutput {
            sampled: row
                .sampling
                .as_deref()
                .map(|sampling| choose(prefix, sampling)),
            targets,
        };
        Row {
            tokens,
            output,
            sampling: row.sampling.as_deref().cloned(),
        }
    }

    fn slot(&self, row: &PlanRow, position: usize) -> usize {
        row.blocks[position / self.block_size].index() * self.block_size
            + position % self.block_size
    }
}

/// K5: a block that a row writes is in no other row's table.
fn check_writers(plan: &StepPlan, block_size: usize) {
    let mut holders: BTreeMap<BlockId, usize> = BTreeMap::new();
    for block in plan.rows.iter().flat_map(|row| &row.blocks) {
        *holders.entry(*block).or_default() += 1;
    }
    for row in &plan.rows {
        for block in &row.blocks[row.position as usize / block_size..] {
            assert_eq!(
                holders[block], 1,
                "K5: block {block} is written and shared: {row:?}"
            );
        }
    }
}
