//! What the scheduler knows in numbers.
//!
//! Plain values: names, labels and units of metrics are given at the edge.

/// A snapshot. Fields under "so far" only grow, also over faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences that hold blocks and take part in every step.
    pub running: usize,
    /// Sequences that wait, preempted ones included.
    pub waiting: usize,
    /// Prefill backlog: tokens that are known and not computed, of waiting and running sequences.
    pub waiting_tokens: usize,
    /// Sequences that count against `max_num_queued_reqs`: those that wait and never ran.
    pub queued: usize,
    /// Their prompt tokens, which count against `max_num_queued_tokens`.
    pub queued_tokens: usize,
    /// Sequences that run alone, one after the other, because they may be what kills the shards.
    pub suspects: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Blocks in all; `used + evictable + free`.
    pub blocks_total: usize,
    /// Blocks that running sequences hold.
    pub blocks_used: usize,
    /// Blocks that none holds and whose content may be found again.
    pub blocks_evictable: usize,
    /// Blocks without content.
    pub blocks_free: usize,
    /// Counters.
    pub counters: Counters,
}

/// Numbers that only grow, also over faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps planned.
    pub steps: u64,
    /// Sequences that gave up their blocks to others.
    pub preemptions: u64,
    /// Sequences that lost their blocks to a fault.
    pub recomputations: u64,
    /// Tokens looked up in the prefix cache, once for each sequence.
    pub prefix_cache_queries: u64,
    /// Of those, tokens found.
    pub prefix_cache_hits: u64,
    /// Tokens computed to close a gap.
    pub prefill_tokens: u64,
    /// Tokens computed that had been chosen in the step before.
    pub decode_tokens: u64,
    /// Of those, tokens computed for sequences that had ended meanwhile.
    pub discarded_tokens: u64,
}

impl Stats {
    /// Tokens of key-value memory that running sequences hold.
    pub fn kv_tokens_used(&self) -> usize {
        self.blocks_used * self.block_size
    }

    /// Tokens of key-value memory that hold what may be found again, and can be taken.
    pub fn kv_tokens_evictable(&self) -> usize {
        self.blocks_evictable * self.block_size
    }

    /// Tokens of key-value memory without content.
    pub fn kv_tokens_free(&self) -> usize {
        self.blocks_free * self.block_size
    }

    /// Tokens of key-value memory in all.
    pub fn kv_tokens_total(&self) -> usize {
        self.blocks_total * self.block_size
    }
}
