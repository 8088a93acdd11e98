//! Which computed blocks hold which tokens, so that a sequence need not compute them again.
//!
//! The cache is a tree: a *node* is one full block of tokens after the node before it, the root is
//! one salt. Lookups go through a hash of (salt, parent node, tokens), but the hash is not trusted:
//! what it finds is compared with the stored salt, parent and tokens. As a node's number is never
//! used twice, equal parents mean equal prefixes, and a hit is exact whatever the hash does.
//!
//! It does not count references or choose what to evict; that is [`super::blocks`].
//!
//! Invariant: `by_hash` and `entries` are inverse to each other.

use super::sequence::Tokens;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use topology::ids::BlockId;

/// The place of one full block of a sequence in the tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    salt: u64,
    /// The node before it; 0 is the root.
    parent: u64,
    hash: u64,
    /// The sequence, and which of its blocks this is.
    tokens: Tokens<'a>,
    index: usize,
}

/// What is known of one cached block.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// Its own number, or 0 if the block is not cached.
    node: u64,
    parent: u64,
    salt: u64,
    hash: u64,
}

/// The tree of cached blocks.
#[derive(Debug)]
pub(super) struct PrefixCache {
    block_size: usize,
    by_hash: BTreeMap<u64, BlockId>,
    /// By block.
    entries: Vec<Entry>,
    /// By block, `block_size` each: what a cached block holds.
    tokens: Vec<u32>,
    next_node: u64,
}

impl Place<'_> {
    /// Equal for equal places; hardly ever for others.
    pub(super) fn hash(&self) -> u64 {
        self.hash
    }
}

impl PrefixCache {
    pub(super) fn new(num_blocks: usize, block_size: usize) -> Self {
        Self {
            block_size,
            by_hash: BTreeMap::new(),
            entries: vec![Entry::default(); num_blocks],
            tokens: vec![0; num_blocks * block_size],
            next_node: 1,
        }
    }

    /// Whether the block can be found again.
    pub(super) fn contains(&self, block: BlockId) -> bool {
        self.entries[block.index()].node != 0
    }

    /// Where block `index` of a sequence belongs, the blocks before it being `before`. `None` if
    /// the sequence does not fill that block, or the one before is not in the tree.
    pub(super) fn place<'a>(
        &self,
        salt: u64,
        tokens: Tokens<'a>,
        before: &[BlockId],
    ) -> Option<Place<'a>> {
        let index = before.len();
        let parent = match before.last() {
            Some(block) if self.contains(*block) => self.entries[block.index()].node,
            Some(_) => return None,
            None => 0,
        };
        let end = (index + 1) * self.block_size;
        (end <= tokens.len()).then(|| Place {
            salt,
            parent,
            hash: hash(salt, parent, tokens.range(end - self.block_size..end)),
            tokens,
            index,
        })
    }

    /// The block that is cached at this place.
    pub(super) fn find(&self, place: Place<'_>) -> Option<BlockId> {
        let block = *self.by_hash.get(&place.hash)?;
        let entry = &self.entries[block.index()];
        let same = entry.salt == place.salt
            && entry.parent == place.parent
            && self
                .slice(place.tokens, place.index)
                .eq(self.stored(block).iter().copied());
        same.then_some(block)
    }

    /// The longest run of cached blocks that hold the first tokens.
    ///
    /// At most `(len - 1) / block_size` blocks: the last token is computed in any case, as its
    /// logits choose the next.
    pub(super) fn lookup(&self, salt: u64, tokens: Tokens<'_>) -> Vec<BlockId> {
        let mut hits = Vec::new();
        while hits.len() < tokens.len().saturating_sub(1) / self.block_size {
            let place = self.place(salt, tokens, &hits);
            let Some(block) = place.and_then(|place| self.find(place)) else {
                break;
            };
            hits.push(block);
        }
        hits
    }

    /// Makes a computed block findable. It is not if another content has the same hash; then
    /// neither are those behind it.
    pub(super) fn insert(&mut self, place: Place<'_>, block: BlockId) {
        debug_assert!(!self.contains(block), "a block is cached once");
        if self.by_hash.contains_key(&place.hash) {
            return;
        }
        let start = block.index() * self.block_size;
        let range = place.index * self.block_size..(place.index + 1) * self.block_size;
        let slots = &mut self.tokens[start..start + self.block_size];
        for (slot, token) in slots.iter_mut().zip(place.tokens.range(range)) {
            *slot = token;
        }
        self.entries[block.index()] = Entry {
            node: self.next_node,
            parent: place.parent,
            salt: place.salt,
            hash: place.hash,
        };
        self.next_node += 1;
        self.by_hash.insert(place.hash, block);
    }

    /// The block's content is about to be overwritten: it can no longer be found.
    pub(super) fn remove(&mut self, block: BlockId) {
        let entry = std::mem::take(&mut self.entries[block.index()]);
        if entry.node != 0 {
            self.by_hash.remove(&entry.hash);
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.by_hash.clear();
        self.entries.fill(Entry::default());
    }

    /// Compares map and entries (K6), and recomputes each hash from what is stored.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut cached = 0;
        for (block, entry) in (0..).map(BlockId).zip(&self.entries) {
            if entry.node == 0 {
                continue;
            }
            cached += 1;
            let hash = hash(entry.salt, entry.parent, self.stored(block).iter().copied());
            if hash != entry.hash || self.by_hash.get(&hash) != Some(&block) {
                return Err(format!(
                    "K6: cached block {block} is not behind its own hash"
                ));
            }
            if entry.node >= self.next_node {
                return Err(format!("K6: block {block} has a node of the future"));
            }
        }
        if cached != self.by_hash.len() {
            return Err(format!(
                "K6: {cached} blocks are cached, {} are mapped",
                self.by_hash.len()
            ));
        }
        Ok(())
    }

    /// Whether a table's block is, if it is cached, cached at the place that the sequence gives it
    /// (K7, K12).
    pub(super) fn agrees(
        &self,
        salt: u64,
        tokens: Tokens<'_>,
        before: &[BlockId],
        block: BlockId,
    ) -> bool {
        let found = || self.find(self.place(salt, tokens, before)?);
        !self.contains(block) || found() == Some(block)
    }

    /// The tokens of the sequence's block `index`.
    fn slice<'a>(&self, tokens: Tokens<'a>, index: usize) -> impl Iterator<Item = u32> + use<'a> {
        tokens.range(index * self.block_size..(index + 1) * self.block_size)
    }

    fn stored(&self, block: BlockId) -> &[u32] {
        &self.tokens[block.index() * self.block_size..][..self.block_size]
    }
}

/// Keyed by constants: equal runs give equal traces, and a collision costs a hit, never an answer.
fn hash(salt: u64, parent: u64, tokens: impl Iterator<Item = u32>) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write_u64(salt);
    hasher.write_u64(parent);
    for token in tokens {
        hasher.write_u32(token);
    }
    hasher.finish()
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

    fn blocks(ids: &[u32]) -> Vec<BlockId> {
        ids.iter().copied().map(BlockId).collect()
    }

    /// Caches all full blocks of `tokens`.
    fn fill(cache: &mut PrefixCache, salt: u64, tokens: &[u32], table: &[u32]) {
        let table = blocks(table);
        for (index, block) in table.iter().enumerate() {
            if let Some(place) = cache.place(salt, view(tokens), &table[..index]) {
                cache.insert(place, *block);
            }
        }
    }

    #[test]
    fn a_hit_never_covers_the_last_token() {
        let mut cache = PrefixCache::new(8, 4);
        let tokens: Vec<u32> = (0..12).collect();
        fill(&mut cache, 0, &tokens, &[5, 1, 3]);
        for (len, expected) in [(12, 2), (11, 2), (9, 2), (8, 1), (5, 1), (4, 0), (1, 0)] {
            let hits = cache.lookup(0, view(&tokens[..len]));
            assert_eq!(hits, blocks(&[5, 1, 3])[..expected], "{len} tokens");
        }
        let other_salt = cache.lookup(1, view(&tokens));
        assert!(other_salt.is_empty(), "K12");
        cache.check().unwrap();
    }

    #[test]
    fn equal_blocks_after_different_prefixes_are_different() {
        let mut cache = PrefixCache::new(8, 2);
        fill(&mut cache, 0, &[1, 1, 9, 9], &[0]);
        fill(&mut cache, 0, &[2, 2, 9, 9], &[2, 3]);
        assert_eq!(cache.lookup(0, view(&[1, 1, 9, 9, 5])), blocks(&[0]));
        assert_eq!(cache.lookup(0, view(&[2, 2, 9, 9, 5])), blocks(&[2, 3]));
        cache.remove(BlockId(2));
        assert!(cache.lookup(0, view(&[2, 2, 9, 9, 5])).is_empty());
        cache.check().unwrap();
    }

    #[test]
    fn a_collision_is_a_miss_and_ends_the_chain() {
        let mut cache = PrefixCache::new(8, 2);
        fill(&mut cache, 0, &[1, 1], &[0]);
        // Forge a collision: what is stored is no longer what was hashed.
        cache.tokens[0] = 7;
        assert!(cache.lookup(0, view(&[1, 1, 1])).is_empty());
        fill(&mut cache, 0, &[1, 1, 3, 3], &[4, 5]);
        assert!(!cache.contains(BlockId(4)) && !cache.contains(BlockId(5)));
    }
}
