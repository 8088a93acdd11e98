//! The GPUs of a host, as a process that can reach them describes them to one that cannot.
//!
//! `cluster shard --probe` prints a [`Probe`] as one line of JSON; the coordinator, which must not
//! load GPU libraries itself, reads it before it starts anything. Names and numbers only: nothing
//! here talks to a driver. Invariant: every sentence says what is missing and how to get it.

use crate::placement::Device;
use serde::{Deserialize, Serialize};

/// What a probe found, or the sentence that says why no GPU can be used on its host.
pub type Probe = Result<GpuHost, String>;

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// As its driver names it: `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Its memory in bytes.
    pub total_bytes: u64,
}

/// The GPUs that a process of this host may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuHost {
    /// By number, as CUDA counts: `CUDA_VISIBLE_DEVICES` selects and orders them.
    pub gpus: Vec<Gpu>,
    /// `CUDA_VISIBLE_DEVICES`, where it is set.
    pub visible: Option<String>,
    /// The NCCL library's file, or the sentence that says why there is none.
    pub nccl: Result<String, String>,
}

impl GpuHost {
    /// The memory in bytes of each of this host's GPUs that ranks compute on, in their order; 0 for ranks
    /// without one. `is_alone`: there is no other rank anywhere.
    ///
    /// # Errors
    /// A sentence that says what to change: a GPU that is not there, or no NCCL where ranks must exchange
    /// activations.
    pub fn memory_of(&self, devices: &[Device], is_alone: bool) -> Result<Vec<u64>, String> {
        if !is_alone && let Err(missing) = &self.nccl {
            return Err(missing.clone());
        }
        let total = |device: &Device| match device {
            Device::Cpu { .. } => Ok(0),
            Device::Gpu { index, .. } => self
                .gpus
                .get(*index as usize)
                .map(|gpu| gpu.total_bytes)
                .ok_or_else(|| self.no_such(*index)),
        };
        devices.iter().map(total).collect()
    }

    fn no_such(&self, index: u32) -> String {
        let have = match self.gpus.len() {
            0 => "there is none".to_owned(),
            1 => "there is one, GPU 0".to_owned(),
            count => format!("there are {count}, GPUs 0 to {}", count - 1),
        };
        let among = match &self.visible {
            Some(visible) => format!(" among those of CUDA_VISIBLE_DEVICES={visible}"),
            None => String::new(),
        };
        format!("GPU {index} is not there: {have}{among}; name one that is")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(gpus: u64) -> GpuHost {
        let gpu = |index| Gpu {
            name: "GPU".to_owned(),
            total_bytes: 100 + index,
        };
        GpuHost {
            gpus: (0..gpus).map(gpu).collect(),
            visible: None,
            nccl: Err("libnccl.so.2 was not found".to_owned()),
        }
    }

    fn gpu(index: u32) -> Device {
        Device::Gpu { index, ranks: 1 }
    }

    #[test]
    fn each_rank_gets_the_memory_of_its_gpu() {
        let mut host = host(3);
        assert_eq!(
            host.memory_of(&[gpu(2)], true),
            Ok(vec![102]),
            "alone, without NCCL"
        );
        let refused = host.memory_of(&[gpu(2)], false).unwrap_err();
        assert!(refused.contains("libnccl"), "{refused}");
        host.nccl = Ok("/lib/libnccl.so.2".to_owned());
        assert_eq!(host.memory_of(&[gpu(2), gpu(0)], false), Ok(vec![102, 100]));
    }

    #[test]
    fn a_gpu_that_is_not_there_is_refused_with_those_that_are() {
        let refused = host(2).memory_of(&[gpu(2)], true).unwrap_err();
        assert!(
            refused.contains("GPU 2") && refused.contains("GPUs 0 to 1"),
            "{refused}"
        );
        assert!(!refused.contains("CUDA_VISIBLE_DEVICES"), "{refused}");
        let mut hidden = host(0);
        hidden.visible = Some(String::new());
        let refused = hidden.memory_of(&[gpu(0)], true).unwrap_err();
        assert!(
            refused.contains("none") && refused.contains("CUDA_VISIBLE_DEVICES="),
            "{refused}"
        );
    }

    #[test]
    fn a_probe_survives_its_line() {
        for probe in [Ok(host(1)), Err("libcuda.so.1 was not found".to_owned())] {
            let line = serde_json::to_string(&probe).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Probe>(&line).unwrap(), probe);
        }
    }
}
