//! How much memory this process may use: the machine's, or its control group's where that is less.

use std::fs;
use std::path::{Path, PathBuf};

/// Total and free bytes. Zeros where the system does not say.
pub(crate) fn total_and_free() -> (u64, u64) {
    let machine = fs::read_to_string("/proc/meminfo").map_or((0, 0), |text| meminfo(&text));
    group_dirs()
        .iter()
        .filter_map(|dir| group(dir))
        .fold(machine, |least, group| {
            (least.0.min(group.0), least.1.min(group.1))
        })
}

/// `MemTotal` and `MemAvailable` in bytes.
fn meminfo(text: &str) -> (u64, u64) {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kibibytes: u64 = line
            .trim_start_matches(':')
            .split_whitespace()
            .next()?
            .parse()
            .ok()?;
        Some(kibibytes * 1024)
    };
    (
        field("MemTotal").unwrap_or(0),
        field("MemAvailable").unwrap_or(0),
    )
}

/// This process's control group and its ancestors (version 2), or the memory controller's (version 1).
fn group_dirs() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut dirs = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let root = match controllers {
            "" => Path::new("/sys/fs/cgroup"),
            "memory" => Path::new("/sys/fs/cgroup/memory"),
            _ => continue,
        };
        let own = root.join(path.trim_start_matches('/'));
        dirs.extend(
            own.ancestors()
                .take_while(|dir| dir.starts_with(root))
                .map(Path::to_path_buf),
        );
    }
    dirs
}

/// Limit of a control group and what is left of it, in bytes; `None` where it sets no limit.
fn group(dir: &Path) -> Option<(u64, u64)> {
    let number = |name: &str| {
        fs::read_to_string(dir.join(name))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let limit = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
    let used = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
    // File pages that were not used lately count as used but are given back on demand.
    let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let inactive = ["inactive_file ", "total_inactive_file "]
        .iter()
        .find_map(|name| {
            stat.lines()
                .find_map(|line| line.strip_prefix(name))?
                .trim()
                .parse::<u64>()
                .ok()
        });
    let held = used.saturating_sub(inactive.unwrap_or(0));
    Some((limit, limit.saturating_sub(held)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_meminfo() {
        let text = "MemTotal:       24623740 kB\nMemFree:  1 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(meminfo(text), (24_623_740 * 1024, 23_000_000 * 1024));
        assert_eq!(meminfo("nothing"), (0, 0));
    }

    #[test]
    fn a_group_that_sets_a_limit_bounds_the_machine() {
        let dir = std::env::temp_dir().join(format!("kernels-memory-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("memory.current"), "700\n").unwrap();
        fs::write(dir.join("memory.stat"), "anon 5\ninactive_file 200\n").unwrap();
        fs::write(dir.join("memory.max"), "max\n").unwrap();
        assert_eq!(group(&dir), None);
        fs::write(dir.join("memory.max"), "1000\n").unwrap();
        assert_eq!(group(&dir), Some((1000, 500)));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn free_is_part_of_total() {
        let (total, free) = total_and_free();
        assert!(free > 0 && free <= total, "{free} of {total}");
    }
}
