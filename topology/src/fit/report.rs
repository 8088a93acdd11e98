//! How the result of [`super::fit`] reads: the report as a small table, the refusals as sentences.

use super::{Memory, RankNeeds, Sizes};
use std::fmt;

/// How memory is used, and how many blocks come of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FitReport {
    /// Blocks on every rank.
    pub num_blocks: u32,
    /// What each rank takes.
    pub ranks: Vec<RankNeeds>,
    /// What stays free, in bytes: on the host, or on each rank's device.
    pub left_bytes: Memory,
    /// The sizes it was computed for.
    pub sizes: Sizes,
}

/// Why a model does not fit. A sentence with the arithmetic and what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FitError {
    /// Weights and workspace alone are too much.
    #[error(
        "the model does not fit: {place} has {free} free, but weights take {weights} and workspace \
         {workspace}; {advice}"
    )]
    Weights {
        /// The host, or a rank's device.
        place: String,
        /// Free bytes.
        free: Bytes,
        /// Bytes of weights.
        weights: Bytes,
        /// Bytes of workspace.
        workspace: Bytes,
        /// What to change.
        advice: &'static str,
    },
    /// No room for one sequence of the longest length.
    #[error(
        "one sequence of {max_model_len} tokens does not fit: it takes {needed} of KV cache on \
         {place}, where {available} can be had ({arithmetic}); {advice}"
    )]
    Sequence {
        /// The host, or a rank's device.
        place: String,
        /// The longest sequence.
        max_model_len: u32,
        /// Bytes it takes.
        needed: Bytes,
        /// Bytes there are for KV blocks.
        available: Bytes,
        /// How that number came to be.
        arithmetic: String,
        /// What to change.
        advice: String,
    },
    /// More KV blocks were asked for than there is room for.
    #[error(
        "{asked} takes {needed}, but after weights and workspace {place} has only {left} left for \
         it; lower it"
    )]
    Asked {
        /// The host, or a rank's device.
        place: String,
        /// The flag, its value, and what it is per rank.
        asked: String,
        /// Bytes it comes to on this host or device.
        needed: Bytes,
        /// Bytes there are.
        left: Bytes,
    },
}

impl fmt::Display for FitReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_device = match &self.left_bytes {
            Memory::PerRank { free_bytes } => Some(free_bytes),
            Memory::Shared { .. } | Memory::Hosts(_) => None,
        };
        write!(
            f,
            "{:>4}  {:>10}  {:>10}  {:>10}",
            "rank", "weights", "workspace", "KV cache"
        )?;
        if per_device.is_some() {
            for title in ["libraries", "graphs", "NCCL", "left"] {
                write!(f, "  {title:>10}")?;
            }
        }
        writeln!(f)?;
        for (index, rank) in self.ranks.iter().enumerate() {
            let kv = rank.block_bytes.saturating_mul(self.num_blocks.into());
            let [weights, workspace, kv] =
                [rank.weight_bytes, rank.workspace_bytes, kv].map(|bytes| Bytes(bytes).to_string());
            write!(
                f,
                "{:>4}  {weights:>10}  {workspace:>10}  {kv:>10}",
                rank.rank
            )?;
            if let Some(left) = per_device.and_then(|left| left.get(index)) {
                let others = [
                    rank.runtime_bytes,
                    rank.graph_bytes,
                    rank.communicator_bytes,
                    *left,
                ];
                for bytes in others {
                    write!(f, "  {:>10}", Bytes(bytes).to_string())?;
                }
            }
            writeln!(f)?;
        }
        match &self.left_bytes {
            Memory::Shared { free_bytes } => {
                writeln!(f, "left on the host: {}", Bytes(*free_bytes))?;
            }
            Memory::Hosts(hosts) => {
                for host in hosts {
                    writeln!(f, "left on node {}: {}", host.name, Bytes(host.free_bytes))?;
                }
            }
            Memory::PerRank { .. } => {}
        }
        let Sizes {
            block_size,
            max_model_len,
            ..
        } = self.sizes;
        let tokens = u64::from(self.num_blocks) * u64::from(block_size);
        write!(
            f,
            "{} KV blocks of {block_size} tokens: {tokens} tokens, {:.1} sequences of {max_model_len}",
            self.num_blocks,
            tokens as f64 / f64::from(max_model_len.max(1)),
        )
    }
}

/// A number of bytes, shown for people: `512 B`, `7.5 GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        // 1023.96 would be shown as 1024.0.
        while value >= 1023.95 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        write!(f, "{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::fit;
    use crate::ids::Rank;

    #[test]
    fn bytes_and_reports_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1 << 20, "1.0 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (15 << 29, "7.5 GiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
        let needs = [0, 1].map(|rank| RankNeeds {
            rank: Rank(rank),
            weight_bytes: 10_000,
            workspace_bytes: 1000,
            runtime_bytes: 200,
            graph_bytes: 250,
            communicator_bytes: 50,
            block_bytes: 100,
        });
        let sizes = Sizes {
            block_size: 16,
            max_model_len: 100,
            max_num_batched_tokens: 64,
            max_num_seqs: 4,
        };
        let memory = Memory::Shared {
            free_bytes: 1 << 20,
        };
        let own = Memory::PerRank {
            free_bytes: vec![14_700, 14_600],
        };
        let report = fit(&needs, &own, None, &sizes).unwrap().to_string();
        let expected = "\
rank     weights   workspace    KV cache   libraries      graphs        NCCL        left
   0     9.8 KiB      1000 B     3.0 KiB       200 B       250 B        50 B       100 B
   1     9.8 KiB      1000 B     3.0 KiB       200 B       250 B        50 B         0 B
31 KV blocks of 16 tokens: 496 tokens, 5.0 sequences of 100";
        assert_eq!(report, expected);
        let needs = needs.map(|rank| RankNeeds {
            runtime_bytes: 0,
            graph_bytes: 0,
            communicator_bytes: 0,
            ..rank
        });
        let report = fit(&needs, &memory, None, &sizes).unwrap().to_string();
        let expected = "\
rank     weights   workspace    KV cache
   0     9.8 KiB      1000 B     2.7 KiB
   1     9.8 KiB      1000 B     2.7 KiB
left on the host: 997.0 KiB
28 KV blocks of 16 tokens: 448 tokens, 4.5 sequences of 100";
        assert_eq!(report, expected);
    }
}
