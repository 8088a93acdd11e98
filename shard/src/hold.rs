//! A shard without a coordinator: keeps what it has for a successor, for as long as it may.
//!
//! The device leaves its epoch, weights and KV memory stay where they are. The shard dials the address it knows
//! until somebody answers there who has its coordinator's key, as only a successor on the coordinator's machine can.
//! Loads nothing and computes nothing by itself. On another host it is the same, but for what only the coordinator's
//! own shows: its process, and what it left there.
//!
//! Lines go where somebody may read them: through the pipe as long as the parent has it open, then to the file.
//!
//! Invariants: a shard serves one coordinator at a time, and none that is not later than the last one; it
//! ends when its time is over, when its coordinator said so or left nothing for a successor, or when it is not wanted.

use crate::clock::unix_seconds;
use crate::log;
use crate::session::{End, Session};
use anyhow::{Context, Result, bail};
use std::fs;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use topology::launch::child::{Gone, Lease, Parent};
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
    session: Session,
    seat: &Seat,
    link: Connected,
    parent: Parent,
) -> Result<End> {
    let ended = serve_all(session, seat, link, parent).await;
    if let Some(hold) = &seat.launch.hold
        && hold.is_unattended()
    {
        // Nobody will come to read it.
        log::close();
        hold.forget();
    }
    ended
}

async fn serve_all(
    mut session: Session,
    seat: &Seat,
    mut link: Connected,
    mut parent: Parent,
) -> Result<End> {
    let mut generation = link.generation;
    let lost = || End::Lost("the coordinator's process is gone".to_owned());
    let parent_gone = async {
        match parent.gone().await {
            Gone::Farewell => End::Stopped,
            Gone::Lost => lost(),
        }
    };
    let mut ended = session.serve(link, parent_gone).await?;
    let lease = parent.lease();
    loop {
        let End::Lost(why) = ended else {
            return Ok(ended);
        };
        let holds = session.held().and(seat.launch.hold.as_ref());
        let Some(hold) = holds else {
            bail!("{why}");
        };
        // On another host a parent may still read its pipe, and nobody that file.
        if hold.legacy.is_some() || parent.is_lost() {
            log::detach(&hold.log);
        }
        let notice = Notice::post(hold, &lease);
        let seconds = hold.seconds;
        tracing::warn!("{why}; weights are held for another coordinator for {seconds} s");
        let finding = find(seat, hold, generation);
        let found = wait(&mut session, (&mut parent, hold), finding).await;
        drop(notice);
        link = match found? {
            Ok(link) => link,
            Err(end) => return Ok(end),
        };
        let held = session.held().context("what was loaded is gone")?;
        generation = link.generation;
        log::detach(&hold.log);
        tracing::info!(generation, "another coordinator takes over");
        if let Err(error) = link.sender.send(&FromShard::Held(Box::new(held))).await {
            ended = End::Lost(format!("cannot greet the coordinator: {error}"));
            continue;
        }
        // Elsewhere the coordinator's process has another's number.
        let pid = hold.legacy.is_some().then_some(link.pid);
        let process_gone = async {
            gone(pid, &lease).await;
            lost()
        };
        ended = session.serve(link, process_gone).await?;
    }
}

/// Has the device leave its epoch, and waits for a coordinator to be found; or says how the wait ended.
async fn wait(
    session: &mut Session,
    (parent, hold): (&mut Parent, &Hold),
    find: impl Future<Output = Result<Connected>>,
) -> Result<Result<Connected, End>> {
    if let Some(stuck) = session.leave().await? {
        return Ok(Err(stuck));
    }
    tokio::select! {
        found = find => found.map(Ok),
        () = farewell(parent, &hold.log) => Ok(Err(End::Stopped)),
        failed = session.idle() => bail!("{:#}", failed.err().context("the device ended")?),
    }
}

/// Returns when the parent has said farewell. Where it is gone without, lines go to `file` from then on.
async fn farewell(parent: &mut Parent, file: &Path) {
    if parent.gone().await == Gone::Lost {
        log::detach(file);
        pending::<()>().await;
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
        if hold.legacy.as_ref().is_some_and(|legacy| !legacy.exists()) {
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

/// Returns when the coordinator's process has ended; of one on another host only the link can tell. Shows that this
/// process's own runtime works.
async fn gone(pid: Option<u32>, lease: &Lease) {
    // Where it cannot be watched, it is gone already.
    let Ok(mut coordinator) = pid.map(Watched::new).transpose() else {
        return;
    };
    loop {
        lease.renew(SERVING_LEASE);
        let ended = async {
            match &mut coordinator {
                Some(coordinator) => coordinator.ended().await,
                None => pending().await,
            }
        };
        if timeout(RENEW_EVERY, ended).await.is_ok() {
            return;
        }
    }
}

/// A file that says until when this shard waits; there while it does.
struct Notice(Option<PathBuf>);

impl Notice {
    fn post(hold: &Hold, lease: &Lease) -> Self {
        let seconds = u64::from(hold.seconds);
        lease.renew(Duration::from_secs(seconds));
        let path = hold.notice();
        if let Some(path) = &path {
            // For `cluster status` alone; nothing else depends on it.
            let _ = fs::write(path, (unix_seconds() + seconds).to_string());
        }
        Self(path)
    }
}

impl Drop for Notice {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}
