//! Who holds which KV block.
//!
//! A block is *used* (held by at least one table), *idle* (held by none, but its content can be
//! found again) or *free*. It does not know sequences: it works on their tables. Nothing is written
//! here; a block that more than one table holds is full and never written again, because a hit
//! covers full blocks only and a sequence writes behind its hits.
//!
//! Invariant: every block is in exactly one of the three states, and its count of references is the
//! number of tables that hold it. All operations are O(1) per block.

use super::prefix::PrefixCache;
use super::sequence::Tokens;
use std::ops::Range;
use topology::ids::BlockId;

/// The end of a list.
const NONE: u32 = u32::MAX;

/// A doubly linked list through the blocks; the links are the pool's.
#[derive(Clone, Copy, Debug)]
struct List {
    head: u32,
    tail: u32,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    prev: u32,
    next: u32,
}

/// What a sequence would find in the cache.
#[derive(Debug)]
pub(super) struct Hits {
    /// The blocks, from the start of the sequence.
    pub blocks: Vec<BlockId>,
    /// Those of `blocks` that are idle: taking them leaves fewer for others.
    pub num_idle: usize,
}

/// All KV blocks of the cluster.
#[derive(Debug)]
pub(super) struct BlockPool {
    block_size: usize,
    enable_prefix_caching: bool,
    /// Tables that hold the block.
    refs: Vec<u32>,
    /// A block is on at most one list, so one pair of links is enough.
    links: Vec<Link>,
    free: List,
    /// Least recently used first.
    idle: List,
    cache: PrefixCache,
    /// Tables released so far: unless it grows, what did not fit still does not.
    num_releases: u64,
}

impl BlockPool {
    pub(super) fn new(num_blocks: u32, block_size: u32, enable_prefix_caching: bool) -> Self {
        let (blocks, block_size) = (num_blocks as usize, block_size as usize);
        let mut pool = Self {
            block_size,
            enable_prefix_caching,
            refs: vec![0; blocks],
            links: vec![
                Link {
                    prev: NONE,
                    next: NONE
                };
                blocks
            ],
            free: List::EMPTY,
            idle: List::EMPTY,
            cache: PrefixCache::new(blocks, block_size),
            num_releases: 0,
        };
        pool.clear();
        pool
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.refs.len()
    }

    /// Blocks whose content is of no use.
    pub(super) fn num_free(&self) -> usize {
        self.free.len
    }

    /// Blocks that could be found again, and can be taken.
    pub(super) fn num_idle(&self) -> usize {
        self.idle.len
    }

    /// Blocks that can be taken.
    pub(super) fn num_available(&self) -> usize {
        self.free.len + self.idle.len
    }

    /// Tables released so far.
    pub(super) fn num_releases(&self) -> u64 {
        self.num_releases
    }

    /// Blocks that hold `tokens` tokens.
    pub(super) fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Tables that hold the block.
    pub(super) fn num_holders(&self, block: BlockId) -> u32 {
        self.refs[block.index()]
    }

    /// Finds what is cached of these tokens; takes nothing.
    pub(super) fn lookup(&self, salt: u64, tokens: Tokens<'_>) -> Hits {
        let blocks = if self.enable_prefix_caching {
            self.cache.lookup(salt, tokens)
        } else {
            Vec::new()
        };
        let num_idle = blocks.iter().filter(|b| self.refs[b.index()] == 0).count();
        Hits { blocks, num_idle }
    }

    /// Takes hits: they are held by one table more.
    pub(super) fn take_hits(&mut self, hits: &[BlockId]) {
        for block in hits {
            let refs = &mut self.refs[block.index()];
            if *refs == 0 {
                self.idle.remove(&mut self.links, block.0);
            }
            *refs += 1;
        }
    }

    /// Appends blocks until `table` holds `tokens` tokens. Takes all it needs, or nothing and says
    /// `false`. Free blocks go first, then the idle one that was not used for longest.
    pub(super) fn extend(&mut self, table: &mut Vec<BlockId>, tokens: usize) -> bool {
        let needed = self.blocks_for(tokens).saturating_sub(table.len());
        if needed > self.num_available() {
            return false;
        }
        for _ in 0..needed {
            let block = self.free.pop_front(&mut self.links).or_else(|| {
                let block = self.idle.pop_front(&mut self.links)?;
                self.cache.remove(BlockId(block));
                Some(block)
            });
            let block = BlockId(block.expect("as many blocks as needed are available"));
            self.refs[block.index()] = 1;
            table.push(block);
        }
        true
    }

    /// Gives a table back. Its last block becomes idle first, so that it is evicted before those
    /// it depends on.
    pub(super) fn release(&mut self, table: &mut Vec<BlockId>) {
        self.num_releases += 1;
        for block in table.drain(..).rev() {
            self.release_block(block);
        }
    }

    /// Makes the blocks of `table` numbered `computed`, which were just computed, findable.
    ///
    /// Where another block with the same prefix can be found already, the table takes that one
    /// and gives its own back. So what can be found of a prefix is one block at each place, and a
    /// table that holds a cached block holds all cached blocks before it.
    pub(super) fn register(
        &mut self,
        salt: u64,
        tokens: Tokens<'_>,
        table: &mut [BlockId],
        computed: Range<usize>,
    ) {
        if !self.enable_prefix_caching {
            return;
        }
        for index in computed {
            let Some(place) = self.cache.place(salt, tokens, &table[..index]) else {
                return;
            };
            match self.cache.find(place) {
                Some(same) => {
                    self.take_hits(&[same]);
                    self.release_block(std::mem::replace(&mut table[index], same));
                    self.num_releases += 1;
                }
                None => self.cache.insert(place, table[index]),
            }
        }
    }

    /// A name for the place of a sequence's next full block behind `table`, equal for sequences
    /// that need the same. `None` if it has none, or without a cache.
    pub(super) fn next_place(
        &self,
        salt: u64,
        tokens: Tokens<'_>,
        table: &[BlockId],
    ) -> Option<u64> {
        let place = self.cache.place(salt, tokens, table)?;
        self.enable_prefix_caching.then_some(place.hash())
    }

    /// All blocks lost their content. No table may hold one.
    pub(super) fn clear(&mut self) {
        self.cache.clear();
        self.refs.fill(0);
        self.free = List::EMPTY;
        self.idle = List::EMPTY;
        for block in (0u32..).take(self.refs.len()) {
            self.free.push_back(&mut self.links, block);
        }
        self.num_releases += 1;
    }

    /// Recomputes everything from the tables that are said to be all there are (K1, K2, K3, K6).
    pub(super) fn check<'a>(
        &self,
        tables: impl Iterator<Item = &'a [BlockId]>,
    ) -> Result<(), String> {
        let mut held = vec![0u32; self.refs.len()];
        for block in tables.flatten() {
            held[block.index()] += 1;
        }
        if held != self.refs {
            return Err(format!(
                "K2: tables hold {held:?}, counted are {:?}",
                self.refs
            ));
        }
        let mut seen = vec![false; self.refs.len()];
        for (list, cached, name) in [(self.free, false, "free"), (self.idle, true, "idle")] {
            for block in list.walk(&self.links)? {
                if std::mem::replace(&mut seen[block as usize], true) {
                    return Err(format!("K3: block {block} is listed twice"));
                }
                if held[block as usize] > 0 {
                    return Err(format!("K3: block {block} is {name} and held"));
                }
                if self.cache.contains(BlockId(block)) != cached {
                    return Err(format!("K1: block {block} is {name}, cached: {}", !cached));
                }
            }
        }
        let used = held.iter().filter(|refs| **refs > 0).count();
        if used + self.free.len + self.idle.len != self.refs.len() {
            return Err(format!(
                "K1: {used} used + {} free + {} idle blocks of {}",
                self.free.len,
                self.idle.len,
                self.refs.len()
            ));
        }
        self.cache.check()
    }

    /// Whether the cached blocks of a table hold the tokens of its sequence, and no cached one
    /// follows one that is not (K7, K12).
    pub(super) fn check_content(
        &self,
        salt: u64,
        tokens: Tokens<'_>,
        table: &[BlockId],
    ) -> Result<(), String> {
        for (index, block) in table.iter().enumerate() {
            if !self.cache.agrees(salt, tokens, &table[..index], *block) {
                return Err(format!(
                    "K7, K12: block {block}, number {index} of a table, is another prefix's"
                ));
            }
        }
        Ok(())
    }

    /// One table less holds the block.
    fn release_block(&mut self, block: BlockId) {
        let refs = &mut self.refs[block.index()];
        *refs = refs.checked_sub(1).expect("a released block is held");
        if *refs > 0 {
            return;
        }
        if self.cache.contains(block) {
            self.idle.push_back(&mut self.links, block.0);
        } else {
            self.free.push_front(&mut self.links, block.0);
        }
    }

    /// The idle blocks in the order in which they would be evicted.
    #[cfg(test)]
    fn eviction_order(&self) -> Vec<u32> {
        self.idle.walk(&self.links).unwrap()
    }
}

impl List {
    const EMPTY: Self = Self {
        head: NONE,
        tail: NONE,
        len: 0,
    };

    fn push_back(&mut self, links: &mut [Link], block: u32) {
        links[block as usize] = Link {
            prev: self.tail,
            next: NONE,
        };
        match self.tail {
            NONE => self.head = block,
            tail => links[tail as usize].next = block,
        }
        self.tail = block;
        self.len += 1;
    }

    fn push_front(&mut self, links: &mut [Link], block: u32) {
        links[block as usize] = Link {
            prev: NONE,
            next: self.head,
        };
        match self.head {
            NONE => self.tail = block,
            head => links[head as usize].prev = block,
        }
        self.head = block;
        self.len += 1;
    }

    fn remove(&mut self, links: &mut [Link], block: u32) {
        let Link { prev, next } = links[block as usize];
        match prev {
            NONE => self.head = next,
            prev => links[prev as usize].next = next,
        }
        match next {
            NONE => self.tail = prev,
            next => links[next as usize].prev = prev,
        }
        self.len -= 1;
    }

    fn pop_front(&mut self, links: &mut [Link]) -> Option<u32> {
        let block = self.head;
        if block == NONE {
            return None;
        }
        self.remove(links, block);
        Some(block)
    }

    /// All members in order; an error if the links do not agree.
    fn walk(&self, links: &[Link]) -> Result<Vec<u32>, String> {
        let (mut members, mut prev, mut block) = (Vec::new(), NONE, self.head);
        while block != NONE && members.len() <= self.len {
            if links[block as usize].prev != prev {
                return Err(format!("K3: the link back from block {block} is wrong"));
            }
            members.push(block);
            (prev, block) = (block, links[block as usize].next);
        }
        if members.len() != self.len || self.tail != prev {
            return Err(format!(
                "K3: a list counts {} blocks and links {}",
                self.len,
                members.len()
            ));
        }
        Ok(members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(tokens: &[u32]) -> Tokens<'_> {
        Tokens {
            prompt: tokens,
            generated: &[],
        }
    }

    /// A table over `tokens`, computed and registered.
    fn computed(pool: &mut BlockPool, tokens: &[u32]) -> Vec<BlockId> {
        let mut table = Vec::new();
        assert!(pool.extend(&mut table, tokens.len()));
        pool.register(
            0,
            view(tokens),
            &mut table,
            0..tokens.len() / pool.block_size,
        );
        table
    }

    #[test]
    fn the_tail_of_the_longest_unused_sequence_is_evicted_first() {
        let mut pool = BlockPool::new(6, 2, true);
        let mut first = computed(&mut pool, &[1, 1, 2, 2]);
        let mut second = computed(&mut pool, &[3, 3, 4, 4]);
        pool.release(&mut first);
        pool.release(&mut second);
        assert_eq!(pool.eviction_order(), [1, 0, 3, 2]);
        // A hit makes the first sequence the most recently used.
        let hits = pool.lookup(0, view(&[1, 1, 2, 2, 9]));
        assert_eq!((hits.blocks.len(), hits.num_idle), (2, 2));
        let mut table = hits.blocks;
        pool.take_hits(&table);
        pool.check(std::iter::once(table.as_slice())).unwrap();
        pool.release(&mut table);
        assert_eq!(pool.eviction_order(), [3, 2, 1, 0]);
        // Two free blocks go before any idle one.
        assert!(pool.extend(&mut table, 6));
        assert_eq!(pool.eviction_order(), [2, 1, 0]);
        assert_eq!(pool.lookup(0, view(&[3, 3, 4, 4, 9])).blocks.len(), 1);
        pool.check(std::iter::once(table.as_slice())).unwrap();
    }

    #[test]
    fn equal_blocks_computed_twice_become_one() {
        let mut pool = BlockPool::new(6, 2, true);
        let first = computed(&mut pool, &[1, 1, 2, 2, 3]);
        let mut second = computed(&mut pool, &[1, 1, 2, 2, 4]);
        assert_eq!(first[..2], second[..2]);
        assert_eq!(pool.num_free(), 2);
        pool.check([first.as_slice(), &second].into_iter()).unwrap();
        pool.release(&mut second);
        assert_eq!((pool.num_free(), pool.num_idle()), (3, 0));
    }

    #[test]
    fn too_much_takes_nothing() {
        let mut pool = BlockPool::new(3, 4, false);
        let mut table = Vec::new();
        assert!(pool.extend(&mut table, 5));
        assert!(!pool.extend(&mut table, 13));
        assert_eq!((table.len(), pool.num_available()), (2, 1));
        assert!(pool.extend(&mut table, 12));
        assert_eq!((table.len(), pool.num_available()), (3, 0));
    }

    #[test]
    #[should_panic(expected = "a released block is held")]
    fn a_block_cannot_be_released_twice() {
        let mut pool = BlockPool::new(3, 4, false);
        let mut table = Vec::new();
        assert!(pool.extend(&mut table, 4));
        let mut copy = table.clone();
        pool.release(&mut table);
        pool.release(&mut copy);
    }

    #[test]
    fn the_check_sees_a_lost_and_a_doubled_block() {
        let mut pool = BlockPool::new(3, 4, true);
        let mut table = Vec::new();
        assert!(pool.extend(&mut table, 8));
        pool.check(std::iter::once(table.as_slice())).unwrap();
        assert!(pool.check(std::iter::once(&table[..1])).is_err());
        pool.refs[table[0].index()] = 0;
        assert!(pool.check(std::iter::once(&table[1..])).is_err(), "K1");
    }
}
