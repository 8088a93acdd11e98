//! Where log lines go: to the parent's pipe, and to a file once nobody reads there.
//!
//! A coordinator that is killed leaves a broken pipe behind, or on another host one that somebody still empties for
//! nobody. A line that reaches nobody is no reason to end. Invariant: writing a line never fails, and log lines make
//! the file grow to [`MAX_FILE_BYTES`] at most.

use rustix::stdio::{dup2_stderr, dup2_stdout};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use topology::launch::handed_on;
use tracing_subscriber::fmt::MakeWriter;

/// Most bytes of the file that lines are added to: beside the coordinator it starts a new one long before.
const MAX_FILE_BYTES: u64 = 8 << 20;

/// The process's file, once it was told of one.
static FILE: OnceLock<PathBuf> = OnceLock::new();

/// Whether the parent's pipes are no good any more.
static DETACHED: AtomicBool = AtomicBool::new(false);

/// Whether the file is not to be there any more.
static CLOSED: AtomicBool = AtomicBool::new(false);

/// From now on, lines that the parent does not read go to this file.
pub(crate) fn fall_back_to(file: &Path) {
    // A shard is told once.
    let _ = FILE.set(file.to_owned());
}

/// From now on all goes to this file: also a panic, and what libraries print.
pub(crate) fn detach(file: &Path) {
    fall_back_to(file);
    if !DETACHED.swap(true, Ordering::Relaxed)
        && let Ok(file) = open(file)
    {
        // Where that is not possible, the broken pipes stay.
        let _ = dup2_stdout(&file).and_then(|()| dup2_stderr(&file));
    }
}

/// From now on the file is not written to: it is being removed.
pub(crate) fn close() {
    CLOSED.store(true, Ordering::Relaxed);
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
        let reaches_parent =
            || !DETACHED.load(Ordering::Relaxed) && io::stderr().write_all(line).is_ok();
        if !reaches_parent()
            && !CLOSED.load(Ordering::Relaxed)
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

/// Opened for each line, of which there are few: the coordinator may have renamed it since the last. On another host
/// nobody does; there it begins anew once all of it was handed on.
fn append(path: &Path, line: &[u8]) -> io::Result<()> {
    /// No line comes between the look and the new beginning.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut file = open(path)?;
    let length = file.metadata()?.len();
    let is_full = length >= MAX_FILE_BYTES;
    if is_full && handed_on(path) == Some(length) {
        file.set_len(0)?;
    } else if is_full {
        return Ok(());
    }
    file.write_all(line)
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600).open(path)
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
        let (position, length) = (dir.path().join("rank-0.read"), MAX_FILE_BYTES.to_string());
        std::fs::write(position, length).unwrap();
        append(&path, b"five\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "five\n");
        assert!(append(Path::new("/no/such"), b"five\n").is_err());
    }
}
