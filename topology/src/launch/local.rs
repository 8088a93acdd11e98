//! Shard processes of this host.
//!
//! Starts them, hands on every line they print, and knows when they end. Does not decide how many
//! there are or what becomes of one that died. Invariant: no output is inherited or lost, and no
//! process outlives the value that stands for it.

use super::environment::Variable;
use super::{Announcement, FAREWELL, LAUNCH_LIMIT, Launch, LaunchError, MAX_LINE_BYTES};
use super::{to_line, within};
use serde::de::DeserializeOwned;
use std::env;
use std::ffi::OsStr;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;

/// Lines that may wait for whoever reads them; the child's pipe fills after that, and nothing is lost.
const MAX_LINES: usize = 256;

/// Longest log line in bytes that is kept whole; the rest becomes lines of its own.
const MAX_LOG_LINE_BYTES: u64 = 16 << 10;

/// Most lines before the announcement: what a login shell may print.
const MAX_EARLY_LINES: usize = 100;

/// Longest wait for what a dead child wrote; a grandchild may hold its pipe open.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);

/// The operator's settings and keys are in variables of this prefix. They are the parent's: what
/// a shard needs it is told over the pipe.
const PRIVATE_PREFIX: &[u8] = b"CLUSTER_";

/// Those of that prefix that are about the host and not about the cluster: where GPU libraries are.
const HOST_VARIABLES: [&[u8]; 2] = [b"CLUSTER_CUDA_LIBRARIES", b"CLUSTER_NCCL_SO_PATH"];

/// A process that has said its first word: a shard, who it is; it does not know yet what to do.
#[derive(Debug)]
pub struct Started<T = Announcement> {
    /// What it said.
    pub said: T,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// What it printed before its announcement.
    early: Vec<String>,
}

/// A shard process at work. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// Open for as long as the shard is to live.
    stdin: Option<ChildStdin>,
    /// What it prints, line by line. Taken once by whoever forwards it; the shard waits when nobody
    /// reads and its pipe is full.
    pub lines: Option<mpsc::Receiver<String>>,
}

/// Starts `program arguments…` and waits for its announcement.
///
/// # Errors
/// [`LaunchError`] if it does not start or does not announce itself within [`LAUNCH_LIMIT`].
pub async fn start<A: AsRef<OsStr>>(
    program: &OsStr,
    arguments: impl IntoIterator<Item = A>,
) -> Result<Started, LaunchError> {
    first_word(program, arguments, &[]).await
}

/// The same for a process whose libraries read their settings from the environment.
///
/// # Errors
/// As [`start`].
pub async fn start_for<A: AsRef<OsStr>>(
    environment: &[Variable],
    program: &OsStr,
    arguments: impl IntoIterator<Item = A>,
) -> Result<Started, LaunchError> {
    first_word(program, arguments, environment).await
}

/// Starts a child with pipes, which dies with its handle.
pub(super) fn spawn<A: AsRef<OsStr>>(
    program: &OsStr,
    arguments: impl IntoIterator<Item = A>,
    environment: &[Variable],
) -> Result<Child, LaunchError> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A group of its own: Ctrl-C in a terminal reaches the coordinator alone, which then drains.
        .process_group(0)
        .kill_on_drop(true);
    without_private_variables(&mut command);
    for variable in environment {
        if !variable.is_proposal || env::var_os(variable.name).is_none() {
            command.env(variable.name, &variable.value);
        }
    }
    command.spawn().map_err(|e| match program.to_str() {
        Some("ssh") => super::ssh::no_ssh(&e),
        _ => LaunchError::Io(format!("cannot start {}: {e}", program.display())),
    })
}

/// Starts a child and waits for its first word.
pub(super) async fn first_word<T: DeserializeOwned, A: AsRef<OsStr>>(
    program: &OsStr,
    arguments: impl IntoIterator<Item = A>,
    environment: &[Variable],
) -> Result<Started<T>, LaunchError> {
    let mut child = spawn(program, arguments, environment)?;
    let missing = || LaunchError::Io("the child's pipes are missing".to_owned());
    let stdin = child.stdin.take().ok_or_else(missing)?;
    let mut stdout = BufReader::new(child.stdout.take().ok_or_else(missing)?);
    let mut early = Vec::new();
    let announcement = announcement(&mut stdout, &mut early);
    let what = "waiting for the process to announce itself";
    match within(LAUNCH_LIMIT, what, announcement).await {
        Ok(said) => Ok(Started {
            said,
            child,
            stdin,
            stdout,
            early,
        }),
        Err(error) => Err(with_last_words(error, early, &mut child).await),
    }
}

pub(super) fn without_private_variables(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let bytes = name.as_encoded_bytes();
        if bytes.starts_with(PRIVATE_PREFIX) && !HOST_VARIABLES.contains(&bytes) {
            command.env_remove(name);
        }
    }
}

/// The first line that is an announcement; others are put aside.
async fn announcement<T: DeserializeOwned>(
    stdout: &mut BufReader<ChildStdout>,
    early: &mut Vec<String>,
) -> Result<T, LaunchError> {
    while early.len() < MAX_EARLY_LINES {
        let line = line(stdout, MAX_LINE_BYTES).await;
        let line =
            line.map_err(|e| LaunchError::Io(format!("cannot read from the process: {e}")))?;
        let Some(line) = line else {
            let reason = "it ended before it announced itself";
            return Err(LaunchError::Handshake(reason.to_owned()));
        };
        match serde_json::from_str(&line) {
            Ok(announcement) => return Ok(announcement),
            Err(_) => early.push(line),
        }
    }
    let reason = format!("no announcement in its first {MAX_EARLY_LINES} lines");
    Err(LaunchError::Handshake(reason))
}

/// What the failed child wrote says more than its silence.
async fn with_last_words(
    error: LaunchError,
    mut words: Vec<String>,
    child: &mut Child,
) -> LaunchError {
    // It may have ended already.
    let _ = child.start_kill();
    if let Some(stderr) = child.stderr.take() {
        let mut text = Vec::new();
        let mut stderr = stderr.take(MAX_LOG_LINE_BYTES);
        let reading = stderr.read_to_end(&mut text);
        // What came until then is what there is to show.
        let _ = tokio::time::timeout(LAST_WORDS_LIMIT, reading).await;
        words.push(String::from_utf8_lossy(&text).trim().to_owned());
    }
    words.retain(|line| !line.is_empty());
    if words.is_empty() {
        error
    } else {
        error.with_words(&words.join("\n"))
    }
}

impl Started {
    /// Tells it what to do.
    ///
    /// # Errors
    /// [`LaunchError`] if it does not take the line within [`LAUNCH_LIMIT`].
    pub async fn launch(mut self, launch: &Launch) -> Result<Process, LaunchError> {
        let line = to_line(launch)?;
        within(LAUNCH_LIMIT, "telling the shard what to do", async {
            let written = self.stdin.write_all(&line).await;
            written.map_err(|e| LaunchError::Io(format!("the shard does not listen: {e}")))
        })
        .await?;
        Ok(self.at_work())
    }
}

impl<T> Started<T> {
    /// Leaves it to itself.
    pub(super) fn at_work(mut self) -> Process {
        let (sender, lines) = mpsc::channel(MAX_LINES);
        if let Some(stderr) = self.child.stderr.take() {
            tokio::spawn(forward(Vec::new(), BufReader::new(stderr), sender.clone()));
        }
        tokio::spawn(forward(self.early, self.stdout, sender));
        Process {
            child: self.child,
            stdin: Some(self.stdin),
            lines: Some(lines),
        }
    }
}

impl Process {
    /// Its process id, while it has not been waited for.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits until it has ended. Cancel-safe. Has no deadline: it is what a deadline is raced against.
    ///
    /// # Errors
    /// [`LaunchError::Io`] if the system cannot say.
    pub async fn wait(&mut self) -> Result<ExitStatus, LaunchError> {
        // `Child::wait` would close standard input, which ends the shard, but it was taken out.
        let waited = self.child.wait().await;
        waited.map_err(|e| LaunchError::Io(format!("cannot wait for the shard: {e}")))
    }

    /// Asks it to end, by closing its standard input.
    pub fn hang_up(&mut self) {
        self.stdin = None;
    }

    /// Tells it to end, gives it `limit` for that, and kills it then. How it ended, if it did by itself. Of a process
    /// that stands for one on another host, only what it is told gets there.
    pub async fn dismiss(&mut self, limit: Duration) -> Option<ExitStatus> {
        let ending = async {
            if let Some(mut stdin) = self.stdin.take() {
                // Where nobody listens, the end of the pipe says the rest.
                let _ = stdin.write_all(FAREWELL).await;
            }
            self.child.wait().await.ok()
        };
        let ended = tokio::time::timeout(limit, ending).await.ok().flatten();
        if ended.is_none() {
            self.kill();
        }
        ended
    }

    /// Ends it now.
    pub fn kill(&mut self) {
        // It may have ended already.
        let _ = self.child.start_kill();
    }
}

/// Hands on every line. Whoever does not read makes the child wait, which loses nothing; once the reader
/// has gone for good, the child's output is drained and dropped, so that it does not block on it.
async fn forward(
    early: Vec<String>,
    mut from: impl AsyncBufRead + Unpin,
    to: mpsc::Sender<String>,
) {
    for line in early {
        let _ = to.send(line).await;
    }
    while let Ok(Some(line)) = line(&mut from, MAX_LOG_LINE_BYTES).await {
        let _ = to.send(line).await;
    }
}

/// A line of at most `limit` bytes without its end, whatever its encoding; `None` at the end.
async fn line(
    from: &mut (impl AsyncBufRead + Unpin),
    limit: u64,
) -> std::io::Result<Option<String>> {
    let mut bytes = Vec::new();
    from.take(limit).read_until(b'\n', &mut bytes).await?;
    let text = String::from_utf8_lossy(&bytes);
    Ok((!bytes.is_empty()).then(|| text.trim_end().to_owned()))
}
