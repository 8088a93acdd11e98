//! What a GPU's memory leaves for KV blocks: `--gpu-memory-utilization`, libraries, communicator.
//!
//! Pure arithmetic before and after loading. Invariant: ranks that share a GPU never take more than
//! its utilization together, whatever else was on it when they came.

use super::{Memory, RankNeeds};
use crate::placement::Device;
use crate::wire::Loaded;

/// What the driver's context and the matrix library take of a GPU, before it can be measured.
const LIBRARY_BYTES: u64 = 700 << 20;

/// Kept for NCCL's buffers where there is more than one rank. The communicator is formed after the KV
/// blocks are taken, so this cannot be measured in time.
const COMMUNICATOR_BYTES: u64 = 512 << 20;

/// What recorded decode steps may take at most, before the shard says it.
const RECORDING_BYTES: u64 = 256 << 20;

/// Part of a GPU's `total` bytes that one of the `ranks` on it may take, libraries included.
/// `utilization` is `--gpu-memory-utilization`, from 0 to 1.
pub fn gpu_share(total: u64, utilization: f64, ranks: u32) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a part of a number of bytes; rounding one off is nothing"
    )]
    let usable = (total as f64 * utilization.clamp(0.0, 1.0)) as u64;
    usable / u64::from(ranks.max(1))
}

/// The GPUs of a group of ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuMemory {
    /// One for each rank, in order.
    pub devices: Vec<Device>,
    /// Which host each rank is on; numbers that differ where hosts do.
    pub hosts: Vec<usize>,
    /// Bytes of each rank's GPU.
    pub total_bytes: Vec<u64>,
    /// `--gpu-memory-utilization`
    pub utilization: f64,
}

impl GpuMemory {
    /// What each rank may take in all.
    pub fn usable(&self) -> Memory {
        let devices = self.devices.iter().zip(&self.total_bytes);
        let share = |(device, total): (&Device, &u64)| {
            gpu_share(*total, self.utilization, ranks_on(device))
        };
        Memory::PerRank {
            free_bytes: devices.map(share).collect(),
        }
    }

    /// Adds what libraries will take to what a model was estimated to need.
    pub fn estimated(&self, mut needs: Vec<RankNeeds>) -> Vec<RankNeeds> {
        let communicator = self.communicator_bytes();
        for need in &mut needs {
            need.runtime_bytes = LIBRARY_BYTES;
            need.graph_bytes = RECORDING_BYTES;
            need.communicator_bytes = communicator;
        }
        needs
    }

    /// What ranks need, now that they have loaded: whatever a GPU no longer has is taken by somebody.
    pub fn reported(&self, needs: Vec<RankNeeds>, loaded: &[Loaded]) -> Vec<RankNeeds> {
        // GPU 0 of one host is not GPU 0 of another.
        let places = || self.hosts.iter().zip(&self.devices);
        let on_same = |place: (&usize, &Device)| {
            let ranks = places().zip(loaded).zip(&needs);
            let same: Vec<_> = ranks
                .filter(|((other, _), _)| *other == place)
                .map(|((_, loaded), needs)| (loaded.free_bytes, needs.fixed()))
                .collect();
            // Who loaded last saw what all of them took.
            let free = same.iter().map(|(free, _)| *free).min().unwrap_or(0);
            let known = same.iter().map(|(_, fixed)| *fixed).sum::<u64>();
            (free, known, same.len().max(1) as u64)
        };
        let runtime: Vec<u64> = places()
            .zip(&self.total_bytes)
            .map(|(place, total)| {
                let (free, known, ranks) = on_same(place);
                let other = total.saturating_sub(free).saturating_sub(known);
                other / ranks
            })
            .collect();
        let with = |((need, runtime_bytes), loaded): ((_, u64), &Loaded)| RankNeeds {
            runtime_bytes,
            graph_bytes: loaded.recording_bytes,
            communicator_bytes: self.communicator_bytes(),
            ..need
        };
        let needs = needs.into_iter().zip(runtime).zip(loaded);
        needs.map(with).collect()
    }

    fn communicator_bytes(&self) -> u64 {
        if self.devices.len() > 1 {
            COMMUNICATOR_BYTES
        } else {
            0
        }
    }
}

fn ranks_on(device: &Device) -> u32 {
    match device {
        Device::Gpu { ranks, .. } => *ranks,
        Device::Cpu { .. } => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::{Sizes, fit};
    use crate::ids::Rank;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    fn memory(ranks_on_each: u32, gpus: u32) -> GpuMemory {
        let device = |rank| Device::Gpu {
            index: rank / ranks_on_each,
            ranks: ranks_on_each,
        };
        let world_size = gpus * ranks_on_each;
        GpuMemory {
            devices: (0..world_size).map(device).collect(),
            hosts: vec![0; world_size as usize],
            total_bytes: vec![80 * GIB; world_size as usize],
            utilization: 0.9,
        }
    }

    fn needs(count: u32) -> Vec<RankNeeds> {
        let needs = |rank| RankNeeds {
            rank: Rank(rank),
            weight_bytes: 8 * GIB,
            workspace_bytes: GIB,
            runtime_bytes: 0,
            graph_bytes: 0,
            communicator_bytes: 0,
            block_bytes: 1 << 20,
        };
        (0..count).map(needs).collect()
    }

    fn loaded(free: &[u64]) -> Vec<Loaded> {
        let loaded = |free: &u64| Loaded {
            weight_bytes: 8 * GIB,
            workspace_bytes: GIB,
            block_bytes: 1 << 20,
            recording_bytes: MIB,
            free_bytes: *free,
            load_us: 0,
        };
        free.iter().map(loaded).collect()
    }

    /// What a GPU holds beside the model.
    fn beside(need: &RankNeeds) -> (u64, u64, u64) {
        (
            need.runtime_bytes,
            need.graph_bytes,
            need.communicator_bytes,
        )
    }

    #[test]
    fn what_somebody_else_holds_counts_against_the_utilization() {
        let one = memory(1, 1);
        // 80 GiB, of which 9 are ours, 1 the libraries', and 10 another process's.
        let needs = one.reported(needs(1), &loaded(&[60 * GIB]));
        assert_eq!(beside(&needs[0]), (11 * GIB, MIB, 0));
        let Memory::PerRank { free_bytes } = one.usable() else {
            panic!("GPUs have memory of their own");
        };
        assert_eq!(free_bytes, [72 * GIB]);
    }

    #[test]
    fn ranks_on_one_gpu_share_it_and_keep_room_for_the_communicator() {
        let sizes = Sizes {
            block_size: 16,
            max_model_len: 1024,
            max_num_batched_tokens: 512,
            max_num_seqs: 8,
        };
        // The first was measured before the second had loaded.
        let two = memory(2, 1);
        let needs = two.reported(needs(2), &loaded(&[70 * GIB, 60 * GIB]));
        assert_eq!(beside(&needs[0]), (GIB, MIB, COMMUNICATOR_BYTES));
        assert_eq!(beside(&needs[0]), beside(&needs[1]));
        let report = fit(&needs, &two.usable(), None, &sizes).unwrap();
        let blocks = u64::from(report.num_blocks);
        let taken: u64 = needs.iter().map(|need| need.fixed() + (blocks << 20)).sum();
        assert!(taken <= 72 * GIB && taken > 71 * GIB, "{taken}");
    }

    #[test]
    fn gpus_of_one_number_on_two_hosts_are_two() {
        let mut two = memory(1, 1);
        two.devices.push(two.devices[0].clone());
        two.hosts = vec![0, 1];
        two.total_bytes.push(80 * GIB);
        // On the second, 10 GiB are another process's.
        let needs = two.reported(needs(2), &loaded(&[70 * GIB, 60 * GIB]));
        assert_eq!(beside(&needs[0]), (GIB, MIB, COMMUNICATOR_BYTES));
        assert_eq!(beside(&needs[1]), (11 * GIB, MIB, COMMUNICATOR_BYTES));
    }

    #[test]
    fn estimates_hold_a_place_for_libraries() {
        let estimated = |memory: GpuMemory, count| beside(&memory.estimated(needs(count))[0]);
        let (libraries, graphs) = (LIBRARY_BYTES, RECORDING_BYTES);
        assert_eq!(estimated(memory(1, 1), 1), (libraries, graphs, 0));
        let communicator = COMMUNICATOR_BYTES;
        assert_eq!(
            estimated(memory(1, 2), 2),
            (libraries, graphs, communicator)
        );
        assert_eq!(gpu_share(100, 2.0, 0), 100, "out of range is put into it");
    }
}
