//! The shard's side of a launch.
//!
//! One thread reads standard input for as long as the process lives: the first line says what to do, another
//! one to end, the end of it that the parent is gone. Invariant: no shard outlives its parent, or the last
//! [`Lease`] it was given after that, by more than [`ORPHAN_LIMIT`], whatever its other threads are stuck in; none
//! that was told to end outlives that by more.

use super::process::ProcessId;
use super::{Announcement, LAUNCH_LIMIT, Launch, LaunchError, MAX_LINE_BYTES};
use super::{from_line, read_farewell, to_line, within};
use crate::link::Identity;
use std::io::{self, BufRead, Read, Write};
use std::process;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How long after its parent a shard may live: time to drop what other processes might see.
pub const ORPHAN_LIMIT: Duration = Duration::from_secs(5);

/// Exit status of a shard that had to be ended that way.
const EXIT_ORPHANED: i32 = 4;

/// The parent, as seen from here.
#[derive(Debug)]
pub struct Parent {
    /// The reader drops its end where the pipe closed without a word.
    farewell: oneshot::Receiver<()>,
    /// What came of it, once something has.
    gone: Option<Gone>,
    lease: Lease,
}

/// How a shard lost its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// It said that the shard is to end, which is ended if it has not within [`ORPHAN_LIMIT`].
    Farewell,
    /// The pipe closed: the shard must exit, and is ended if it has not within [`ORPHAN_LIMIT`], unless its lease
    /// is renewed.
    Lost,
}

impl Parent {
    /// Returns when the parent has said farewell, has closed the pipe or is gone. Cancel-safe.
    pub async fn gone(&mut self) -> Gone {
        if self.gone.is_none() {
            let said = (&mut self.farewell).await;
            self.gone = Some(said.map_or(Gone::Lost, |()| Gone::Farewell));
        }
        self.gone.unwrap_or(Gone::Lost)
    }

    /// Whether it is known to be gone without a farewell.
    pub fn is_lost(&self) -> bool {
        self.gone == Some(Gone::Lost)
    }

    /// What keeps the process alive without its parent.
    pub fn lease(&self) -> Lease {
        self.lease.clone()
    }
}

/// Until when this process may live without its parent.
#[derive(Clone, Debug)]
pub struct Lease(Arc<Mutex<Instant>>);

impl Lease {
    /// It may for so long from now, and [`ORPHAN_LIMIT`] for its end. What was granted before stays.
    pub fn renew(&self, time: Duration) {
        let mut until = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *until = (*until).max(Instant::now() + time);
    }

    fn left(&self) -> Duration {
        let until = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (*until + ORPHAN_LIMIT).saturating_duration_since(Instant::now())
    }

    /// Ends the process when the lease is over.
    fn enforce(&self) -> ! {
        loop {
            match self.left() {
                Duration::ZERO => process::exit(EXIT_ORPHANED),
                left => thread::sleep(left),
            }
        }
    }
}

/// Makes this process's key, shows its public half on standard output, and reads what to do from
/// standard input.
///
/// # Errors
/// [`LaunchError`] if the parent does not answer in time, or not with a [`Launch`].
pub async fn announce() -> Result<(Launch, Identity, Parent), LaunchError> {
    let identity = Identity::generate().map_err(|e| LaunchError::Io(e.to_string()))?;
    let io = |e: io::Error| LaunchError::Io(format!("cannot talk to the parent process: {e}"));
    let line = to_line(&Announcement {
        certificate: identity.certificate().clone(),
        process: ProcessId::own().map_err(io)?,
    })?;
    let mut stdout = io::stdout().lock();
    stdout.write_all(&line).map_err(io)?;
    stdout.flush().map_err(io)?;
    drop(stdout);

    let (first, said) = oneshot::channel();
    let (alive, farewell) = oneshot::channel::<()>();
    let lease = Lease(Arc::new(Mutex::new(Instant::now())));
    let over = lease.clone();
    // A thread and not a task: a read of standard input cannot be cancelled, and this one must
    // work on when the runtime does not.
    let reader = thread::Builder::new()
        .name("parent".to_owned())
        .spawn(move || {
            let mut stdin = io::stdin().lock();
            let mut line = String::new();
            let read = (&mut stdin).take(MAX_LINE_BYTES).read_line(&mut line);
            // Where nobody waits for the line any more, the process is ending.
            let _ = first.send(read.map(|_| line));
            if read_farewell(stdin) {
                let _ = alive.send(());
                thread::sleep(ORPHAN_LIMIT);
                process::exit(EXIT_ORPHANED);
            }
            drop(alive);
            over.renew(Duration::ZERO);
            over.enforce()
        });
    reader.map_err(io)?;
    let launch = within(
        LAUNCH_LIMIT,
        "waiting for the parent to say what to do",
        async {
            let line = said
                .await
                .map_err(|_| LaunchError::Io("the reader ended".to_owned()))?;
            from_line::<Launch>(&line.map_err(io)?, "the parent")
        },
    );
    let parent = Parent {
        farewell,
        gone: None,
        lease,
    };
    Ok((launch.await?, identity, parent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_never_shortened() {
        let lease = Lease(Arc::new(Mutex::new(Instant::now())));
        assert!(lease.left() <= ORPHAN_LIMIT);
        lease.renew(Duration::from_secs(60));
        lease.renew(Duration::ZERO);
        let left = lease.left();
        assert!(left > Duration::from_secs(60) && left <= Duration::from_secs(60) + ORPHAN_LIMIT);
    }
}
