//! The small numbers that name things across processes.
//!
//! Newtypes, so that a rank is never taken for a block. They carry no meaning beyond identity and
//! order; what they point at lives with its owner.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash,
            Encode, Decode, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// Position of a shard in its tensor-parallel group, `0..world_size`.
    Rank(u32)
);
id!(
    /// One life of a communicator. A fault ends the epoch; messages of an older one change nothing.
    Epoch(u32)
);
id!(
    /// Counts the plans of an epoch, from 0.
    Step(u64)
);
id!(
    /// Index of a KV block, `0..num_blocks`, the same block on every rank.
    BlockId(u32)
);

impl Rank {
    /// The rank as an index into per-rank arrays.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl BlockId {
    /// The block as an index into the block pool.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl Step {
    /// The step after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}
