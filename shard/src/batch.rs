//! A plan as flat arrays that a device takes in one copy. Pure.
//!
//! Also the place where a plan is believed or not: after this, no index of a step is checked again.
//! A plan that cannot be computed is an error that names the row; nothing here panics on a plan.
//!
//! Invariant: of a batch that was built, all tokens are in the vocabulary, all slots in the pool,
//! and no slot is written twice.

use kernels::batch::Batch;
use topology::wire::{PlanRow, Sampling, StepPlan};

/// What a plan may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens of a step.
    pub max_tokens: usize,
    /// Most rows of a step.
    pub max_rows: usize,
    /// Positions of the longest sequence.
    pub max_positions: usize,
    /// Tokens per KV block.
    pub block_size: usize,
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Tokens are below this.
    pub vocab_size: usize,
}

impl Limits {
    /// Most block ids in one step.
    pub fn max_blocks(&self) -> usize {
        self.max_rows * self.max_positions.div_ceil(self.block_size)
    }
}

/// Why a plan cannot be computed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The plan as a whole.
    #[error("the plan {0}")]
    Plan(String),
    /// One row.
    #[error("row {row} of the plan {what}")]
    Row {
        /// Its index.
        row: usize,
        /// What is wrong, as a verb phrase.
        what: String,
    },
}

/// Turns plans into batches, reusing its memory.
#[derive(Debug)]
pub struct Batcher {
    limits: Limits,
    batch: Batch,
    /// For each block the number of the plan that last wrote to it: finds blocks written by two rows.
    written: Vec<u64>,
    plans: u64,
}

impl Batcher {
    /// Takes memory for the largest step.
    pub fn new(limits: Limits) -> Self {
        let Limits {
            max_tokens,
            max_rows,
            num_blocks,
            ..
        } = limits;
        let batch = Batch {
            token_ids: Vec::with_capacity(max_tokens),
            left: Vec::with_capacity(max_rows),
            positions: Vec::with_capacity(max_tokens),
            slots: Vec::with_capacity(max_tokens),
            row_starts: Vec::with_capacity(max_rows + 1),
            context_lens: Vec::with_capacity(max_rows),
            blocks: Vec::with_capacity(limits.max_blocks()),
            block_starts: Vec::with_capacity(max_rows + 1),
            logit_tokens: Vec::with_capacity(max_tokens),
        };
        Self {
            limits,
            batch,
            written: vec![0; num_blocks],
            plans: 0,
        }
    }

    /// The limits given to [`Self::new`].
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Checks `plan` and lays it out. `logit_tokens` are the tokens that are sampled after or scored.
    ///
    /// # Errors
    /// [`PlanError`] if a limit is passed or the plan contradicts itself.
    pub fn build(&mut self, plan: &StepPlan) -> Result<&mut Batch, PlanError> {
        self.plans += 1;
        self.batch.clear();
        self.batch.row_starts.push(0);
        self.batch.block_starts.push(0);
        let rows = plan.rows.len();
        if rows == 0 || rows > self.limits.max_rows {
            let most = self.limits.max_rows;
            return Err(PlanError::Plan(format!(
                "has {rows} rows; 1 to {most} fit a step"
            )));
        }
        for (index, row) in plan.rows.iter().enumerate() {
            let what = |what| PlanError::Row { row: index, what };
            self.check_tokens(row).map_err(what)?;
            if let Some(sampling) = &row.sampling {
                check_sampling(sampling, &self.limits).map_err(what)?;
            }
            self.push(row).map_err(what)?;
        }
        Ok(&mut self.batch)
    }

    fn check_tokens(&self, row: &PlanRow) -> Result<(), String> {
        let limits = &self.limits;
        let tokens = row.tokens.len();
        if tokens == 0 {
            return Err("has no tokens".to_owned());
        }
        if self.batch.num_tokens() + tokens > limits.max_tokens {
            return Err(format!(
                "passes the limit of {} tokens per step",
                limits.max_tokens
            ));
        }
        let end = row.position as usize + tokens;
        if end > limits.max_positions {
            return Err(format!(
                "ends at position {end} of {}",
                limits.max_positions
            ));
        }
        let needed = end.div_ceil(limits.block_size);
        if row.blocks.len() < needed {
            return Err(format!(
                "has {} blocks for {end} tokens; {needed} are needed",
                row.blocks.len()
            ));
        }
        if row.targets.len() > tokens {
            return Err(format!(
                "scores {} targets after {tokens} tokens",
                row.targets.len()
            ));
        }
        if row.target_alternatives as usize > limits.vocab_size {
            return Err(format!("asks for {} alternatives", row.target_alternatives));
        }
        check_vocabulary("tokens", &row.tokens, limits)?;
        check_vocabulary("targets", &row.targets, limits)
    }

    fn push(&mut self, row: &PlanRow) -> Result<(), String> {
        let Limits {
            block_size,
            num_blocks,
            ..
        } = self.limits;
        let first = row.position as usize;
        let end = first + row.tokens.len();
        let blocks = &row.blocks[..end.div_ceil(block_size)];
        if let Some(block) = blocks.iter().find(|block| block.index() >= num_blocks) {
            return Err(format!("names block {block} of {num_blocks}"));
        }
        for block in &blocks[first / block_size..] {
            if std::mem::replace(&mut self.written[block.index()], self.plans) == self.plans {
                return Err(format!(
                    "writes to block {block}, which this step writes to already"
                ));
            }
        }
        let batch = &mut self.batch;
        let base = batch.num_tokens();
        batch.token_ids.extend_from_slice(&row.tokens);
        for position in first..end {
            let block = blocks[position / block_size].index();
            batch.positions.push(narrow(position));
            batch
                .slots
                .push(narrow(block * block_size + position % block_size));
        }
        batch.blocks.extend(blocks.iter().map(|block| block.0));
        batch.row_starts.push(narrow(batch.token_ids.len()));
        batch.block_starts.push(narrow(batch.blocks.len()));
        batch.context_lens.push(narrow(end));
        batch
            .logit_tokens
            .extend(wanted_tokens(row).map(|token| narrow(base + token)));
        Ok(())
    }
}

/// Tokens of a row, ascending, after which logits are wanted: those with a target, and the last if a
/// token is sampled.
pub(crate) fn wanted_tokens(row: &PlanRow) -> impl Iterator<Item = usize> + use<> {
    let (tokens, targets) = (row.tokens.len(), row.targets.len());
    let sampled = (row.sampling.is_some() && targets < tokens).then(|| tokens - 1);
    (0..targets).chain(sampled)
}

fn check_vocabulary(what: &str, tokens: &[u32], limits: &Limits) -> Result<(), String> {
    match tokens
        .iter()
        .find(|token| **token as usize >= limits.vocab_size)
    {
        Some(token) => Err(format!(
            "has {token} among its {what}, beyond {}",
            limits.vocab_size
        )),
        None => Ok(()),
    }
}

fn check_sampling(sampling: &Sampling, limits: &Limits) -> Result<(), String> {
    let numbers = [
        (
            "temperature",
            sampling.temperature,
            sampling.temperature >= 0.0,
        ),
        (
            "top_p",
            sampling.top_p,
            sampling.top_p > 0.0 && sampling.top_p <= 1.0,
        ),
        (
            "min_p",
            sampling.min_p,
            (0.0..=1.0).contains(&sampling.min_p),
        ),
        ("presence_penalty", sampling.presence_penalty, true),
        ("frequency_penalty", sampling.frequency_penalty, true),
        (
            "repetition_penalty",
            sampling.repetition_penalty,
            sampling.repetition_penalty > 0.0,
        ),
    ];
    for (name, value, allowed) in numbers {
        if !value.is_finite() || !allowed {
            return Err(format!("samples with {name} {value}"));
        }
    }
    if let Some(bias) = sampling
        .logit_bias
        .iter()
        .find(|bias| !bias.bias.is_finite())
    {
        return Err(format!("adds {} to token {}", bias.bias, bias.token));
    }
    let biased = sampling
        .logit_bias
        .iter()
        .any(|bias| bias.token as usize >= limits.vocab_size);
    if biased {
        return Err(format!("biases a token beyond {}", limits.vocab_size));
    }
    if sampling
        .logprobs
        .is_some_and(|n| n as usize > limits.vocab_size)
    {
        return Err(format!(
            "asks for {:?} log-probabilities",
            sampling.logprobs
        ));
    }
    check_vocabulary("banned tokens", &sampling.banned, limits)?;
    check_vocabulary("allowed tokens", &sampling.allowed, limits)?;
    check_vocabulary("prompt tokens", &sampling.prompt, limits)?;
    check_vocabulary("generated tokens", &sampling.generated, limits)
}

/// Everything in a batch is bounded by limits that came as `u32`, blocks times block size excepted,
/// which the pool's size in memory bounds.
fn narrow(x: usize) -> u32 {
    u32::try_from(x).expect("bounded by the limits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;
    use std::collections::HashSet;
    use topology::ids::BlockId;
    use topology::wire::LogitBias;

    const LIMITS: Limits = Limits {
        max_tokens: 40,
        max_rows: 5,
        max_positions: 50,
        block_size: 4,
        num_blocks: 64,
        vocab_size: 100,
    };

    /// A plan that keeps all limits.
    fn valid_plan(random: &mut Random) -> StepPlan {
        let mut free: Vec<u32> = (0..64).collect();
        let mut rows = Vec::new();
        for _ in 0..=random.below(LIMITS.max_rows) {
            let tokens = 1 + random.below(8);
            let position = random.below(LIMITS.max_positions - tokens);
            let needed = (position + tokens).div_ceil(LIMITS.block_size);
            let mut block = || BlockId(free.swap_remove(random.below(free.len())));
            let blocks = (0..needed).map(|_| block()).collect();
            let token = |_| u32::try_from(random.below(100)).unwrap();
            let tokens: Vec<u32> = (0..tokens).map(token).collect();
            let targets = random.below(tokens.len() + 1);
            rows.push(PlanRow {
                targets: tokens[..targets].to_vec(),
                tokens,
                position: u32::try_from(position).unwrap(),
                blocks,
                sampling: (random.below(2) == 0).then(Box::default),
                target_alternatives: 2,
                last_from: None,
            });
        }
        StepPlan {
            rows,
            ..StepPlan::default()
        }
    }

    #[test]
    fn a_valid_plan_becomes_flat_arrays() {
        let seed = Random::seed("flat arrays");
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let mut batcher = Batcher::new(LIMITS);
        for _ in 0..2_000 {
            let plan = valid_plan(&mut random);
            let batch = batcher.build(&plan).unwrap();
            assert_eq!(batch.num_rows(), plan.rows.len());
            assert_eq!(batch.row_starts.len(), plan.rows.len() + 1);
            let mut wanted = Vec::new();
            for (r, row) in plan.rows.iter().enumerate() {
                let tokens = batch.row_starts[r] as usize..batch.row_starts[r + 1] as usize;
                let blocks = batch.block_starts[r] as usize..batch.block_starts[r + 1] as usize;
                assert_eq!(batch.token_ids[tokens.clone()], row.tokens);
                for (i, flat) in tokens.clone().enumerate() {
                    let position = row.position as usize + i;
                    assert_eq!(batch.positions[flat] as usize, position);
                    let block = batch.blocks[blocks.clone()][position / 4] as usize;
                    assert_eq!(batch.slots[flat] as usize, block * 4 + position % 4);
                    let last = i + 1 == row.tokens.len();
                    if i < row.targets.len() || last && row.sampling.is_some() {
                        wanted.push(u32::try_from(flat).unwrap());
                    }
                }
                assert_eq!(
                    batch.context_lens[r] as usize,
                    row.position as usize + row.tokens.len()
                );
            }
            assert_eq!(batch.logit_tokens, wanted);
            let slots: HashSet<_> = batch.slots.iter().collect();
            assert_eq!(slots.len(), batch.num_tokens(), "no slot twice");
        }
    }

    #[test]
    fn shared_blocks_may_be_read_but_not_written_twice() {
        let row = |position, blocks: &[u32]| PlanRow {
            tokens: vec![1],
            position,
            blocks: blocks.iter().map(|b| BlockId(*b)).collect(),
            ..PlanRow::default()
        };
        let mut batcher = Batcher::new(LIMITS);
        let mut build = |rows| {
            batcher
                .build(&StepPlan {
                    rows,
                    ..StepPlan::default()
                })
                .map(drop)
        };
        assert_eq!(build(vec![row(4, &[7, 1]), row(5, &[7, 2])]), Ok(()));
        // The next step may write the same blocks again.
        assert_eq!(build(vec![row(5, &[7, 1]), row(6, &[7, 2])]), Ok(()));
        let error = build(vec![row(4, &[7, 1]), row(5, &[7, 1])])
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "row 1 of the plan writes to block 1, which this step writes to already"
        );
        assert!(
            build(vec![row(0, &[3]), row(4, &[3, 4])]).is_ok(),
            "row 1 only reads block 3"
        );
    }

    #[test]
    fn a_bad_row_is_named() {
        type Spoil = fn(&mut PlanRow);
        let cases: [(&str, Spoil); 14] = [
            ("has no tokens", |r| r.tokens.clear()),
            ("limit of 40 tokens", |r| r.tokens = vec![1; 41]),
            ("ends at position", |r| r.position = u32::MAX),
            ("are needed", |r| r.blocks.truncate(r.blocks.len() - 1)),
            ("names block 64 of 64", |r| r.blocks[0] = BlockId(64)),
            ("has 100 among its tokens", |r| r.tokens[0] = 100),
            ("has 100 among its targets", |r| r.targets = vec![100]),
            ("scores", |r| r.targets = vec![1; r.tokens.len() + 1]),
            ("asks for 101 alternatives", |r| r.target_alternatives = 101),
            ("temperature NaN", |r| sampling(r).temperature = f32::NAN),
            ("top_p 0", |r| sampling(r).top_p = 0.0),
            ("asks for Some(101)", |r| sampling(r).logprobs = Some(101)),
            ("biases a token", |r| {
                sampling(r).logit_bias = vec![LogitBias {
                    token: 100,
                    bias: 1.0,
                }];
            }),
            ("has 100 among its generated tokens", |r| {
                sampling(r).generated = vec![100];
            }),
        ];
        let seed = Random::seed("bad rows");
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let mut batcher = Batcher::new(LIMITS);
        for (sentence, spoil) in cases {
            for _ in 0..50 {
                let mut plan = valid_plan(&mut random);
                let row = random.below(plan.rows.len());
                spoil(&mut plan.rows[row]);
                let error = batcher.build(&plan).unwrap_err().to_string();
                let expected = format!("row {row} of the plan ");
                assert!(
                    error.starts_with(&expected) && error.contains(sentence),
                    "{error}"
                );
            }
        }
        for rows in [0, 6] {
            let rows = vec![PlanRow::default(); rows];
            let error = batcher
                .build(&StepPlan {
                    rows,
                    ..StepPlan::default()
                })
                .unwrap_err();
            assert!(error.to_string().starts_with("the plan has"), "{error}");
        }
    }

    fn sampling(row: &mut PlanRow) -> &mut Sampling {
        row.sampling.get_or_insert_default()
    }

    #[test]
    fn hostile_plans_are_errors_and_never_panics() {
        let seed = Random::seed("hostile plans");
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let mut batcher = Batcher::new(LIMITS);
        let mut refused = 0;
        for _ in 0..20_000 {
            let mut plan = valid_plan(&mut random);
            let at = random.below(plan.rows.len());
            let row = &mut plan.rows[at];
            let wild = |random: &mut Random| {
                u32::try_from(random.next() >> 32 >> random.below(32)).unwrap()
            };
            match random.below(4) {
                0 => row.position = wild(&mut random),
                1 => row.tokens[0] = wild(&mut random),
                2 => row.blocks[0] = BlockId(wild(&mut random)),
                _ => row.targets.push(wild(&mut random)),
            }
            refused += usize::from(batcher.build(&plan).is_err());
        }
        assert!((5_000..20_000).contains(&refused), "{refused} refused");
    }
}
