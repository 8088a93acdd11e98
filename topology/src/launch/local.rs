//! Shard processes of this host.

use super::{Announcement, Launch, LaunchError, MAX_LINE_BYTES, from_line, to_line, within};
use crate::link::Certificate;
use std::ffi::OsStr;
use std::process::{ExitStatus, Stdio};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;

/// Lines that may wait for whoever reads them; the child's pipe fills after that, and nothing is lost.
const MAX_LINES: usize = 256;

/// Longest log line in bytes that is kept whole; the rest becomes lines of its own.
const MAX_LOG_LINE_BYTES: u64 = 16 << 10;

/// A shard process that has said who it is and does not know yet what to do.
#[derive(Debug)]
pub struct Started {
    /// The public half of its key.
    pub certificate: Certificate,
    process: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

/// A shard process at work. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    process: Child,
    /// Open for as long as the shard is to live.
    stdin: Option<ChildStdin>,
    /// What it prints, line by line. Taken once by whoever forwards it.
    pub lines: Option<mpsc::Receiver<String>>,
}

/// Starts `program arguments…` and waits for its announcement.
///
/// # Errors
/// [`LaunchError`] if it does not start or does not announce itself in time.
pub async fn start<A: AsRef<OsStr>>(
    program: &OsStr,
    arguments: impl IntoIterator<Item = A>,
) -> Result<Started, LaunchError> {
    let mut process = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A group of its own: Ctrl-C in a terminal reaches the coordinator alone, which then drains.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| LaunchError::Io(format!("cannot start {}: {e}", program.display())))?;
    let missing = || LaunchError::Io("the child's pipes are missing".into());
    let stdin = process.stdin.take().ok_or_else(missing)?;
    let mut stdout = BufReader::new(process.stdout.take().ok_or_else(missing)?);
    let announcement = within("waiting for the shard to announce itself", async {
        let mut line = String::new();
        let reading = (&mut stdout)
            .take(MAX_LINE_BYTES)
            .read_line(&mut line)
            .await;
        reading.map_err(|e| LaunchError::Io(format!("cannot read from the shard: {e}")))?;
        from_line::<Announcement>(&line, "the shard")
    });
    match announcement.await {
        Ok(Announcement { certificate }) => Ok(Started {
            certificate,
            process,
            stdin,
            stdout,
        }),
        Err(error) => Err(with_last_words(error, &mut process).await),
    }
}

/// What the failed child wrote to its standard error says more than its silence.
async fn with_last_words(error: LaunchError, process: &mut Child) -> LaunchError {
    let _ = process.start_kill(); // it may have ended already
    let mut words = String::new();
    if let Some(stderr) = process.stderr.take() {
        let _ = stderr
            .take(MAX_LOG_LINE_BYTES)
            .read_to_string(&mut words)
            .await;
    }
    match words.trim() {
        "" => error,
        words => LaunchError::Handshake(format!("{error}; it wrote: {words}")),
    }
}

impl Started {
    /// Tells it what to do.
    ///
    /// # Errors
    /// [`LaunchError`] if it does not take the line.
    pub async fn launch(mut self, launch: &Launch) -> Result<Process, LaunchError> {
        let line = to_line(launch)?;
        within("telling the shard what to do", async {
            let written = self.stdin.write_all(&line).await;
            written.map_err(|e| LaunchError::Io(format!("the shard does not listen: {e}")))
        })
        .await?;
        let (sender, lines) = mpsc::channel(MAX_LINES);
        if let Some(stderr) = self.process.stderr.take() {
            tokio::spawn(forward(BufReader::new(stderr), sender.clone()));
        }
        tokio::spawn(forward(self.stdout, sender));
        Ok(Process {
            process: self.process,
            stdin: Some(self.stdin),
            lines: Some(lines),
        })
    }
}

impl Process {
    /// Its process id, while it has not been waited for.
    pub fn pid(&self) -> Option<u32> {
        self.process.id()
    }

    /// Waits until it has ended. Cancel-safe. Has no deadline: it is what a deadline is raced against.
    ///
    /// # Errors
    /// [`LaunchError::Io`] if the system cannot say.
    pub async fn wait(&mut self) -> Result<ExitStatus, LaunchError> {
        let waited = wait(&mut self.process).await;
        waited.map_err(|e| LaunchError::Io(format!("cannot wait for the shard: {e}")))
    }

    /// Asks it to end, by closing its standard input.
    pub fn hang_up(&mut self) {
        self.stdin = None;
    }

    /// Ends it now.
    pub fn kill(&mut self) {
        let _ = self.process.start_kill(); // it may have ended already
    }
}

/// `Child::wait` closes standard input first, which would end the shard; this does not.
async fn wait(process: &mut Child) -> std::io::Result<ExitStatus> {
    debug_assert!(
        process.stdin.is_none(),
        "the pipe was taken out at the start"
    );
    process.wait().await
}

/// Hands on every line. Whoever does not read makes the child wait, which loses nothing; once the reader
/// has gone for good, the child's output is drained and dropped, so that it does not block on it.
async fn forward(mut from: impl AsyncRead + AsyncBufReadExt + Unpin, to: mpsc::Sender<String>) {
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut from)
            .take(MAX_LOG_LINE_BYTES)
            .read_until(b'\n', &mut line)
            .await
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                let _ = to.send(text).await;
            }
        }
    }
}
