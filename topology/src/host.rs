//! What this host has: cores this process may use, memory that is free.
//!
//! Reads the operating system at the moment it is asked; decides nothing. In a container the
//! control group's limits count, not the machine's. Invariant: free memory is never more than
//! what the kernel would give without swapping or killing.

use crate::spec::list;
use std::fs;
use std::io;
use std::path::Path;
use std::thread;

/// Cores that this process may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCores {
    /// Their numbers, ascending. Never empty.
    pub allowed: Vec<u32>,
    /// How many threads make sense: fewer than `allowed` where a quota says so. At least 1.
    pub parallelism: u32,
    /// `allowed` by NUMA node, in the order of the nodes; all in one where the system names none. None is empty.
    pub nodes: Vec<Vec<u32>>,
}

impl HostCores {
    /// Asks the operating system.
    ///
    /// # Errors
    /// What the operating system answers where it refuses.
    pub fn read() -> io::Result<Self> {
        let set = rustix::thread::sched_getaffinity(None)?;
        let allowed = (0..rustix::thread::CpuSet::MAX_CPU).filter(|core| set.is_set(*core));
        let allowed: Vec<u32> = allowed
            .filter_map(|core| u32::try_from(core).ok())
            .collect();
        let quota = thread::available_parallelism()?.get();
        let parallelism = u32::try_from(quota.min(allowed.len()).max(1)).unwrap_or(1);
        let nodes = numa_nodes(Path::new("/sys/devices/system/node"), &allowed);
        Ok(Self {
            allowed,
            parallelism,
            nodes,
        })
    }

    /// Cores about whose memory nothing is known.
    pub fn of_one_node(allowed: Vec<u32>, parallelism: u32) -> Self {
        let nodes = vec![allowed.clone()];
        Self {
            allowed,
            parallelism,
            nodes,
        }
    }
}

/// The cores of each node that `folder` lists, of those that are `allowed`.
fn numa_nodes(folder: &Path, allowed: &[u32]) -> Vec<Vec<u32>> {
    let read = |name: String| fs::read_to_string(folder.join(name)).ok();
    // As the kernel writes it: 0-1, say; not the entries of the folder, which have no order.
    let numbers = read("online".to_owned()).and_then(|text| list(text.trim(), "nodes").ok());
    let nodes = numbers
        .unwrap_or_default()
        .into_iter()
        .filter_map(|number| {
            let cores = read(format!("node{number}/cpulist"))?;
            // A node of memory alone has an empty list.
            let mut cores = list(cores.trim(), "cores").ok()?;
            cores.retain(|core| allowed.contains(core));
            (!cores.is_empty()).then_some(cores)
        });
    let nodes: Vec<_> = nodes.collect();
    if nodes.iter().map(Vec::len).sum::<usize>() == allowed.len() {
        nodes
    } else {
        vec![allowed.to_vec()]
    }
}

/// Memory of this host, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// What can be taken without swapping.
    pub free_bytes: u64,
    /// What there is in all.
    pub total_bytes: u64,
}

impl HostMemory {
    /// Reads `/proc/meminfo` and the control group's limit.
    ///
    /// # Errors
    /// If `/proc/meminfo` cannot be read or lacks its fields.
    pub fn read() -> io::Result<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let host = Self::from_meminfo(&meminfo)
            .ok_or_else(|| io::Error::other("/proc/meminfo lacks MemTotal or MemAvailable"))?;
        let limits = [
            // Version 2, then version 1 of the interface, as a container sees its own group.
            ("/sys/fs/cgroup", "memory.max", "memory.current"),
            (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            ),
        ];
        let groups = limits.iter().filter_map(|(root, limit, usage)| {
            let read = |name: &str| fs::read_to_string(Path::new(root).join(name)).ok();
            from_cgroup(&read(limit)?, &read(usage)?, &read("memory.stat")?)
        });
        Ok(groups.fold(host, Self::least))
    }

    /// What a host says in its `/proc/meminfo`; `None` if the text is not that.
    pub fn from_meminfo(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            let kibibytes = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?;
            kibibytes.checked_mul(1024)
        };
        Some(Self {
            free_bytes: field("MemAvailable:")?,
            total_bytes: field("MemTotal:")?,
        })
    }

    fn least(self, other: Self) -> Self {
        Self {
            free_bytes: self.free_bytes.min(other.free_bytes),
            total_bytes: self.total_bytes.min(other.total_bytes),
        }
    }
}

/// `None` where the group has no limit.
fn from_cgroup(limit: &str, usage: &str, stat: &str) -> Option<HostMemory> {
    let total_bytes = limit.trim().parse::<u64>().ok()?;
    let usage = usage.trim().parse::<u64>().ok()?;
    // Cached file pages count as usage but are given up on demand; weights are mapped files.
    let cached = |name: &str| {
        let line = stat.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<u64>().ok()
    };
    let cached = cached("total_inactive_file ")
        .or_else(|| cached("inactive_file "))
        .unwrap_or(0);
    let used = usage.saturating_sub(cached);
    Some(HostMemory {
        free_bytes: total_bytes.saturating_sub(used),
        total_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_cores_and_memory() {
        let cores = HostCores::read().unwrap();
        assert!((1..=cores.allowed.len()).contains(&(cores.parallelism as usize)));
        assert!(cores.allowed.is_sorted());
        let mut of_nodes = cores.nodes.concat();
        of_nodes.sort_unstable();
        assert_eq!(of_nodes, cores.allowed);
        let memory = HostMemory::read().unwrap();
        assert!(memory.free_bytes > 1 << 20 && memory.free_bytes <= memory.total_bytes);
    }

    #[test]
    fn cores_are_told_apart_by_the_memory_beside_them() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("online", "0-2\n");
        write("node0/cpulist", "0-1,4-5\n");
        write("node1/cpulist", "2-3,6-7\n");
        write("node2/cpulist", "\n");
        let nodes = |allowed: &[u32]| numa_nodes(folder.path(), allowed);
        let all: Vec<u32> = (0..8).collect();
        assert_eq!(nodes(&all), [[0, 1, 4, 5], [2, 3, 6, 7]]);
        assert_eq!(nodes(&[1, 2, 6]), [vec![1], vec![2, 6]]);
        assert_eq!(nodes(&[4, 5]), [[4, 5]]);
        assert_eq!(nodes(&[0, 9]), [[0, 9]], "a core that no node has");
        assert_eq!(numa_nodes(Path::new("/nowhere"), &all), [all]);
    }

    #[test]
    fn the_smaller_of_machine_and_container_counts() {
        let host = HostMemory::from_meminfo(
            "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:    800 kB\n",
        )
        .unwrap();
        assert_eq!((host.free_bytes, host.total_bytes), (800 << 10, 1000 << 10));
        assert_eq!(HostMemory::from_meminfo("MemTotal: 1000 kB\n"), None);
        assert_eq!(from_cgroup("max\n", "5\n", ""), None, "no limit");
        let group = from_cgroup("500000\n", "300000\n", "anon 1\ninactive_file 100000\n").unwrap();
        assert_eq!((group.free_bytes, group.total_bytes), (300_000, 500_000));
        assert_eq!(host.least(group), group);
        // Version 1 lists the group's own pages and, under `total_`, those of its children.
        let nested = from_cgroup("500", "400", "inactive_file 1\ntotal_inactive_file 50").unwrap();
        assert_eq!(nested.free_bytes, 150);
        assert_eq!(from_cgroup("500", "900", "").unwrap().free_bytes, 0);
    }
}
