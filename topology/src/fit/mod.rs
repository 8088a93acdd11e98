//! Memory to KV blocks: what a model takes on each rank, and what is left for sequences.
//!
//! Pure arithmetic over numbers of bytes. Used twice with the same code: before loading with
//! [`RankNeeds::estimate`], so that what cannot fit is refused at once, and after loading with what the
//! shards report. It does not measure memory; [`crate::host`] and the shards do.
//!
//! Invariant: a report that comes out holds at least one sequence of the longest length, so that every
//! admitted request can run alone; the number of blocks is the same on every rank.

use crate::ids::Rank;
use crate::model_shape::{Dtype, ModelShape};
use crate::partition::{Partition, tensors};
use crate::wire::Loaded;

mod report;

pub use report::{Bytes, FitError, FitReport};

/// The sizes that a server is started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Tokens per KV block, at least 1.
    pub block_size: u32,
    /// Longest sequence in tokens.
    pub max_model_len: u32,
    /// Most tokens in one step.
    pub max_num_batched_tokens: u32,
    /// Most sequences in one step.
    pub max_num_seqs: u32,
}

impl Sizes {
    /// Blocks that one sequence of the longest length takes.
    pub fn blocks_per_sequence(&self) -> u64 {
        u64::from(self.max_model_len.div_ceil(self.block_size.max(1)).max(1))
    }
}

/// What one rank takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankNeeds {
    /// The rank.
    pub rank: Rank,
    /// Its part of the weights.
    pub weight_bytes: u64,
    /// Activations of the largest step.
    pub workspace_bytes: u64,
    /// One KV block.
    pub block_bytes: u64,
}

impl RankNeeds {
    /// Before loading. Weights and blocks are exact for weights of `dtype` and keys and values of
    /// `kv_dtype`; the workspace is an estimate, a few per cent of them.
    pub fn estimate(
        shape: &ModelShape,
        partition: &Partition,
        (dtype, kv_dtype): (Dtype, Dtype),
        sizes: &Sizes,
    ) -> Self {
        let specs = tensors(shape);
        let elements = specs
            .iter()
            .map(|spec| partition.part(spec).elements())
            .sum::<u64>();
        let kv_width = u64::from(partition.local_kv_heads()) * u64::from(shape.head_dim);
        // Keys and values, for each token of a block in each layer.
        let block_elements = kv_width
            .saturating_mul(2 * u64::from(shape.num_layers))
            .saturating_mul(sizes.block_size.into());
        Self {
            rank: partition.rank,
            weight_bytes: elements.saturating_mul(dtype.bytes() as u64),
            workspace_bytes: workspace(shape, partition, sizes),
            block_bytes: block_elements.saturating_mul(kv_dtype.bytes() as u64),
        }
    }

    /// After loading, as the shard says.
    pub fn reported(rank: Rank, loaded: &Loaded) -> Self {
        Self {
            rank,
            weight_bytes: loaded.weight_bytes,
            workspace_bytes: loaded.workspace_bytes,
            block_bytes: loaded.block_bytes,
        }
    }

    fn fixed(&self) -> u64 {
        self.weight_bytes.saturating_add(self.workspace_bytes)
    }
}

/// 32-bit activations of the widest layer, logits of all rows, and the rotary tables.
fn workspace(shape: &ModelShape, partition: &Partition, sizes: &Sizes) -> u64 {
    const FLOAT_BYTES: u64 = 4;
    let heads = u64::from(partition.local_heads() * 2 + partition.local_kv_heads() * 2);
    let per_token = 3 * u64::from(shape.hidden_size)
        + heads * u64::from(shape.head_dim)
        + 2 * u64::from(partition.local_intermediate());
    let per_row = u64::from(partition.vocab_width) * u64::from(partition.world_size + 1);
    let floats = per_token
        .saturating_mul(sizes.max_num_batched_tokens.into())
        .saturating_add(per_row.saturating_mul(sizes.max_num_seqs.into()))
        .saturating_add(u64::from(shape.head_dim) * u64::from(sizes.max_model_len));
    floats.saturating_mul(FLOAT_BYTES)
}

/// Memory that may be used, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Memory {
    /// All ranks take from the memory of one host: CPU shards.
    Shared {
        /// Free before loading.
        free_bytes: u64,
    },
    /// Ranks take from the memory of their host, and there are several: CPU shards on nodes.
    Hosts(Vec<HostShare>),
    /// Each rank has a device of its own: GPUs.
    PerRank {
        /// Usable before loading, in rank order.
        free_bytes: Vec<u64>,
    },
}

/// One of several hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostShare {
    /// As the operator calls it.
    pub name: String,
    /// Free before loading, in bytes.
    pub free_bytes: u64,
    /// How many ranks it has; they follow those of the hosts before it.
    pub ranks: usize,
}

/// What the operator asked for instead of what fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// `--kv-cache-memory-bytes`: bytes of KV blocks on each rank.
    Bytes(u64),
    /// `--num-gpu-blocks-override`: KV blocks.
    Blocks(u32),
}

/// A group of ranks that take from the same memory.
struct Pool<'a> {
    place: String,
    free: u64,
    ranks: &'a [RankNeeds],
    shared: bool,
}

/// How many KV blocks fit.
///
/// Where nothing is `asked` for, ranks that share a host take enough for `max_num_seqs` sequences of the longest length, but at most half of what weights and
/// workspace leave; ranks with a device of their own take all that is left.
///
/// # Errors
/// [`FitError`] if not even one sequence of the longest length fits.
pub fn fit(
    needs: &[RankNeeds],
    memory: &Memory,
    asked: Option<Asked>,
    sizes: &Sizes,
) -> Result<FitReport, FitError> {
    let pools = pools(needs, memory);
    let blocks = pools.iter().map(|pool| pool.blocks(asked, sizes));
    let blocks = blocks.collect::<Result<Vec<_>, _>>()?;
    // The table is global: the poorest rank decides.
    let blocks = blocks.into_iter().min().unwrap_or(0);
    let num_blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
    let left = pools
        .iter()
        .map(|pool| pool.left().saturating_sub(pool.kv(num_blocks.into())));
    let left_bytes = match memory {
        Memory::Shared { .. } => Memory::Shared {
            free_bytes: left.sum(),
        },
        Memory::Hosts(hosts) => {
            let hosts = hosts.iter().zip(left).map(|(host, free_bytes)| HostShare {
                free_bytes,
                ..host.clone()
            });
            Memory::Hosts(hosts.collect())
        }
        Memory::PerRank { .. } => Memory::PerRank {
            free_bytes: left.collect(),
        },
    };
    Ok(FitReport {
        num_blocks,
        ranks: needs.to_vec(),
        left_bytes,
        sizes: *sizes,
    })
}

fn pools<'a>(needs: &'a [RankNeeds], memory: &Memory) -> Vec<Pool<'a>> {
    match memory {
        Memory::Shared { free_bytes } => vec![Pool {
            place: "this host".to_owned(),
            free: *free_bytes,
            ranks: needs,
            shared: true,
        }],
        Memory::Hosts(hosts) => {
            let mut rest = needs;
            let pool = |host: &HostShare| {
                let (ranks, others) = rest.split_at(host.ranks.min(rest.len()));
                rest = others;
                Pool {
                    place: format!("node {}", host.name),
                    free: host.free_bytes,
                    ranks,
                    shared: true,
                }
            };
            hosts.iter().map(pool).collect()
        }
        Memory::PerRank { free_bytes } => {
            let ranks = needs.chunks(1).zip(free_bytes);
            let pool = |(ranks, free): (&'a [RankNeeds], &u64)| Pool {
                place: format!("the device of rank {}", ranks[0].rank),
                free: *free,
                ranks,
                shared: false,
            };
            ranks.map(pool).collect()
        }
    }
}

impl Pool<'_> {
    fn total(&self, part: impl Fn(&RankNeeds) -> u64) -> u64 {
        self.ranks.iter().map(part).fold(0, u64::saturating_add)
    }

    /// Bytes after weights and workspace.
    fn left(&self) -> u64 {
        self.free.saturating_sub(self.total(RankNeeds::fixed))
    }

    /// Bytes of so many blocks on all ranks of this pool.
    fn kv(&self, blocks: u64) -> u64 {
        self.total(|rank| rank.block_bytes).saturating_mul(blocks)
    }

    /// The size of a block on the rank whose blocks are largest.
    fn largest_block(&self) -> u64 {
        let largest = self.ranks.iter().map(|rank| rank.block_bytes).max();
        largest.unwrap_or(1).max(1)
    }

    fn blocks(&self, asked: Option<Asked>, sizes: &Sizes) -> Result<u64, FitError> {
        let fixed = self.total(RankNeeds::fixed);
        if fixed >= self.free {
            let advice = if self.shared {
                "use a smaller model, --dtype bfloat16, or a host with more memory"
            } else {
                "use more ranks (--tensor-parallel-size), or a smaller model"
            };
            return Err(FitError::Weights {
                place: self.place.clone(),
                free: Bytes(self.free),
                weights: Bytes(self.total(|rank| rank.weight_bytes)),
                workspace: Bytes(self.total(|rank| rank.workspace_bytes)),
                advice,
            });
        }
        let left = self.left();
        let wanted = sizes
            .blocks_per_sequence()
            .saturating_mul(sizes.max_num_seqs.max(1).into());
        let per_block = self.kv(1).max(1);
        let ranks = self.ranks.len() as u64;
        let (blocks, bytes) = match asked {
            Some(Asked::Bytes(bytes)) => (
                bytes / self.largest_block(),
                Some(bytes.saturating_mul(ranks)),
            ),
            Some(Asked::Blocks(blocks)) => (blocks.into(), Some(self.kv(blocks.into()))),
            None if self.shared => ((left / 2 / per_block).min(wanted), None),
            None => (left / per_block, None),
        };
        if let (Some(asked), Some(bytes)) = (asked, bytes)
            && bytes > left
        {
            return Err(FitError::Asked {
                place: self.place.clone(),
                asked: self.in_words(asked),
                needed: Bytes(bytes),
                left: Bytes(left),
            });
        }
        if blocks >= sizes.blocks_per_sequence() {
            Ok(blocks)
        } else {
            Err(self.no_sequence(blocks, asked, sizes))
        }
    }

    /// What was asked for of every rank here.
    fn in_words(&self, asked: Asked) -> String {
        match asked {
            Asked::Bytes(bytes) => {
                format!("--kv-cache-memory-bytes {} on each rank", Bytes(bytes))
            }
            Asked::Blocks(blocks) => format!(
                "--num-gpu-blocks-override {blocks} at {} a block on each rank",
                Bytes(self.largest_block())
            ),
        }
    }

    fn no_sequence(&self, blocks: u64, asked: Option<Asked>, sizes: &Sizes) -> FitError {
        let arithmetic = match asked {
            Some(asked) => self.in_words(asked),
            None => format!(
                "{}{} free, less weights {} and workspace {}",
                if self.shared { "half of " } else { "" },
                Bytes(self.free),
                Bytes(self.total(|rank| rank.weight_bytes)),
                Bytes(self.total(|rank| rank.workspace_bytes)),
            ),
        };
        let tokens = blocks.saturating_mul(sizes.block_size.into());
        let shorter = if tokens == 0 {
            String::new()
        } else {
            format!("lower --max-model-len to {tokens} or less, or ")
        };
        let more = match asked {
            Some(Asked::Blocks(_)) => "raise --num-gpu-blocks-override",
            None if !self.shared => "use more ranks (--tensor-parallel-size)",
            Some(Asked::Bytes(_)) | None => "raise --kv-cache-memory-bytes",
        };
        FitError::Sequence {
            place: self.place.clone(),
            max_model_len: sizes.max_model_len,
            needed: Bytes(self.kv(sizes.blocks_per_sequence())),
            available: Bytes(self.kv(blocks)),
            arithmetic,
            advice: format!("{shorter}{more}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Random, seed};
    use crate::testing::random_shape;

    const SIZES: Sizes = Sizes {
        block_size: 16,
        max_model_len: 100,
        max_num_batched_tokens: 64,
        max_num_seqs: 4,
    };

    fn needs(ranks: u32) -> Vec<RankNeeds> {
        let needs = |rank| RankNeeds {
            rank: Rank(rank),
            weight_bytes: 10_000,
            workspace_bytes: 1000,
            block_bytes: 100,
        };
        (0..ranks).map(needs).collect()
    }

    #[test]
    fn a_shared_host_gives_what_is_wanted_but_at_most_half() {
        let blocks = |free_bytes| {
            let memory = Memory::Shared { free_bytes };
            fit(&needs(2), &memory, None, &SIZES).map(|report| report.num_blocks)
        };
        // One sequence is 7 blocks; four of them on two ranks are 28 * 200 bytes.
        assert_eq!(blocks(1 << 20), Ok(28));
        assert_eq!(blocks(22_000 + 2 * 20 * 200), Ok(20));
        assert_eq!(blocks(22_000 + 2 * 7 * 200), Ok(7));
        let refused = blocks(22_000 + 2 * 7 * 200 - 1).unwrap_err().to_string();
        for word in [
            "100 tokens",
            "this host",
            "half of",
            "96 or less",
            "--kv-cache-memory-bytes",
        ] {
            assert!(refused.contains(word), "{word}: {refused}");
        }
        let refused = blocks(22_000).unwrap_err().to_string();
        assert!(refused.contains("weights take 19.5 KiB"), "{refused}");
    }

    #[test]
    fn each_of_several_hosts_gives_half_and_the_poorest_decides() {
        let host = |name: &str, free_bytes, ranks| HostShare {
            name: name.to_owned(),
            free_bytes,
            ranks,
        };
        let memory = Memory::Hosts(vec![host("a", 1 << 20, 1), host("b", 22_000 + 2 * 4000, 2)]);
        let report = fit(&needs(3), &memory, None, &SIZES).unwrap();
        assert_eq!(report.num_blocks, 20);
        let left = [(1 << 20) - 11_000 - 2000, 4000].map(|left| left);
        let left = vec![host("a", left[0], 1), host("b", left[1], 2)];
        assert_eq!(report.left_bytes, Memory::Hosts(left));
        assert!(report.to_string().contains("left on node b: 3.9 KiB"), "{report}");
        let poor = Memory::Hosts(vec![host("a", 1 << 20, 1), host("b", 20_000, 2)]);
        let refused = fit(&needs(3), &poor, None, &SIZES).unwrap_err().to_string();
        assert!(refused.contains("node b has 19.5 KiB free"), "{refused}");
    }

    #[test]
    fn own_devices_give_all_and_the_poorest_decides() {
        let memory = Memory::PerRank {
            free_bytes: vec![20_000, 13_000],
        };
        let report = fit(&needs(2), &memory, None, &SIZES).unwrap();
        assert_eq!(report.num_blocks, 20);
        assert_eq!(
            report.left_bytes,
            Memory::PerRank {
                free_bytes: vec![7000, 0]
            }
        );
        let poor = Memory::PerRank {
            free_bytes: vec![20_000, 11_050],
        };
        let refused = fit(&needs(2), &poor, None, &SIZES).unwrap_err().to_string();
        assert!(
            refused.contains("rank 1") && refused.contains("more ranks"),
            "{refused}"
        );
        assert!(
            !refused.contains("--max-model-len"),
            "no length would fit: {refused}"
        );
    }

    #[test]
    fn what_is_asked_for_is_taken_or_refused() {
        let memory = Memory::Shared { free_bytes: 30_000 };
        let asked = |bytes| fit(&needs(2), &memory, Some(Asked::Bytes(bytes)), &SIZES);
        assert_eq!(asked(4000).unwrap().num_blocks, 40);
        let refused = asked(4001).unwrap_err().to_string();
        assert!(
            refused.contains("on each rank") && refused.contains("7.8 KiB"),
            "{refused}"
        );
        let refused = asked(600).unwrap_err().to_string();
        assert!(refused.contains("600 B on each rank"), "{refused}");
        let asked = |blocks| fit(&needs(2), &memory, Some(Asked::Blocks(blocks)), &SIZES);
        assert_eq!(asked(40).unwrap().num_blocks, 40);
        for (blocks, parts) in [
            (41, ["--num-gpu-blocks-override 41", "8.0 KiB"]),
            (
                u32::MAX,
                ["--num-gpu-blocks-override 4294967295", "lower it"],
            ),
            (
                6,
                ["raise --num-gpu-blocks-override", "--max-model-len to 96"],
            ),
            (0, ["raise --num-gpu-blocks-override", "0 B can be had"]),
        ] {
            let refused = asked(blocks).unwrap_err().to_string();
            for part in parts {
                assert!(refused.contains(part), "{part}: {refused}");
            }
        }
    }

    #[test]
    fn a_report_never_takes_more_than_there_is() {
        let mut random = Random::new(seed(12));
        let mut fitted = 0;
        for _ in 0..3000 {
            let shape = random_shape(&mut random);
            let world_size = *random.pick(&[1, 2, 4]);
            let Ok(partitions) = Partition::all(&shape, world_size) else {
                continue;
            };
            let dtypes = (Dtype::Bfloat16, Dtype::Float32);
            let estimate = |partition| RankNeeds::estimate(&shape, partition, dtypes, &SIZES);
            let needs: Vec<_> = partitions.iter().map(estimate).collect();
            let free_bytes = random.next() % (1 << 22);
            let memory = Memory::Shared { free_bytes };
            let asked = match random.below(3) {
                0 => Some(Asked::Bytes(random.next() % (1 << 20))),
                1 => Some(Asked::Blocks(u32::try_from(random.below(1 << 10)).unwrap())),
                _ => None,
            };
            let Ok(report) = fit(&needs, &memory, asked, &SIZES) else {
                continue;
            };
            fitted += 1;
            let blocks = u64::from(report.num_blocks);
            let taken: u64 = needs
                .iter()
                .map(|rank| rank.fixed() + blocks * rank.block_bytes)
                .sum();
            let Memory::Shared { free_bytes: left } = report.left_bytes else {
                panic!()
            };
            assert_eq!(taken + left, free_bytes);
            assert!(blocks >= SIZES.blocks_per_sequence());
        }
        assert!(fitted > 300, "{fitted} fitted");
    }

    #[test]
    fn the_parts_of_weights_add_up() {
        let mut random = Random::new(seed(13));
        for _ in 0..200 {
            let mut shape = random_shape(&mut random);
            // Without norms and biases nothing is replicated but the norms.
            (shape.num_heads, shape.num_kv_heads, shape.intermediate_size) = (8, 4, 40);
            let dtypes = (Dtype::Bfloat16, Dtype::Bfloat16);
            let bytes = |world_size| {
                let partitions = Partition::all(&shape, world_size).unwrap();
                let needs = partitions
                    .iter()
                    .map(|p| RankNeeds::estimate(&shape, p, dtypes, &SIZES));
                needs.fold((0, 0), |sum, n| {
                    (sum.0 + n.weight_bytes, sum.1 + n.block_bytes)
                })
            };
            let whole = bytes(1);
            let replicated: u64 = tensors(&shape)
                .iter()
                .filter(|spec| spec.split == crate::partition::Split::Replicated)
                .map(|spec| 2 * u64::from(spec.rows))
                .sum();
            assert_eq!(bytes(4), (whole.0 + 3 * replicated, whole.1));
            assert_eq!(bytes(8).1, 2 * whole.1, "each KV head is held twice");
        }
    }
}
