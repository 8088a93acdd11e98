//! `cluster logs`: what shards printed, and what they print.
//!
//! Reads files, so that it works for a cluster that is gone or stuck as well. Follows a file over its
//! rotation. Invariant: each line is shown once, whole, those of one rank in their order.

use super::args::Logs;
use super::{EXIT_INPUT, complain, find};
use crate::admin::entry::{Entry, RankEntry};
use crate::admin::shard_log::older;
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

/// How often files are looked at while they are followed.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Runs the command.
pub(super) fn run(flags: &Logs) -> ExitCode {
    let shown = find::live_or_last(&flags.which).and_then(|entry| show(flags, entry));
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(&error, EXIT_INPUT),
    }
}

fn show(flags: &Logs, mut entry: Entry) -> Result<()> {
    let count = entry.state.ranks.len();
    let ranks = match flags.shard {
        Some(rank) => {
            ensure!(
                (rank as usize) < count,
                "cluster {} has no shard {rank}; it has {count}, the first is 0",
                entry.state.name
            );
            rank as usize..rank as usize + 1
        }
        None => 0..count,
    };
    let names: Vec<String> = entry
        .state
        .ranks
        .iter()
        .map(|it| name(&entry, it))
        .collect();
    let names = (ranks.len() > 1).then_some(names);
    let mut tails: Vec<Tail> = ranks
        .map(|rank| Tail::new(rank, entry.state.ranks[rank].log.clone()))
        .collect();
    let mut first = true;
    loop {
        // Looked at before the files are: what was printed until the end is shown.
        let goes_on = flags.follow && entry.is_live;
        let mut lines = Vec::new();
        for tail in &mut tails {
            let mut new = tail.read()?;
            if let Some(limit) = flags.tail.filter(|_| first) {
                new.drain(..new.len().saturating_sub(limit));
            }
            lines.push((tail.rank, new));
        }
        first = false;
        if print(merge(lines), names.as_deref()).is_err() || !goes_on {
            return Ok(()); // a reader that had enough is no mistake
        }
        thread::sleep(LOOK_EVERY);
        entry.refresh();
    }
}

/// What tells a shard's lines from others': its model where there are several.
fn name(entry: &Entry, shard: &RankEntry) -> String {
    match entry.state.models.as_slice() {
        [_] => String::new(),
        several => several
            .get(shard.model)
            .map_or_else(String::new, |model| format!(" {model}")),
    }
}

/// `names` follow the shards' numbers, where those are shown.
fn print(lines: Vec<(usize, String)>, names: Option<&[String]>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for (rank, line) in lines {
        if let Some(name) = names.and_then(|names| names.get(rank)) {
            write!(out, "[{rank}{name}] ")?;
        }
        writeln!(out, "{line}")?;
    }
    out.flush()
}

/// Lines of several ranks in the order of their times. A line without a time, as of a panic, stays with
/// the one before it.
fn merge(ranks: Vec<(usize, Vec<String>)>) -> Vec<(usize, String)> {
    let mut all = Vec::new();
    for (rank, lines) in ranks {
        let mut last = String::new();
        for line in lines {
            if let Some(time) = time(&line) {
                time.clone_into(&mut last);
            }
            all.push((last.clone(), rank, line));
        }
    }
    all.sort_by(|(one, ..), (other, ..)| one.cmp(other)); // stable: ranks keep their order
    all.into_iter()
        .map(|(_, rank, line)| (rank, line))
        .collect()
}

/// The time a line begins with, to the second: their writers' digits differ beyond.
fn time(line: &str) -> Option<&str> {
    let time = line.get(..19)?;
    let mut shape = time.bytes().zip(*b"0000-00-00T00:00:00");
    let fits = |(byte, like): (u8, u8)| match like {
        b'0' => byte.is_ascii_digit(),
        mark => byte == mark,
    };
    shape.all(fits).then_some(time)
}

/// A rank's file, read up to somewhere.
#[derive(Debug)]
struct Tail {
    rank: usize,
    path: PathBuf,
    open: Option<BufReader<File>>,
    /// The beginning of a line whose end was not written yet.
    part: Vec<u8>,
    begun: bool,
}

impl Tail {
    fn new(rank: usize, path: PathBuf) -> Self {
        Self {
            rank,
            path,
            open: None,
            part: Vec::new(),
            begun: false,
        }
    }

    /// Lines since the last call.
    fn read(&mut self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        if !self.begun {
            self.begun = true;
            if let Some(before) = open(&older(&self.path))? {
                self.open = Some(before);
                self.drain(&mut lines)?;
                self.open = None;
            }
        }
        if self.open.is_none() {
            self.open = open(&self.path)?;
        }
        self.drain(&mut lines)?;
        while self.is_rotated() {
            // The rest of the older file, then the new one from its beginning.
            self.drain(&mut lines)?;
            self.open = open(&self.path)?;
            self.drain(&mut lines)?;
        }
        Ok(lines)
    }

    /// Whether the file of that name is another one by now.
    fn is_rotated(&self) -> bool {
        let inode = |about: io::Result<fs::Metadata>| about.map(|about| about.ino()).ok();
        let opened = self
            .open
            .as_ref()
            .and_then(|f| inode(f.get_ref().metadata()));
        let named = inode(fs::metadata(&self.path));
        opened.is_some() && named.is_some() && opened != named
    }

    fn drain(&mut self, lines: &mut Vec<String>) -> Result<()> {
        let Some(file) = &mut self.open else {
            return Ok(());
        };
        loop {
            let read = file.read_until(b'\n', &mut self.part);
            read.with_context(|| format!("cannot read {}", self.path.display()))?;
            if self.part.pop_if(|byte| *byte == b'\n').is_none() {
                return Ok(());
            }
            lines.push(String::from_utf8_lossy(&self.part).into_owned());
            self.part.clear();
        }
    }
}

fn open(path: &Path) -> Result<Option<BufReader<File>>> {
    match File::open(path) {
        Ok(file) => Ok(Some(BufReader::new(file))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_followed_over_its_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rank-0.log");
        let append = |text: &str| {
            let file = File::options().create(true).append(true).open(&path);
            file.unwrap().write_all(text.as_bytes()).unwrap();
        };
        let mut tail = Tail::new(0, path.clone());
        assert_eq!(tail.read().unwrap(), [""; 0], "not there yet");
        append("one\ntw");
        assert_eq!(tail.read().unwrap(), ["one"]);
        append("o\n");
        assert_eq!(tail.read().unwrap(), ["two"]);
        append("three\n");
        fs::rename(&path, older(&path)).unwrap();
        append("four\n");
        assert_eq!(tail.read().unwrap(), ["three", "four"]);
        let mut late = Tail::new(0, path);
        assert_eq!(late.read().unwrap(), ["one", "two", "three", "four"]);
        assert_eq!(late.read().unwrap(), [""; 0]);
    }

    #[test]
    fn ranks_are_merged_by_time_and_panics_stay_together() {
        let lines = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        let merged = merge(vec![
            (
                0,
                lines(&[
                    "2026-01-01T00:00:01Z a",
                    "panicked",
                    "2026-01-01T00:00:03.5Z c",
                ]),
            ),
            (1, lines(&["2026-01-01T00:00:02.123Z b"])),
        ]);
        let order: Vec<_> = merged
            .iter()
            .map(|(rank, line)| (*rank, line.rsplit(' ').next().unwrap()))
            .collect();
        assert_eq!(order, [(0, "a"), (0, "panicked"), (1, "b"), (0, "c")]);
    }
}
