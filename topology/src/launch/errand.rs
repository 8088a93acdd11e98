//! A short-lived process that answers questions, here or behind `ssh`.
//!
//! A question is a line to its standard input, an answer a line of its standard output; it ends when this value
//! is dropped. Secrets, such as a group's identity, cross only these pipes. Invariant: every answer comes
//! within its deadline, or the errand has failed.

use super::local::spawn;
use super::{LaunchError, to_line, within};
use crate::examine::{Answer, Question};
use std::ffi::OsStr;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::time::timeout;

/// Longest answer in bytes: the digests of thousands of files fit.
const MAX_ANSWER_BYTES: u64 = 4 << 20;

/// Most lines before an answer: what a login shell or a library may print.
const MAX_NOISE_LINES: usize = 100;

/// Longest wait for what a process wrote that ended, and the most of it that is shown.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);
const MAX_LAST_WORDS: u64 = 2 << 10;

/// A process that answers.
#[derive(Debug)]
pub struct Errand {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Errand {
    /// Starts `program arguments…`.
    ///
    /// # Errors
    /// [`LaunchError`] if it does not start.
    pub fn start<A: AsRef<OsStr>>(
        program: &OsStr,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Self, LaunchError> {
        let mut child = spawn(program, arguments, &[])?;
        let missing = || LaunchError::Io("the child's pipes are missing".to_owned());
        Ok(Self {
            stdin: child.stdin.take().ok_or_else(missing)?,
            stdout: BufReader::new(child.stdout.take().ok_or_else(missing)?),
            child,
        })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// [`LaunchError`] with what the process wrote, if it ended or says something else.
    pub async fn ask(
        &mut self,
        question: &Question,
        limit: Duration,
    ) -> Result<Answer, LaunchError> {
        self.ask_and_watch(question, limit, &|_, _| {}).await
    }

    /// Asks, and hears of the work until the answer comes: bytes that were read, of so many. `limit` is how
    /// long it may say nothing.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub async fn ask_and_watch(
        &mut self,
        question: &Question,
        limit: Duration,
        tell: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Answer, LaunchError> {
        let line = to_line(question)?;
        let what = "an answer from the node";
        let mut said = within(limit, what, async {
            let written = self.stdin.write_all(&line).await;
            written.map_err(|e| LaunchError::Io(format!("it does not listen: {e}")))?;
            self.answer().await
        })
        .await;
        loop {
            match said {
                Ok(Answer::Reading { done, total }) => {
                    tell(done, total);
                    said = within(limit, what, self.answer()).await;
                }
                Ok(answer) => return Ok(answer),
                Err(error) => return Err(self.with_last_words(error).await),
            }
        }
    }

    async fn answer(&mut self) -> Result<Answer, LaunchError> {
        for _ in 0..MAX_NOISE_LINES {
            let mut line = Vec::new();
            let read = (&mut self.stdout).take(MAX_ANSWER_BYTES);
            let read = { read }.read_until(b'\n', &mut line).await;
            read.map_err(|e| LaunchError::Io(format!("cannot read its answer: {e}")))?;
            if line.is_empty() {
                let reason = "it ended without an answer".to_owned();
                return Err(LaunchError::Handshake(reason));
            }
            if let Ok(answer) = serde_json::from_slice(&line) {
                return Ok(answer);
            }
        }
        let reason = format!("no answer in {MAX_NOISE_LINES} lines");
        Err(LaunchError::Handshake(reason))
    }

    async fn with_last_words(&mut self, error: LaunchError) -> LaunchError {
        // It may have ended already.
        let _ = self.child.start_kill();
        let mut text = Vec::new();
        if let Some(stderr) = self.child.stderr.take() {
            // What came until then is what there is to show.
            let mut stderr = stderr.take(MAX_LAST_WORDS);
            let _ = timeout(LAST_WORDS_LIMIT, stderr.read_to_end(&mut text)).await;
        }
        match String::from_utf8_lossy(&text).trim() {
            "" => error,
            words => error.with_words(words),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(script: &str) -> Result<Answer, String> {
        let mut errand = Errand::start("sh".as_ref(), ["-c", script]).unwrap();
        let limit = Duration::from_secs(2);
        let answer = errand.ask(&Question::Clock, limit).await;
        answer.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn noise_before_an_answer_is_passed_over_and_silence_ends() {
        let script = "read question; echo welcome; echo '{\"Clock\":7}'";
        assert_eq!(ask(script).await, Ok(Answer::Clock(7)));
        let script = "read question; for i in 1 2 3; do sleep 0.8; \
                      echo '{\"Reading\":{\"done\":'$i',\"total\":3}}'; done; echo '{\"Clock\":7}'";
        let heard = std::sync::Mutex::new(Vec::new());
        let mut errand = Errand::start("sh".as_ref(), ["-c", script]).unwrap();
        let tell = |done, total| heard.lock().unwrap().push((done, total));
        // Longer than the limit, but never silent for as long.
        let limit = Duration::from_secs(2);
        let answer = errand.ask_and_watch(&Question::Clock, limit, &tell).await;
        assert_eq!(answer.unwrap(), Answer::Clock(7));
        assert_eq!(heard.into_inner().unwrap(), [(1, 3), (2, 3), (3, 3)]);
        let failed = ask("echo broken >&2; exit 1").await.unwrap_err();
        assert!(failed.contains("broken"), "{failed}");
        let late = ask("exec sleep 60").await.unwrap_err();
        assert!(late.contains("longer than 2s"), "{late}");
        let missing = Errand::start("/no/such".as_ref(), [""; 0]).unwrap_err();
        assert!(missing.to_string().contains("/no/such"));
    }
}
