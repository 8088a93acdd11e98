//! Who asks the process to end: signals, and the operator over the admin socket.
//!
//! Waits and tells; what the end looks like is `up`'s business. Invariant: a wish that came before anyone
//! waited for it is not lost.

use crate::admin::server::Asked;
use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// Ctrl-C, SIGTERM, the end of the terminal, and `cluster down`.
#[derive(Debug)]
pub(super) struct Signals {
    /// Wishes that came over the admin socket.
    asked: watch::Receiver<Asked>,
    interrupt: Signal,
    terminate: Signal,
    /// Under `nohup` the cluster is to outlive its terminal.
    hangup: Option<Signal>,
}

impl Signals {
    /// Listens from now on; also to what the operator asks for.
    pub(super) fn new(asked: watch::Receiver<Asked>) -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        let hangup = !hangup_is_ignored();
        Ok(Self {
            asked,
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: hangup.then(|| listen(SignalKind::hangup())).transpose()?,
        })
    }

    /// A signal that asks for the end.
    pub(super) async fn next(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = hangup => {}
            () = asked_for(&mut self.asked, Asked::Drain) => {}
        }
    }

    /// A signal that somebody sends who does not want to wait: one terminal hangs up several times.
    pub(super) async fn urgent(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            () = asked_for(&mut self.asked, Asked::Now) => {}
        }
    }
}

/// Waits until at least that was asked for; for ever where nobody can ask any more.
async fn asked_for(asked: &mut watch::Receiver<Asked>, least: Asked) {
    if asked.wait_for(|asked| *asked >= least).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // Signal 1 is the lowest bit.
    mask.is_some_and(|mask| mask & 1 != 0)
}
