//! Recomputes the scheduler's whole accounting and compares.
//!
//! The letters are those of the project's list of invariants: K for blocks, S for sequences. What
//! takes two moments to see (K5 on content, K8, K11, S1, S2, S4, S5, S8) is for the model test.
//!
//! It costs O(blocks + tokens); tests call it after every operation.

use super::Scheduler;
use super::sequence::Sequence;
use super::under_way::UnderWay;
use std::collections::BTreeMap;

impl Scheduler {
    /// Whether all that is kept is what it would be if computed anew.
    ///
    /// # Errors
    /// The invariant that does not hold, in words.
    pub fn check(&self) -> Result<(), String> {
        self.pool
            .check(self.running.iter().map(|s| s.table.as_slice()))?;
        self.waiting.check()?;
        self.check_places()?;
        self.check_limits()?;
        self.check_suspects()?;
        for sequence in self.waiting.iter() {
            check_waiting(sequence)?;
        }
        for sequence in &self.running {
            self.check_running(sequence)?;
        }
        Ok(())
    }

    /// S1, S2: each live sequence is in exactly one place, and found there.
    fn check_places(&self) -> Result<(), String> {
        let places = self.waiting.iter().chain(&self.running);
        let mut found = BTreeMap::new();
        for sequence in places {
            if found.insert(sequence.request.id, sequence.rank()).is_some() {
                return Err(format!("S2: {:?} is twice", sequence.request.id));
            }
        }
        if found != self.ranks {
            return Err("S1: the sequences found are not those that were not ended".into());
        }
        if !self.running.is_sorted_by_key(Sequence::rank) {
            return Err("S4: running sequences are out of order".into());
        }
        Ok(())
    }

    /// S3, S6, S7.
    fn check_limits(&self) -> Result<(), String> {
        let config = &self.config;
        let max_rows = config.max_num_seqs as usize;
        let max_tokens = config.max_num_batched_tokens as usize;
        let mut steps = self.under_way.iter().map(UnderWay::size);
        let too_large = steps.find(|(rows, tokens)| *rows > max_rows || *tokens > max_tokens);
        if too_large.is_some() || self.running.len() > max_rows {
            let running = self.running.len();
            return Err(format!(
                "S3: {running} sequences run, a step has {too_large:?}"
            ));
        }
        if self.under_way.len() > 1 + usize::from(config.async_scheduling) {
            return Err(format!("S3: {} steps are under way", self.under_way.len()));
        }
        if self.waiting.num_fresh() > config.max_num_queued_reqs
            || self.waiting.num_fresh_tokens() > config.max_num_queued_tokens
        {
            return Err("S7: more is queued than may be".into());
        }
        let longest = config.max_sequence_tokens();
        let mut all = self.waiting.iter().chain(&self.running);
        if all.any(|s| s.request.prompt.len() + s.request.max_tokens as usize > longest) {
            return Err("S6: a sequence cannot fit alone".into());
        }
        Ok(())
    }

    /// K4, K5, K7, K12, and the state of a running sequence.
    fn check_running(&self, sequence: &Sequence) -> Result<(), String> {
        let id = sequence.request.id;
        let block_size = self.config.block_size as usize;
        let needed = self.pool.blocks_for(sequence.len());
        let held = sequence.table.len();
        // The token chosen last gets its block when the next step is planned.
        let one_behind =
            sequence.gap() == 1 && held + 1 == needed && sequence.planned() == held * block_size;
        if held != needed && !one_behind {
            return Err(format!("K4: {id:?} needs {needed} blocks and holds {held}"));
        }
        let shares = self.under_way.iter().map(|s| s.share_of(sequence.rank()));
        let (scheduled, pending) = shares.fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
        if (sequence.scheduled, sequence.pending, sequence.share) != (scheduled, pending, 0)
            || sequence.planned() > sequence.len()
            || (sequence.gap() == 0 && scheduled == 0)
        {
            return Err(format!(
                "S2: {id:?} is at {} + {} of {} tokens; steps under way compute {scheduled} and choose {pending}",
                sequence.computed,
                sequence.scheduled,
                sequence.len(),
            ));
        }
        for block in &sequence.table[sequence.computed / block_size..] {
            if self.pool.num_holders(*block) != 1 {
                return Err(format!(
                    "K5: {id:?} will write to block {block}, which is shared"
                ));
            }
        }
        check_scores(sequence, sequence.computed)?;
        self.pool
            .check_content(
                sequence.request.cache_salt,
                sequence.tokens(),
                &sequence.table,
            )
            .map_err(|error| format!("{error} ({id:?})"))
    }
}

/// A waiting sequence has its tokens and nothing else.
fn check_waiting(sequence: &Sequence) -> Result<(), String> {
    if sequence.planned() + sequence.pending + sequence.share + sequence.table.len() > 0
        || (!sequence.started && !sequence.generated.is_empty())
    {
        return Err(format!(
            "S2: {:?} waits and is computed",
            sequence.request.id
        ));
    }
    check_scores(sequence, 0)
}

/// Scores of prompt tokens are as many as were computed.
fn check_scores(sequence: &Sequence, computed: usize) -> Result<(), String> {
    let expected = computed.min(sequence.request.prompt.len() - 1);
    match &sequence.scores {
        Some(scores) if scores.len() != expected => Err(format!(
            "S2: {:?} has {} scores of {expected}",
            sequence.request.id,
            scores.len()
        )),
        _ => Ok(()),
    }
}
