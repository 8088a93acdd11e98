//! A `cluster up` of this same binary, for as long as a benchmark needs it.
//!
//! It is started on a free port of the loopback and asked over HTTP like any other server. Invariant: it does
//! not outlive the value, and every wait for it has a deadline.

use crate::client::Client;
use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStderr, Command};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

/// Longest start: weights of any size that is benched this way, from a slow disk.
const READY_DEADLINE: Duration = Duration::from_secs(900);
/// What running requests get at the end, and then some.
const STOP_DEADLINE: Duration = Duration::from_secs(40);
/// How often it is asked whether it is there yet: the resolution of what is reported.
const POLL: Duration = Duration::from_millis(1);
/// Lines of its messages that are kept for the case that it fails.
const KEPT_LINES: usize = 20;

/// A cluster that was started here.
#[derive(Debug)]
pub(crate) struct Launched {
    child: Child,
    said: JoinHandle<VecDeque<String>>,
    /// Port on 127.0.0.1.
    pub(crate) port: u16,
    /// Moment of the start.
    pub(crate) began: Instant,
    /// From the start to the first connection it took.
    pub(crate) listening: Duration,
    /// From the start to being ready.
    pub(crate) ready: Duration,
}

impl Launched {
    /// Starts `program up FLAGS` and waits until it is ready.
    ///
    /// # Errors
    /// If it cannot be started, ends, or is not ready in time, with what it said last.
    pub(crate) async fn start(
        program: &Path,
        flags: &[OsString],
        key: Option<&str>,
    ) -> anyhow::Result<Self> {
        ensure!(
            value_of(flags, "--port").is_none(),
            "leave out --port behind --: the benchmark takes a free one"
        );
        let port = free_port().await?;
        let client = Client::new(&format!("http://127.0.0.1:{port}"), key)?;
        let began = Instant::now();
        let mut child = Command::new(program)
            .arg("up")
            .args(flags)
            .args(["--host", "127.0.0.1", "--port", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let stderr = child.stderr.take().context("read what the cluster says")?;
        let mut launched = Self {
            child,
            said: tokio::spawn(last_lines(stderr)),
            port,
            began,
            listening: Duration::ZERO,
            ready: Duration::ZERO,
        };
        match timeout(READY_DEADLINE, launched.wait(&client)).await {
            Ok(Ok(())) => Ok(launched),
            Ok(Err(error)) => Err(launched.why(error).await),
            Err(_) => {
                let late = READY_DEADLINE.as_secs();
                Err(launched
                    .why(anyhow::anyhow!("the cluster is not ready after {late} s"))
                    .await)
            }
        }
    }

    async fn wait(&mut self, client: &Client) -> anyhow::Result<()> {
        while TcpStream::connect(("127.0.0.1", self.port)).await.is_err() {
            self.check()?;
            sleep(POLL).await;
        }
        self.listening = self.began.elapsed();
        while !client.is_ready().await? {
            self.check()?;
            sleep(POLL).await;
        }
        self.ready = self.began.elapsed();
        Ok(())
    }

    fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait().context("look after the cluster")? {
            Some(status) => bail!("the cluster ended before it was ready ({status})"),
            None => Ok(()),
        }
    }

    /// The error with what the cluster said last.
    async fn why(mut self, error: anyhow::Error) -> anyhow::Error {
        // It may have ended already; its output ends with it.
        let _ = self.child.kill().await;
        let said = self.said.await.unwrap_or_default();
        let said: Vec<String> = said.into();
        error.context(format!("the cluster said last:\n{}", said.join("\n")))
    }

    /// Asks it to end and waits for that.
    ///
    /// # Errors
    /// If it had to be killed.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok());
        if let Some(pid) = pid.and_then(Pid::from_raw) {
            // Where it has ended by itself there is nobody to ask.
            let _ = kill_process(pid, Signal::TERM);
        }
        if timeout(STOP_DEADLINE, self.child.wait()).await.is_err() {
            self.child.kill().await.context("kill the cluster")?;
            bail!(
                "the cluster did not end within {} s",
                STOP_DEADLINE.as_secs()
            );
        }
        Ok(())
    }
}

/// The value of a flag among others, as `--flag VALUE` or `--flag=VALUE`.
pub(crate) fn value_of<'a>(flags: &'a [OsString], name: &str) -> Option<&'a OsStr> {
    let joined = format!("{name}=");
    flags.iter().enumerate().find_map(|(index, flag)| {
        if flag == name {
            return Some(
                flags
                    .get(index + 1)
                    .map_or(OsStr::new(""), OsString::as_os_str),
            );
        }
        flag.to_str()?.strip_prefix(&joined).map(OsStr::new)
    })
}

async fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").await;
    let listener = listener.context("take a free port")?;
    Ok(listener.local_addr().context("take a free port")?.port())
}

async fn last_lines(stderr: ChildStderr) -> VecDeque<String> {
    let mut lines = BufReader::new(stderr).lines();
    let mut kept = VecDeque::with_capacity(KEPT_LINES);
    while let Ok(Some(line)) = lines.next_line().await {
        if kept.len() == KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(line);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_found_in_both_spellings() {
        let flags: Vec<OsString> = ["--cpus", "2", "--model=/m", "--port"]
            .map(OsString::from)
            .to_vec();
        assert_eq!(value_of(&flags, "--cpus"), Some(OsStr::new("2")));
        assert_eq!(value_of(&flags, "--model"), Some(OsStr::new("/m")));
        assert_eq!(value_of(&flags, "--port"), Some(OsStr::new("")));
        assert_eq!(value_of(&flags, "--mod"), None);
    }

    #[tokio::test]
    async fn a_program_that_ends_is_quoted() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("cluster");
        std::fs::write(
            &script,
            "#!/bin/sh\necho \"no such flag: $2\" >&2\nexit 2\n",
        )
        .unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&script, mode).unwrap();
        let start = async |flag: &str| {
            let flags = [flag.into()];
            let error = Launched::start(&script, &flags, None).await.unwrap_err();
            format!("{error:#}")
        };
        let said = start("--wrong").await;
        assert!(
            said.contains("no such flag: --wrong") && said.contains("exit status: 2"),
            "{said}"
        );
        assert!(start("--port=1").await.contains("leave out --port"));
    }
}
