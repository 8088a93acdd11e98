//! The run directory: one entry for each cluster of this user on this machine.
//!
//! ```text
//! $XDG_RUNTIME_DIR/cluster/8000/   named after --name, or after the port
//!   lock          held by the process for as long as it lives: an entry nobody holds is over
//!   state.json    what this file calls State
//!   admin.sock    the admin socket
//!   legacy-N.json what a successor needs to take over the shards of model N; see `fleet::Legacy`
//!   background/   requests that are answered later; see `http::background`
//!   logs/         what shards print
//! ```
//!
//! Invariants: two clusters never share an entry; what belongs to another user, or can be written by one,
//! is not used; an entry that is over stays readable until its name is taken again or
//! eight newer ones have ended.

use crate::fleet::{Ended, Legacy};
use crate::http::background;
use anyhow::{Context, Result, bail, ensure};
use futures_util::future::join_all;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Entries of clusters that have ended which are kept for `cluster logs`.
const MAX_ENDED: usize = 8;

/// How long another process may hold the directory's own lock: it renames and removes a few files.
const TURN_LIMIT: Duration = Duration::from_secs(5);

/// Whoever looks whether an entry is held holds it for that moment.
const GLANCE_LIMIT: Duration = Duration::from_millis(200);

/// Longest path of a Unix socket, in bytes.
const MAX_SOCKET_PATH: usize = 107;

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The entry's name.
    pub name: String,
    /// The coordinator's process id.
    pub pid: u32,
    /// Where its API is.
    pub address: SocketAddr,
    /// What the API calls the models.
    pub models: Vec<String>,
    /// The topology file, if there is one.
    pub topology: Option<PathBuf>,
    /// This program's version.
    pub version: String,
    /// When it was started, in seconds since 1970.
    pub started: u64,
    /// Seconds that running requests get when it is told to end.
    pub shutdown_seconds: u32,
    /// One for each shard: those of the first model in rank order, then those of the next.
    pub ranks: Vec<RankEntry>,
    /// How it ended, in a sentence; absent while it runs, and where it was killed.
    pub ended: Option<String>,
}

/// What an entry says of a rank.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankEntry {
    /// Number of its model.
    pub model: usize,
    /// Its rank there.
    pub rank: u32,
    /// Its node.
    pub host: String,
    /// Its process there; `None` while it is being replaced.
    pub pid: Option<u32>,
    /// File of what it prints.
    pub log: PathBuf,
}

/// Where entries may be, the place for new ones first.
///
/// `given` is `--run-dir`, which then counts alone; `runtime` is `$XDG_RUNTIME_DIR`.
pub fn places(given: Option<&Path>, runtime: Option<&Path>) -> Vec<PathBuf> {
    if let Some(given) = given {
        return vec![given.to_owned()];
    }
    let uid = own_uid();
    let runtime = runtime.map(Path::to_owned);
    let of_user = [runtime, Some(format!("/run/user/{uid}").into())];
    let mut places: Vec<PathBuf> = of_user
        .into_iter()
        .flatten()
        .filter(|dir| dir.is_absolute() && dir.is_dir())
        .map(|dir| dir.join("cluster"))
        .collect();
    places.push(format!("/tmp/cluster-{uid}").into());
    places.dedup();
    places
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// An entry that is this process's for as long as this value lives.
#[derive(Debug)]
pub struct Claim {
    dir: PathBuf,
    _lock: File,
    state: State,
}

/// An entry as others see it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its directory.
    pub dir: PathBuf,
    /// What it says.
    pub state: State,
    /// Whether its process lives.
    pub is_live: bool,
    /// Where that was killed: how many of its shards wait for another one.
    pub orphans: usize,
}

impl Claim {
    /// Takes the entry `state.name` in `place`; one that is over is replaced, and its logs go on.
    ///
    /// # Errors
    /// A sentence that says who holds it, or why `place` cannot be used.
    pub fn take(place: &Path, mut state: State) -> Result<Self> {
        make_private(place)?;
        let turn = lock_in(place, ".turn")?;
        ensure!(
            is_locked_within(&turn, TURN_LIMIT),
            "{} was locked by another process for {TURN_LIMIT:?}",
            place.display()
        );
        let dir = place.join(&state.name);
        let socket = dir.join(SOCKET);
        let length = socket.as_os_str().len();
        ensure!(
            length <= MAX_SOCKET_PATH,
            "{} is {length} bytes long and a socket's path holds {MAX_SOCKET_PATH}; give a shorter \
             --run-dir or --name",
            socket.display()
        );
        make_private(&dir)?;
        let lock = lock_in(&dir, LOCK)?;
        if !is_locked_within(&lock, GLANCE_LIMIT) {
            let holder =
                read(&dir).map_or_else(|_| "another process".to_owned(), |s| s.to_string());
            bail!(
                "the name {} is taken by {holder}; end that with `cluster down`, or give this one another \
                 --name",
                state.name
            );
        }
        remove_if_there(&socket)?;
        make_private(&dir.join(LOGS))?;
        for (rank, entry) in state.ranks.iter_mut().enumerate() {
            entry.log = dir.join(LOGS).join(format!("rank-{rank}.log"));
        }
        let mut claim = Self {
            dir,
            _lock: lock,
            state,
        };
        claim.update(|_| {})?;
        forget_oldest(place);
        Ok(claim)
    }

    /// Where the admin socket belongs.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET)
    }

    /// Where background requests belong.
    pub fn background(&self) -> PathBuf {
        self.dir.join(BACKGROUND)
    }

    /// The entry's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the entry says.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Changes what the entry says.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn update(&mut self, change: impl FnOnce(&mut State)) -> Result<()> {
        change(&mut self.state);
        let (new, file) = (self.dir.join("state.new"), self.dir.join(STATE));
        let text = serde_json::to_vec_pretty(&self.state).context("write down the state")?;
        // Whoever reads meanwhile reads the old one or the new one.
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, &file))
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

const LOCK: &str = "lock";
const STATE: &str = "state.json";
const SOCKET: &str = "admin.sock";
const LOGS: &str = "logs";
const BACKGROUND: &str = "background";

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            name, pid, address, ..
        } = self;
        write!(f, "cluster {name} (process {pid}, http://{address})")
    }
}

impl Entry {
    /// All entries of `places`, those that live first, newest first.
    pub fn all(places: &[PathBuf]) -> Vec<Self> {
        // Whoever may do everything may look at everyone's; nothing is written there.
        let is_trusted = |place: &&PathBuf| own_uid() == 0 || check_private(place).is_ok();
        let dirs = places.iter().filter(is_trusted);
        let dirs = dirs.filter_map(|place| fs::read_dir(place).ok()).flatten();
        let entries = dirs.filter_map(|dir| Self::at(dir.ok()?.path()));
        let mut entries: Vec<_> = entries.collect();
        entries.sort_by_key(|entry| (!entry.is_live, u64::MAX - entry.state.started));
        entries
    }

    fn at(dir: PathBuf) -> Option<Self> {
        let is_live = is_held(&dir)?;
        let state = read(&dir).ok()?;
        Some(Self {
            orphans: if is_live { 0 } else { orphans(&dir) },
            dir,
            state,
            is_live,
        })
    }

    /// The entry `name` in `place`, if there is one.
    pub fn named(place: &Path, name: &str) -> Option<Self> {
        check_private(place).ok()?;
        Self::at(place.join(name))
    }

    /// Reads it again.
    pub fn refresh(&mut self) {
        self.is_live = is_held(&self.dir).unwrap_or(false);
        self.orphans = if self.is_live { 0 } else { orphans(&self.dir) };
        if let Ok(state) = read(&self.dir) {
            self.state = state;
        }
    }

    /// Its admin socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET)
    }
}

/// How many shards wait that a process left which was killed.
pub(super) fn orphans(dir: &Path) -> usize {
    let legacies = Legacy::read(dir).into_values();
    legacies.map(|legacy| legacy.alive().count()).sum()
}

/// Ends the shards, of models that are not `kept`, that wait for a successor of the process that held the entry. Those
/// that cannot be told to stay known. Must not be called within a tokio runtime.
///
/// # Errors
/// If a process holds it now, or its files cannot be written.
pub fn end_orphans(dir: &Path, kept: impl Fn(usize) -> bool) -> Result<Ended> {
    let lock = lock_in(dir, LOCK)?;
    ensure!(
        is_locked_within(&lock, GLANCE_LIMIT),
        "another process has just taken over the shards of {}",
        dir.display()
    );
    let mut legacies = Legacy::read(dir);
    legacies.retain(|model, _| !kept(*model));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let ends = join_all(legacies.values_mut().map(Legacy::end));
    let mut all = Ended::default();
    for ended in runtime.context("cannot start a thread")?.block_on(ends) {
        all.count += ended.count;
        all.unreached.extend(ended.unreached);
    }
    // Whoever could not be told to end can be the next time.
    Legacy::remove(dir, |model| kept(model) || legacies.contains_key(&model));
    for (model, legacy) in legacies {
        legacy.leave(dir, model)?;
    }
    Ok(all)
}

fn read(dir: &Path) -> Result<State> {
    let text = fs::read(dir.join(STATE)).context("read the state")?;
    serde_json::from_slice(&text).context("understand the state")
}

/// Whether a process holds the entry; `None` if it is no entry.
fn is_held(dir: &Path) -> Option<bool> {
    let lock = File::open(dir.join(LOCK)).ok()?;
    // Shared, and let go at once: two who look do not take each other for the cluster.
    Some(flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
}

fn lock_in(dir: &Path, name: &str) -> Result<File> {
    let path = dir.join(name);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path);
    file.with_context(|| format!("cannot open {}", path.display()))
}

/// Tries to lock a file for as long as that; whether it is locked.
fn is_locked_within(file: &File, limit: Duration) -> bool {
    let begun = crate::clock::now();
    while flock(file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if crate::clock::since(begun) >= limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Makes a directory that is its owner's alone, if it is not there.
fn make_private(dir: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.with_context(|| {
        format!(
            "cannot make the run directory {}; give another --run-dir",
            dir.display()
        )
    })?;
    check_private(dir)
}

/// In a directory that others may write to, they could put a socket of their own.
fn check_private(dir: &Path) -> Result<()> {
    let about = fs::symlink_metadata(dir)
        .with_context(|| format!("cannot use the run directory {}", dir.display()))?;
    ensure!(
        about.is_dir() && about.uid() == own_uid() && about.mode() & 0o022 == 0,
        "{} is no directory that is this user's and that nobody else may write to; remove it, or give \
         another --run-dir",
        dir.display()
    );
    Ok(())
}

/// Removes entries that are over, but for the newest few. The directory's lock is held.
fn forget_oldest(place: &Path) {
    let mut ended = Entry::all(&[place.to_owned()]);
    let has_work = |entry: &Entry| background::has_work(&entry.dir.join(BACKGROUND));
    ended.retain(|entry| !entry.is_live && entry.orphans == 0 && !has_work(entry));
    for entry in ended.iter().skip(MAX_ENDED) {
        if let Err(error) = fs::remove_dir_all(&entry.dir) {
            tracing::warn!("cannot remove {}: {error}", entry.dir.display());
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    pub(crate) fn state(name: &str, started: u64) -> State {
        State {
            name: name.into(),
            pid: std::process::id(),
            address: "127.0.0.1:8000".parse().unwrap(),
            models: vec!["demo".into()],
            topology: None,
            version: "0".into(),
            started,
            shutdown_seconds: 30,
            ranks: (0..2)
                .map(|rank| RankEntry {
                    rank,
                    ..RankEntry::default()
                })
                .collect(),
            ended: None,
        }
    }

    #[test]
    fn a_name_is_held_by_one_and_taken_over_when_that_is_gone() {
        let place = tempfile::tempdir().unwrap();
        let first = Claim::take(place.path(), state("a", 1)).unwrap();
        let refused = Claim::take(place.path(), state("a", 2)).unwrap_err();
        let pid = std::process::id();
        assert!(
            refused.to_string().contains(&format!("process {pid}")),
            "{refused}"
        );
        let other = Claim::take(place.path(), state("b", 3)).unwrap();
        let seen = || {
            let entries = Entry::all(&[place.path().to_owned()]);
            let seen = entries.iter().map(|e| (e.state.name.clone(), e.is_live));
            seen.collect::<Vec<_>>()
        };
        assert_eq!(seen(), [("b".into(), true), ("a".into(), true)]);
        // As after a crash: nothing is cleaned up, and a socket stays.
        fs::write(first.socket(), "").unwrap();
        drop(first);
        assert_eq!(seen(), [("b".into(), true), ("a".into(), false)]);
        let again = Claim::take(place.path(), state("a", 4)).unwrap();
        assert!(!again.socket().exists(), "the old socket is gone");
        assert_eq!(seen(), [("a".into(), true), ("b".into(), true)]);
        drop((other, again));
    }

    #[test]
    fn entries_that_are_over_do_not_pile_up_and_live_ones_stay() {
        let place = tempfile::tempdir().unwrap();
        let oldest = Claim::take(place.path(), state("alive", 0)).unwrap();
        for number in 1..30 {
            drop(Claim::take(place.path(), state(&format!("c{number}"), number)).unwrap());
        }
        let entries = Entry::all(&[place.path().to_owned()]);
        let ended = entries.iter().filter(|entry| !entry.is_live).count();
        assert!(ended <= MAX_ENDED + 1, "{ended}");
        assert_eq!(entries[0].state, oldest.state);
        assert_eq!(entries[1].state.name, "c29", "the newest is kept");
    }

    #[test]
    fn directories_that_others_may_write_to_are_refused() {
        let place = tempfile::tempdir().unwrap();
        let open = place.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        let refused = Claim::take(&open, state("a", 1)).unwrap_err().to_string();
        assert!(refused.contains("nobody else may write"), "{refused}");
        let link = place.path().join("link");
        std::os::unix::fs::symlink(place.path(), &link).unwrap();
        assert!(Claim::take(&link, state("a", 1)).is_err(), "a link");
        let long = place.path().join("x".repeat(100));
        let refused = Claim::take(&long, state("a", 1)).unwrap_err().to_string();
        assert!(refused.contains("shorter --run-dir"), "{refused}");
        assert!(Claim::take(Path::new("/proc/x"), state("a", 1)).is_err());
    }

    #[test]
    fn the_users_directory_comes_first() {
        let runtime = tempfile::tempdir().unwrap();
        let found = places(None, Some(runtime.path()));
        assert_eq!(found[0], runtime.path().join("cluster"));
        assert!(found.last().unwrap().starts_with("/tmp"));
        let missing = places(None, Some(Path::new("/no/such")));
        assert!(!missing.iter().any(|place| place.starts_with("/no")));
        assert_eq!(
            places(Some(Path::new("/x")), Some(runtime.path())),
            [Path::new("/x")]
        );
    }
}
