//! The answers of a batch, in the file that is its output and its journal.
//!
//! Lines are only ever added, and are on disk when [`Journal::append`] returns. A last line that was cut off by a
//! crash is removed when the file is opened again. Invariants: one process at a time writes; every line but
//! one that is being written is whole.

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The file, open for more.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
}

/// What is read of a line.
#[derive(Deserialize)]
struct Answered {
    custom_id: String,
}

impl Journal {
    /// Opens or makes the file; and whose answers are in it.
    ///
    /// # Errors
    /// A sentence: it cannot be written, another process does, or it is something else.
    pub(super) fn open(path: &Path) -> Result<(Self, HashSet<String>)> {
        let shown = path.display();
        let mut options = OpenOptions::new();
        let options = options.create(true).truncate(false).read(true).write(true);
        let file = options
            .open(path)
            .with_context(|| format!("cannot write {shown}"))?;
        ensure!(
            flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok(),
            "another process writes {shown}; wait for it, or give another --output-file"
        );
        let mut journal = Self {
            path: path.to_owned(),
            file,
        };
        let done = journal.recover()?;
        // A file that is new is to be there after a crash too.
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let synced = File::open(dir.unwrap_or(Path::new("."))).and_then(|dir| dir.sync_all());
        synced.with_context(|| format!("cannot write beside {shown}"))?;
        Ok((journal, done))
    }

    /// Reads what is there and cuts off a line that is not whole.
    fn recover(&mut self) -> Result<HashSet<String>> {
        let shown = self.path.display();
        let mut reader = BufReader::new(&self.file);
        let (mut done, mut whole, mut line) = (HashSet::new(), 0, Vec::new());
        for number in 1.. {
            line.clear();
            let read = reader.read_until(b'\n', &mut line);
            let bytes = read.with_context(|| format!("cannot read {shown}"))?;
            // Only the last line can be without its end: it was being written.
            if bytes == 0 || line.last() != Some(&b'\n') {
                break;
            }
            match serde_json::from_slice(&line) {
                Ok(Answered { custom_id }) => done.insert(custom_id),
                // A system that went down may leave a last line of another content than was written.
                Err(_) if reader.fill_buf().is_ok_and(<[u8]>::is_empty) => break,
                Err(error) => bail!(
                    "line {number} of {shown} is no answer of a batch ({error}); give another --output-file"
                ),
            };
            whole += bytes as u64;
        }
        let cut = self.file.set_len(whole);
        let cut = cut.and_then(|()| self.file.seek(SeekFrom::Start(whole)));
        cut.with_context(|| format!("cannot write {shown}"))?;
        Ok(done)
    }

    /// Adds lines. They are on disk when this returns.
    ///
    /// # Errors
    /// If they cannot be written; the file is to be opened again then.
    pub(super) fn append(&mut self, lines: &[Value]) -> Result<()> {
        let mut text = String::new();
        for line in lines {
            text.push_str(&line.to_string());
            text.push('\n');
        }
        let written = self.file.write_all(text.as_bytes());
        let written = written.and_then(|()| self.file.sync_data());
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    fn line(id: &str) -> Value {
        json!({"id": "x", "custom_id": id, "response": {"body": "ä\n"}, "error": null})
    }

    #[test]
    fn whatever_was_cut_off_is_written_again_and_nothing_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        let (mut journal, done) = Journal::open(&path).unwrap();
        assert!(done.is_empty());
        let taken = Journal::open(&path).unwrap_err().to_string();
        assert!(taken.contains("another process"), "{taken}");
        journal.append(&[line("a"), line("b")]).unwrap();
        journal.append(&[line("c")]).unwrap();
        drop(journal);
        let whole = fs::read(&path).unwrap();
        for length in 0..=whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let (mut journal, done) = Journal::open(&path).unwrap();
            for id in ["a", "b", "c"] {
                if !done.contains(id) {
                    journal.append(&[line(id)]).unwrap();
                }
            }
            assert_eq!(fs::read(&path).unwrap(), whole, "cut off at {length}");
        }
        // As after a power failure: the length was written, the content not.
        let mut torn = whole.clone();
        torn.extend_from_slice(b"\0\0\0\0\n");
        fs::write(&path, torn).unwrap();
        assert_eq!(Journal::open(&path).unwrap().1.len(), 3);
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn other_files_are_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        fs::write(&path, "one\ntwo\n").unwrap();
        let error = Journal::open(&path).unwrap_err().to_string();
        assert!(
            error.contains("line 1") && error.contains("--output-file"),
            "{error}"
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        assert!(Journal::open(Path::new("/no/such/file")).is_err());
    }
}
