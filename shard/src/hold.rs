//! A shard without a coordinator: keeps what it has for a successor, for as long as it may.
//!
//! The device leaves its epoch, weights and KV memory stay where they are. The shard dials the address it knows
//! until somebody answers there who has its coordinator's key, as only a successor on the same machine can.
//! Loads nothing and computes nothing by itself.
//!
//! Invariants: a shard serves one coordinator at a time, and none that is not later than the last one; it
//! ends when its time is over, when its coordinator left nothing for a successor, or when it is not wanted.

use crate::clock::unix_seconds;
use crate::session::{End, Session};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use topology::launch::child::{Lease, Parent};
use topology::launch::process::Watched;
use topology::launch::{Hold, Launch};
use topology::link::{Connected, Dialer, Identity, LinkError};
use topology::wire::{FromShard, Hello};

/// Pause between two tries to reach a successor.
const DIAL_EVERY: Duration = Duration::from_millis(200);
/// Longest time that one try may take to reach it; the next one is as good.
const DIAL_LIMIT: Duration = Duration::from_millis(500);
/// Longest time that a successor may take to say what it wants.
const GREET_LIMIT: Duration = Duration::from_secs(10);
/// How long the process may live after the last sign of life of its runtime, once its parent is gone.
const SERVING_LEASE: Duration = Duration::from_secs(30);
/// How often there is such a sign.
const RENEW_EVERY: Duration = Duration::from_secs(1);

/// Who this shard is, whomever it serves.
pub(crate) struct Seat {
    pub(crate) launch: Launch,
    pub(crate) identity: Identity,
    pub(crate) hello: Hello,
}

/// Serves the coordinator of `link`, and after it, if it is lost and this shard may wait, its successors.
///
/// # Errors
/// As [`Session::serve`]; and a sentence if nobody came, or one who does not want this shard.
pub(crate) async fn serve(
    mut session: Session,
    seat: &Seat,
    mut link: Connected,
    mut parent: Parent,
) -> Result<End> {
    let mut generation = link.generation;
    let mut ended = session.serve(link, parent.gone()).await?;
    let lease = parent.lease();
    loop {
        let End::Lost(why) = ended else {
            return Ok(ended);
        };
        let holds = session.held().and(seat.launch.hold.as_ref());
        let Some(hold) = holds else {
            bail!("{why}");
        };
        let notice = Notice::post(hold, &lease);
        let seconds = hold.seconds;
        tracing::warn!("{why}; weights are held for another coordinator for {seconds} s");
        if let Some(stuck) = session.leave().await? {
            return Ok(stuck);
        }
        link = tokio::select! {
            found = find(seat, hold, generation) => found?,
            failed = session.idle() => bail!("{:#}", failed.err().context("the device ended")?),
        };
        drop(notice);
        let held = session.held().context("what was loaded is gone")?;
        generation = link.generation;
        tracing::info!(generation, "another coordinator takes over");
        if let Err(error) = link.sender.send(&FromShard::Held(Box::new(held))).await {
            ended = End::Lost(format!("cannot greet the coordinator: {error}"));
            continue;
        }
        let pid = link.pid;
        ended = session.serve(link, gone(pid, &lease)).await?;
    }
}

/// Dials until a later coordinator than `last` has welcomed this shard.
async fn find(seat: &Seat, hold: &Hold, last: u32) -> Result<Connected> {
    let Launch {
        coordinator,
        certificate,
        ..
    } = &seat.launch;
    let until = Instant::now() + Duration::from_secs(hold.seconds.into());
    let dialer = Dialer::new(*coordinator, certificate, &seat.identity)?;
    while Instant::now() < until {
        if !hold.legacy.exists() {
            bail!("its coordinator left nothing for another one");
        }
        // An error says nothing: nobody is there yet, or a stranger has the address now.
        if let Ok(dialed) = dialer.dial(DIAL_LIMIT).await {
            match dialed.greet(seat.hello.clone(), GREET_LIMIT).await {
                Ok(link) if link.generation > last => return Ok(link),
                Ok(link) => {
                    let stale = link.generation;
                    tracing::warn!(
                        "a coordinator of the past (generation {stale}) was turned away"
                    );
                }
                // It froze again, or died.
                Err(LinkError::TimedOut(_)) => {}
                Err(error) => bail!("the coordinator does not want this shard any more: {error}"),
            }
        }
        sleep(DIAL_EVERY).await;
    }
    bail!("no coordinator came within {} s", hold.seconds)
}

/// Returns when the coordinator's process has ended. Shows that this process's own runtime works.
async fn gone(pid: u32, lease: &Lease) {
    // Where it cannot be watched, it is gone already, or the link will tell.
    let Ok(mut coordinator) = Watched::new(pid) else {
        return;
    };
    loop {
        lease.renew(SERVING_LEASE);
        if timeout(RENEW_EVERY, coordinator.ended()).await.is_ok() {
            return;
        }
    }
}

/// A file that says until when this shard waits; there while it does.
struct Notice(PathBuf);

impl Notice {
    fn post(hold: &Hold, lease: &Lease) -> Self {
        let seconds = u64::from(hold.seconds);
        lease.renew(Duration::from_secs(seconds));
        let path = hold.notice();
        // For `cluster status` alone; nothing else depends on it.
        let _ = fs::write(&path, (unix_seconds() + seconds).to_string());
        Self(path)
    }
}

impl Drop for Notice {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
