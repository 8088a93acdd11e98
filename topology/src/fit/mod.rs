//! Memory to KV blocks: what a model takes on each rank, and what is left for sequences.
//!
//! Pure arithmetic over numbers of bytes. Used twice with the same code: before loading with
//! [`RankNeeds::estimate`], so that what cannot fit is refused at once, and after loading with what the
//! shards report. It does not measure memory; [`crate::host`] and the shards do.
//!
//! Invariant: a report that comes out holds at least one sequence of the longest length, so that every
//! admitted request can run alone; the number of blocks is the same on every rank.

use crate::ids::Rank;
use crate::model_shape::{Dtype, KvDtype, ModelShape};
use crate::partition::{HEAD, Partition, Split, TensorSpec, tensors};
use crate::quantization::{Code, Grouping, device_bytes};
use crate::wire::Loaded;
use serde::{Deserialize, Serialize};

mod gpu;
mod report;
#[cfg(test)]
mod tests;
mod workspace;

pub use gpu::{GpuMemory, gpu_share};
pub use report::{Bytes, FitError, FitReport};
pub use workspace::{StepSize, Workspace};

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

/// What numbers are kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elements {
    /// Weights that are not quantised.
    pub dtype: Dtype,
    /// What the matrices of linear layers become at load.
    pub at_load: Option<Code>,
    /// What the head becomes at load.
    pub head_at_load: Option<Code>,
    /// Activations.
    pub compute: Dtype,
    /// Keys and values.
    pub kv: KvDtype,
}

/// What one rank takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankNeeds {
    /// The rank.
    pub rank: Rank,
    /// Its part of the weights.
    pub weight_bytes: u64,
    /// Activations and logits of the largest step, and rotary tables.
    pub workspace_bytes: u64,
    /// On a GPU, what the driver's context and libraries take; 0 elsewhere.
    pub runtime_bytes: u64,
    /// On a GPU, what recorded decode steps may take.
    pub graph_bytes: u64,
    /// On a GPU, what is kept for NCCL.
    pub communicator_bytes: u64,
    /// One KV block.
    pub block_bytes: u64,
}

impl RankNeeds {
    /// Before loading: what the shards will take, but for a quantised head that is filled up.
    pub fn estimate(
        shape: &ModelShape,
        partition: &Partition,
        elements: Elements,
        sizes: &Sizes,
    ) -> Self {
        let mut weights = tensors(shape);
        if shape.tie_word_embeddings && elements.head_at_load.is_some() {
            let embedding = weights.iter().find(|spec| spec.split == Split::Vocab);
            let head = embedding.map(|spec| TensorSpec {
                name: HEAD.to_owned(),
                ..spec.clone()
            });
            weights.extend(head);
        }
        let weights = weights.iter();
        let weights = weights.map(|spec| weight_bytes(spec, partition, elements));
        let kv_width = u64::from(partition.local_kv_heads()) * u64::from(shape.head_dim);
        // Keys and values, for each token of a block in each layer.
        let block_elements = kv_width
            .saturating_mul(2 * u64::from(shape.num_layers))
            .saturating_mul(sizes.block_size.into());
        Self {
            rank: partition.rank,
            weight_bytes: weights.fold(0, u64::saturating_add),
            workspace_bytes: Workspace::of(shape, partition, StepSize::of(sizes))
                .bytes(elements.compute.bytes()),
            runtime_bytes: 0,
            graph_bytes: 0,
            communicator_bytes: 0,
            block_bytes: block_elements.saturating_mul(elements.kv.bytes() as u64),
        }
    }

    /// After loading, as the shard says.
    pub fn reported(rank: Rank, loaded: &Loaded) -> Self {
        Self {
            rank,
            weight_bytes: loaded.weight_bytes,
            workspace_bytes: loaded.workspace_bytes,
            runtime_bytes: 0,
            graph_bytes: 0,
            communicator_bytes: 0,
            block_bytes: loaded.block_bytes,
        }
    }

    /// Workspace, and what else a GPU has to hold.
    fn beside_weights(&self) -> u64 {
        let rest = [
            self.runtime_bytes,
            self.graph_bytes,
            self.communicator_bytes,
        ];
        rest.into_iter()
            .fold(self.workspace_bytes, u64::saturating_add)
    }

    /// All but KV blocks, in bytes.
    pub fn fixed(&self) -> u64 {
        self.weight_bytes.saturating_add(self.beside_weights())
    }
}

/// This rank's part of one weight.
fn weight_bytes(spec: &TensorSpec, partition: &Partition, elements: Elements) -> u64 {
    const FLOAT_BYTES: u64 = 4;
    let part = partition.part(spec);
    if spec.is_vector {
        // Norms and biases are kept in 32 bits.
        return part.elements().saturating_mul(FLOAT_BYTES);
    }
    // Embedding and head are filled up, so that all ranks have as many rows.
    let rows = match spec.split {
        Split::Vocab => u64::from(partition.vocab_width),
        _ => part.rows.len() as u64,
    };
    let shape = [rows, part.cols.len() as u64];
    let at_load = match spec.name.as_str() {
        HEAD => elements.head_at_load,
        _ => elements.at_load.filter(|_| spec.is_linear()),
    };
    let (code, groups) = match (&spec.scheme, at_load) {
        (Some(scheme), _) => (scheme.code, scheme.groups_in(&part.cols, spec.cols)),
        (None, Some(code)) => (code, Grouping::at_load(code).groups_in(&part.cols)),
        (None, None) => {
            let bytes = elements.dtype.bytes() as u64;
            return shape.into_iter().fold(bytes, u64::saturating_mul);
        }
    };
    device_bytes(code, shape, groups.into())
}

/// Memory that may be used, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

impl Asked {
    /// Bytes of it on ranks with these needs together.
    pub fn bytes(self, ranks: &[RankNeeds]) -> u64 {
        let on_rank = |rank: &RankNeeds| match self {
            Self::Bytes(bytes) => bytes,
            Self::Blocks(blocks) => rank.block_bytes.saturating_mul(blocks.into()),
        };
        ranks.iter().map(on_rank).fold(0, u64::saturating_add)
    }
}

/// What each of several models may take of `free` bytes of one host: its claim, and an equal part of what all
/// claims leave. `None` if they leave nothing.
pub fn share(free: u64, claims: &[u64]) -> Option<Vec<u64>> {
    let all = claims
        .iter()
        .fold(0, |sum: u64, claim| sum.saturating_add(*claim));
    let part = free.checked_sub(all)? / (claims.len() as u64).max(1);
    Some(claims.iter().map(|claim| claim + part).collect())
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
                "use a smaller model, --dtype bfloat16, a smaller --max-model-len, or a host with more memory"
            } else {
                "use more GPUs (--gpus), a smaller model, a smaller --max-model-len, or a higher --gpu-memory-utilization"
            };
            return Err(FitError::Weights {
                place: self.place.clone(),
                free: Bytes(self.free),
                weights: Bytes(self.total(|rank| rank.weight_bytes)),
                workspace: Bytes(self.total(RankNeeds::beside_weights)),
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
                Bytes(self.total(RankNeeds::beside_weights)),
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
            None if !self.shared => "use more GPUs (--gpus)",
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
