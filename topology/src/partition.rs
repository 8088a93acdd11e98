//! Which part of each tensor belongs to which rank: pure ranges.
//!
//! Megatron's words: *column-parallel* splits a layer's outputs, the rows of an `[out, in]` weight;
//! *row-parallel* splits its inputs, the columns; *vocab-parallel* splits embedding and head by
//! token. Here are ranges only; who reads the bytes is the shard's loader, who adds up the result
//! of a row-parallel layer is its forward pass.
//!
//! Invariant: over all ranks the parts of a tensor cover it exactly once; only KV heads, where
//! there are fewer of them than ranks, and replicated tensors are held several times.

use crate::ids::Rank;
use crate::model_shape::ModelShape;
use std::ops::Range;

pub use crate::tensors::{Axis, HEAD, Split, TensorSpec, tensors};

/// Largest number of ranks in a group.
pub const MAX_WORLD_SIZE: u32 = 1024;

/// One rank's part of a model, in whole-model indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// This rank.
    pub rank: Rank,
    /// Number of ranks.
    pub world_size: u32,
    /// Query heads of this rank.
    pub heads: Range<u32>,
    /// KV heads of this rank. Where there are fewer KV heads than ranks, several ranks hold the same.
    pub kv_heads: Range<u32>,
    /// Positions of the feed-forward layer's inner width. Ranks may differ by one.
    pub intermediate: Range<u32>,
    /// Tokens whose embedding and logit this rank has. Shorter than `vocab_width`, or empty, at the
    /// last ranks where the vocabulary does not divide.
    pub vocab: Range<u32>,
    /// Logits that each rank contributes to a gather, padding included: `ceil(vocab_size / world_size)`.
    pub vocab_width: u32,
    head_dim: u32,
}

/// Why a model cannot be split. A sentence that names the sizes which would work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartitionError {
    /// The numbers of heads do not divide.
    #[error(
        "{architecture} with {heads} query heads, {kv_heads} KV heads and a feed-forward width of \
         {intermediate} cannot be split over {world_size} ranks; --tensor-parallel-size can be \
         {works}"
    )]
    Indivisible {
        /// Of the model.
        architecture: String,
        /// Query heads of the model.
        heads: u32,
        /// KV heads of the model.
        kv_heads: u32,
        /// Width of the feed-forward layer.
        intermediate: u32,
        /// The size asked for.
        world_size: u32,
        /// The sizes that work, as a list for people.
        works: String,
    },
    /// The rank is not one of the group's.
    #[error("rank {rank} is not one of the {world_size} ranks")]
    NoSuchRank {
        /// The rank asked for.
        rank: Rank,
        /// Number of ranks.
        world_size: u32,
    },
}

impl Partition {
    /// The part of `rank` among `world_size` ranks.
    ///
    /// # Errors
    /// [`PartitionError`] if the heads cannot be split so many ways or there is no such rank.
    pub fn new(shape: &ModelShape, rank: Rank, world_size: u32) -> Result<Self, PartitionError> {
        if !divides(shape, world_size) {
            return Err(indivisible(shape, world_size));
        }
        if rank.0 >= world_size {
            return Err(PartitionError::NoSuchRank { rank, world_size });
        }
        let kv_heads = if shape.num_kv_heads >= world_size {
            share(shape.num_kv_heads, rank, world_size)
        } else {
            // Each KV head lives on world_size / num_kv_heads ranks, next to its query heads.
            let head = start(shape.num_kv_heads, rank.0, world_size);
            head..head + 1
        };
        let vocab_width = shape.vocab_size.div_ceil(world_size);
        let vocab_end = |ranks: u32| {
            let end = u64::from(ranks) * u64::from(vocab_width);
            u32::try_from(end).unwrap_or(u32::MAX).min(shape.vocab_size)
        };
        Ok(Self {
            rank,
            world_size,
            heads: share(shape.num_heads, rank, world_size),
            kv_heads,
            intermediate: share(shape.intermediate_size, rank, world_size),
            vocab: vocab_end(rank.0)..vocab_end(rank.0 + 1),
            vocab_width,
            head_dim: shape.head_dim,
        })
    }

    /// The parts of all ranks, in rank order.
    ///
    /// # Errors
    /// [`PartitionError`] if the heads cannot be split so many ways.
    pub fn all(shape: &ModelShape, world_size: u32) -> Result<Vec<Self>, PartitionError> {
        if world_size == 0 {
            return Err(indivisible(shape, world_size));
        }
        let ranks = (0..world_size).map(|rank| Self::new(shape, Rank(rank), world_size));
        ranks.collect()
    }

    /// Query heads of this rank.
    pub fn local_heads(&self) -> u32 {
        self.heads.end - self.heads.start
    }

    /// KV heads of this rank, at least 1.
    pub fn local_kv_heads(&self) -> u32 {
        self.kv_heads.end - self.kv_heads.start
    }

    /// Feed-forward width of this rank.
    pub fn local_intermediate(&self) -> u32 {
        self.intermediate.end - self.intermediate.start
    }

    /// The part of a tensor that this rank holds.
    pub fn part(&self, tensor: &TensorSpec) -> TensorPart {
        let whole = TensorPart {
            rows: 0..tensor.rows,
            cols: 0..tensor.cols,
        };
        match tensor.split {
            Split::Column(axis) => TensorPart {
                rows: self.along(axis),
                ..whole
            },
            Split::Row(axis) => TensorPart {
                cols: self.along(axis),
                ..whole
            },
            Split::Vocab => TensorPart {
                rows: self.vocab.clone(),
                ..whole
            },
            Split::Replicated => whole,
        }
    }

    /// This rank's range of an axis, in rows or columns of a weight.
    fn along(&self, axis: Axis) -> Range<u32> {
        let (range, unit) = match axis {
            Axis::Heads => (&self.heads, self.head_dim),
            Axis::KvHeads => (&self.kv_heads, self.head_dim),
            Axis::Intermediate => (&self.intermediate, 1),
        };
        range.start * unit..range.end * unit
    }
}

/// The tensor-parallel sizes up to [`MAX_WORLD_SIZE`] that a model can be split over, ascending.
pub fn world_sizes(shape: &ModelShape) -> Vec<u32> {
    let most = shape.num_heads.min(MAX_WORLD_SIZE);
    (1..=most).filter(|size| divides(shape, *size)).collect()
}

/// One rank's part of a tensor. May be empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPart {
    /// Rows of the stored tensor.
    pub rows: Range<u32>,
    /// Columns of the stored tensor; `0..1` for a vector.
    pub cols: Range<u32>,
}

impl TensorPart {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        let length = |range: &Range<u32>| u64::from(range.end.saturating_sub(range.start));
        length(&self.rows) * length(&self.cols)
    }
}

/// Query heads must divide; KV heads must divide, or be divided; nobody may go without a
/// feed-forward part. The vocabulary is padded and never in the way.
fn divides(shape: &ModelShape, world_size: u32) -> bool {
    (1..=MAX_WORLD_SIZE).contains(&world_size)
        && shape.num_heads.is_multiple_of(world_size)
        && (shape.num_kv_heads.is_multiple_of(world_size)
            || world_size.is_multiple_of(shape.num_kv_heads))
        && shape.intermediate_size >= world_size
}

fn indivisible(shape: &ModelShape, world_size: u32) -> PartitionError {
    let sizes = world_sizes(shape);
    let sizes: Vec<_> = sizes.iter().map(u32::to_string).collect();
    let works = match sizes.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => sizes.join(""),
    };
    PartitionError::Indivisible {
        architecture: shape.architecture.clone(),
        heads: shape.num_heads,
        kv_heads: shape.num_kv_heads,
        intermediate: shape.intermediate_size,
        world_size,
        works,
    }
}

/// Contiguous ranges that differ by at most one.
fn share(whole: u32, rank: Rank, world_size: u32) -> Range<u32> {
    start(whole, rank.0, world_size)..start(whole, rank.0 + 1, world_size)
}

/// `floor(whole * rank / world_size)`, which is at most `whole`.
fn start(whole: u32, rank: u32, world_size: u32) -> u32 {
    let start = u64::from(whole) * u64::from(rank) / u64::from(world_size);
    u32::try_from(start).unwrap_or(whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Random, seed};
    use crate::testing::random_shape;
    use std::collections::BTreeSet;

    /// How often each element of a tensor is held, over all ranks.
    fn holders(spec: &TensorSpec, partitions: &[Partition]) -> BTreeSet<u32> {
        let mut count = vec![0u32; (spec.rows * spec.cols) as usize];
        for partition in partitions {
            let part = partition.part(spec);
            for row in part.rows {
                for col in part.cols.clone() {
                    count[(row * spec.cols + col) as usize] += 1;
                }
            }
        }
        count.into_iter().collect()
    }

    #[test]
    fn the_parts_cover_every_tensor_exactly() {
        let mut random = Random::new(seed(7));
        let mut split = 0;
        for _ in 0..400 {
            let shape = random_shape(&mut random);
            for world_size in [1, 2, 3, 4, 8] {
                let Ok(partitions) = Partition::all(&shape, world_size) else {
                    assert!(!world_sizes(&shape).contains(&world_size));
                    continue;
                };
                split += 1;
                for spec in tensors(&shape) {
                    let times = match spec.split {
                        Split::Replicated => world_size,
                        Split::Column(Axis::KvHeads) => (world_size / shape.num_kv_heads).max(1),
                        _ => 1,
                    };
                    let held = holders(&spec, &partitions);
                    assert_eq!(held, BTreeSet::from([times]), "{spec:?} over {world_size}");
                }
            }
        }
        assert!(split > 400, "{split} splits were looked at");
    }

    #[test]
    fn query_heads_find_their_kv_head_on_the_same_rank() {
        let mut random = Random::new(seed(8));
        for _ in 0..1000 {
            let shape = random_shape(&mut random);
            let group = shape.num_heads / shape.num_kv_heads;
            for world_size in world_sizes(&shape) {
                for partition in Partition::all(&shape, world_size).unwrap() {
                    assert!(
                        partition
                            .heads
                            .clone()
                            .all(|head| partition.kv_heads.contains(&(head / group)))
                    );
                    let local = partition.local_heads();
                    assert!(
                        local.is_multiple_of(partition.local_kv_heads()),
                        "{shape:?}"
                    );
                    assert_eq!(local, shape.num_heads / world_size);
                }
            }
        }
    }

    #[test]
    fn shares_are_near_equal_and_the_vocabulary_is_padded() {
        let mut random = Random::new(seed(9));
        for _ in 0..1000 {
            let shape = random_shape(&mut random);
            for world_size in world_sizes(&shape) {
                let partitions = Partition::all(&shape, world_size).unwrap();
                let widths = partitions.iter().map(Partition::local_intermediate);
                let (least, most) = (widths.clone().min().unwrap(), widths.max().unwrap());
                assert!(least > 0 && most - least <= 1, "{least}..{most}");
                let width = shape.vocab_size.div_ceil(world_size);
                for (rank, partition) in partitions.iter().enumerate() {
                    assert_eq!(partition.vocab_width, width);
                    // A gathered row has token t at t: each rank's part starts where it belongs.
                    let start = u32::try_from(rank).unwrap() * width;
                    assert_eq!(partition.vocab.start, start.min(shape.vocab_size));
                    assert!(partition.vocab.len() <= width as usize);
                }
            }
        }
    }

    #[test]
    fn a_refusal_names_the_sizes_that_work() {
        let mut shape = random_shape(&mut Random::new(1));
        (shape.num_heads, shape.num_kv_heads, shape.intermediate_size) = (12, 4, 64);
        assert_eq!(world_sizes(&shape), [1, 2, 4, 12]);
        let refused = Partition::new(&shape, Rank(0), 3).unwrap_err().to_string();
        assert!(
            refused.contains("over 3 ranks") && refused.contains("1, 2, 4 or 12"),
            "{refused}"
        );
        assert!(Partition::all(&shape, 0).is_err());
        assert!(Partition::new(&shape, Rank(4), 4).is_err());
        shape.intermediate_size = 1;
        let refused = Partition::new(&shape, Rank(0), 2).unwrap_err().to_string();
        assert!(refused.ends_with("can be 1"), "{refused}");
    }

    #[test]
    fn a_known_model_has_the_known_tensors() {
        let mut shape = random_shape(&mut Random::new(2));
        shape.num_layers = 2;
        (shape.qkv_bias, shape.output_bias, shape.mlp_bias) = (true, true, false);
        (shape.qk_norm, shape.tie_word_embeddings) = (true, true);
        shape.output_norms = true;
        let names: Vec<_> = tensors(&shape).into_iter().map(|spec| spec.name).collect();
        assert_eq!(names.len(), 2 + 2 * (7 + 4 + 6));
        for name in [
            "model.layers.1.self_attn.o_proj.bias",
            "model.layers.0.self_attn.k_norm.weight",
            "model.layers.1.post_feedforward_layernorm.weight",
        ] {
            assert!(names.iter().any(|found| found == name), "{name}");
        }
        assert!(!names.iter().any(|name| name == "lm_head.weight"));
        let bias = tensors(&shape)
            .into_iter()
            .find(|spec| spec.name.ends_with("o_proj.bias"));
        assert_eq!(
            bias.unwrap().split,
            Split::Replicated,
            "added once, after the sum"
        );
    }
}
