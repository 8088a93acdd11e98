//! What a coordinator leaves to its successor: a file of the run directory for each model.
//!
//! Written when shards come, so that it is there whenever the process is killed; removed when the shards
//! end in order, and never before all of them are this process's. With it a coordinator that is started on the same machine finds the shards, also those on other
//! nodes, proves itself to them by the same key, and tells whether it wants them. Decides nothing.
//!
//! Invariants: a file is never half written and nobody else's to read; its generation grows with every
//! coordinator before that one speaks to a shard; its time is never long before the coordinator's end, so that what
//! waits elsewhere is not looked for longer than it waits.

use super::terms::Terms;
use crate::clock::{now, since, unix_seconds};
use anyhow::{Context, Result, ensure};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};
use tokio::time::sleep;
use topology::fit::Memory;
use topology::ids::Rank;
use topology::launch::Hold;
use topology::launch::process::ProcessId;
use topology::launch::ssh::Away;
use topology::link::{Certificate, Listener, SavedIdentity};

/// How the files' names begin and end in a cluster's directory; between them is the number of the model.
const FILE: (&str, &str) = ("legacy-", ".json");

/// From which number on files are of shards that could not be told to end. No cluster has as many models.
const UNREACHED: usize = 1 << 20;

/// How often a coordinator gives its files a new time.
const PULSE_EVERY: Duration = Duration::from_secs(5);

/// How long after that time shards on other nodes may begin to wait: the pulse, and what a silent link takes.
const NOTICE_SECONDS: u64 = 10;

/// How long the system may take to end a process.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What is left to a successor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Legacy {
    /// Counts the coordinators of these shards, from 0.
    pub generation: u32,
    /// Under which the shards were started.
    pub terms: Terms,
    /// Memory before they were: what they hold is missing from it now.
    pub memory: Memory,
    /// Where shards look for a coordinator.
    pub address: SocketAddr,
    /// Whom they believe there.
    pub identity: SavedIdentity,
    /// By rank; `None` before its first process came.
    pub ranks: Vec<Option<Holder>>,
    /// When the coordinator lived, in seconds since 1970: the file's time.
    #[serde(skip)]
    pub pulse: u64,
}

/// A shard that was admitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its identity.
    pub certificate: Certificate,
    /// Its process on its machine.
    pub process: ProcessId,
    /// How it is found on another node; `None` on this machine.
    pub away: Option<Away>,
    /// The `ssh` on this machine that it was started through, which stays as long as the shard does.
    pub ssh: Option<ProcessId>,
}

/// What became of shards that were to end.
#[derive(Debug, Default)]
pub struct Ended {
    /// How many have ended.
    pub count: usize,
    /// Of those that could not be told to, what is wrong.
    pub unreached: Vec<String>,
}

impl Legacy {
    /// What lies in a cluster's directory, by number of the model; without what is another version's.
    pub fn read(dir: &Path) -> BTreeMap<usize, Self> {
        let legacies = files(dir).into_iter().filter_map(|model| {
            let path = file(dir, model);
            let text = fs::read(&path).ok()?;
            let mut legacy: Self = serde_json::from_slice(&text).ok()?;
            let time = fs::metadata(&path).ok()?.mtime();
            legacy.pulse = u64::try_from(time).unwrap_or_default();
            Some((model, legacy))
        });
        legacies.collect()
    }

    /// Removes those of models that are not `kept`: their shards that wait end.
    pub fn remove(dir: &Path, kept: impl Fn(usize) -> bool) {
        for model in files(dir).into_iter().filter(|model| !kept(*model)) {
            remove(&file(dir, model));
        }
    }

    /// The shards that run, with their ranks. Those on other nodes are not asked: they may run as long as they may
    /// wait.
    pub fn alive(&self) -> impl Iterator<Item = (Rank, &Holder)> {
        let ranks = (0..).map(Rank).zip(&self.ranks);
        let known = ranks.filter_map(|(rank, holder)| Some((rank, holder.as_ref()?)));
        known.filter(|(_, holder)| match holder.away {
            None => holder.process.is_running(),
            Some(_) => self.seconds_left() > 0,
        })
    }

    /// How much longer shards on other nodes may wait; those whose coordinator has not ended are not meant.
    pub fn seconds_left(&self) -> u64 {
        let until = self.pulse + u64::from(self.terms.hold_seconds) + NOTICE_SECONDS;
        until.saturating_sub(unix_seconds())
    }

    /// Ends the shards that run. Those that could not be told to are what is left.
    pub async fn end(&mut self) -> Ended {
        let mut ended = Ended::default();
        let ends = self
            .alive()
            .map(async |(rank, holder)| (rank, holder.end().await));
        let mut left = vec![None; self.ranks.len()];
        for (rank, end) in join_all(ends).await {
            match end {
                Ok(had_run) => ended.count += usize::from(had_run),
                Err(error) => {
                    left[rank.index()].clone_from(&self.ranks[rank.index()]);
                    let seconds = self.seconds_left();
                    ended.unreached.push(format!(
                        "rank {rank}: {error:#}; without a coordinator it ends by itself, within {seconds} s"
                    ));
                }
            }
        }
        self.ranks = left;
        ended
    }

    /// Puts what is left after [`Self::end`] of that of number `model` where it stays until it is told to end, whatever
    /// the cluster serves next.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn leave(&self, dir: &Path, model: usize) -> Result<()> {
        if self.ranks.iter().all(Option::is_none) {
            remove(&file(dir, model));
            return Ok(());
        }
        if Self::is_unreached(model) {
            return self.write(&file(dir, model));
        }
        let last = files(dir).into_iter().max().unwrap_or_default();
        self.write(&file(dir, (last + 1).max(UNREACHED)))?;
        remove(&file(dir, model));
        Ok(())
    }

    /// Whether a number is no model's, but that of shards which could not be told to end, and which nobody takes over.
    pub fn is_unreached(model: usize) -> bool {
        model >= UNREACHED
    }

    fn write(&self, file: &Path) -> Result<()> {
        let new = file.with_extension("new");
        let text = serde_json::to_vec_pretty(self).context("write down the legacy")?;
        let mut options = OpenOptions::new();
        let options = options.create(true).write(true).truncate(true).mode(0o600);
        // A key is in it: it is nobody else's from its first byte on.
        let written = options
            .open(&new)
            .and_then(|mut out| {
                out.write_all(&text)?;
                out.set_modified(UNIX_EPOCH + Duration::from_secs(self.pulse))
            })
            .and_then(|()| fs::rename(&new, file));
        written.with_context(|| format!("cannot write {}", file.display()))
    }
}

impl Holder {
    /// Ends it for good. Whether it ran.
    async fn end(&self) -> Result<bool> {
        if let Some(away) = &self.away {
            return Ok(away.end().await?);
        }
        let begun = now();
        self.process.kill();
        while self.process.is_running() {
            let pid = self.process.pid;
            ensure!(
                since(begun) < KILL_LIMIT,
                "the system does not end process {pid}"
            );
            sleep(Duration::from_millis(5)).await;
        }
        Ok(true)
    }
}

/// The file of a model.
fn file(dir: &Path, model: usize) -> PathBuf {
    let (begin, end) = FILE;
    dir.join(format!("{begin}{model}{end}"))
}

fn remove(file: &Path) {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!("cannot remove {}: {error}", file.display());
        }
        _ => {}
    }
}

/// The models that have one.
fn files(dir: &Path) -> Vec<usize> {
    let (begin, end) = FILE;
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let models = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix(begin)?.strip_suffix(end)?.parse().ok()
    });
    models.collect()
}

/// Keeps the file of one model up to date.
#[derive(Debug)]
pub struct Keeper {
    /// The cluster's directory.
    pub dir: PathBuf,
    /// The model's number.
    pub model: usize,
    /// Files of shards' log lines, by rank.
    pub logs: Vec<PathBuf>,
    /// See [`Legacy::terms`].
    pub terms: Terms,
    /// See [`Legacy::memory`].
    pub memory: Memory,
    /// See [`Legacy::generation`].
    pub generation: u32,
    /// See [`Legacy::ranks`].
    pub ranks: Vec<Option<Holder>>,
}

impl Keeper {
    /// What a shard of `rank` is told, which may be `away`.
    pub(super) fn hold(&self, rank: Rank, away: Option<&Away>) -> Option<Hold> {
        let (legacy, log) = if let Some(away) = away {
            (None, away.log().to_owned())
        } else {
            let log = self.logs.get(rank.index())?.clone();
            (Some(file(&self.dir, self.model)), log)
        };
        Some(Hold {
            seconds: self.terms.hold_seconds,
            legacy,
            log,
        })
    }

    /// Takes in that a shard came.
    pub(super) fn admitted(&mut self, rank: Rank, holder: Holder) {
        if let Some(place) = self.ranks.get_mut(rank.index()) {
            *place = Some(holder);
        }
    }

    /// From now on the file is about shards of this process alone.
    pub(super) fn own(&self) -> OwnFile {
        OwnFile(file(&self.dir, self.model))
    }

    /// Says every few seconds that this coordinator lives.
    pub(super) fn pulse(&self) -> impl Future<Output = ()> + Send + use<> {
        let file = file(&self.dir, self.model);
        async move {
            loop {
                sleep(PULSE_EVERY).await;
                let now = UNIX_EPOCH + Duration::from_secs(unix_seconds());
                // Where it is not there, nobody is to come.
                let open = File::options().write(true).open(&file);
                let _ = open.and_then(|file| file.set_modified(now));
            }
        }
    }

    /// Writes the file. Where that fails the cluster serves on, and cannot be taken over.
    pub(super) fn write(&self, listener: &Listener) {
        let written = listener
            .local_addr()
            .map_err(Into::into)
            .and_then(|address| {
                let legacy = Legacy {
                    generation: self.generation,
                    terms: self.terms.clone(),
                    memory: self.memory.clone(),
                    address,
                    identity: listener.identity().save(),
                    ranks: self.ranks.clone(),
                    pulse: unix_seconds(),
                };
                legacy.write(&file(&self.dir, self.model))
            });
        if let Err(error) = written {
            tracing::warn!("if this process dies, its shards cannot be taken over: {error:#}");
        }
    }
}

/// The file of shards that end with this value, and have no successor then.
#[derive(Debug)]
pub(super) struct OwnFile(PathBuf);

impl Drop for OwnFile {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::terms::tests::terms;

    #[tokio::test]
    async fn what_is_left_is_this_users_alone_and_opens_the_same_door() {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(std::net::Ipv4Addr::LOCALHOST.into()).unwrap();
        let mut keeper = Keeper {
            dir: dir.path().to_owned(),
            model: 1,
            logs: vec![dir.path().join("rank-0.log")],
            terms: terms(),
            memory: Memory::Shared { free_bytes: 5 },
            generation: 3,
            ranks: vec![None; 2],
        };
        let hold = |rank| keeper.hold(rank, None);
        assert!(hold(Rank(0)).is_some() && hold(Rank(1)).is_none());
        let holder = Holder {
            certificate: listener.certificate().clone(),
            process: ProcessId::own().unwrap(),
            away: None,
            ssh: None,
        };
        keeper.admitted(Rank(1), holder);
        keeper.write(&listener);
        let mode = fs::metadata(file(dir.path(), 1)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        let read = || Legacy::read(dir.path());
        let legacy = read().remove(&1).unwrap();
        assert_eq!((legacy.generation, &legacy.ranks[0]), (3, &None));
        let alive: Vec<_> = legacy.alive().map(|(rank, _)| rank).collect();
        assert_eq!(alive, [Rank(1)]);
        let address = listener.local_addr().unwrap();
        assert_eq!(legacy.address, address);
        let again = || Listener::bind_again(address, legacy.identity.load().unwrap());
        assert!(again().is_err(), "the first one has the port");
        assert_eq!(legacy.identity, listener.identity().save());
        // Nothing of it is the model's any more, until it is told to end.
        for number in [1, UNREACHED] {
            legacy.leave(dir.path(), number).unwrap();
            assert_eq!(files(dir.path()), [UNREACHED]);
        }
        keeper.write(&listener);
        legacy.leave(dir.path(), 1).unwrap();
        assert_eq!(
            read().into_keys().collect::<Vec<_>>(),
            [UNREACHED, UNREACHED + 1]
        );
        let nothing = Legacy {
            ranks: vec![None; 2],
            ..legacy
        };
        for number in [UNREACHED, UNREACHED + 1] {
            nothing.leave(dir.path(), number).unwrap();
        }
        assert!(files(dir.path()).is_empty());
        keeper.write(&listener);
        Legacy::remove(dir.path(), |model| model == 1);
        assert_eq!(files(dir.path()), [1]);
        for _ in 0..2 {
            Legacy::remove(dir.path(), |_| false);
            assert!(read().is_empty() && files(dir.path()).is_empty());
        }
    }
}
