//! Where log lines go: to the parent's pipe, and to a file once nobody reads there.
//!
//! A coordinator that is killed leaves a broken pipe behind. A line that reaches nobody is no reason to
//! end. Invariant: writing a line never fails, and the file grows to [`MAX_FILE_BYTES`] at most.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tracing_subscriber::fmt::MakeWriter;

/// Most bytes of the file that lines are added to: the coordinator starts a new one long before.
const MAX_FILE_BYTES: u64 = 8 << 20;

/// The process's file, once it was told of one.
static FILE: OnceLock<PathBuf> = OnceLock::new();

/// From now on, lines that the parent does not read go to this file.
pub(crate) fn fall_back_to(file: &Path) {
    // A shard is told once.
    let _ = FILE.set(file.to_owned());
}

/// Makes writers of one line each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Log;

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if io::stderr().write_all(line).is_err()
            && let Some(file) = FILE.get()
        {
            // Nothing is left to be done about a full disk.
            let _ = append(file, line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Opened for each line, of which there are few: the coordinator may have renamed it since the last.
fn append(path: &Path, line: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.create(true).append(true).mode(0o600).open(path)?;
    if file.metadata()?.len() < MAX_FILE_BYTES {
        file.write_all(line)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_added_to_a_file_that_stays_small() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rank-0.log");
        append(&path, b"one\n").unwrap();
        std::fs::rename(&path, dir.path().join("older")).unwrap();
        append(&path, b"two\n").unwrap();
        append(&path, b"three\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two\nthree\n");
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(MAX_FILE_BYTES).unwrap();
        append(&path, b"four\n").unwrap();
        assert_eq!(file.metadata().unwrap().len(), MAX_FILE_BYTES);
        assert!(append(Path::new("/no/such"), b"five\n").is_err());
    }
}
