//! What one rank's processes print, in a file: all of them, one after the other.
//!
//! A file grows to [`MAX_FILE_BYTES`], then becomes the older one and a new one begins; of two, the
//! older goes. So a rank takes twice that at most, and the last [`MAX_FILE_BYTES`] of what it said are always
//! there. Invariant: a line is in a file before anything else is done with it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Most bytes of a file. A shard of a healthy cluster says a few hundred bytes in its life.
pub const MAX_FILE_BYTES: u64 = 4 << 20;

/// The file of a rank.
#[derive(Debug)]
pub struct ShardLog {
    path: PathBuf,
    file: Option<(File, u64)>,
    limit: u64,
    /// Whether it was said that it cannot be written.
    failed: bool,
}

/// The older file beside `path`.
pub fn older(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

impl ShardLog {
    /// Goes on where `path` ends, if it is there.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: None,
            limit: MAX_FILE_BYTES,
            failed: false,
        }
    }

    /// Appends a line. Where that fails the cluster serves on, and it is said once.
    pub fn line(&mut self, line: &str) {
        match self.append(line) {
            Ok(()) => self.failed = false,
            Err(error) => {
                self.file = None;
                if !std::mem::replace(&mut self.failed, true) {
                    tracing::warn!("cannot write {}: {error}", self.path.display());
                }
            }
        }
    }

    fn append(&mut self, line: &str) -> io::Result<()> {
        let bytes = line.len() as u64 + 1;
        if let Some((_, length)) = &self.file
            && length + bytes > self.limit
        {
            self.file = None;
            fs::rename(&self.path, older(&self.path))?;
        }
        let (file, length) = match &mut self.file {
            Some(open) => open,
            closed => {
                let file = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .mode(0o600)
                    .open(&self.path)?;
                let length = file.metadata()?.len();
                closed.insert((file, length))
            }
        };
        // In one piece: whoever follows the file sees whole lines.
        file.write_all(format!("{line}\n").as_bytes())?;
        *length += bytes;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_always_there_and_files_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rank-0.log");
        for part in 0..10 {
            // Another process of the rank, or another run of the cluster.
            let mut log = ShardLog::new(path.clone());
            log.limit = 1000;
            for line in 0..100 {
                log.line(&format!("part {part} line {line}"));
                let kept = fs::read_to_string(&path).unwrap();
                let before = fs::read_to_string(older(&path)).unwrap_or_default();
                assert!(kept.len() <= 1000 + 32 && before.len() <= 1000 + 32);
                let all = before + &kept;
                assert!(all.ends_with(&format!("part {part} line {line}\n")));
                let expected = 900.min((part * 100 + line + 1) * 14);
                assert!(all.len() >= expected, "{} of {expected}", all.len());
            }
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_full_disk_stops_nothing() {
        let mut log = ShardLog::new("/dev/full".into());
        log.line("lost");
        log.line("lost");
        assert!(log.failed);
    }
}
