//! Drops a model's files from the system's file cache, as after a reboot.
//!
//! Invariant: files are only read and synced, never changed.

use anyhow::Context;
use rustix::fs::{Advice, fadvise, fdatasync};
use std::fs::{self, File};
use std::path::Path;

/// Drops all files below `folder`, and returns their number of bytes. Pages that a process has mapped stay, and pages
/// that are not written yet are written first.
///
/// # Errors
/// If a file cannot be read or the file system does not take the advice.
pub(crate) fn drop_cache(folder: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    for entry in entries {
        let path = entry
            .with_context(|| format!("read {}", folder.display()))?
            .path();
        let context = || format!("drop {} from the file cache", path.display());
        let kind = fs::metadata(&path).with_context(context)?;
        if kind.is_dir() {
            bytes += drop_cache(&path)?;
        } else if kind.is_file() {
            let file = File::open(&path).with_context(context)?;
            fdatasync(&file).with_context(context)?;
            fadvise(&file, 0, None, Advice::DontNeed).with_context(context)?;
            bytes += kind.len();
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_all_folders_are_dropped_and_unchanged() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("inner");
        fs::create_dir(&inner).unwrap();
        fs::write(directory.path().join("a"), [1; 5000]).unwrap();
        fs::write(inner.join("b"), [2; 70]).unwrap();
        assert_eq!(drop_cache(directory.path()).unwrap(), 5070);
        assert_eq!(fs::read(inner.join("b")).unwrap(), [2; 70]);
        let error = drop_cache(&directory.path().join("none")).unwrap_err();
        assert!(format!("{error:#}").contains("none"), "{error:#}");
    }
}
