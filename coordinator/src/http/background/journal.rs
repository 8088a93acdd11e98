//! Accepted background requests and their answers, on disk.
//!
//! ```text
//! background/ID.request   a line of JSON (Head), then the body as it was sent
//!            ID.result    what a GET answers, once there is an end
//!            ID.new       being written; nobody has been told of it
//! ```
//!
//! A file is written under another name, synced, and then given its own: after a crash it is there whole or not at
//! all, so that a request is accepted or was never, and has one answer or none. Only where requests are and how many
//! bytes they take is held in memory. Knows no clock, HTTP or engine; `now` is seconds since 1970. Invariants: an answer is
//! written once; there are never more requests than the limit.

use crate::http::auth::Tenant;
use crate::http::limits::BackgroundLimits;
use crate::http::openai::Api;
use anyhow::{Context, Result};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const REQUEST: &str = "request";
const RESULT: &str = "result";
const NEW: &str = "new";

/// Longest [`Head`] in bytes: the name of a model and little else.
const MAX_HEAD_BYTES: u64 = 64 << 10;

/// What is known of a request besides its body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    /// Where it was sent.
    pub(super) api: Api,
    /// Whose it is.
    pub(super) tenant: Tenant,
    /// What answers call its model.
    pub(super) model: String,
    /// When it was accepted.
    pub(super) created: u64,
    /// Of its first choice, so that it says the same whenever it is computed.
    pub(super) seed: u64,
}

/// How far a request is.
#[derive(Clone, Debug)]
pub(super) enum State {
    Queued,
    /// Being computed, until the token is cancelled.
    InProgress(CancellationToken),
    /// Since then.
    Ended(u64),
}

#[derive(Debug)]
struct Entry {
    head: Head,
    state: State,
    /// Of its files.
    bytes: u64,
}

/// A request to be computed.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) id: Uuid,
    pub(super) head: Head,
    pub(super) body: Vec<u8>,
    /// Cancelled when nobody wants it any more.
    pub(super) cancelled: CancellationToken,
}

/// A request to be computed whose file is lost; it is to be given an answer that says so.
#[derive(Debug, thiserror::Error)]
#[error("the request {id} is lost: {error}")]
pub(super) struct Unreadable {
    pub(super) id: Uuid,
    pub(super) head: Head,
    error: io::Error,
}

/// Why no request is begun though some wait.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotBegun {
    /// It never will be.
    #[error(transparent)]
    Lost(#[from] Unreadable),
    /// Its file cannot be read now; it waits again.
    #[error("the request {0} cannot be read yet: {1}")]
    Later(Uuid, io::Error),
}

/// Why a request is not accepted.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("{0} background requests are kept, which is the limit")]
    Count(usize),
    #[error("{0} bytes of background requests and answers are kept, and {1} is the limit")]
    Bytes(u64, u64),
    #[error("the journal cannot be written: {0}")]
    Disk(#[from] io::Error),
}

/// How many requests there are, by state, and what they take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) queued: usize,
    pub(super) in_progress: usize,
    pub(super) ended: usize,
    pub(super) bytes: u64,
}

/// The directory, open for more.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    limits: BackgroundLimits,
    entries: BTreeMap<Uuid, Entry>,
    /// Those to be computed, and some that were cancelled, oldest first.
    queue: VecDeque<Uuid>,
    bytes: u64,
}

impl Journal {
    /// Opens or makes the directory; what was accepted and has no answer waits again.
    ///
    /// # Errors
    /// A sentence: it cannot be read or written.
    pub(super) fn open(dir: &Path, limits: BackgroundLimits) -> Result<Self> {
        let mut journal = Self {
            dir: dir.to_owned(),
            limits,
            entries: BTreeMap::new(),
            queue: VecDeque::new(),
            bytes: 0,
        };
        let read = journal.read();
        read.with_context(|| format!("cannot use the journal {}", dir.display()))?;
        Ok(journal)
    }

    fn read(&mut self) -> io::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)?;
        let mut results = Vec::new();
        for file in fs::read_dir(&self.dir)? {
            let path = file?.path();
            let id = path.file_stem().and_then(|stem| stem.to_str());
            let id = id.and_then(|id| Uuid::try_parse(id).ok());
            match (id, path.extension().and_then(|it| it.to_str())) {
                (Some(id), Some(REQUEST)) => self.read_request(id, &path)?,
                (Some(id), Some(RESULT)) => results.push((id, path)),
                (Some(_), Some(NEW)) => fs::remove_file(path)?,
                _ => {} // not ours
            }
        }
        for (id, path) in results {
            let Some(entry) = self.entries.get_mut(&id) else {
                // A request is forgotten before its answer is.
                fs::remove_file(path)?;
                continue;
            };
            let about = fs::metadata(path)?;
            let ended = u64::try_from(about.mtime()).unwrap_or_default();
            entry.state = State::Ended(ended);
            entry.bytes += about.len();
            self.bytes += about.len();
        }
        let waiting = |(_, entry): &(&Uuid, &Entry)| matches!(entry.state, State::Queued);
        let waiting = self.entries.iter().filter(waiting);
        let mut waiting: Vec<_> = waiting.map(|(id, it)| (it.head.created, *id)).collect();
        waiting.sort_unstable();
        self.queue = waiting.into_iter().map(|(_, id)| id).collect();
        Ok(())
    }

    fn read_request(&mut self, id: Uuid, path: &Path) -> io::Result<()> {
        let file = File::open(path)?;
        let bytes = file.metadata()?.len();
        match read_head(&mut BufReader::new(file)) {
            Ok(head) => {
                let state = State::Queued;
                self.bytes += bytes;
                self.entries.insert(id, Entry { head, state, bytes });
            }
            // Of another version, perhaps: it is not ours to delete.
            Err(error) => tracing::warn!("{} is left alone: {error}", path.display()),
        }
        Ok(())
    }

    fn path(&self, id: Uuid, extension: &str) -> PathBuf {
        self.dir.join(format!("{}.{extension}", id.simple()))
    }

    /// Takes a request. It is on disk when this returns.
    ///
    /// # Errors
    /// If there is no room for it; nothing is left of it then.
    pub(super) fn accept(&mut self, id: Uuid, head: Head, body: &[u8]) -> Result<(), Refused> {
        if self.entries.len() >= self.limits.requests {
            return Err(Refused::Count(self.entries.len()));
        }
        let mut line = serde_json::to_vec(&head).map_err(io::Error::from)?;
        line.push(b'\n');
        let bytes = (line.len() + body.len()) as u64;
        if self.bytes + bytes > self.limits.bytes {
            return Err(Refused::Bytes(self.bytes, self.limits.bytes));
        }
        self.write(&self.path(id, REQUEST), &[&line, body])?;
        self.bytes += bytes;
        let state = State::Queued;
        self.entries.insert(id, Entry { head, state, bytes });
        self.queue.push_back(id);
        Ok(())
    }

    /// The request that has waited longest, which counts as being computed from now on.
    ///
    /// # Errors
    /// If its file cannot be read, now or ever.
    pub(super) fn begin(&mut self) -> Option<Result<Task, NotBegun>> {
        loop {
            let id = self.queue.pop_front()?;
            let path = self.path(id, REQUEST);
            let Some(entry) = self.entries.get_mut(&id) else {
                continue; // deleted meanwhile
            };
            if !matches!(entry.state, State::Queued) {
                continue; // it waited too long
            }
            let cancelled = CancellationToken::new();
            entry.state = State::InProgress(cancelled.clone());
            let read = || -> io::Result<Task> {
                let mut file = BufReader::new(File::open(path)?);
                let (head, mut body) = (read_head(&mut file)?, Vec::new());
                file.read_to_end(&mut body)?;
                Ok(Task {
                    id,
                    head,
                    body,
                    cancelled,
                })
            };
            return Some(read().map_err(|error| {
                if is_lost(&error) {
                    let head = entry.head.clone();
                    return Unreadable { id, head, error }.into();
                }
                entry.state = State::Queued;
                if is_shortage(&error) {
                    self.queue.push_front(id);
                } else {
                    // It may be this file alone, which must not stop the others.
                    self.queue.push_back(id);
                }
                NotBegun::Later(id, error)
            }));
        }
    }

    /// Keeps the answer to a request, unless that was deleted or has one. It is on disk when this returns. Whether
    /// it was kept.
    ///
    /// # Errors
    /// If it cannot be written; to be tried again.
    pub(super) fn finish(&mut self, id: Uuid, answer: &[u8], now: u64) -> io::Result<bool> {
        let is_open = |entry: &Entry| !matches!(entry.state, State::Ended(_));
        if !self.entries.get(&id).is_some_and(is_open) {
            return Ok(false);
        }
        self.write(&self.path(id, RESULT), &[answer])?;
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.state = State::Ended(now);
            entry.bytes += answer.len() as u64;
            self.bytes += answer.len() as u64;
        }
        Ok(true)
    }

    /// A request of `tenant`'s, and how far it is; as if it were not there for any other.
    pub(super) fn find(&self, id: Uuid, (api, tenant): (Api, Tenant)) -> Option<(Head, State)> {
        let entry = self.entries.get(&id)?;
        let head = &entry.head;
        let is_theirs = head.api == api && head.tenant == tenant;
        is_theirs.then(|| (head.clone(), entry.state.clone()))
    }

    /// The answer that was kept.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(super) fn answer(&self, id: Uuid) -> io::Result<Vec<u8>> {
        fs::read(self.path(id, RESULT))
    }

    /// Ends a request and forgets its answer.
    ///
    /// # Errors
    /// If it would come back after a crash; to be tried again.
    pub(super) fn delete(&mut self, id: Uuid) -> io::Result<()> {
        // In this order: a request without its answer would be computed again.
        for extension in [REQUEST, RESULT] {
            match fs::remove_file(self.path(id, extension)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => self.sync()?,
            }
        }
        if let Some(entry) = self.entries.remove(&id) {
            self.bytes -= entry.bytes;
            if let State::InProgress(cancelled) = entry.state {
                cancelled.cancel();
            }
        }
        Ok(())
    }

    /// Forgets answers that were kept for long enough, and gives those requests up that have waited for too long:
    /// `give_up` says what their answers are. How many were given up.
    ///
    /// # Errors
    /// If files cannot be changed; to be tried again.
    pub(super) fn expire(
        &mut self,
        now: u64,
        give_up: impl Fn(Uuid, &Head) -> Vec<u8>,
    ) -> io::Result<usize> {
        let age = self.limits.age.as_secs();
        let (mut over, mut late) = (Vec::new(), Vec::new());
        for (id, entry) in &self.entries {
            match &entry.state {
                State::Ended(at) if at + age <= now => over.push(*id),
                State::Queued | State::InProgress(_) if entry.head.created + age <= now => {
                    late.push((*id, give_up(*id, &entry.head), entry.state.clone()));
                }
                _ => {}
            }
        }
        for id in over {
            self.delete(id)?;
        }
        for (id, answer, state) in &late {
            self.finish(*id, answer, now)?;
            if let State::InProgress(cancelled) = state {
                cancelled.cancel();
            }
        }
        Ok(late.len())
    }

    /// What there is.
    pub(super) fn counts(&self) -> Counts {
        let mut counts = Counts {
            bytes: self.bytes,
            ..Counts::default()
        };
        for entry in self.entries.values() {
            match entry.state {
                State::Queued => counts.queued += 1,
                State::InProgress(_) => counts.in_progress += 1,
                State::Ended(_) => counts.ended += 1,
            }
        }
        counts
    }

    fn write(&self, path: &Path, parts: &[&[u8]]) -> io::Result<()> {
        let new = path.with_extension(NEW);
        let write = || {
            let mut options = OpenOptions::new();
            let options = options.create(true).truncate(true).write(true).mode(0o600);
            let mut file = options.open(&new)?;
            for part in parts {
                file.write_all(part)?;
            }
            file.sync_all()?;
            fs::rename(&new, path)?;
            self.sync()
        };
        write().inspect_err(|_| {
            // Whoever hears that it failed must not find it later.
            let _ = fs::remove_file(&new);
            let _ = fs::remove_file(path);
        })
    }

    /// Names are on disk when this returns.
    fn sync(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }
}

/// Whether a file that cannot be read is not there or not whole, so that it never will be.
fn is_lost(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
    matches!(error.kind(), NotFound | InvalidData | UnexpectedEof)
}

/// Whether the machine or the process has too little of something to read any file.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    let error = Errno::from_io_error(error);
    matches!(error, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}

fn read_head(file: &mut impl BufRead) -> io::Result<Head> {
    let mut line = Vec::new();
    file.take(MAX_HEAD_BYTES).read_until(b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line)?)
}

/// Whether requests wait in the journal `dir` that the next process of its name is to compute.
pub(super) fn has_work(dir: &Path, limits: &BackgroundLimits, now: u64) -> bool {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_waiting = |path: &Path| {
        let is_request = path.extension().is_some_and(|it| it == REQUEST);
        let about = fs::metadata(path).ok();
        let accepted = about.and_then(|about| u64::try_from(about.mtime()).ok());
        let is_young = accepted.is_some_and(|at| now < at + limits.age.as_secs());
        is_request && is_young && !path.with_extension(RESULT).exists()
    };
    files.into_iter().any(|file| is_waiting(&file.path()))
}
